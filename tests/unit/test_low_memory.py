"""One component in memory at a time, and of a large one a piece: the same numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest

from edge_sd import Pipeline, Request
from edge_sd.backends.openvino import cache, loading, pieces
from edge_sd.backends.openvino.component import Graph
from edge_sd.backends.openvino.pieces import InPieces, cut, take
from edge_sd.backends.openvino.reading import accept_fractional_timesteps, read_model
from edge_sd.bundle import ModelBundle
from edge_sd.converters.parity import psnr
from edge_sd.errors import DeviceError
from edge_sd.pipeline import shapes_of
from edge_sd.turns import Turn, Turns

REQUEST = Request("a red apple, glossy style", seed=1, steps=3)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGE_SD_MODELS", str(tmp_path / "models"))
    return tmp_path / "openvino"


class Held:
    """A component that counts how many of its kind are loaded."""

    loaded = 0

    def __init__(self) -> None:
        Held.loaded += 1
        self.bound: dict[str, Any] = {}

    def bind(self, **constants: Any) -> None:
        self.bound |= constants

    def __call__(self, **inputs: Any) -> dict[str, Any]:
        assert Held.loaded == 1
        return {**self.bound, **inputs}

    def close(self) -> None:
        Held.loaded -= 1


def test_one_is_loaded_at_a_time_and_what_is_bound_stays() -> None:
    turns = Turns()
    first, second = Turn(turns, Held), Turn(turns, Held)
    assert Held.loaded == 0
    first.bind(a=np.ones(1))
    for _ in range(2):
        assert set(first(x=np.zeros(1))) == {"a", "x"}
        assert set(second(x=np.zeros(1))) == {"x"}
    second.close()
    first.close()
    assert Held.loaded == 0


def test_pieces_compute_what_the_whole_does() -> None:
    bundle, core = ModelBundle.open("emoji"), ov.Core()
    artifact = bundle.variant("openvino-fp16").artifacts["unet"]
    shapes = shapes_of(bundle.facts, 128, 128, 1)["unet"]
    rng = np.random.default_rng(0)
    inputs = {name: rng.standard_normal((2, *shape[1:])).astype(np.float32) for name, shape in shapes.items()}
    inputs["timestep"] = np.array([500.5], np.float32)

    def model() -> Any:
        made = read_model(core, bundle.path(artifact.graph), [bundle.path(name) for name in artifact.weights])
        accept_fractional_timesteps(made)
        made.reshape(dict(shapes))
        return made

    def graph(made: Any) -> Graph:
        return Graph(core.compile_model(made, "CPU", {"INFERENCE_PRECISION_HINT": ov.Type.f32}))

    whole = graph(model())
    expected = [whole({n: v if n == "timestep" else v[k : k + 1] for n, v in inputs.items()})["out_sample"].copy()
                for k in range(2)]  # fmt: skip
    for size, count in ((4 << 20, 7), (12 << 20, 3)):
        where = cut(model(), size)
        assert where.count == count
        pieces = InPieces("unet", count, lambda n, where=where: (graph(take(model(), where, n)), None), shapes)
        found = pieces(**inputs)
        assert set(found) == {"out_sample"}
        assert np.abs(found["out_sample"] - np.concatenate(expected)).max() < 1e-5


def draw(**wishes: Any) -> np.ndarray:
    with Pipeline.open("emoji", "cpu", "openvino-fp16", **wishes) as pipeline:
        result = pipeline.generate(REQUEST)
    assert not wishes or result.pictures[0].settings.vae_tile == 256
    return np.asarray(result.pictures[0].image)


def test_a_picture_in_pieces_is_the_picture(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = draw()
    monkeypatch.setattr(loading, "LARGE", 8 << 20)
    monkeypatch.setattr(pieces, "PIECE", 8 << 20)
    first = draw(low_memory=True)
    assert psnr(first, whole, peak=255) >= 40
    blobs = sorted(place.glob("*-[0-9].blob"))
    assert len(blobs) == 4
    blobs[0].write_bytes(blobs[0].read_bytes()[:-9])
    cache.write(blobs[1].stem, {"piece": b"nothing that OpenVINO knows"})
    assert (draw(low_memory=True) == first).all()


def test_what_is_left_out_is_said() -> None:
    with Pipeline.open("emoji", "cpu", "openvino-fp16", low_memory=True) as pipeline:
        notes = pipeline.generate(replace(REQUEST, deep_every=2)).notes
    assert any("deep_every is left out" in note for note in notes)


def test_a_piece_that_fails_is_a_devices_failure() -> None:
    def broken(n: int) -> Any:
        raise RuntimeError("first line\nno memory for piece 0")

    with pytest.raises(DeviceError, match="unet failed: no memory for piece 0"):
        InPieces("unet", 1, broken, {"sample": (1, 4, 8, 8)})(sample=np.zeros((1, 4, 8, 8), np.float32))


def test_the_cuts_are_asked_for_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network below LARGE is held whole."""
    monkeypatch.setattr(loading.Loading, "_in_pieces", None)
    assert draw(low_memory=True).shape == (128, 128, 3)
