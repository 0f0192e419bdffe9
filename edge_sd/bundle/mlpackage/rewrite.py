"""A copy of a package with other values of constants, in whatever form they are stored, or other sources of inputs.

A plain constant's new numbers go over its old ones. Those of a compressed one, or of another shape, are appended to the
weight file as a blob of their own, and the graph gets a plain constant in its place: an operation that every deployment
target knows. All other bytes of the graph stay as they are.
"""

from __future__ import annotations

import shutil
import struct
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ...errors import InvalidModel
from .package import DTYPES, PREFIX, SENTINEL, Operation, Package, root_model
from .wire import WireError, changed, decode, field

Array = NDArray[Any]
# Model.mlProgram, functions (a map), a function's blocks (a map), a block's operations.
_OPERATIONS = (502, 2, 2, 3, 2, 3)
# coremltools' mlmodel/src/MILBlob/Blob: the numbers of types there, and what records are aligned to.
_BLOB_TYPES = {"float16": 1, "float32": 2}
_UNIT = 64


def rewrite(
    package: Path,
    target: Path,
    names: Collection[str],
    value: Callable[[str], Array],
    wires: Mapping[str, str] | None = None,
) -> None:
    """Write `target`, the package with `value(name)` for the constants `names`; one is in memory at a time.

    `wires`: operation -> the value that its input x is from now on, of the same type and made before it.
    Float arrays become float32 where that was the constant's type, else float16. Raises InvalidModel or OSError.
    """
    opened = Package.open(package)
    shutil.copytree(package, target, copy_function=shutil.copyfile)
    graph = root_model(target)
    weights = graph.parent / "weights/weight.bin"
    rows = [each for function in opened.functions.values() for each in function.operations if each.name in set(names)]
    blobs = [each for function in opened.functions.values() for each in _blobs(function.operations)]
    readers = Counter(offset for _, offset in set(blobs))
    places: dict[str, tuple[str, tuple[int, ...], int]] = {}
    with weights.open("r+b") as file:
        for operation in {each.name: each for each in rows}.values():
            kind = operation.outputs[0][1]
            dtype = "float32" if kind.dtype == "float32" else "float16"
            array = np.ascontiguousarray(value(operation.name), f"<f{np.dtype(dtype).itemsize}")
            offset = operation.attributes["val"].offset if operation.kind == "const" else None
            if offset is not None and array.shape == kind.shape and readers[offset] == 1:
                file.seek(offset)
                file.seek(struct.unpack_from("<IIQQ", file.read(_UNIT))[3])
                file.write(array.tobytes())
            else:
                places[operation.name] = (dtype, array.shape, _append(file, array, _BLOB_TYPES[dtype]))
        if places:
            _count(file, len(places))
    if places or wires:
        name = f"{PREFIX}{weights.relative_to(graph.parent).as_posix()}"

        def edit(row: bytes) -> bytes:
            return _wired(_plain(row, places, name), wires or {})

        try:
            graph.write_bytes(changed(graph.read_bytes(), _OPERATIONS, edit))
        except WireError as error:
            raise InvalidModel(f"{package} is damaged: {error}") from error


def _blobs(operations: list[Operation]) -> list[tuple[str, int]]:
    """(operation, offset) of every constant of the weight file."""
    return [
        (each.name, one.offset)
        for each in operations
        for one in (*each.attributes.values(), *(x for row in each.inputs.values() for x in row))
        if not isinstance(one, str) and one.offset is not None
    ]


def _append(file: BinaryIO, array: Array, kind: int) -> int:
    """Write a blob at the end; the place of its record."""
    start = -(-file.seek(0, 2) // _UNIT) * _UNIT
    file.seek(start)
    file.write(struct.pack("<IIQQ", SENTINEL, kind, array.nbytes, start + _UNIT).ljust(_UNIT, b"\0"))
    file.write(array.tobytes())
    return start


def _count(file: BinaryIO, more: int) -> None:
    """The file's header begins with the number of its blobs."""
    file.seek(0)
    (count,) = struct.unpack("<I", file.read(4))
    file.seek(0)
    file.write(struct.pack("<I", count + more))


def _plain(row: bytes, places: dict[str, tuple[str, tuple[int, ...], int]], weights: str) -> bytes:
    """An encoded operation, as a plain constant where it is one of `places` (name -> type, shape, offset)."""
    operation = decode("Operation", row)
    outputs = [each.get("name", "") for each in operation["outputs"]]
    if not outputs or outputs[0] not in places:
        return row
    dtype, shape, offset = places[outputs[0]]
    number = next(number for number, (name, _) in DTYPES.items() if name == dtype)
    dimensions = b"".join(field(3, field(1, field(1, size))) for size in shape)
    kind = field(1, field(1, number) + field(2, len(shape)) + dimensions)
    blob = field(2, kind) + field(5, field(1, weights) + field(2, offset))
    named = field(2, field(1, field(1, 2))) + field(3, field(1, field(4, field(1, outputs[0]))))
    return (
        field(1, "const")
        + field(3, field(1, outputs[0]) + field(2, kind))
        + field(5, field(1, "name") + field(2, named))
        + field(5, field(1, "val") + field(2, blob))
    )


def _wired(row: bytes, wires: Mapping[str, str]) -> bytes:
    """An encoded operation, reading another value as x where it is one of `wires`."""
    outputs = [each.get("name", "") for each in decode("Operation", row)["outputs"]]
    if not outputs or outputs[0] not in wires:
        return row
    source = field(1, "x") + field(2, field(1, field(1, wires[outputs[0]])))
    # Entries of a map begin with their key.
    return changed(row, (2,), lambda entry: source if entry.startswith(field(1, "x")) else entry)
