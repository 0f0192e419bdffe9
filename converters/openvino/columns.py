"""Our own rounding to four bits in a graph that nncf made: other integers, scales and zeros in the same places.

nncf takes the nearest integers of a grid from least to most of each group. Here the grid of a group is the best of
forty, and integers are those that change a layer's outputs least (rounding.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..parity import Arrays
from ..rounding import inputs, integers, limits, rounded
from ..sources.wrappers import Wrapped

BITS = 4


def round_columns(
    model: Any, wrapped: Wrapped, calls: list[Arrays], report: Callable[[float], None] = lambda share: None
) -> int:
    """Round the 4-bit weights of `model` anew by what its layers see in `calls`; returns how many layers that were.

    A weight whose place has no layer's name, or another shape, stays as it is. `report` is told the share that is done.
    """
    layers = dict(wrapped.module.named_modules())
    places: dict[str, Any] = {}
    for op in model.get_ops():
        if op.get_type_name() != "Constant" or op.get_element_type().to_string() != "u4":
            continue
        name = op.get_friendly_name().removeprefix("self.").removesuffix(".weight")
        layer = layers.get(name)
        if isinstance(layer, torch.nn.Linear) and op.get_output_shape(0)[0] == layer.weight.shape[0]:
            places[name] = op

    def run() -> None:
        for call in calls:
            wrapped.module(*(torch.from_numpy(np.ascontiguousarray(call[name])) for name in wrapped.example))

    changed = 0
    for n, (name, given) in enumerate(inputs(wrapped.module, list(places), run)):
        report(n / len(places))
        if given is None:
            continue
        weight = layers[name].weight.detach().float()
        width = places[name].get_output_shape(0)[-1]
        seen = given.damped(biased=False)
        grid = integers(weight, BITS, width, seen.diagonal())
        codes = rounded(weight, grid, seen)
        _replace(places[name], codes.numpy(), grid.scale.numpy(), grid.zero.numpy())
        changed += 1
    return changed


def _replace(constant: Any, codes: NDArray[Any], scale: NDArray[Any], zero: NDArray[Any]) -> None:
    """Put other integers, scales and zeros where `constant` and those that belong to it are."""
    from openvino import opset13 as ops

    subtract = _reader(_reader(constant, "Convert"), "Subtract")
    zeros = subtract.input_value(1).get_node().input_value(0).get_node()
    scales = _reader(subtract, "Multiply").input_value(1).get_node()
    least, _ = limits(BITS)
    for place, values in ((constant, codes - least), (zeros, zero - least)):
        place.output(0).replace(_four_bits(values, list(place.get_output_shape(0))).output(0))
    shape = scales.get_output_shape(0)
    kind = scales.get_element_type().to_dtype()
    scales.output(0).replace(ops.constant(scale.reshape(shape).astype(kind)).output(0))


def _reader(node: Any, kind: str) -> Any:
    """The operation of a kind that reads `node`."""
    return next(
        port.get_node() for port in node.output(0).get_target_inputs() if port.get_node().get_type_name() == kind
    )


def _four_bits(values: NDArray[Any], shape: list[int]) -> Any:
    """A constant of unsigned integers of four bits, two in a byte, the first in its lower half."""
    import openvino as ov
    from openvino import opset13 as ops

    flat = values.astype(np.uint8).reshape(-1)
    flat = np.concatenate([flat, np.zeros(len(flat) % 2, np.uint8)])
    packed = np.ascontiguousarray(flat[0::2] | flat[1::2] << 4)
    return ops.constant(ov.Tensor(packed, ov.Shape(shape), ov.Type.u4), shared_memory=False)
