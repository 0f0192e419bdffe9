"""The cost of presets: the embedded model's pictures beside float32's, for the same prompts and seeds."""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .report import Column, Table, decibels, share

# Every fourth of these is guided by one style, on one ground.
STYLES = ("flat style", "3d style", "glossy style", "cartoon style")
GROUNDS = ("", " on a blue background", " on a yellow background", " on a pink background")
SEED = 1000


@dataclass
class Row:
    """A way to draw, and its pictures: pixels, what the judge sees in them, and seconds for all."""

    name: str
    variant: str | None
    changes: dict[str, Any]
    steps: int | None = None
    pictures: list[np.ndarray] = field(default_factory=list)
    concepts: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def prompts(count: int) -> list[str]:
    """`count` prompts over the judge's concepts, styles and grounds, the same at every run."""
    from ..compare.judge import Judge

    labels = Judge(_emoji() / "evaluator").labels
    chosen = np.random.default_rng(0).permutation(len(labels))
    return [f"{labels[chosen[n % len(chosen)]]}, {STYLES[n % 4]}{GROUNDS[n // 4 % 4]}" for n in range(count)]


def measure(count: int) -> list[Row]:
    """Float32 first, then the presets, and another seed for what a decibel means; `count` pictures each."""
    from edge_sd import Pipeline, Request
    from edge_sd.converters.build import build
    from edge_sd.converters.recipes import RECIPES
    from edge_sd.pipeline.presets import PRESETS

    from ..compare.judge import Judge

    judge = Judge(_emoji() / "evaluator")
    with tempfile.TemporaryDirectory() as scratch:
        bundle = Path(scratch) / "bundle"
        for recipe in ("fp32", "fp16", "w8a8"):
            build(_emoji(), bundle, "openvino", RECIPES[recipe], lambda what, share: None)
        rows = [
            Row("float32", "openvino-fp32", {}),
            Row("exact", "openvino-fp16", PRESETS["exact"].changes),
            Row("balanced", "openvino-w8a8", PRESETS["balanced"].changes),
            Row("fast", "openvino-w8a8", PRESETS["fast"].changes),
            Row("turbo", "openvino-fp16-lcm", PRESETS["turbo"].changes),
            Row("float32, another seed", "openvino-fp32", {}),
        ]
        for row in rows:
            seed = SEED + (count if row is rows[-1] else 0)
            model = "emoji" if row.name == "turbo" else bundle
            with Pipeline.open(model, "cpu", row.variant) as pipeline:
                for n, prompt in enumerate(prompts(count)):
                    request = Request(prompt, seed=seed + n, **row.changes)
                    started = time.perf_counter()
                    picture = pipeline.generate(request).pictures[0].image
                    row.seconds.append(time.perf_counter() - started)
                    row.pictures.append(np.asarray(picture, np.float32))
                    row.concepts.append(judge.look(picture).concept)
    return rows


def table(rows: list[Row]) -> Table:
    """Likeness to the first row in dB (peak 255), and how often the judge names the same thing."""
    from edge_sd.images.metrics import PEAK, finite, psnr

    first, found = rows[0], []
    for row in rows[1:]:
        # Identical pictures have no error to take a logarithm of.
        ratios = [finite(psnr(a, b, PEAK)) for a, b in zip(first.pictures, row.pictures, strict=True)]
        found.append(
            {
                "name": row.name,
                "median": statistics.median(ratios),
                "mean": statistics.mean(ratios),
                "worst": min(ratios),
                "agrees": statistics.mean(a == b for a, b in zip(first.concepts, row.concepts, strict=True)),
                "time": statistics.median(row.seconds[1:]) / statistics.median(first.seconds[1:]),
            }
        )
    columns = (
        Column("name", f"embedded model, {len(first.pictures)} pictures"),
        Column("median", "PSNR, median", decibels),
        Column("mean", "mean", decibels),
        Column("worst", "worst", decibels),
        Column("agrees", "judge agrees", share),
        Column("time", "time", lambda value: f"{value:.2f} ×"),
    )
    return Table("quality", columns, found)


def _emoji() -> Path:
    from edge_sd.paths import embedded_models

    return embedded_models() / "emoji"
