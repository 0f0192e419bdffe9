"""Activations in 8 bits: ranges by the executor, operations by coremltools, and what both compute of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_sd.bundle.mlpackage.package import Package
from edge_sd.converters.coreml import activations, convert
from edge_sd.converters.coreml.mil import Program
from edge_sd.converters.parity import psnr

from .test_coreml_mil import build

RNG = np.random.default_rng(0)
WEIGHTS = [(RNG.normal(size=(64, 64)) / 8).astype(np.float16) for _ in range(2)]
CALLS = [{"x": RNG.normal(size=(2, 64)).astype(np.float16)} for _ in range(4)]


def body(mb: Any, x: Any) -> Any:
    """Two layers; the second reads what the first makes with one number in 64 thirty times as large."""
    loud = mb.mul(x=mb.linear(x=x, weight=WEIGHTS[0], name="first"), y=np.float16([30] + [1] * 63))
    return mb.linear(x=loud, weight=WEIGHTS[1], name="second")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("activations") / "plain.mlpackage", body, "iOS17")


def test_inputs_are_rounded_to_even_steps_of_what_was_met(plain: Path, tmp_path: Path) -> None:
    program = Program.open(plain)
    met = activations.ranges(program, lambda: [program.predict(call) for call in CALLS])
    assert met["x"].high == max(float(call["x"].max()) for call in CALLS)
    layers = activations.by_noise(plain, met)
    assert layers == ["second", "first"], "one loud number takes the steps of all others"
    found = {}
    for name, some in (("all", layers), ("first", layers[1:])):
        convert.save(activations.compress(convert.opened(plain), met, some), tmp_path / f"{name}.mlpackage")
        kinds = [each.kind for each in Package.open(tmp_path / f"{name}.mlpackage").functions["main"].operations]
        assert kinds.count("quantize") == kinds.count("dequantize") == len(some)
        found[name] = Program.open(tmp_path / f"{name}.mlpackage").predict(CALLS[0])["second"]
    # By hand.
    x = CALLS[0]["x"].astype(np.float64)
    low, high = min(met["x"].low, 0.0), max(met["x"].high, 0.0)
    scale = np.float64(np.float16((np.float16(high) - np.float16(low)) / 255))
    zero = np.round(-128 - low / scale)
    rounded = (np.clip(np.round(x / scale) + zero, -128, 127) - zero) * scale
    loud = rounded @ WEIGHTS[0].T.astype(np.float64) * np.array([30] + [1] * 63)
    wanted = loud @ WEIGHTS[1].T.astype(np.float64)
    exact = Program.open(plain, "exact").predict(CALLS[0])["second"]
    assert psnr(found["first"], wanted) > 60
    assert 30 < psnr(found["first"], exact) < 60
    assert psnr(found["all"], exact) < psnr(found["first"], exact)
