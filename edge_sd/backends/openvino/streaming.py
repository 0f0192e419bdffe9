"""Weights that stay in their file: inputs of a graph instead of constants in it.

Constants are packed for the kernels when a graph is compiled: weights are in memory once more, and packing is most of
what a load takes. Kernels for products of two inputs pack as they go, as fast, and read an input where it is: mapped
from the model's own file, whose pages the system may take back at any time (`mapping`).

    linear layers   Y = X W^T         X [1, tokens, in], W [1, out, in]
    convolutions    Y = P^T W^T       P [1, in k k, positions], what lies under the kernel; W [1, out, in k k]

A convolution with more positions than outputs keeps its weights: they are few, and its patches would be many.

The kernel for products of 8-bit numbers knows no zero point, so what is rounded is shifted to begin at zero. That adds
the same to an output every time: W x = W (x + c) - c W 1.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .edits import chain
from .graph import fix_shapes, parameter

# Weights of fewer numbers are not worth an input.
LEAST = 1 << 14
# Largest ratio of positions to outputs of a streamed convolution, with little memory.
LEAN_PATCHES = 2
# Operations that only move numbers: rounding before or after them is the same.
MOVES = frozenset({"Transpose", "Reshape", "Interpolate"})


def stream(model: Any, lean: bool) -> dict[str, Any]:
    """Make weights of `model`, whose shapes are known, its inputs; returns the constants that they were, by name.

    Those of layers that multiply 8 bits by 8 bits, as that costs no time; all where `lean`: others are converted at
    every call.
    """
    fix_shapes(model)
    found: dict[str, Any] = {}
    inputs: dict[str, Any] = {}
    shifted: dict[str, Any] = {}
    names = Counter(node.get_friendly_name() for node in model.get_ops() if node.get_type_name() == "Constant")
    for op in model.get_ordered_ops():
        numbers = _numbers(op)
        if numbers is None or _positions(op) > _outputs(op) * (LEAN_PATCHES if lean else 1):
            continue
        if names[numbers.get_friendly_name()] > 1:
            # Equal names in the file could not be told apart.
            continue
        rounding = _rounding(op, numbers)
        if rounding is None and not lean:
            continue
        name = numbers.get_friendly_name()
        if name not in inputs:
            inputs[name], found[name] = _input(numbers), numbers
        _rewrite(op, numbers, inputs[name], rounding, shifted)
    model.add_parameters(list(inputs.values()))
    model.validate_nodes_and_infer_types()
    return found


def _input(numbers: Any) -> Any:
    import openvino as ov

    # For inputs of known shapes the plugin sets memory aside that is never used.
    shape = ov.PartialShape([-1, *numbers.get_output_shape(0)[1:]])
    return parameter(shape, numbers.get_friendly_name(), numbers.get_output_element_type(0))


def constants(model: Any, names: Collection[str]) -> dict[str, Any]:
    """Those constants of a graph as it was read that have one of these names."""
    return {node.get_friendly_name(): node for node in model.get_ops()
            if node.get_type_name() == "Constant" and node.get_friendly_name() in names}  # fmt: skip


@dataclass(frozen=True)
class _Rounding:
    """Rounding to 8 bits before a layer: the operation, what moves its results to the layer, and its range."""

    op: Any
    moves: tuple[Any, ...]
    low: float
    step: float

    @property
    def shift(self) -> float:
        """c: what is added so that the smallest number is zero; nothing where zero is in the middle already."""
        zero = round(-self.low / self.step)
        return 0.0 if zero == 128 else zero * self.step

    def of(self, x: Any) -> Any:
        """Round x + c."""
        from openvino import opset13 as ops

        c = self.shift
        low, high = (_number(bound + c) for bound in (self.low, self.low + 255 * self.step))
        return ops.fake_quantize(ops.add(x, _number(c)) if c else x, low, high, low, high, 256)


def _numbers(op: Any) -> Any | None:
    """The constant that the weights of a linear layer or a convolution are made of; None for other operations."""
    kind = op.get_type_name()
    if kind not in ("MatMul", "Convolution"):
        return None
    attributes = op.get_attributes()
    if attributes["transpose_a"] if kind == "MatMul" else attributes["dilations"] != [1, 1]:
        return None
    made_of = list(chain(op.input_value(1).get_node()))
    # The scales of a layer of many outputs are many, too, but not of this shape.
    whole = list(op.input_value(1).get_shape())
    large = [each for each in made_of if each.get_type_name() == "Constant" and list(each.shape) == whole]
    if len(large) != 1 or math.prod(whole) < LEAST:
        return None
    # Weights of 4 bits have a scale for each group of inputs.
    plain = all(each.get_type_name() in ("Constant", "Convert", "Subtract", "Multiply") for each in made_of)
    scales = {math.prod(each.shape) for each in made_of if each.get_type_name() == "Constant"} - {
        math.prod(large[0].shape)
    }
    of_type = large[0].get_element_type().get_type_name() in ("i8", "u8", "f16", "bf16", "f32")
    return large[0] if plain and of_type and scales <= {1, _outputs(op)} else None


def _outputs(op: Any) -> int:
    return int(op.get_output_shape(0)[1 if op.get_type_name() == "Convolution" else -1])


def _positions(op: Any) -> int:
    """How many patches are to be made; those of linear layers are there already."""
    batch, _, *positions = op.get_output_shape(0)
    return 0 if op.get_type_name() == "MatMul" else int(batch * math.prod(positions))


def _rounding(op: Any, numbers: Any) -> _Rounding | None:
    """The rounding of a layer's input, where its weights are 8-bit numbers around zero, too."""
    kinds = Counter(each.get_type_name() for each in chain(op.input_value(1).get_node()))
    if numbers.get_element_type().get_type_name() != "i8" or kinds["Subtract"] or kinds["Constant"] != 2:
        return None
    moves: list[Any] = []
    node = op.input_value(0).get_node()
    while node.get_type_name() in MOVES and len(node.output(0).get_target_inputs()) == 1:
        moves.insert(0, node)
        node = node.input_value(0).get_node()
    if node.get_type_name() != "FakeQuantize" or node.get_attributes()["levels"] != 256:
        return None
    bounds = [node.input_value(n).get_node() for n in range(1, 5)]
    if not all(each.get_type_name() == "Constant" and math.prod(each.shape) == 1 for each in bounds):
        return None
    low, high, *same = (float(each.data.item()) for each in bounds)
    return _Rounding(node, tuple(moves), low, (high - low) / 255) if same == [low, high] else None


def _rewrite(op: Any, numbers: Any, weights: Any, rounding: _Rounding | None, shifted: dict[str, Any]) -> None:
    """Let a layer be a product with the input `weights`; `shifted` has roundings that several layers read."""
    from openvino import opset13 as ops

    convolution, shape = op.get_type_name() == "Convolution", list(op.get_output_shape(0))
    turned = not convolution and not op.get_attributes()["transpose_b"]
    outputs = _outputs(op)
    x, c = op.input_value(0), 0.0
    if rounding is not None:
        x, c = rounding.op.input_value(0), rounding.shift
        if rounding.moves:
            rounding.moves[0].input(0).replace_source_output(x)
            x = rounding.moves[-1].output(0)
    if convolution:
        padded = _padded(op, x)
        x = _patches(op, padded if rounding is None else rounding.of(padded))
    else:
        if rounding is not None:
            key = rounding.op.get_name()
            if rounding.moves or key not in shifted:
                x = rounding.of(x)
                shifted |= {} if rounding.moves else {key: x}
            else:
                x = shifted[key]
        x = ops.reshape(x, _ints([1, math.prod(shape[:-1]), -1]), False)
    matrix = _matrix(op.input_value(1).get_node(), numbers, weights, turned)
    y = ops.matmul(x, matrix, convolution, not turned)
    if c:
        y = ops.add(y, ops.constant((-c * _sums(op.input_value(1).get_node(), numbers, turned)).reshape(1, 1, outputs)))
    if convolution:
        batch, _, h, w = shape
        # Rows of pixels, channels last, to planes.
        y = ops.transpose(ops.reshape(y, _ints([batch, h, w, outputs]), False), _ints([0, 3, 1, 2]))
    else:
        y = ops.reshape(y, _ints(shape), False)
    y.set_friendly_name(op.get_friendly_name())
    op.output(0).replace(y.output(0))


def _padded(op: Any, x: Any) -> Any:
    from openvino import opset13 as ops

    attributes = op.get_attributes()
    begin, end = attributes["pads_begin"], attributes["pads_end"]
    if not any([*begin, *end]):
        return x
    return ops.pad(x, _ints([0, 0, *begin]), _ints([0, 0, *end]), "constant", _number(0))


def _patches(op: Any, x: Any) -> Any:
    """What lies under the kernel at each position, [1, in k k, positions] in the order of the kernel's own numbers."""
    from openvino import opset13 as ops

    batch, channels = op.get_input_shape(0)[:2]
    rows, columns = op.get_input_shape(1)[2:]
    h, w = op.get_output_shape(0)[2:]
    down, right = op.get_attributes()["strides"]
    strides, axes = _ints([down, right]), _ints([2, 3])
    parts = []
    for n in range(batch):
        row = ops.slice(x, _ints([n]), _ints([n + 1]), _ints([1]), _ints([0])) if batch > 1 else x
        under = []
        for i in range(rows):
            for j in range(columns):
                start, stop = [i, j], [i + down * (h - 1) + 1, j + right * (w - 1) + 1]
                under.append(ops.slice(row, _ints(start), _ints(stop), strides, axes))
        # Kernel positions in order, within each channel.
        part = ops.concat(under, 2) if len(under) > 1 else under[0]
        parts.append(ops.reshape(part, _ints([1, channels * len(under), h * w]), False))
    return ops.concat(parts, 2) if batch > 1 else parts[0]


def _matrix(node: Any, numbers: Any, weights: Any, turned: bool) -> Any:
    """The weights `node` as [1, out, in k k], or [1, in, out] where turned, of an input in place of its numbers."""
    from openvino import opset13 as ops

    shape = list(numbers.shape)
    if node.get_friendly_name() == numbers.get_friendly_name():
        return ops.reshape(weights, _ints([1, shape[0], math.prod(shape[1:])]), False)
    if node.get_type_name() == "Constant":
        return ops.constant(_flat(node.data, shape, turned), node.get_element_type())
    first, *more = (_matrix(each.get_node(), numbers, weights, turned) for each in node.input_values())
    if node.get_type_name() == "Convert":
        return ops.convert(first, node.get_element_type().get_type_name())
    return (ops.multiply if node.get_type_name() == "Multiply" else ops.subtract)(first, *more)


def _flat(scale: NDArray[Any], shape: Sequence[int], turned: bool) -> NDArray[Any]:
    """A scale, or a zero point, of each output, as what goes with a matrix; of one number for all it stays that."""
    if scale.size == 1:
        return np.asarray(scale).reshape(1, 1, 1)
    return np.asarray(scale).reshape((1, 1, -1) if turned else (1, -1, 1))


def _sums(node: Any, numbers: Any, turned: bool) -> NDArray[np.float32]:
    """W 1: the sum of each output's weights."""
    sums = numbers.data.reshape(numbers.shape[0], -1).sum(axis=0 if turned else 1, dtype=np.int32)
    name = numbers.get_friendly_name()
    (scale,) = [each for each in chain(node) if each.get_type_name() == "Constant" and each.get_friendly_name() != name]
    return np.asarray(sums * np.asarray(scale.data, np.float32).ravel(), np.float32)


def _ints(numbers: Sequence[int]) -> Any:
    from openvino import opset13 as ops

    return ops.constant(np.array(numbers, np.int64))


def _number(number: float) -> Any:
    from openvino import opset13 as ops

    return ops.constant(np.float32(number))
