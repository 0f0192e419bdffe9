"""Edits of an OpenVINO graph that was read and is not compiled yet: its files stay as they are."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...components.edits import Edits
from ...components.lora import Change, Lora, Unplaced, changes_of
from ...errors import InvalidRequest
from ...text.textual_inversion import FIRST


def apply(model: Any, edits: Edits, name: str) -> None:
    """Change `model`, the graph `name`, in place. Raises InvalidRequest for an edit that does not fit it."""
    if edits.vectors is not None:
        _add_vectors(model, edits.vectors, name)
    if edits.clip_skip > 1:
        _skip_layers(model, edits.clip_skip, name)
    if edits.loras:
        add_loras(model, edits.loras, edits.part, name, edits.unplaced)


# Prefixes of wrapper modules, which LoRAs do not name.
_MODULE = (
    r"(?:^|\.)((?:down_blocks|up_blocks|mid_block|conv_in|conv_out|time_embedding|add_embedding|text_model|encoder"
    r"|embeddings|text_projection|transformer_blocks|single_transformer_blocks|pos_embed|time_text_embed"
    r"|context_embedder|norm_out|proj_out|time_embed|caption_projection|patch_embed)\b[\w.]*?)"
)
# Characters of a name that are looked at, and operations one after another between a weight's numbers and its reader:
# both searches take time beyond measure in a graph that is made for it. A weight of 4 bits has six.
LONGEST, DEEPEST = 1000, 8
# OpenVINO's names of weights and of layers. Quantized weights lose their names, so the layer's is used.
_WEIGHT, _LAYER = re.compile(_MODULE + r"\.weight"), re.compile(_MODULE + "/")


def add_loras(
    model: Any, loras: Sequence[tuple[Lora, float]], part: str, name: str, unplaced: Unplaced | None = None
) -> None:
    """Add differences, times their factors, to the weights of linear layers and convolutions.

    Weights of few bits are taken apart, and put together again with 8 for each number and a scale for each output.
    Raises InvalidRequest where nothing has a place, or something has another shape.
    """
    known = layers(model)
    changes = changes_of(loras, part, known, name, unplaced)
    ports = [(port, changes[module], module) for module in changes for port in known[module]]
    # The sums run in parallel; only one thread changes the graph.
    with ThreadPoolExecutor() as pool:
        for (port, _, module), stored in zip(ports, pool.map(lambda each: _changed(*each), ports), strict=True):
            _replace(port, stored, module)


def layers(model: Any) -> dict[str, list[Any]]:
    """Name of a module -> the inputs that read its weight."""
    found: dict[str, list[Any]] = {}
    for node in model.get_ops():
        if node.get_type_name() not in ("MatMul", "Convolution"):
            continue
        port = node.input(1)
        stored = list(chain(port.get_source_output().get_node()))
        matches = [_WEIGHT.search(each.get_friendly_name()[:LONGEST]) for each in stored]
        matches += [_LAYER.search(node.get_friendly_name()[:LONGEST])] if stored else []
        if match := next(filter(None, matches), None):
            found.setdefault(match[1], []).append(port)
    return found


def plain_input(layer: Any) -> Any:
    """Input of a layer before smoothing and rounding."""
    value = layer.input_value(0)
    while value.get_node().get_type_name() == "FakeQuantize" or _smooths(value.get_node()):
        value = value.get_node().input_value(0)
    return value


def _smooths(node: Any) -> bool:
    """Whether it moves outliers into the weights behind it (SmoothQuant), as nncf calls it."""
    return node.get_type_name() == "Multiply" and "nncf_smooth_quant" in node.get_friendly_name()


def _smoothing(layer: Any) -> NDArray[np.float32] | None:
    """What each input of a layer is multiplied by, [in]; its weights were divided by that."""
    node = layer.input_value(0).get_node()
    if node.get_type_name() == "FakeQuantize":
        node = node.input_value(0).get_node()
    return _value(node.input_value(1).get_node()).ravel() if _smooths(node) else None


def misfit(lora: Lora, module: str, why: object) -> InvalidRequest:
    return InvalidRequest(f"the LoRA {lora.name!r} does not fit this model: {module} is {why}")


def chain(node: Any) -> Iterator[Any]:
    """A weight's node and what it is made of: constants, perhaps with a scale and a zero point; else nothing."""
    if _is_stored(node):
        yield node
        for value in node.input_values():
            yield from chain(value.get_node())


def _is_stored(node: Any, depth: int = DEEPEST) -> bool:
    """Whether it is a constant, or made of constants alone by at most so many operations."""
    kind = node.get_type_name()
    return kind == "Constant" or (
        depth > 0
        and kind in _ARITHMETIC
        and all(_is_stored(value.get_node(), depth - 1) for value in node.input_values())
    )


_ARITHMETIC: dict[str, Callable[[Any, list[NDArray[Any]]], NDArray[Any]]] = {
    "Convert": lambda node, values: values[0],
    "Subtract": lambda node, values: values[0] - values[1],
    "Multiply": lambda node, values: values[0] * values[1],
    "Reshape": lambda node, values: values[0].reshape(tuple(node.output(0).get_shape())),
}


# The types of weights that a changed one has again, but for bfloat16, which numpy has not.
_FLOATS: dict[str, type[np.floating[Any]]] = {
    "f64": np.float64, "f32": np.float32, "f16": np.float16, "bf16": np.float32,
}  # fmt: skip


def _value(node: Any) -> NDArray[np.float32]:
    """A weight as float32, whatever it is stored as."""
    if node.get_type_name() == "Constant":
        # Of types that numpy does not have, such as integers of 4 bits and floats of 8, `data` is bytes.
        return np.asarray(node.get_data(dtype=np.float32), np.float32)
    inputs = [value.get_node() for value in node.input_values()]
    if node.get_type_name() == "Reshape":
        inputs = inputs[:1]
    made = _ARITHMETIC[node.get_type_name()](node, [_value(each) for each in inputs])
    return np.asarray(made, np.float32)


def _changed(port: Any, changes: Sequence[Change], module: str) -> tuple[NDArray[Any], ...]:
    """The changed weight of a port: in its stored type, or 8-bit values, an optional zero point, and the scale."""
    source = port.get_source_output()
    weight = _value(source.get_node())
    reader = port.get_node()
    turned = reader.get_type_name() == "MatMul" and not reader.get_attributes().get("transpose_b", False)
    shape, smoothing = weight.shape[::-1] if turned else weight.shape, _smoothing(reader)
    for lora, factor, difference in changes:
        try:
            change = difference.of(shape, factor)
        except ValueError as error:
            raise misfit(lora, module, error) from error
        if smoothing is not None:
            change = change / smoothing.reshape(-1, *[1] * (change.ndim - 2))
        weight = weight + (change.T if turned else change)
    made_of = list(chain(source.get_node()))
    stored = [each for each in made_of if each.get_type_name() == "Constant"]
    kinds = {each.get_element_type().get_type_name() for each in stored}
    if kinds <= _FLOATS.keys():
        return (np.ascontiguousarray(weight, _FLOATS[stored[0].get_element_type().get_type_name()]),)
    axis = 1 if turned else 0
    signed = kinds & {"i8", "i4"}
    if any(each.get_type_name() == "Subtract" for each in made_of) or not signed:
        return _quantized(weight, axis)
    # Beside rounded activations the plugin wants no zero point; for the seven bits see converters/openvino/quantize.py.
    numbers = next(each for each in stored if each.get_element_type().get_type_name() in signed)
    return _symmetric(weight, axis, 63 if np.abs(_value(numbers)).max() <= 64 else 127)


def _replace(port: Any, stored: tuple[NDArray[Any], ...], module: str) -> None:
    import openvino as ov
    from openvino import opset13 as ops

    # Not copied: the graph holds the arrays.
    numbers, *more = (ops.constant(each, shared_memory=True) for each in stored)
    new = numbers
    if more:
        zero, scale = (more[0] if len(more) == 2 else None), more[-1]
        new = ops.convert(numbers, scale.get_element_type().get_type_name())
        new = new if zero is None else ops.subtract(new, ops.convert(zero, ov.Type.f16))
        new = ops.multiply(new, scale)
    new.set_friendly_name(f"{module}.weight")
    kind = port.get_source_output().get_element_type()
    port.replace_source_output((new if new.get_element_type() == kind else ops.convert(new, kind)).output(0))


def _symmetric(weight: NDArray[np.float32], axis: int, most: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Numbers from -`most` to `most`, and the scale of each output channel: weight = numbers scale."""
    others = tuple(n for n in range(weight.ndim) if n != axis)
    scale = np.maximum(np.abs(weight).max(axis=others, keepdims=True) / most, 1e-9).astype(np.float32)
    return np.round(weight / scale).astype(np.int8), scale


def _quantized(
    weight: NDArray[np.float32], axis: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.float16]]:
    """Numbers of 8 bits, zero point and scale, for each output channel its own: weight = (numbers - zero) scale."""
    others = tuple(n for n in range(weight.ndim) if n != axis)
    low = np.minimum(weight.min(axis=others, keepdims=True), 0)
    high = np.maximum(weight.max(axis=others, keepdims=True), 0)
    scale = np.maximum((high - low) / 255, 1e-6).astype(np.float16)
    exact = scale.astype(np.float32)
    zero = np.clip(np.round(-low / exact), 0, 255)
    numbers = np.clip(np.round(weight / exact) + zero, 0, 255)
    return numbers.astype(np.uint8), zero.astype(np.uint8), scale


def _add_vectors(model: Any, vectors: NDArray[np.float32], name: str) -> None:
    """A second table of embeddings: ids from FIRST on are rows of `vectors`, to all but the lookup they are id 0."""
    import openvino as ov
    from openvino import opset13 as ops

    (ids,) = [each for each in model.get_parameters() if "input_ids" in each.output(0).get_names()]
    lookup = next((node for node in _after(ids) if node.get_type_name() == "Gather" and _looks_up(node, ids)), None)
    if lookup is None:
        raise InvalidRequest(f"{name} has no table of embeddings; convert the model again to use words of your own")
    users = list(ids.output(0).get_target_inputs())
    first = ops.constant(np.array(FIRST, np.int64))
    wide = ops.convert(ids, "i64")
    added = ops.greater_equal(wide, first)
    known = ops.select(added, ops.constant(np.array(0, np.int64)), wide)
    for user in users:
        # Other readers, such as the search for the end of the text, must not take these ids for the largest.
        user.replace_source_output(ops.convert(known, ids.get_element_type().get_type_name()).output(0))
    readers = list(lookup.output(0).get_target_inputs())
    rows = ops.maximum(ops.subtract(wide, first), ops.constant(np.array(0, np.int64)))
    kind = lookup.output(0).get_element_type()
    table = ops.convert(ops.constant(vectors), kind.get_type_name())
    own = ops.gather(table, rows, ops.constant(np.array(0, np.int64)))
    chosen = ops.select(ops.unsqueeze(added, ops.constant(np.array([-1], np.int64))), own, lookup)
    for reader in readers:
        reader.replace_source_output(chosen.output(0))
    model.validate_nodes_and_infer_types()
    assert lookup.output(0).get_partial_shape()[-1] == ov.Dimension(vectors.shape[1])


def embedding_width(model: Any) -> int:
    """How many numbers a token's embedding has; 0 where the graph has no table of them."""
    for ids in model.get_parameters():
        for node in _after(ids):
            if node.get_type_name() == "Gather" and _looks_up(node, ids):
                return int(node.output(0).get_partial_shape()[-1].get_length())
    return 0


def _after(node: Any) -> Iterator[Any]:
    """What reads a node directly, or through changes of type and shape."""
    for target in node.output(0).get_target_inputs():
        reader = target.get_node()
        yield reader
        if reader.get_type_name() in ("Convert", "Reshape", "Unsqueeze"):
            yield from _after(reader)


def _looks_up(gather: Any, ids: Any) -> bool:
    """Whether this gather looks up table rows by the ids (and does not pick one of the ids)."""
    node = gather.input_value(1).get_node()
    while node.get_type_name() in ("Convert", "Reshape", "Unsqueeze"):
        node = node.input_value(0).get_node()
    return bool(node.get_friendly_name() == ids.get_friendly_name())


def _skip_layers(model: Any, skip: int, name: str) -> None:
    """Let the final norm read an earlier layer's states, those that the graph names hidden_states.N."""
    states = {}
    for port in model.outputs:
        for port_name in port.get_names():
            if found := re.fullmatch(r"hidden_states\.(\d+)", port_name):
                states[int(found[1])] = port.get_node().input_value(0)
    norm = _norm(model.output("last_hidden_state"))
    if not states or norm is None:
        raise InvalidRequest(f"{name} has no hidden states, which CLIP skip needs; convert the model again")
    last = max(states)
    if norm.input_value(0) != states[last]:
        last += 1  # Some exports leave the last one out.
    wanted = states.get(last - skip + 1)
    if wanted is None or skip > last:
        raise InvalidRequest(f"CLIP skip {skip} is beyond this model's text encoder; valid: 1 to {last}")
    norm.input(0).replace_source_output(wanted)
    model.validate_nodes_and_infer_types()


def _norm(output: Any) -> Any:
    """The layer norm that makes an output: scaled and shifted, perhaps converted, it is."""
    queue, seen = [output.get_node()], 0
    while queue and seen < 16:
        node, seen = queue.pop(0), seen + 1
        if node.get_type_name() == "MVN":
            return node
        if node.get_type_name() in ("Result", "Add", "Multiply", "Convert"):
            queue += [value.get_node() for value in node.input_values()]
    return None
