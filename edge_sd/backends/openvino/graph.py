"""Rewrites of an OpenVINO graph before compiling: the same picture with less arithmetic.

Each rewrite finds its place by the kinds of operations and their dependencies, not by names, so it works on any UNet in
this format, quantized or not. Shapes have to be known.

    hoist          loop-invariant code motion: what depends on the prompt alone, or on the timestep alone
    split_deep     a graph that reuses deep features beside the one that makes them (DeepCache, Ma et al. 2023)
    fold_upsampling   doubling and the convolution after it, as one transposed convolution
    products_in_convolutions   8-bit matrix products where the CPU has kernels for convolutions only
    merge_tokens   keys and values of the finest self-attention, averaged 2 x 2 (ToDo, Smith et al. 2024)
    pad_heads   heads as wide as the matrix unit's tiles, where there are many keys
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...components.base import DEEP
from .edits import DEEPEST

# Below these many tokens averaging them takes longer than it saves.
MANY_TOKENS = 1024
# Inputs with this prefix are weights passed from outside; values that depend on them alone count as constant.
GIVEN = "lora."
# Numbers of 16 bits in a row of a matrix unit's tile (AMX).
TILE = 32


def hoist(model: Any, name: str) -> Any | None:
    """Move the part of `model` that depends on the input `name` alone into a model of its own; None if there is none.

    Cross-attention's keys and values are of the prompt alone, the projections of the time embedding of the timestep
    alone, a ControlNet's features of its lines of those alone: in a loop over steps they are computed once. The outputs
    of the one are inputs of the other, of the same names: `name`.0, `name`.1, … in place of `name`.
    """
    import openvino as ov
    from openvino import opset13 as ops

    source = _parameter(model, name)
    if source is None:
        return None
    fix_shapes(model)
    depends = dependencies(model)
    alone = frozenset({source.get_name()})
    weights = [each for each in model.get_parameters() if is_given(each) and all(
        depends[reader.get_node().get_name()] == alone for reader in each.output(0).get_target_inputs())]  # fmt: skip
    results: list[Any] = []
    entrances: list[Any] = []
    for op in model.get_ordered_ops():
        if depends[op.get_name()] != alone or op.get_type_name() == "Result":
            continue
        for out in op.outputs():
            users = [each for each in out.get_target_inputs() if depends[each.get_node().get_name()] != alone]
            if users:
                entrance = parameter(out.get_partial_shape(), f"{name}.{len(entrances)}", out.get_element_type())
                results.append(ops.result(out))
                for user in users:
                    user.replace_source_output(entrance.output(0))
                entrances.append(entrance)
    for each in (source, *weights):
        model.remove_parameter(each)
    model.add_parameters(entrances)
    model.validate_nodes_and_infer_types()
    before = ov.Model(results, [source, *weights], f"{model.get_friendly_name()}.{name}")
    for port, entrance in zip(before.outputs, entrances, strict=True):
        port.get_tensor().set_names(entrance.output(0).get_names())
    return before


def split_deep(model: Any, depth: int = 1) -> Any:
    """Let `model` return the deep features that a second model, which this returns, takes as its input `DEEP`.

    A U-Net joins each skip connection with what comes from below. Below the `depth`-th last join lies most of the
    arithmetic and little of what changes from one step to the next.
    """
    from openvino import opset13 as ops

    below = joins(model)[-depth].input_value(0)
    result = ops.result(below)
    model.add_results([result])
    result.output(0).get_tensor().set_names({DEEP})
    model.validate_nodes_and_infer_types()
    shallow = model.clone()
    shallow.remove_result(shallow.get_results()[-1])
    join = joins(shallow)[-depth]
    entrance = parameter(below.get_partial_shape(), DEEP, below.get_element_type())
    join.input(0).replace_source_output(entrance.output(0))
    shallow.add_parameters([entrance])
    used = {op.get_name() for op in shallow.get_ordered_ops() if op.get_output_size()}
    for each in shallow.get_parameters():
        if not any(reader.get_node().get_name() in used for reader in each.output(0).get_target_inputs()):
            shallow.remove_parameter(each)
    shallow.validate_nodes_and_infer_types()
    return shallow


def merge_tokens(model: Any) -> int:
    """Average keys and values over 2 x 2 tokens where self-attention has most of them; returns in how many layers.

    Neighbours are much alike there, and attention takes a quarter of the time. Queries keep their full resolution.
    """
    from openvino import opset13 as ops

    sample = _parameter(model, "sample")
    assert sample is not None
    h, w = sample.get_output_shape(0)[2:]
    layers = [op for op in model.get_ordered_ops() if op.get_type_name() == "ScaledDotProductAttention"]
    own = [op for op in layers if op.input_value(0).get_shape()[2] == op.input_value(1).get_shape()[2]]
    most = max((op.input_value(1).get_shape()[2] for op in own), default=0)
    while h * w > most and h % 2 == w % 2 == 0:
        h, w = h // 2, w // 2
    if most < MANY_TOKENS or h * w != most or h % 2 or w % 2:
        return 0
    finest = [op for op in own if op.input_value(1).get_shape()[2] == most]
    for op in finest:
        for n in (1, 2):
            b, heads, _, d = op.input_value(n).get_shape()
            blocks = ops.constant(np.array([b, heads, h // 2, 2, w // 2, 2, d]))
            means = ops.reduce_mean(ops.reshape(op.input_value(n), blocks, False), ops.constant([3, 5]), False)
            merged = ops.reshape(means, ops.constant(np.array([b, heads, h * w // 4, d])), False)
            op.input(n).replace_source_output(merged.output(0))
    model.validate_nodes_and_infer_types()
    return len(finest)


def pad_heads(model: Any) -> int:
    """Pad queries and keys with zeros to whole tiles where attention has many keys; returns the number of layers.

    The width is what products of queries and keys are summed over. Of SD 1.5's 40 numbers a second tile would take 8,
    and the plugin's kernel is slower at that than at the 64 of two whole ones. Zeros change no sum.
    """
    from openvino import opset13 as ops

    found = 0
    for op in model.get_ordered_ops():
        if op.get_type_name() != "ScaledDotProductAttention" or op.get_attributes()["causal"]:
            continue
        # Of three inputs: without a mask, and scaled by the width.
        if op.get_input_size() != 3 or not all(value.get_partial_shape().is_static for value in op.input_values()):
            continue
        q, k, v = (op.input_value(n) for n in range(3))
        rank, width = len(q.get_shape()), q.get_shape()[-1]
        if width % TILE == 0 or k.get_shape()[-2] < MANY_TOKENS:
            continue
        more = [*[0] * (rank - 1), -width % TILE]
        zero = ops.constant(np.array(0), q.get_element_type())
        q, k = (ops.pad(x, ops.constant([0] * rank), ops.constant(more), "constant", zero) for x in (q, k))
        scale = ops.constant(np.array(width**-0.5), q.get_element_type())
        shares = ops.softmax(ops.matmul(ops.multiply(q, scale), k, False, True), -1)
        attended = ops.matmul(shares, v, False, False)
        attended.set_friendly_name(op.get_friendly_name())
        op.output(0).replace(attended.output(0))
        found += 1
    model.validate_nodes_and_infer_types()
    return found


def joins(model: Any) -> list[Any]:
    """The concatenations of features from below with a skip connection, in order."""
    return [op for op in model.get_ordered_ops()
            if op.get_type_name() == "Concat" and op.get_input_size() == 2 and len(op.get_output_partial_shape(0)) == 4
            and op.get_axis() == 1 and op.get_output_element_type(0).is_real()]  # fmt: skip


def _parameter(model: Any, name: str) -> Any | None:
    return next((each for each in model.get_parameters() if name in each.output(0).get_names()), None)


def parameter(shape: Any, name: str, kind: Any = np.float32) -> Any:
    """A new input of that name."""
    from openvino import opset13 as ops

    made = ops.parameter(shape, kind)
    made.set_friendly_name(name)
    made.output(0).set_names({name})
    return made


def is_given(node: Any) -> bool:
    """Whether it is an input whose name begins with GIVEN."""
    return bool(node.get_type_name() == "Parameter" and node.get_friendly_name().startswith(GIVEN))


def fix_shapes(model: Any) -> None:
    """Replace ShapeOf of a known shape by a constant, so that it is no dependency."""
    from openvino import opset13 as ops

    for op in model.get_ordered_ops():
        if op.get_type_name() == "ShapeOf" and op.input_value(0).get_partial_shape().is_static:
            shape = ops.constant(list(op.input_value(0).get_shape()), op.get_output_element_type(0))
            op.output(0).replace(shape.output(0))


def dependencies(model: Any) -> dict[str, frozenset[str]]:
    """Name of each operation -> the names of the parameters that it depends on."""
    found: dict[str, frozenset[str]] = {}
    for op in model.get_ordered_ops():
        name, inputs = op.get_name(), [op.input_value(n).get_node().get_name() for n in range(op.get_input_size())]
        own = op.get_type_name() == "Parameter" and not is_given(op)
        found[name] = frozenset({name}) if own else _union(found[each] for each in inputs)
    return found


def _union(sets: Iterable[frozenset[str]]) -> frozenset[str]:
    found = frozenset[str]()
    for each in sets:
        # Sets are nearly always equal, so they are shared: building thousands dominates the time here.
        if not each <= found:
            found = each if found <= each else found | each
    return found


def fold_upsampling(model: Any) -> int:
    """Put nearest-neighbour doubling into the 3 x 3 convolution after it; returns how many times.

    Of the nine pixels under such a kernel only four differ, so its weights can be summed for each of the four places
    that a pixel becomes: a transposed convolution of 4 x 4 with stride 2, the same numbers for 4/9 of the products.
    """
    from openvino import opset13 as ops

    found = 0
    for op in model.get_ordered_ops():
        if op.get_type_name() != "Convolution" or op.input_value(0).get_node().get_type_name() != "Interpolate":
            continue
        up = op.input_value(0).get_node()
        small, large = up.input_value(0), up.output(0)
        doubled = [2 * n for n in small.get_shape()[2:]] == list(large.get_shape())[2:]
        attributes = op.get_attributes()
        same = attributes["pads_begin"] == attributes["pads_end"] == [1, 1] and attributes["strides"] == [1, 1]
        kernel = _constant(op.input_value(1))
        if (
            not doubled
            or not same
            or kernel is None
            or kernel.shape[2:] != (3, 3)
            or len(large.get_target_inputs()) > 1
        ):
            continue
        weights = ops.constant(_doubling_kernel(kernel), shared_memory=True)
        if kernel.dtype != np.float32:
            weights = ops.convert(weights, "f32")
        moved = ops.convolution_backprop_data(small, weights, [2, 2], None, [1, 1], [1, 1], [1, 1])
        moved.set_friendly_name(op.get_friendly_name())
        op.output(0).replace(moved.output(0))
        found += 1
    model.validate_nodes_and_infer_types()
    return found


def _doubling_kernel(kernel: NDArray[Any]) -> NDArray[Any]:
    """The kernel [in, out, 4, 4] of the transposed convolution that doubling and `kernel` [out, in, 3, 3] are."""
    # Slices and sums: an einsum of these sizes would take half of the loading time.
    k = kernel.transpose(1, 0, 2, 3)
    transposed = np.empty((*k.shape[:2], 4, 4), kernel.dtype)
    # Which rows, and columns, of the kernel meet the pixels 2i - 1 .. 2i + 2 that input i becomes.
    meeting = ((2,), (1, 2), (0, 1), (0,))
    for a, rows in enumerate(meeting):
        for b, columns in enumerate(meeting):
            transposed[:, :, a, b] = sum(k[:, :, y, x].astype(np.float32) for y in rows for x in columns)
    return transposed


def _constant(port: Any) -> Any | None:
    """The array of a constant, through a conversion of its type."""
    node = port.get_node()
    if node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    return node.get_data() if node.get_type_name() == "Constant" else None


def products_in_convolutions(model: Any) -> int:
    """Let 8-bit products with weights be convolutions of 1 x 1; returns how many.

    On CPUs without VNNI the plugin has fast 8-bit kernels for convolutions but not for matrix products.
    Tokens one after the other are pixels in a row, channels last, so nothing is moved.
    """
    from openvino import opset13 as ops

    found = 0
    for op in model.get_ordered_ops():
        if op.get_type_name() != "MatMul" or op.input_value(0).get_node().get_type_name() != "FakeQuantize":
            continue
        attributes, x = op.get_attributes(), op.input_value(0)
        kernel = _as_kernel(op.input_value(1)) if attributes["transpose_b"] and not attributes["transpose_a"] else None
        if kernel is None or len(x.get_shape()) != 3:
            continue
        b, n, c = x.get_shape()
        width = op.get_output_shape(0)[-1]
        pixels = ops.transpose(ops.reshape(x, ops.constant([b, 1, n, c]), False), ops.constant([0, 3, 1, 2]))
        y, last = ops.convolution(pixels, kernel, [1, 1], [0, 0], [0, 0], [1, 1]), op
        users = list(op.output(0).get_target_inputs())
        added = users[0].get_node() if len(users) == 1 and users[0].get_node().get_type_name() == "Add" else None
        bias = None if added is None else _constant(added.input_value(1 - users[0].get_index()))
        if bias is not None and bias.size == width:
            # Inside the convolution it costs nothing.
            y, last = ops.add(y, ops.constant(np.asarray(bias, np.float32).reshape(1, width, 1, 1))), added
        tokens = ops.reshape(ops.transpose(y, ops.constant([0, 2, 3, 1])), ops.constant([b, n, width]), False)
        last.output(0).replace(tokens.output(0))
        found += 1
    model.validate_nodes_and_infer_types()
    return found


def _as_kernel(port: Any, depth: int = DEEPEST) -> Any | None:
    """Weights [out, in], constants through the conversion and scaling of 8 bits, as a kernel [out, in, 1, 1].

    None for what more than `depth` operations make of them.
    """
    from openvino import opset13 as ops

    node = port.get_node()
    kind = node.get_type_name()
    if kind == "Constant":
        array = node.get_data()
        return ops.constant(array.reshape(*array.shape, 1, 1)) if array.ndim == 2 else node
    if kind not in ("Convert", "Multiply", "Subtract") or not depth:
        return None
    inputs = [_as_kernel(node.input_value(n), depth - 1) for n in range(node.get_input_size())]
    if any(each is None for each in inputs):
        return None
    if kind == "Convert":
        return ops.convert(inputs[0], node.get_output_element_type(0).get_type_name())
    return (ops.multiply if kind == "Multiply" else ops.subtract)(*inputs)
