"""The embedded model here and in its peers on the same weights, in one run, interleaved, medians.

Each row is a process of its own. It draws a picture, timed from the start of the process to the PNG on disk, and then
another, timed in the loaded program. The ratio columns hold on a busy machine,
where the seconds do not. Peak memory is the largest resident set up to the first PNG.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from .process import measured
from .report import Column, Table, beside, seconds

PROMPT = "a red apple, glossy style"
STEPS, GUIDANCE, SEED = 20, 4.0, 7

OURS = """
from edge_sd import Pipeline, Request
pipeline = Pipeline.open(MODEL)
def draw():
    request = Request(PROMPT, seed=SEED, steps=STEPS, guidance=GUIDANCE, width=128, height=128)
    return pipeline.generate(request).pictures[0]
"""
GENAI = """
import openvino_genai
from PIL import Image
pipeline = openvino_genai.Text2ImagePipeline(MODEL, "CPU", **OPTIONS)
def draw():
    image = pipeline.generate(PROMPT, num_inference_steps=STEPS, guidance_scale=GUIDANCE, width=128, height=128,
                              generator=openvino_genai.TorchGenerator(SEED))
    return Image.fromarray(image.data[0])
"""
DIFFUSERS = """
import torch
from diffusers import StableDiffusionPipeline
pipeline = StableDiffusionPipeline.from_pretrained(MODEL, torch_dtype=torch.float32)
pipeline.set_progress_bar_config(disable=True)
def draw():
    return pipeline(PROMPT, num_inference_steps=STEPS, guidance_scale=GUIDANCE, width=128, height=128,
                    generator=torch.Generator().manual_seed(SEED)).images[0]
"""
MEASURE = """
draw().save(OUTPUT)
first = time.time()
peak = peak_memory()
started = time.perf_counter()
draw()
print(json.dumps({"first": first, "second": time.perf_counter() - started, "peak": peak}))
"""


@dataclass
class Row:
    """One program: its script, and what each run measured, in seconds and bytes."""

    name: str
    script: str
    model: str
    options: dict[str, str] = field(default_factory=dict)
    home: str = ""
    start_to_png: list[float] = field(default_factory=list)
    second: list[float] = field(default_factory=list)
    peak: list[float] = field(default_factory=list)

    def run(self, output: Path) -> None:
        started = time.time()
        found = measured(
            self.name, self.script + MEASURE, MODEL=self.model, PROMPT=PROMPT, STEPS=STEPS, GUIDANCE=GUIDANCE,
            SEED=SEED, OUTPUT=str(output), OPTIONS=self.options, home=self.home,
        )  # fmt: skip
        self.start_to_png.append(found["first"] - started)
        self.second.append(found["second"])
        self.peak.append(found["peak"])
        assert output.stat().st_size > 0


def measure(runs: int = 5) -> list[Row]:
    """The embedded model here, in openvino.genai and in diffusers; `runs` rounds after one that is not counted."""
    from edge_sd.converters.build import build
    from edge_sd.converters.recipes import RECIPES
    from edge_sd.paths import embedded_models

    emoji = embedded_models() / "emoji"
    with tempfile.TemporaryDirectory() as scratch:
        build(emoji, Path(scratch) / "bundle", "openvino", RECIPES["fp16"], lambda what, share: None)
        theirs = str(Path(scratch) / "bundle/openvino-fp16")
        rows = [
            Row("edge-sd", OURS, "emoji", home=f"{scratch}/caches"),
            Row("openvino.genai, with its cache", GENAI, theirs, {"CACHE_DIR": f"{scratch}/cache"}),
            Row("openvino.genai", GENAI, theirs),
            Row("diffusers, torch float32", DIFFUSERS, str(emoji)),
        ]
        for n in range(runs + 1):
            for row in rows:
                row.run(Path(scratch) / "x.png")
                if n == 0:
                    # The first round reads everything from the disk for the first time, and fills the caches.
                    for values in (row.start_to_png, row.second, row.peak):
                        values.clear()
    return rows


def table(rows: list[Row]) -> Table:
    """Ratios are to the first row, above 1 where that one is faster or smaller."""
    first = rows[0]

    def cell(mine: list[float], its: list[float], row: Row) -> tuple[float, float | None]:
        ratio = statistics.median(a / b for a, b in zip(mine, its, strict=True))
        return statistics.median(mine), None if row is first else ratio

    return Table(
        "embedded",
        (
            Column("program", "embedded model, 20 guided steps"),
            Column("start_to_png", "process start to PNG", beside(seconds(2))),
            Column("second", "the next picture", beside(seconds(2))),
            Column("peak", "peak memory", beside(lambda value: f"{value / 2**20:.0f} MiB")),
        ),
        [
            {
                "program": row.name,
                "start_to_png": cell(row.start_to_png, first.start_to_png, row),
                "second": cell(row.second, first.second, row),
                "peak": cell(row.peak, first.peak, row),
            }
            for row in rows
        ],
    )
