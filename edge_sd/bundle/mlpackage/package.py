"""A `.mlpackage` on disk: its functions as plain data, its constants as numpy arrays.

Unet.mlpackage/Manifest.json                                which file is the model
Unet.mlpackage/Data/com.apple.CoreML/model.mlmodel          protobuf (coremltools' mlmodel/format)
Unet.mlpackage/Data/com.apple.CoreML/weights/weight.bin     blobs: a 64-byte header, then for each a 64-byte
                                                            record (0xDEADBEEF, type, bytes, offset) and its data
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import InvalidModel
from ...files import inside, parse_json
from .wire import WireError, decode

# MIL.proto's DataType -> (our name, what numpy reads); types of fewer than 8 bits are packed, lowest bits first.
DTYPES = {
    1: ("bool", "?"), 2: ("string", ""), 10: ("float16", "<f2"), 11: ("float32", "<f4"), 12: ("float64", "<f8"),
    21: ("int8", "i1"), 22: ("int16", "<i2"), 23: ("int32", "<i4"), 24: ("int64", "<i8"), 25: ("int4", ""),
    31: ("uint8", "u1"), 32: ("uint16", "<u2"), 33: ("uint32", "<u4"), 34: ("uint64", "<u8"), 35: ("uint4", ""),
    36: ("uint2", ""), 37: ("uint1", ""), 38: ("uint6", ""), 39: ("uint3", ""),
}  # fmt: skip
NUMPY = {name: code for name, code in DTYPES.values() if code}
SENTINEL = 0xDEADBEEF
PREFIX = "@model_path/"
# Numbers in one constant: of any, and of one that is written in the program, where large ones lie in the weight file.
MOST_NUMBERS, MOST_IMMEDIATE = 1 << 34, 1 << 20

Constant = NDArray[Any] | str


@dataclass(frozen=True)
class TensorType:
    """`dtype` as numpy names it, or int4, uint1, …; a scalar has the shape ()."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Lazy:
    """A constant that is read when it is wanted; `offset` is its record's place in the weight file, if it is there."""

    type: TensorType
    read: Callable[[], NDArray[Any]]
    offset: int | None = None


@dataclass(frozen=True)
class Operation:
    """One operation of a function. Each input is a list of names of values, or of constants written in its place."""

    kind: str
    inputs: dict[str, list[str | Lazy]]
    attributes: dict[str, Lazy]
    outputs: list[tuple[str, TensorType]]

    @property
    def name(self) -> str:
        return self.outputs[0][0] if self.outputs else self.kind


@dataclass(frozen=True)
class Function:
    inputs: dict[str, TensorType]
    outputs: list[str]
    operations: list[Operation]


@dataclass(frozen=True)
class Package:
    """The functions of a package by name; models with one function call it "main"."""

    path: Path
    version: int
    default: str
    functions: dict[str, Function]

    @classmethod
    def open(cls, path: Path) -> Package:
        """Read a package. Raises InvalidModel naming what is wrong."""
        model = root_model(path)
        try:
            document = decode("Model", model.read_bytes())
            program = document["mlProgram"]
            functions = {name: _function(body, _Weights(model.parent)) for name, body in program["functions"].items()}
        except OSError as error:
            raise InvalidModel(f"{model} cannot be read ({error.strerror})") from error
        except WireError as error:
            raise InvalidModel(f"{model} is damaged: {error}") from error
        except KeyError as error:
            raise InvalidModel(f"{path} is no ML Program: it has no {error}") from error
        except (TypeError, ValueError, AttributeError, IndexError) as error:
            raise InvalidModel(f"{path} is no ML Program: {error}") from error
        default = document.get("description", {}).get("defaultFunctionName") or "main"
        if default not in functions:
            raise InvalidModel(f"{path} is no ML Program: it has no function {default!r}")
        return cls(path, document.get("specificationVersion", 0), default, functions)


def root_model(path: Path) -> Path:
    """The file of a package that holds its graph. Raises InvalidModel."""
    manifest = path / "Manifest.json"
    try:
        document = parse_json(manifest.read_text("utf-8"))
        relative = document["itemInfoEntries"][document["rootModelIdentifier"]]["path"]
        return inside(path, f"Data/{relative}")
    except OSError as error:
        raise InvalidModel(f"{manifest} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InvalidModel(f"{manifest} is no package's manifest: {error}") from error


class _Weights:
    """The blob files of a package, mapped into memory when first asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, NDArray[np.uint8]] = {}

    def read(self, name: str, offset: int, kind: TensorType) -> NDArray[Any]:
        if name not in self._files:
            path = inside(self.folder, name.removeprefix(PREFIX))
            try:
                self._files[name] = np.memmap(path, np.uint8, "r")
            except (OSError, ValueError) as error:
                raise InvalidModel(f"{path} cannot be read ({error})") from error
        data = self._files[name]
        try:
            sentinel, _, size, start = struct.unpack_from("<IIQQ", data[offset : offset + 64].tobytes())
        except struct.error as error:
            raise InvalidModel(f"{self.folder / name}: no blob at {offset}") from error
        if sentinel != SENTINEL or start + size > len(data):
            raise InvalidModel(f"{self.folder / name} is damaged: no blob at {offset}")
        return unpack(data[start : start + size], kind)


def unpack(data: NDArray[np.uint8], kind: TensorType) -> NDArray[Any]:
    """Bytes -> array of `kind`; packed types come as int8 or uint8. Raises InvalidModel if the bytes are too few."""
    count = _count(kind)
    if kind.dtype in NUMPY:
        dtype = np.dtype(NUMPY[kind.dtype])
        if len(data) < count * dtype.itemsize:
            raise InvalidModel(f"a constant of {kind.dtype} {kind.shape} has only {len(data)} bytes")
        return np.frombuffer(data[: count * dtype.itemsize].tobytes(), dtype).reshape(kind.shape)
    if not kind.dtype.lstrip("uint").isdecimal():
        raise InvalidModel(f"a constant of type {kind.dtype} can't be stored as bytes")
    bits = int(kind.dtype.lstrip("uint"))
    if len(data) * 8 < count * bits:
        raise InvalidModel(f"a constant of {kind.dtype} {kind.shape} has only {len(data)} bytes")
    each = unpack_bits(data, bits, count).reshape(kind.shape)
    sign = 1 << (bits - 1)
    return (each.astype(np.int8) ^ sign) - sign if kind.dtype.startswith("int") else each


def _count(kind: TensorType) -> int:
    """How many numbers a constant has. Raises InvalidModel for a size that is not constant, or beyond any model's."""
    count = math.prod(kind.shape)
    if any(size < 0 for size in kind.shape) or count > MOST_NUMBERS:
        raise InvalidModel(f"a constant of {kind.dtype} has the shape {kind.shape}")
    return count


def unpack_bits(data: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.uint8]:
    """`count` unsigned numbers of `bits` bits each, packed lowest bits first."""
    each = np.unpackbits(np.asarray(data), count=count * bits, bitorder="little").reshape(count, bits)
    return np.packbits(each, axis=1, bitorder="little").reshape(count)


def _function(body: dict[str, Any], weights: _Weights) -> Function:
    block = body["block_specializations"][body["opset"]]
    return Function(
        inputs={row["name"]: _type(row["type"]) for row in body["inputs"]},
        outputs=block["outputs"],
        operations=[_operation(row, weights) for row in block["operations"]],
    )


def _operation(row: dict[str, Any], weights: _Weights) -> Operation:
    return Operation(
        kind=row["type"],
        inputs={
            name: [each["name"] if "name" in each else _constant(each["value"], weights) for each in one["arguments"]]
            for name, one in row["inputs"].items()
        },
        attributes={name: _constant(value, weights) for name, value in row["attributes"].items() if "type" in value},
        outputs=[(each["name"], _type(each["type"])) for each in row["outputs"]],
    )


def _type(row: dict[str, Any]) -> TensorType:
    if "tensorType" not in row:
        return TensorType("unknown", ())
    tensor = row["tensorType"]
    dtype = DTYPES.get(tensor.get("dataType", 0), ("unknown", ""))[0]
    # A dimension that is not constant has no size here.
    return TensorType(dtype, tuple(each.get("constant", {}).get("size", -1) for each in tensor["dimensions"]))


def _constant(value: dict[str, Any], weights: _Weights) -> Lazy:
    kind = _type(value.get("type", {}))
    if "blobFileValue" in value:
        blob = value["blobFileValue"]
        offset = blob.get("offset", 0)
        return Lazy(kind, lambda: weights.read(blob.get("fileName", ""), offset, kind), offset)
    return Lazy(kind, lambda: _immediate(value, kind))


def _immediate(value: dict[str, Any], kind: TensorType) -> NDArray[Any]:
    try:
        tensor = value.get("immediateValue", {}).get("tensor", {})
        if not tensor:
            if _count(kind) > MOST_IMMEDIATE:
                raise InvalidModel(f"a constant of {kind.dtype} {kind.shape} has no bytes")
            return np.zeros(kind.shape, NUMPY.get(kind.dtype, "u1"))
        ((form, content),) = tensor.items()
        if form == "bytes":
            return unpack(np.frombuffer(content.get("values", b""), np.uint8), kind)
        dtype = np.str_ if kind.dtype == "string" else np.dtype(NUMPY[kind.dtype])
        return np.array(content["values"], dtype).reshape(kind.shape)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise InvalidModel(f"a constant of {kind.dtype} {kind.shape} is damaged: {error}") from error
