"""Transformers at their published sizes, with random weights: a step takes as long whatever they are.

Conversion of FLUX.2 klein 4B and Stable Diffusion 3.5 medium to int8, stopped once on the way, and 512 x 512 pixels
beside openvino.genai and optimum-intel on the same files. Each row is a process. Programs run in the table's order, and
ratios are of one round. Steps are all alike, so two are drawn.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from edge_sd.errors import InvalidRequest

from . import random_weights
from .process import measured
from .report import Column, Table, decibels, gibibytes, seconds

SIDE = 512
PROMPT = "a red apple, glossy style"
PARTS = ("conversion", "klein", "sd35")
NAMES = {"sd35": "SD 3.5 medium, no T5", "klein": "FLUX.2 klein 4B"}

# Stopped as by Ctrl-C where the second component begins; the run after it goes on from there.
CONVERT = """
from pathlib import Path
from edge_sd.apps.libraries import hush_libraries
from edge_sd.converters.build import build
from edge_sd.converters.recipes import RECIPES
hush_libraries()
parts, started = [], time.perf_counter()
def report(what, share):
    part = what.partition(": ")[2].partition(",")[0]
    if part and part not in parts:
        parts.append(part)
    if STOP and len(parts) > 1:
        raise KeyboardInterrupt
parity = {}
try:
    bundle = build(Path(SOURCE), Path(TARGET), "openvino", RECIPES[RECIPE], report)
    made = bundle.variant(f"openvino-{RECIPE}").artifacts
    parity = {part: artifact.parity.psnr for part, artifact in made.items()}
except KeyboardInterrupt:
    assert STOP
print(json.dumps({"seconds": time.perf_counter() - started, "peak": peak_memory(), "parts": parts, "parity": parity}))
"""
OURS = """
from edge_sd import Pipeline, Request
marks, started = [], time.perf_counter()
with Pipeline.open(MODEL, "cpu", VARIANT, low_memory=LOW) as pipeline:
    request = Request(PROMPT, seed=0, steps=STEPS, width=SIDE, height=SIDE, guidance=GUIDANCE)
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
marks.append(time.perf_counter())
pipeline.generate(PROMPT, num_inference_steps=STEPS, guidance_scale=GUIDANCE, width=SIDE, height=SIDE, callback=mark)
marks.append(time.perf_counter())
"""
OPTIMUM = """
import diffusers
from optimum.intel import OVPipelineForText2Image
marks, started = [], time.perf_counter()
pipeline = OVPipelineForText2Image.from_pretrained(MODEL, device="CPU")
load = time.perf_counter() - started
def mark(pipeline, step, t, values):
    marks.append(time.perf_counter())
    return values
pipeline.set_progress_bar_config(disable=True)
marks.append(time.perf_counter())
pipeline(PROMPT, num_inference_steps=STEPS, guidance_scale=GUIDANCE, width=SIDE, height=SIDE, callback_on_step_end=mark)
marks.append(time.perf_counter())
"""
TELL = """
print(json.dumps({"load": load, "marks": marks, "peak": peak_memory()}))
"""


@dataclass
class Row:
    """One program, and for each run seconds of a step, of a picture without loading, of loading; bytes of memory."""

    name: str
    script: str
    model: Path
    values: dict[str, Any] = field(default_factory=dict)
    step: list[float] = field(default_factory=list)
    picture: list[float] = field(default_factory=list)
    load: list[float] = field(default_factory=list)
    peak: list[float] = field(default_factory=list)

    def run(self) -> None:
        given = {"PROMPT": PROMPT, "SIDE": SIDE, **self.values}
        found = measured(self.name, self.script + TELL, MODEL=str(self.model), **given)
        marks = found["marks"]
        # The first step has the text before it, and with little memory the transformer's loading.
        steps = [after - before for before, after in pairwise(marks[1:-1])]
        self.step.append(statistics.median(steps))
        self.picture.append(marks[-1] - marks[0])
        self.load.append(found["load"])
        self.peak.append(found["peak"])


def tables(home: Path | None, rounds: int, parts: Collection[str] = PARTS) -> Iterator[Table]:
    """Those of PARTS that are wished. Without `home` the models (50 GB) lie among temporary files, and go."""
    with tempfile.TemporaryDirectory(prefix="edge-sd-bench-") as scratch:
        folder = home or Path(scratch)
        if "conversion" in parts:
            for name in NAMES:
                yield Table(f"transformers-conversion-{name}", CONVERSION, [convert(folder, name)])
        for name, rows in (("klein", klein(folder)), ("sd35", sd35(folder))):
            if name not in parts:
                continue
            for _ in range(rounds):
                for row in rows:
                    row.run()
            yield drawn(name, rows)


def klein(home: Path) -> list[Row]:
    """Two steps, as all are alike: one draws without guidance."""
    model, values = home / "klein/bundle/openvino-int8", {"STEPS": 2, "GUIDANCE": 1.0}
    return [
        Row("openvino.genai", GENAI, model, values),
        Row("edge-sd", OURS, model, {**values, "VARIANT": None, "LOW": False}),
        Row("edge-sd, --low-memory", OURS, model, {**values, "VARIANT": None, "LOW": True}),
    ]


def sd35(home: Path) -> list[Row]:
    """Two steps with guidance, each of two rows."""
    model, values = home / "sd35/bundle/openvino-int8", {"STEPS": 2, "GUIDANCE": 4.5}
    return [
        Row("optimum-intel", OPTIMUM, model, values),
        Row("edge-sd", OURS, model, {**values, "VARIANT": None, "LOW": False}),
    ]


def drawn(name: str, rows: list[Row]) -> Table:
    """The ratios are to the first of `rows`, of the same round."""
    columns = (
        Column("program", f"{NAMES[name]} in int8, {SIDE} x {SIDE}, 2 steps"),
        Column("load", "load", seconds(0)),
        Column("step", "a step", seconds(1)),
        Column("picture", "picture", seconds(0)),
        Column("faster", "times faster a step", lambda value: f"{value:.2f}"),
        Column("peak", "peak memory", gibibytes(2)),
    )
    found = [
        {
            "program": row.name,
            **{each: statistics.median(getattr(row, each)) for each in ("load", "step", "picture", "peak")},
            "faster": statistics.median(a / b for a, b in zip(rows[0].step, row.step, strict=True)),
        }
        for row in rows
    ]
    return Table(f"transformers-{name}", columns, found)


CONVERSION = (
    Column("model", "random weights, to OpenVINO in int8, stopped once"),
    Column("seconds", "time", seconds(0)),
    Column("peak", "peak memory", gibibytes(1)),
    Column("parity", "parity of each component", lambda all_: ", ".join(f"{k} {decibels(v)}" for k, v in all_.items())),
    Column("went_on", "went on with"),
)


def convert(home: Path, name: str) -> dict[str, Any]:
    """A row of CONVERSION, measured where it is not there yet; it stays beside the bundle. Raises InvalidRequest."""
    source, bundle, kept = random_weights.ready(home, name), home / name / "bundle", home / name / "conversion.json"
    if kept.is_file():
        return dict(json.loads(kept.read_text("utf-8")))
    if bundle.exists():
        raise InvalidRequest(
            f"{bundle} is there, and no {kept.name} of what it took; remove it, or give another --home"
        )
    runs = [
        measured(f"converting {name}", CONVERT, SOURCE=str(source), TARGET=str(bundle), RECIPE="int8", STOP=stop)
        for stop in (True, False)
    ]
    row = {
        "model": NAMES[name],
        "seconds": sum(run["seconds"] for run in runs),
        "peak": max(run["peak"] for run in runs),
        "parity": runs[1]["parity"],
        "went_on": runs[1]["parts"][0],
    }
    kept.write_text(json.dumps(row), "utf-8")
    return row
