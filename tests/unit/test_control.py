"""Several nets in one drawing: their residuals add up, each with its weight and in its steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edge_sd import Request
from edge_sd.components.controlnet import ControlledUNet, Net
from edge_sd.errors import InvalidRequest
from edge_sd.images.lines import read_lines
from edge_sd.pipeline.control import Control, controls_of
from edge_sd.sampling.windows import active_timesteps

from .test_canvas import picture


class Follower:
    """Its residual is the mean of the picture that it follows."""

    def bind(self, **constants: Any) -> None: ...

    def __call__(self, **inputs: Any) -> dict[str, Any]:
        shape = (len(inputs["sample"]), 2, 1, 1)
        return {"additional_residual_0": np.full(shape, inputs["controlnet_cond"].mean(), np.float32)}

    def close(self) -> None: ...


class UNet(Follower):
    def __call__(self, **inputs: Any) -> dict[str, Any]:
        assert "controlnet_cond" not in inputs
        return {"out_sample": inputs["additional_residual_0"]}


def test_residuals_add_up_with_their_weights_in_their_steps() -> None:
    early, late = frozenset({900.0, 500.0}), frozenset({500.0, 100.0})
    both = ControlledUNet(UNet(), [Net(Follower(), 0.5, early), Net(Follower(), 2.0, late)], 4)
    both.bind(controlnet_cond=np.concatenate([np.full((1, 3, 8, 8), v, np.float32) for v in (0.4, 0.7)], axis=1))
    for t, expected in ((900.0, 0.2), (500.0, 0.2 + 1.4), (100.0, 1.4), (50.0, 0.0)):
        found = both(sample=np.zeros((1, 4, 1, 1)), timestep=np.array([t], np.float32))["out_sample"]
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_means_over_the_picture_are_for_the_prompts_row() -> None:
    always = frozenset({900.0})
    both = ControlledUNet(UNet(), [Net(Follower(), 0.5, always, pooled=True), Net(Follower(), 2.0, always)], 4)
    both.bind(controlnet_cond=np.full((1, 6, 8, 8), 0.4, np.float32))
    for rows, expected in ((2, [0.8, 1.0]), (1, [1.0])):
        found = both(sample=np.zeros((rows, 4, 1, 1)), timestep=np.array([900.0], np.float32))["out_sample"]
        np.testing.assert_allclose(found[:, 0, 0, 0], expected, atol=1e-6)


def test_values_are_one_for_all_or_one_each() -> None:
    found = controls_of(["a", "b"], weight=[0.5], start=[0.0, 0.5], net=["", "depth"])
    assert found == (Control("a", 0.5), Control("b", 0.5, 0.5, net="depth"))
    assert [each.part for each in found] == ["controlnet", "controlnet_depth"]
    with pytest.raises(InvalidRequest, match="2 control pictures have 3 values of weight"):
        controls_of(["a", "b"], weight=[1.0, 1.0, 1.0])
    with pytest.raises(InvalidRequest, match="control weight 3 is not"):
        Request("a cat", controls=[Control("a"), Control("b", weight=3)])


def test_steps_take_part_that_lie_between_start_and_end() -> None:
    assert active_timesteps([999.0, 750.0, 500.0, 250.0], 0.25, 0.75) == {750.0, 500.0}


def test_grey_and_tile_are_the_picture_itself() -> None:
    tile, grey = (read_lines(picture(), 64, 64, reading)[0] for reading in ("tile", "grey"))
    np.testing.assert_allclose(tile, np.asarray(picture(), np.float32).transpose(2, 0, 1) / 255)
    luma = np.asarray(picture().convert("L"), np.float32) / 255
    np.testing.assert_allclose(grey, np.stack([luma] * 3))


def test_what_was_recorded_of_a_control_holds_unless_it_is_said_anew() -> None:
    recorded = [{"image": "0123", "weight": 0.5, "start": 0.25, "end": 1.0, "reading": "lines", "net": ""}]
    assert controls_of(["a"], recorded) == (Control("a", 0.5, 0.25, reading="lines"),)
    # The default is an answer, too.
    assert controls_of(["a"], recorded, weight=[1.0], start=[0.0]) == (Control("a", reading="lines"),)
    assert controls_of(["a", "b"], recorded, weight=[0.7]) == (Control("a", 0.7), Control("b", 0.7))
