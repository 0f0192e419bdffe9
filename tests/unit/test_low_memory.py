"""One component in memory at a time, and of a large one its activations: the same numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_sd import Pipeline, Request
from edge_sd.backends.openvino import loading
from edge_sd.components.offload import Turn, Turns
from edge_sd.converters.parity import psnr

REQUEST = Request("a red apple, glossy style", seed=1, steps=3)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGE_SD_CACHE", str(tmp_path))
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


def draw(**wishes: Any) -> np.ndarray:
    with Pipeline.open("emoji", "cpu", "openvino-fp16", **wishes) as pipeline:
        result = pipeline.generate(REQUEST)
    assert not wishes or result.pictures[0].settings.vae_tile == 256
    return np.asarray(result.pictures[0].image)


def test_a_picture_of_weights_in_their_file_is_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = draw()
    monkeypatch.setattr(loading, "LARGE", 8 << 20)
    streamed = []
    found = loading.stream
    monkeypatch.setattr(loading, "stream", lambda *given: streamed.append(found(*given)) or streamed[-1])
    assert psnr(draw(low_memory=True), whole, peak=255) >= 40
    # The UNet, and what is computed before it.
    assert [len(each) > 1 for each in streamed] == [True] * 3


def test_deep_features_are_kept_with_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "LARGE", 8 << 20)
    request = replace(REQUEST, deep_every=2)
    with Pipeline.open("emoji", "cpu", "openvino-fp16") as pipeline:
        expected = np.asarray(pipeline.generate(request).pictures[0].image)
    with Pipeline.open("emoji", "cpu", "openvino-fp16", low_memory=True) as pipeline:
        found = np.asarray(pipeline.generate(request).pictures[0].image)
    assert psnr(found, expected, peak=255) >= 40
