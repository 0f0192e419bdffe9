"""The compressed forms of constants, decompressed: op name -> function of numpy arrays by their MIL names.

Two generations: iOS16's take indices and masks as packed bytes and a shape, iOS18's as arrays of small integers.
Source: coremltools' operation reference (mil/ops/defs/iOS16/constexpr_ops.py and iOS18/compression.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .package import Function, Lazy, Operation, unpack_bits

Array = NDArray[Any]


def affine_dequantize(quantized_data: Array, zero_point: Array, scale: Array, axis: Array) -> Array:
    """scale (q - zero_point), with one scale for all or one for each place on `axis`."""
    shape = [-1 if n == int(axis) % quantized_data.ndim else 1 for n in range(quantized_data.ndim)]

    def along(x: Array) -> Array:
        return x.astype(np.float32).reshape(shape) if x.ndim else x.astype(np.float32)

    return (quantized_data.astype(np.float32) - along(zero_point)) * along(scale)


def lut_to_dense(indices: Array, lut: Array, shape: Array | None = None, vector_axis: Array | None = None) -> Array:
    """iOS16: packed indices of one table. iOS18: a table for each block of the array, of numbers or vectors."""
    if shape is not None:
        sizes = [int(n) for n in shape]
        each = unpack_bits(indices.reshape(-1), int(math.log2(lut.size)), math.prod(sizes))
        return np.asarray(lut[each].reshape(sizes))
    blocks = lut.shape[:-2]
    which = np.broadcast_to(np.zeros((), np.intp), indices.shape)
    for axis, count in enumerate(blocks):
        place = np.arange(indices.shape[axis]) // (indices.shape[axis] // count)
        which = which * count + place.reshape([-1 if n == axis else 1 for n in range(indices.ndim)])
    found = lut.reshape(-1, *lut.shape[-2:])[which, indices.astype(np.intp)]
    if lut.shape[-1] == 1:
        return np.asarray(found[..., 0])
    assert vector_axis is not None
    axis = int(vector_axis) % indices.ndim
    moved = np.moveaxis(found, -1, axis + 1)
    return moved.reshape([s * (lut.shape[-1] if n == axis else 1) for n, s in enumerate(indices.shape)])


def blockwise_shift_scale(data: Array, scale: Array, offset: Array | None = None) -> Array:
    """scale (data - offset), with one scale for each block of the array."""
    values = data.astype(np.float32)
    if offset is not None:
        values = values - _blown_up(offset, data.shape)
    return values * _blown_up(scale, data.shape)


def sparse_to_dense(nonzero_data: Array, mask: Array, shape: Array | None = None) -> Array:
    """The values at the places of the mask, zeros elsewhere."""
    if shape is not None:
        sizes = [int(n) for n in shape]
        mask = np.unpackbits(mask.reshape(-1), count=math.prod(sizes), bitorder="little").reshape(sizes)
    dense = np.zeros(mask.shape, nonzero_data.dtype)
    dense[mask != 0] = nonzero_data
    return dense


def cast(source_val: Array, output_dtype: str) -> Array:
    return source_val.astype(np.float32)


def _blown_up(blocks: Array, shape: tuple[int, ...]) -> Array:
    values = blocks.astype(np.float32)
    for axis, (count, size) in enumerate(zip(blocks.shape, shape, strict=True)):
        values = values.repeat(size // count, axis)
    return values


CONSTEXPR: dict[str, Callable[..., Array]] = {
    f"constexpr_{function.__name__}": function
    for function in (affine_dequantize, lut_to_dense, blockwise_shift_scale, sparse_to_dense, cast)
}


class Constants:
    """The constants of a function by name, each decompressed when it is asked for."""

    def __init__(self, function: Function) -> None:
        self.operations: dict[str, Operation] = {
            each.name: each for each in function.operations if each.kind == "const" or each.kind in CONSTEXPR
        }

    def read(self, name: str) -> Array:
        """Raises InvalidModel if the weight file is damaged."""
        operation = self.operations[name]
        if operation.kind == "const":
            return operation.attributes["val"].read()
        given = {**operation.attributes, **{name: each[0] for name, each in operation.inputs.items()}}
        given.pop("name", None)
        return CONSTEXPR[operation.kind](**{name: self._value(each) for name, each in given.items()})

    def _value(self, given: str | Lazy) -> Any:
        if isinstance(given, str):
            return self.read(given)
        found = given.read()
        return str(found) if given.type.dtype == "string" else found
