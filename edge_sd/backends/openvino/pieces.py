"""A graph as a row of pieces, of which one is in memory at a time.

A piece is what follows in the order of computation until so many bytes of weights are together. What a later piece
reads of it, skip connections among it, is its output and that one's input. Pieces are compiled one after the other,
each from a fresh reading of the files, so that no more of them is mapped than one needs; they wait on the disk
(cache), and at every call each is read, run for all rows, and let go.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import DeviceError
from ..base import Array, Shapes, batches, last_rows
from .graph import dependencies, fix_shapes, parameter

# Bytes of weights in a piece.
PIECE = 96 << 20
# Names of what passes from one piece to another.
CROSSING = "between."


@dataclass(frozen=True)
class Cut:
    """Which piece each operation is in, by its place in the order; operations of constants alone are in all."""

    piece: Mapping[int, int]
    count: int


def cut(model: Any, size: int) -> Cut:
    """Where to cut `model`, whose shapes are known, so that pieces have about `size` bytes of weights."""
    fix_shapes(model)
    depends = dependencies(model)
    seen: set[str] = set()
    piece: dict[int, int] = {}
    held, n = 0, 0
    for place, op in enumerate(model.get_ordered_ops()):
        if not depends[op.get_name()] or op.get_type_name() == "Parameter":
            continue
        piece[place] = n
        held += sum(_constant_bytes(op.input_value(k), depends, seen) for k in range(op.get_input_size()))
        if held >= size:
            held, n = 0, n + 1
    last = max(piece.values())
    return Cut(piece, last + 1)


def _constant_bytes(port: Any, depends: Mapping[str, frozenset[str]], seen: set[str]) -> int:
    """The bytes of the constants that `port` is computed of, if it is of constants alone; each counts once."""
    node = port.get_node()
    if depends[node.get_name()] or node.get_name() in seen:
        return 0
    seen.add(node.get_name())
    if node.get_type_name() == "Constant":
        return int(node.get_byte_size())
    return sum(_constant_bytes(node.input_value(k), depends, seen) for k in range(node.get_input_size()))


def take(model: Any, where: Cut, n: int) -> Any:
    """Piece `n` of `model`, which is spent; crossing values have the same names in every piece."""
    import openvino as ov
    from openvino import opset13 as ops

    fix_shapes(model)
    depends = dependencies(model)
    order = model.get_ordered_ops()
    place = {op.get_name(): k for k, op in enumerate(order)}
    inputs: list[Any] = []
    results: list[Any] = []
    for k, op in enumerate(order):
        if (k not in where.piece and op.get_type_name() != "Parameter") or not depends[op.get_name()]:
            continue
        if op.get_type_name() == "Result":
            if where.piece[k] == n:
                results.append(op)
            continue
        own = where.piece.get(k, -1)
        for output in op.outputs():
            users = [each for each in output.get_target_inputs()
                     if where.piece.get(place[each.get_node().get_name()], -1) != own]  # fmt: skip
            later = [each for each in users if where.piece.get(place[each.get_node().get_name()], -1) == n]
            if own == n and users:
                result = ops.result(output)
                result.output(0).get_tensor().set_names({f"{CROSSING}{k}.{output.get_index()}"})
                results.append(result)
            elif later and own == -1:
                inputs.append(op)
            elif later:
                entrance = parameter(
                    output.get_partial_shape(), f"{CROSSING}{k}.{output.get_index()}", output.get_element_type()
                )
                for each in later:
                    each.replace_source_output(entrance.output(0))
                inputs.append(entrance)
    return ov.Model(results, inputs, f"{model.get_friendly_name()}.{n}")


class InPieces:
    """A component whose pieces are opened one after the other; `open_piece(n)` returns one and what it reads."""

    def __init__(self, name: str, count: int, open_piece: Callable[[int], tuple[Any, Any]], shapes: Shapes) -> None:
        self.name, self.count, self.open_piece, self.shapes = name, count, open_piece, shapes
        self._bound: dict[str, Array] = {}

    def bind(self, **constants: Array) -> None:
        self._bound |= constants

    def __call__(self, **inputs: Array) -> dict[str, Array]:
        given = last_rows({**self._bound, **inputs})
        rows = list(batches(given, self.shapes))
        try:
            for n in range(self.count):
                piece, held = self.open_piece(n)
                for row in rows:
                    row |= {name: value.copy() for name, value in piece(row).items()}
                # `held` is what the piece reads its weights from.
                del piece, held
        except RuntimeError as error:
            raise DeviceError(f"{self.name} failed: {str(error).strip().splitlines()[-1][:300]}") from error
        results = [{name: value for name, value in row.items() if name not in given and not name.startswith(CROSSING)}
                   for row in rows]  # fmt: skip
        return {name: np.concatenate([each[name] for each in results]).astype(np.float32) for name in results[0]}

    def close(self) -> None:
        self._bound.clear()
