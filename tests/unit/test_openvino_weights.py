"""Four-bit weights in OpenVINO graphs: each method computes, and those that learn are nearer."""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino as ov
import pytest
import torch
from torch import Tensor, nn

from edge_sd.converters.openvino.convert import _from_trace, _name_ports
from edge_sd.converters.openvino.weights import compress
from edge_sd.converters.parity import Arrays, Recording
from edge_sd.converters.recipes import LEARNED, METHODS, RECIPES
from edge_sd.converters.sources.wrappers import Wrapped

WIDTH, CALLS = 64, 4


class Layers(nn.Module):
    """Two linear layers and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(self.second(self.first(x).relu()).transpose(1, 2)).transpose(1, 2)
        return y


def given(count: int) -> list[Arrays]:
    """Inputs that have much to do with each other, as a network's have."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(8, WIDTH, generator=generator)
    return [
        {
            "x": (
                torch.randn(1, 32, 8, generator=generator) @ mixing
                + 0.1 * torch.randn(1, 32, WIDTH, generator=generator)
            ).numpy()
        }
        for _ in range(count)
    ]


@pytest.fixture
def wrapped() -> Wrapped:
    torch.manual_seed(0)
    module = Layers().eval().requires_grad_(False)
    for layer in (module.first, module.second):
        # Heavy tails: even grids of nearest numbers do badly.
        layer.weight.data *= torch.randn_like(layer.weight).abs() + 0.1
    return Wrapped("unet", module, {"x": torch.zeros(1, 32, WIDTH)}, {"x": (0, 1)}, ("y",))


def compressed(wrapped: Wrapped, name: str, calls: list[Arrays]) -> Any:
    example = tuple(wrapped.example.values())
    graph = _from_trace(torch.jit.trace(wrapped.module, example, check_trace=False), example)
    _name_ports(graph, wrapped)
    recording = Recording(given(1) + calls, [{}] * (1 + len(calls)), measured=1)
    return compress(graph, wrapped, RECIPES[name], recording)


def error(graph: Any, wrapped: Wrapped) -> float:
    """Of outputs on inputs that were not learned from, relative to them."""
    compiled = ov.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": ov.Type.f32})
    total = 0.0
    for call in given(CALLS + 4)[CALLS:]:
        exact = wrapped.module(torch.from_numpy(call["x"])).numpy()
        total += float(np.mean((compiled(call)["y"] - exact) ** 2) / np.mean(exact**2)) / 4
    return total


def test_every_method_computes_and_those_that_learn_are_nearer(wrapped: Wrapped) -> None:
    errors = {name: error(compressed(wrapped, name, given(CALLS)), wrapped) for name in ("int4", "nf4", "fp8")}
    learned = {name: error(compressed(wrapped, f"int4{name}", given(CALLS)), wrapped) for name in LEARNED}
    assert all(value < 0.02 for value in errors.values())
    assert learned["gptq"] < 0.7 * errors["int4"]
    assert learned["lowrank"] < errors["int4"]
    assert {recipe.method for recipe in RECIPES.values()} - {""} == {*METHODS}


def test_a_method_that_has_nothing_to_learn_from_rounds_to_the_nearest(wrapped: Wrapped) -> None:
    same = [error(compressed(wrapped, name, []), wrapped) for name in ("int4", "int4awq", "int4gptq")]
    assert same[0] == same[1] == same[2]
