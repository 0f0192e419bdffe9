"""Core AI by Apple's runtime: the embedded model's components and pictures, and what SD 1.5's shapes take.

A picture is drawn twice from one seed, by torch in float32 and by the variant on `coreai-reference`.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_sd import Pipeline, Request
from edge_sd.images.metrics import psnr
from edge_sd.paths import embedded_models

from .process import measured
from .report import Column, Table, decibels, gibibytes, seconds, share

# A prompt and a number of steps.
Shot = tuple[str, int]
PRECISIONS = ("fp32", "fp16", "int8", "int4", "mixed4")
# Guided steps of a picture, and the precision that is drawn in the steps of the model's own, too.
STEPS, WHOLE, WHOLE_STEPS = 4, "fp16", 20
PROMPTS = ("a red apple, glossy style", "a cat, flat style", "a rocket, 3d style")
# What a picture needs; a ControlNet and a tiny decoder would take as long again.
PARTS = ("text_encoder", "unet", "vae_decoder", "vae_encoder")

# A UNet of SD 1.5's full size, with random weights: what it takes does not depend on their values.
FULL_SIZE = """
import torch
import numpy as np
from dataclasses import replace
from pathlib import Path
from diffusers import UNet2DConditionModel
from edge_sd.apps.libraries import hush_libraries
from edge_sd.backends.coreai.runtime import Asset, Loop, array
from edge_sd.bundle.bundle import ModelBundle
from edge_sd.bundle.facts import LatentSpace
from edge_sd.converters.coreai import convert
from edge_sd.converters.coreai.wrappers import Sizes, wrap
from edge_sd.converters.sources.wrappers import UNet
hush_libraries()
if STAGE == "convert":
    torch.set_default_dtype(torch.float16)
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768).eval().requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    facts = replace(ModelBundle.open("emoji").facts, max_tokens=77, latents=LatentSpace())
    started = time.perf_counter()
    component = wrap("unet", UNet(unet), facts, [Sizes(512, 512)], torch.float16)
    convert.save(convert.convert(component), Path(OUTPUT), "", "")
    print(json.dumps({"seconds": time.perf_counter() - started, "peak": peak_memory(),
                      "bytes": sum(file.stat().st_size for file in Path(OUTPUT).rglob("*") if file.is_file())}))
else:
    started = time.perf_counter()
    asset = Asset(Path(OUTPUT), Loop())
    found = {"load": time.perf_counter() - started}
    if STAGE == "step":
        ports = asset.functions["main"]
        inputs = {name: array(np.ones(port.shape, port.dtype)) for name, port in ports.items()}
        started = time.perf_counter()
        asset.call("main", inputs)
        found["step"] = time.perf_counter() - started
    print(json.dumps({**found, "peak": peak_memory()}))
"""


def pictures(names: Sequence[str] = PRECISIONS) -> Table:
    """The embedded model in each precision: bytes, the least PSNR of its components, and that of pictures."""
    from edge_sd.converters.build import build
    from edge_sd.converters.recipes import RECIPES
    from edge_sd.converters.targets import form_named

    shots = [(prompt, STEPS) for prompt in PROMPTS]
    whole = (PROMPTS[0], WHOLE_STEPS)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        source, bundle = _plain(Path(scratch) / "emoji"), Path(scratch) / "bundle"
        exact = _drawn(source, "torch-cpu", "torch", [*shots, whole])
        for name in names:
            made = build(source, bundle, form_named("coreai"), RECIPES[name], lambda what, share: None)
            variant = made.variant(f"coreai-gpu-{name}")
            wanted = [*shots, whole] if name == WHOLE else shots
            found = _drawn(bundle, "coreai-reference", f"coreai-gpu-{name}", wanted)
            told = {shot: psnr(pixels, exact[shot], 255) for shot, pixels in found.items()}
            rows.append(
                {
                    "precision": name,
                    "bytes": sum(variant.part_size(part) for part in PARTS),
                    "components": min(each.parity.psnr for each in variant.artifacts.values() if each.parity),
                    "pictures": min(told[shot] for shot in shots),
                    "whole": told.get(whole),
                }
            )
    half = next((row["bytes"] for row in rows if row["precision"] == "fp16"), None)
    for row in rows:
        row["share"] = row["bytes"] / half if half else None
    columns = (
        Column("precision", "the embedded model by Apple's runtime"),
        Column("bytes", "size", lambda value: f"{value / 1e6:.1f} MB"),
        Column("share", "of fp16's", share),
        Column("components", "components, least", decibels),
        Column("pictures", f"pictures of {STEPS} steps, least", decibels),
        Column("whole", f"picture of {WHOLE_STEPS} steps", decibels),
    )
    return Table("coreai", columns, rows)


def _plain(target: Path) -> Path:
    """The embedded model without what is trained beside it."""
    beside = ("controlnet", "vae_tiny", "openvino-*", "coreml-*", "lcm", "evaluator", "edge_sd.json")
    return Path(shutil.copytree(embedded_models() / "emoji", target, ignore=shutil.ignore_patterns(*beside)))


def _drawn(model: Path, device: str, variant: str, shots: Sequence[Shot]) -> dict[Shot, NDArray[np.float64]]:
    """A picture's pixels for each prompt and number of steps."""
    with Pipeline.open(str(model), device, variant) as pipeline:
        return {
            (prompt, steps): np.asarray(
                pipeline.generate(Request(prompt, seed=0, steps=steps, sampler="euler")).pictures[0].image, np.float64
            )
            for prompt, steps in shots
        }


def full_size() -> Iterator[Table]:
    """SD 1.5's UNet to Core ML's successor in float16, and then a step of it, each in a process of its own."""
    columns = (
        Column("what", "SD 1.5 UNet, 512x512, batch 2, fp16, by Apple's runtime"),
        Column("seconds", "time", seconds(0)),
        Column("peak", "peak memory", gibibytes(1)),
        Column("bytes", "asset", lambda value: f"{value / 1e6:.0f} MB"),
    )
    with tempfile.TemporaryDirectory() as scratch:
        output = str(Path(scratch, "Unet.aimodel"))
        made = measured("converting to Core AI", FULL_SIZE, STAGE="convert", OUTPUT=output)
        loaded = measured("loading Core AI", FULL_SIZE, STAGE="load", OUTPUT=output)
        rows = [
            {"what": "convert", "seconds": made["seconds"], "peak": made["peak"], "bytes": made["bytes"]},
            {"what": "load", "seconds": loaded["load"], "peak": loaded["peak"]},
        ]
        yield Table("coreai-large", columns, rows)
        # An hour of a core, or more.
        ran = measured("a step of Core AI", FULL_SIZE, STAGE="step", OUTPUT=output)
    step = {"what": "one step", "seconds": ran["step"], "peak": ran["peak"]}
    yield Table("coreai-step", columns[:3], [step])
