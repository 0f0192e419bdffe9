"""A user's own model: time and memory of its variants, beside openvino.genai, and the operations that take the time.

Each row is a process that loads, draws as the model does by default, and says how long each part of it took.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

from edge_sd.bundle.bundle import ModelBundle
from edge_sd.devices.choose import choose
from edge_sd.devices.discovery import discover
from edge_sd.errors import EdgeSDError

from ..terminal import Watch
from .process import measured
from .report import Column, Table, gibibytes, seconds

PROMPT, PEER = "a red apple", "openvino.genai"
DRAW = """
from edge_sd import Pipeline, Request
started = time.perf_counter()
with Pipeline.open(MODEL, DEVICE, VARIANT) as pipeline:
    request = Request(PROMPT, seed=0)
    settings = pipeline.resolve(request)
    pipeline.prepare(settings)
    load = time.perf_counter() - started
    marks = [time.perf_counter()]
    for step in pipeline.steps(request):
        marks.append(time.perf_counter())
    pipeline.decode(step.latents, settings.decoder)
    marks.append(time.perf_counter())
    print(json.dumps({"load": load, "marks": marks, "peak": peak_memory(), "width": settings.width,
                      "height": settings.height, "steps": settings.steps, "guidance": settings.guidance,
                      "device": pipeline.plan.device.name}))
"""
# The same picture, of a variant that this program reads, too. It has no place of its own for decoding.
GENAI = """
import openvino_genai
started = time.perf_counter()
pipeline = openvino_genai.Text2ImagePipeline(MODEL, "CPU")
load = time.perf_counter() - started
marks = [time.perf_counter()]
def mark(step, steps, latents):
    marks.append(time.perf_counter())
    return False
pipeline.generate(PROMPT, num_inference_steps=STEPS, guidance_scale=GUIDANCE, width=WIDTH, height=HEIGHT, callback=mark)
marks.append(time.perf_counter())
print(json.dumps({"load": load, "marks": marks, "peak": peak_memory()}))
"""


def measure(
    model: str, variants: Sequence[str], device: str, rounds: int, report: Watch = lambda what, share: None
) -> list[dict[str, Any]]:
    """A row for each variant, all that run here if none is named; medians of `rounds` that take turns.

    `report` is told which variant draws, and the share of all rounds that is done.

    Raises VariantNotFound or DeviceError for what can't be drawn.
    """
    bundle = ModelBundle.open(model)
    names = list(variants) or [name for name in bundle.variants if _runs(bundle, name, device)]
    for name in names:
        _place(bundle, name, device)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    theirs = {name: bundle.root / name for name in names if _peer_reads(bundle, name)}
    for turn in range(rounds):
        for n, name in enumerate(names):
            report(f"drawing with {name}", (turn * len(names) + n) / (rounds * len(names)))
            found[name].append(measured(name, DRAW, MODEL=model, VARIANT=name, DEVICE=device, PROMPT=PROMPT))
            if name in theirs:
                settings = {key.upper(): found[name][0][key] for key in ("width", "height", "steps", "guidance")}
                peer = measured(PEER, GENAI, MODEL=str(theirs[name]), PROMPT=PROMPT, **settings)
                same = {**found[name][0], **peer, "device": "CPU"}
                found.setdefault(f"{name}, {PEER}", []).append(same)
    return [_row(name, runs) for name, runs in found.items()]


def _place(bundle: ModelBundle, name: str, device: str) -> None:
    bundle.variant(name)
    here = discover()
    choose(bundle, here.devices, device, name, machine=here.machine)


def _runs(bundle: ModelBundle, name: str, device: str) -> bool:
    with suppress(EdgeSDError):
        _place(bundle, name, device)
        return True
    return False


def _peer_reads(bundle: ModelBundle, name: str) -> bool:
    """Whether openvino.genai is here and draws with this variant: with UNets of SD, in its layout."""
    layout = (bundle.root / name / "model_index.json").is_file()
    plain = not (bundle.facts.inpainting or bundle.facts.instructed or bundle.facts.takes_guidance)
    return layout and plain and find_spec("openvino_genai") is not None


def _row(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    steps = [[after - before for before, after in pairwise(run["marks"])] for run in runs]
    return {
        "variant": name,
        **{key: runs[0][key] for key in ("device", "width", "height", "guidance")},
        "load": statistics.median(run["load"] for run in runs),
        "steps": len(steps[0]) - 1,
        # The first has the text encoder in it.
        "step": statistics.median(statistics.median(each[:-1]) for each in steps),
        "decode": statistics.median(each[-1] for each in steps),
        "picture": statistics.median(run["marks"][-1] - run["marks"][0] for run in runs),
        "peak": statistics.median(run["peak"] for run in runs),
    }


def tables(
    model: str, variants: Sequence[str], device: str, rounds: int, report: Watch = lambda what, share: None
) -> list[Table]:
    """Time and memory of each variant; for OpenVINO's, the UNet operations' shares of a step on the CPU."""
    rows = measure(model, variants, device, rounds, report)
    columns = (
        Column("variant", model),
        Column("load", "load", seconds(1)),
        Column("step", "step", seconds(2)),
        Column("decode", "decode", seconds(2)),
        Column("picture", "picture", seconds(1)),
        Column("peak", "peak memory", gibibytes(2)),
        Column("device", "on"),
    )
    size = f"{rows[0]['width']} x {rows[0]['height']} pixels, {rows[0]['steps']} steps."
    made = [Table("own", columns, rows, [size], {"model": model})]
    bundle = ModelBundle.open(model)
    for row in rows:
        if row["variant"] in bundle.variants and bundle.variant(row["variant"]).backend == "openvino":
            from .profile import COLUMNS, of_denoiser, shares

            profile = of_denoiser(bundle, row["variant"], row["width"], row["height"])
            note = f"{row['variant']}: {profile.sums / 1e9:.3g} billion sums in {profile.seconds:.3g} s a guided step."
            facts = {"variant": row["variant"], "sums": profile.sums, "seconds": profile.seconds}
            made.append(Table("profile", COLUMNS, shares(profile), [note], facts))
    return made
