"""Sensitivity to int8: each layer's share of a network's error, beside its share of the products.

Rounding a layer's inputs and weights changes its output z by delta, which changes the network's output y by J delta to
first order, J = dy/dz. For signs v drawn at random E[(v^T J delta)^2] = |J delta|^2 (Hutchinson 1990), and one backward
pass gives v^T J for every layer at once: a few dozen passes weigh all layers, where rounding one layer after the other
takes a pass for each. Errors of layers are small and nearly independent, so their squares add up; the layers that cost
most for what they save are left in floating point (a knapsack by the ratio of the two, as in HAWQ's, Dong et al. 2019).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Backward passes, over all inputs: the estimate of a layer's error is then right within a fifth, and errors of layers
# lie decades apart.
PROBES = 48


@dataclass(frozen=True)
class Cost:
    """Cost and gain of int8 in one layer.

    error      mean square error of the network's output, relative to the output's mean square
    products   the layer's share of the network's
    """

    layer: str
    error: float
    products: float


def costs(
    module: nn.Module,
    inputs: list[tuple[Tensor, ...]],
    report: Callable[[float], None] = lambda share: None,
    probes: int = PROBES,
) -> list[Cost]:
    """The cost of each convolution and linear layer of `module`, estimated on `inputs`, most expensive first.

    `report` is called with the share of the work that is done, 0 to 1. The random signs are the same in each run;
    `probes` are backward passes over all inputs.
    """
    layers: dict[str, nn.Module] = {
        name: each for name, each in module.named_modules() if isinstance(each, nn.Conv2d | nn.Linear)
    }
    ranges, products, power = _observe(module, layers, inputs)
    passes = -(-probes // len(inputs))
    random = torch.Generator().manual_seed(0)
    errors = dict.fromkeys(ranges, 0.0)
    for n, given in enumerate(inputs):
        y, changes = _changed(module, {name: layers[name] for name in ranges}, ranges, given)
        names, z, delta = zip(*changes, strict=True)
        for k in range(passes):
            v = torch.randint(0, 2, y.shape, generator=random).mul(2).sub(1).to(y.dtype)
            rows = torch.autograd.grad(y, z, v, retain_graph=True, allow_unused=True)
            shares: dict[str, float] = {}
            for name, row, change in zip(names, rows, delta, strict=True):
                # A layer that is used twice changes the output by the sum.
                shares[name] = shares.get(name, 0.0) + (0.0 if row is None else float((row * change).sum()))
            for name, share in shares.items():
                errors[name] += share**2 / passes / y.numel() / power
            report((n + (k + 1) / passes) / len(inputs))
    total = sum(products.values())
    found = [Cost(name, error, products[name] / total) for name, error in errors.items()]
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
) -> tuple[dict[str, tuple[float, float]], dict[str, int], float]:
    """Each layer's range of inputs and number of products, and the sum of the outputs' mean squares."""
    ranges: dict[str, tuple[float, float]] = {}
    products: dict[str, int] = {}

    def watch(name: str) -> Any:
        def hook(layer: Any, arguments: tuple[Tensor], output: Tensor) -> None:
            low, high = ranges.get(name, (0.0, 0.0))
            ranges[name] = min(low, float(arguments[0].min())), max(high, float(arguments[0].max()))
            products[name] = products.get(name, 0) + output.numel() * layer.weight[0].numel()

        return hook

    with torch.no_grad(), _hooked(layers, watch):
        power = sum(float(_first(module(*each)).square().mean()) for each in inputs)
    return ranges, products, power


def _changed(
    module: nn.Module, layers: dict[str, nn.Module], ranges: dict[str, tuple[float, float]], given: tuple[Tensor, ...]
) -> tuple[Tensor, list[tuple[str, Tensor, Tensor]]]:
    """The network's output, and (layer, z, delta) of every call of a layer, with the graph that leads from z to it."""
    changes: list[tuple[str, Tensor, Tensor]] = []

    def watch(name: str) -> Any:
        def hook(layer: Any, arguments: tuple[Tensor], output: Tensor) -> Tensor:
            with torch.no_grad():
                delta = _rounded(layer, arguments[0], ranges[name]) - output
            z = output if output.requires_grad else output.detach().requires_grad_()
            changes.append((name, z, delta))
            return z

        return hook

    with torch.enable_grad(), _hooked(layers, watch):
        return _first(module(*given)), changes


@contextmanager
def _hooked(layers: dict[str, nn.Module], watch: Callable[[str], Any]) -> Iterator[None]:
    handles = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rounded(layer: Any, x: Tensor, bounds: tuple[float, float]) -> Tensor:
    """The layer's output as int8 would compute it: 256 levels for its inputs, 255 for each output channel's weights."""
    low, high = bounds
    step = max(high - low, 1e-12) / 255
    zero = round(-low / step)
    weight = layer.weight.data
    wide = weight.float()
    scale = wide.flatten(1).abs().amax(1).clamp_min(1e-12).div(127).reshape(-1, *[1] * (weight.dim() - 1))
    layer.weight.data = (wide / scale).round().mul(scale).to(weight.dtype)
    try:
        # Past the hooks.
        output: Tensor = layer.forward((x / step + zero).round().clamp(0, 255).sub(zero).mul(step))
    finally:
        layer.weight.data = weight
    return output


def _first(output: Any) -> Tensor:
    first: Tensor = output[0] if isinstance(output, tuple) else output
    return first
