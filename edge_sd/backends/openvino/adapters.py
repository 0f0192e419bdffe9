"""LoRAs as inputs of a graph, so that another LoRA or another weight needs no compiling.

    y = W x + U (D x)        D [R, in], U [out, R]; R is large enough for the ranks of all that are given together

x is the layer's input before it is smoothed and rounded (W8A8). D and U are zero for layers without a LoRA and for
unused ranks. This covers linear layers and convolutions of 1 x 1. Larger kernels, and differences that are no product
of two thin matrices, are added to the weights (`edits`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...components.base import Array
from ...components.edits import Edits
from ...components.lora import Change, changes_of
from .edits import layers, misfit, plain_input
from .graph import GIVEN, parameter

# Ranks are rounded up to a multiple of this. Where they are more than MOST together, what they cost at every step is
# more than adding them to the weights takes.
RANKS, MOST = 16, 64


@dataclass(frozen=True)
class Adapters:
    """The inputs of the graph `name`, the component `part`.

    rank      R
    shapes    module -> (out, in) of its layer, for those that have inputs
    modules   all that the graph has
    """

    name: str
    part: str
    rank: int
    shapes: Mapping[str, tuple[int, int]]
    modules: tuple[str, ...]

    def values(self, edits: Edits) -> dict[str, Array] | None:
        """Values of the inputs for the LoRAs of `edits`. None where the LoRAs need other inputs, or none.

        Raises InvalidRequest for what is of another model.
        """
        changes = changes_of(edits.loras, self.part, self.modules, self.name, edits.unplaced)
        if not changes or not set(changes) <= set(self.shapes):
            return None
        found: dict[str, Array] = {}
        for module, shape in self.shapes.items():
            thin = _thin(changes.get(module, ()), module, shape)
            if thin is None or len(thin[0]) > self.rank:
                return None
            down, up = np.zeros((self.rank, shape[1]), np.float32), np.zeros((shape[0], self.rank), np.float32)
            down[: len(thin[0])], up[:, : len(thin[0])] = thin
            found |= {f"{GIVEN}{module}.down": down, f"{GIVEN}{module}.up": up}
        return found


def adapt(model: Any, edits: Edits, name: str) -> Adapters | None:
    """Give `model` inputs for the LoRAs of `edits`. None, and nothing changed, where they are to be added to weights.

    Raises InvalidRequest for what is of another model.
    """
    known = layers(model)
    changes = changes_of(edits.loras, edits.part, known, name, edits.unplaced)
    shapes, rank = {}, 0
    for module, mine in changes.items():
        found = {_shape(port.get_node()) for port in known[module]}
        shape = found.pop()
        thin = None if shape is None or found else _thin(mine, module, shape)
        if shape is None or thin is None:
            return None
        shapes[module], rank = shape, max(rank, len(thin[0]))
    if not 0 < rank <= MOST:
        return None
    adapters = Adapters(name, edits.part, -(-rank // RANKS) * RANKS, shapes, tuple(known))
    for module in shapes:
        _add_inputs(model, adapters, module, [port.get_node() for port in known[module]])
    model.validate_nodes_and_infer_types()
    return adapters


def _add_inputs(model: Any, adapters: Adapters, module: str, nodes: Sequence[Any]) -> None:
    from openvino import opset13 as ops

    outputs, inputs = adapters.shapes[module]
    down = parameter([adapters.rank, inputs], f"{GIVEN}{module}.down")
    up = parameter([outputs, adapters.rank], f"{GIVEN}{module}.up")
    model.add_parameters([down, up])
    for node in nodes:
        x, readers = plain_input(node), list(node.output(0).get_target_inputs())
        pixels = node.get_type_name() == "Convolution"
        tokens = ops.transpose(x, ops.constant([0, 2, 3, 1])) if pixels else x
        change = ops.matmul(ops.matmul(tokens, down, False, True), up, False, True)
        y = ops.add(node, ops.transpose(change, ops.constant([0, 3, 1, 2])) if pixels else change)
        for reader in readers:
            reader.replace_source_output(y.output(0))


def _shape(layer: Any) -> tuple[int, int] | None:
    """Outputs and inputs of a layer that takes one value of each input for one of each output; None for others."""
    shape = [int(n) for n in layer.input_value(1).get_shape()]
    if layer.get_type_name() == "Convolution":
        plain = shape[2:] == [1, 1] and list(layer.get_attributes()["strides"]) == [1, 1]
        return (shape[0], shape[1]) if plain else None
    if len(shape) != 2 or layer.get_attributes()["transpose_a"]:
        return None
    return (shape[0], shape[1]) if layer.get_attributes()["transpose_b"] else (shape[1], shape[0])


def _thin(changes: Sequence[Change], module: str, shape: tuple[int, int]) -> tuple[Array, Array] | None:
    """D [r, in] and U [out, r] of all changes together; None where one is no product of two such matrices."""
    downs, ups = [np.zeros((0, shape[1]), np.float32)], [np.zeros((shape[0], 0), np.float32)]
    for lora, factor, difference in changes:
        factors = difference.factors(factor)
        if factors is None:
            return None
        down, up = factors
        if (len(up), down.shape[1]) != shape:
            raise misfit(lora, module, f"{[len(up), down.shape[1]]} where the weight is {list(shape)}")
        downs.append(down)
        ups.append(up)
    return np.concatenate(downs), np.concatenate(ups, axis=1)
