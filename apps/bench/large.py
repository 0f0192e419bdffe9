"""SD 1.5's shapes at 512 x 512 with random weights, here and in its peers: a step takes as long whatever they are.

Each row is a process that loads, draws, and says how long each step and the decoder took and how much memory it had.
Most of ours are timed over the whole picture; the steps of peers are all alike, so 20 times the median is theirs.
"""

from __future__ import annotations

import json
import shutil
import statistics
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from .process import measured
from .report import Column, Table, gibibytes, seconds

SIDE, STEPS, GUIDANCE = 512, 20, 7.5
PROMPT = "a red apple, glossy style"
# Steps that are run where all steps are alike.
FEW = 4

OURS = """
from edge_sd import Pipeline, Request
marks, started = [], time.perf_counter()
with Pipeline.open(MODEL, "cpu", VARIANT, low_memory=LOW) as pipeline:
    request = Request(PROMPT, seed=0, steps=STEPS, width=SIDE, height=SIDE, **{"guidance": GUIDANCE, **CHANGES})
    settings = pipeline.resolve(request)
    pipeline.prepare(settings)
    load = time.perf_counter() - started
    marks.append(time.perf_counter())
    for step in pipeline.steps(request):
        marks.append(time.perf_counter())
    pipeline.decode(step.latents, settings.decoder)
    marks.append(time.perf_counter())
"""
GENAI = """
import openvino_genai
marks, started = [], time.perf_counter()
pipeline = openvino_genai.Text2ImagePipeline(MODEL, "CPU")
load = time.perf_counter() - started
def mark(step, steps, latents):
    marks.append(time.perf_counter())
    return False
pipeline.generate(PROMPT, num_inference_steps=STEPS, guidance_scale=GUIDANCE, width=SIDE, height=SIDE, callback=mark)
marks.append(time.perf_counter())
"""
OPTIMUM = """
from optimum.intel import OVStableDiffusionPipeline
marks, started = [], time.perf_counter()
pipeline = OVStableDiffusionPipeline.from_pretrained(MODEL, device="CPU")
load = time.perf_counter() - started
def mark(pipeline, step, t, values):
    marks.append(time.perf_counter())
    return values
pipeline.set_progress_bar_config(disable=True)
pipeline(PROMPT, num_inference_steps=STEPS, guidance_scale=GUIDANCE, width=SIDE, height=SIDE, callback_on_step_end=mark)
marks.append(time.perf_counter())
"""
TELL = """
print(json.dumps({"load": load, "marks": marks, "peak": peak_memory()}))
"""


@dataclass
class Row:
    """One program, and for each run seconds of a step, of the decoder, of a picture, of loading; bytes of memory."""

    name: str
    script: str
    model: Path
    values: dict[str, Any] = field(default_factory=dict)
    steps: int = STEPS
    alike: bool = False
    step: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    picture: list[float] = field(default_factory=list)
    load: list[float] = field(default_factory=list)
    peak: list[float] = field(default_factory=list)

    def run(self) -> None:
        found = measured(
            self.name, self.script + TELL, MODEL=str(self.model), PROMPT=PROMPT, SIDE=SIDE, STEPS=self.steps,
            GUIDANCE=GUIDANCE, **self.values,
        )  # fmt: skip
        marks = found["marks"]
        # Peers mark a step's end only: their first step is not counted. With low memory it is what loads the UNet.
        seconds = [after - before for before, after in pairwise(marks)]
        steps, decode = seconds[:-1], seconds[-1]
        self.step.append(statistics.median(steps))
        self.decode.append(decode)
        whole = statistics.median(steps) * STEPS if self.alike else sum(steps)
        self.picture.append(whole + decode)
        self.load.append(found["load"])
        self.peak.append(found["peak"])


def measure(home: Path, rounds: int) -> list[Row]:
    """Peers first, then the presets; `home` keeps the model (6 GB), so that it is made once."""
    from edge_sd.pipeline.presets import PRESETS

    bundle = make_bundle(home)
    peers = bundle / "openvino-fp16"

    def ours(name: str, variant: str, steps: int = STEPS, low: bool = False, **more: Any) -> Row:
        changes = {**PRESETS[name.split(",")[0]].changes, **more}
        return Row(f"edge-sd, {name}", OURS, bundle, {"VARIANT": variant, "CHANGES": changes, "LOW": low}, steps, low)

    rows = [
        Row("openvino.genai", GENAI, peers, steps=FEW, alike=True),
        Row("optimum-intel", OPTIMUM, peers, steps=FEW, alike=True),
        ours("exact", "openvino-fp16"),
        ours("balanced", "openvino-w8a8"),
        ours("fast", "openvino-w8a8"),
        # A few-step model needs no guidance; its weights are of the same shapes.
        ours("turbo", "openvino-w8a8", 4, guidance=1.0),
        ours("balanced, --low-memory", "openvino-w8a8", FEW, low=True),
    ]
    for _ in range(rounds):
        for row in rows:
            row.run()
    return rows


def table(rows: list[Row]) -> Table:
    """The ratio is to the faster of the peers."""
    best = [min(pair) for pair in zip(*(row.picture for row in rows if row.script is not OURS), strict=True)]
    columns = (
        Column("program", "SD 1.5's shapes, 512 x 512"),
        Column("step", "step", seconds(2)),
        Column("decode", "decode", seconds(1)),
        Column("picture", "picture", seconds(0)),
        Column("faster", "times faster", lambda value: f"{value:.2f}"),
        Column("load", "load", seconds(0)),
        Column("peak", "peak memory", gibibytes(2)),
    )
    found = [
        {
            "program": row.name,
            **{name: statistics.median(getattr(row, name)) for name in ("step", "decode", "picture", "load", "peak")},
            "faster": statistics.median(a / b for a, b in zip(best, row.picture, strict=True)),
        }
        for row in rows
    ]
    return Table("large", columns, found)


def make_bundle(home: Path) -> Path:
    """The model with random weights, as fp16 and W8A8, kept from an earlier run where it exists."""
    from edge_sd.converters.build import build
    from edge_sd.converters.recipes import RECIPES

    source, bundle = ready_source(home), home / "bundle"
    for name in ("fp16", "w8a8"):
        if not (bundle / f"openvino-{name}").is_dir():
            build(source, bundle, "openvino", RECIPES[name], lambda what, share: None)
    return bundle


def ready_source(home: Path) -> Path:
    """The diffusers folder, made once."""
    source = home / "source"
    if not (source / "model_index.json").is_file():
        make_source(source)
    return source


def make_source(folder: Path) -> None:
    """A diffusers folder of SD 1.5's configs; the tokenizer is the embedded model's, whose ids lie within its table."""
    import torch
    from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from edge_sd.paths import embedded_models

    torch.manual_seed(0)
    shutil.rmtree(folder, ignore_errors=True)
    UNet2DConditionModel(sample_size=64, cross_attention_dim=768).half().save_pretrained(folder / "unet")
    AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    ).half().save_pretrained(folder / "vae")  # fmt: skip
    # TAESD's configuration is the default.
    AutoencoderTiny().half().save_pretrained(folder / "vae_tiny")
    config = CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        max_position_embeddings=77, hidden_act="quick_gelu", projection_dim=768,
    )  # fmt: skip
    CLIPTextModel(config).half().save_pretrained(folder / "text_encoder")
    DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    ).save_pretrained(folder / "scheduler")  # fmt: skip
    emoji = embedded_models() / "emoji"
    shutil.copytree(emoji / "tokenizer", folder / "tokenizer")
    index = json.loads((emoji / "model_index.json").read_text("utf-8"))
    (folder / "model_index.json").write_text(json.dumps(index), "utf-8")
