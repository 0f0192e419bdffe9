"""Windows cover the whole, weights add up, and what a window can't see does not matter to what needs no neighbours."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sd import Request
from edge_sd.components.tiling import Tiled, ramp, scales_of, starts
from edge_sd.images.canvas import content_hash

from .test_canvas import picture
from .test_pipeline import pipeline


class Recorder:
    """A component of three kinds that keeps what it was given."""

    def __init__(self, scale: int, output: str, picture: str) -> None:
        self.scale, self.output, self.picture = scale, output, picture
        self.shapes: list[dict[str, tuple[int, ...]]] = []
        self.bound: dict[str, Any] = {}

    def bind(self, **constants: Any) -> None:
        self.bound |= constants

    def __call__(self, **inputs: Any) -> dict[str, Any]:
        self.shapes.append({name: value.shape for name, value in inputs.items()})
        value = inputs[self.picture]
        grown = value.repeat(self.scale, 2).repeat(self.scale, 3) if self.scale > 0 else value[:, :, ::8, ::8]
        return {self.output: 2 * grown + 1, "deep": value}

    def close(self) -> None: ...


@given(st.integers(1, 300), st.integers(8, 64))
def test_windows_cover_everything_and_share_what_they_should(length: int, window: int) -> None:
    overlap = window // 4
    places = starts(length, window, overlap)
    assert places[0] == 0
    assert max(places) + window >= length
    if length > window:
        assert places[-1] + window == length
        assert all(0 < b - a <= window - overlap for a, b in pairwise(places))
    assert ramp(window, overlap).min() == 1


@pytest.mark.parametrize(
    ("part", "scale", "output", "shape"),
    [
        ("unet", 1, "out_sample", (2, 4, 21, 40)),
        ("vae_decoder", 8, "sample", (1, 4, 21, 40)),
        ("vae_encoder", 0, "latent_parameters", (1, 3, 168, 320)),
    ],
)
def test_what_needs_no_neighbours_comes_out_as_whole(
    part: str, scale: int, output: str, shape: tuple[int, ...]
) -> None:
    name, factors = scales_of(part, 8)
    unit = factors[name]
    component = Recorder(scale, output, name)
    tiled = Tiled(component, {name: (*shape[:2], 16 * unit, 16 * unit)}, name, factors)
    whole = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    (found,) = tiled(**{name: whole}).values()
    np.testing.assert_allclose(found, Recorder(scale, output, name)(**{name: whole})[output], atol=1e-5)
    assert {each[name][2:] for each in component.shapes} == {(16 * unit, 16 * unit)}


def test_a_picture_that_steers_is_cut_with_the_latents_and_text_is_bound_once() -> None:
    name, factors = scales_of("unet", 8)
    component = Recorder(1, "out_sample", name)
    tiled = Tiled(component, {name: (1, 4, 16, 16)}, name, factors)
    tiled.bind(controlnet_cond=np.zeros((1, 3, 128, 256), np.float32), encoder_hidden_states=np.zeros((1, 7, 3)))
    tiled(sample=np.zeros((1, 4, 16, 32), np.float32), timestep=np.zeros(1))
    assert set(component.bound) == {"encoder_hidden_states"}
    assert {each["controlnet_cond"] for each in component.shapes} == {(1, 3, 128, 128)}
    assert {each["timestep"] for each in component.shapes} == {(1,)}


def test_a_picture_larger_than_the_model_is_drawn_in_tiles() -> None:
    with pipeline() as opened:
        request = Request(
            "a cat", seed=1, steps=3, image=picture(128, 192), width=128, height=192, tile=64, vae_tile=64
        )
        drawn = opened.generate(request).pictures[0]
        assert drawn.image.size == (128, 192)
        assert opened.components.shapes("unet")["sample"] == (2, 4, 8, 8)
        assert opened.components.shapes("vae_decoder")["latent_sample"] == (1, 4, 8, 8)
        # The fake autoencoder needs no neighbours: its tiles change nothing.
        whole = opened.generate(Request(**{**request.__dict__, "vae_tile": 0})).pictures[0]
    assert content_hash(whole.image) == content_hash(drawn.image)


def test_large_pictures_are_decoded_in_tiles_by_themselves() -> None:
    with pipeline() as opened:
        small = opened.resolve(Request("a cat", width=1024, height=1024))
        large = opened.resolve(Request("a cat", width=1088, height=1024))
        never = opened.resolve(Request("a cat", width=1088, height=1024, vae_tile=0))
    assert [each.vae_window for each in (small, large, never)] == [(1024, 1024), (768, 768), (1088, 1024)]
