"""Sensitivity to int8: each layer's share of a network's error, beside its share of the products.

The rounding of one layer's inputs and weights is imitated in torch while all others stay float32, and the network's
output is compared. Errors of layers are small and nearly independent, so their squares add up; the layers that cost
most for what they save are left in floating point (a knapsack by the ratio of the two, as in HAWQ's, Dong et al. 2019,
with the error measured and not estimated from curvature).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Cost:
    """Cost and gain of int8 in one layer.

    error      mean square error of the network's output, relative to the output's mean square
    products   the layer's share of the network's
    """

    layer: str
    error: float
    products: float


def costs(module: nn.Module, inputs: list[tuple[Tensor, ...]]) -> list[Cost]:
    """The cost of each convolution and linear layer of `module`, measured on `inputs`, most expensive first."""
    layers: dict[str, nn.Module] = {
        name: each for name, each in module.named_modules() if isinstance(each, nn.Conv2d | nn.Linear)
    }
    with torch.no_grad():
        ranges, products, expected = _observe(module, layers, inputs)
        power = sum(float(each.square().mean()) for each in expected)
        found = []
        for name, layer in layers.items():
            if name not in ranges:
                continue
            with _rounded(layer, ranges[name]):
                outputs = [_first(module(*each)) for each in inputs]
            error = sum(float((a - b).square().mean()) for a, b in zip(outputs, expected, strict=True)) / power
            found.append(Cost(name, error, products[name] / sum(products.values())))
    return sorted(found, key=lambda cost: cost.error / cost.products, reverse=True)


def sensitive(found: list[Cost], error: float, products: float) -> list[str]:
    """Layers to keep in floating point: those with the most error for each product, until the rest is below `error`.

    error      relative mean square of the output that may remain
    products   at most this share of them is left in floating point
    """
    kept: list[str] = []
    remaining, spent = sum(cost.error for cost in found), 0.0
    for cost in found:
        if remaining <= error:
            break
        if spent + cost.products <= products:
            kept.append(cost.layer)
            remaining, spent = remaining - cost.error, spent + cost.products
    return kept


def _observe(
    module: nn.Module, layers: dict[str, nn.Module], inputs: list[tuple[Tensor, ...]]
) -> tuple[dict[str, tuple[float, float]], dict[str, int], list[Tensor]]:
    """Each layer's range of inputs and number of products, and the outputs of all."""
    ranges: dict[str, tuple[float, float]] = {}
    products: dict[str, int] = {}

    def watch(name: str) -> Any:
        def hook(layer: Any, arguments: tuple[Tensor], output: Tensor) -> None:
            low, high = ranges.get(name, (0.0, 0.0))
            ranges[name] = min(low, float(arguments[0].min())), max(high, float(arguments[0].max()))
            products[name] = products.get(name, 0) + output.numel() * layer.weight[0].numel()

        return hook

    handles = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    outputs = [_first(module(*each)) for each in inputs]
    for handle in handles:
        handle.remove()
    return ranges, products, outputs


@contextmanager
def _rounded(layer: Any, bounds: tuple[float, float]) -> Iterator[None]:
    """The layer as int8 would compute it: 256 levels for its inputs, 255 for each output channel's weights."""
    low, high = bounds
    step = max(high - low, 1e-12) / 255
    zero = round(-low / step)

    def quantize(_: Any, arguments: tuple[Tensor]) -> tuple[Tensor]:
        return ((arguments[0] / step + zero).round().clamp(0, 255).sub(zero).mul(step),)

    weight = layer.weight.data
    scale = weight.flatten(1).abs().amax(1).clamp_min(1e-12).div(127).reshape(-1, *[1] * (weight.dim() - 1))
    handle = layer.register_forward_pre_hook(quantize)
    layer.weight.data = (weight / scale).round().mul(scale)
    try:
        yield
    finally:
        layer.weight.data = weight
        handle.remove()


def _first(output: Any) -> Tensor:
    first: Tensor = output[0] if isinstance(output, tuple) else output
    return first
