"""Tensors of safetensors files, read with numpy alone: the runtime does not have the library of that name.

The format: eight bytes of length, a JSON header of so many bytes, then the tensors, one after the other without a gap
(https://github.com/huggingface/safetensors#format). What is not exactly that is refused, because two readers could see
two different models in it.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidModel, InvalidRequest, choices
from ..files import parse_json, refuse_pointer

HEADER_LIMIT = 64 << 20
Bytes = NDArray[np.uint8]
# Types of tensors as numpy stores them. Of those that numpy does not have, `_DECODED` makes float32.
DTYPES: dict[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16, "F8_E4M3": np.uint8,
    "F8_E5M2": np.uint8, "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U64": np.uint64,
    "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """The content of a file: its tensors by name, and the texts in its header's `__metadata__`."""

    tensors: dict[str, NDArray[Any]]
    metadata: dict[str, str] = field(default_factory=dict)


def parse(data: Bytes, name: str) -> Stored:
    """The tensors in a file's bytes: views into them, but copies in float32 of types that numpy does not have.

    Raises InvalidModel, with `name` in the message: a header that is no such header, tensors that overlap, leave holes
    or have more bytes than their shape, bytes after the last one, a name that is there twice, and types of less than
    eight bits.
    """
    try:
        header, body = _header(data)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError("its __metadata__ is not an object of texts")
        _check_places(header, len(body))
        return Stored({key: _tensor(body, row) for key, row in header.items()}, metadata)
    except KeyError as error:
        raise InvalidModel(f"{name} is damaged or no safetensors file: {error} is missing in its header") from error
    except (struct.error, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise InvalidModel(f"{name} is damaged or no safetensors file: {error}") from error


def read(path: Path) -> Stored:
    """The content of a file that a person gave. Raises InvalidRequest (no such file) or InvalidModel (damaged)."""
    check_readable(path)
    try:
        return parse(np.fromfile(path, np.uint8), path.name)
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read ({error.strerror})") from error
    except MemoryError as error:
        raise InvalidModel(f"{path.name} does not fit into memory") from error


def pick(path: Path, names: Iterable[str]) -> dict[str, NDArray[Any]]:
    """Some tensors of a file, of which nothing else is read but the header. Raises InvalidModel."""
    try:
        header, body = _header(np.memmap(path, np.uint8, "r"))
        return {name: np.array(_tensor(body, header[name])) for name in names}
    except KeyError as error:
        raise InvalidModel(f"{path.name} has no {error}") from error
    except (OSError, struct.error, ValueError, TypeError) as error:
        raise InvalidModel(f"{path.name} is damaged or no safetensors file: {error}") from error


def shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of a file's tensors, by its header alone. Raises InvalidModel."""
    try:
        data = np.memmap(path, np.uint8, "r")
        header, body = _header(data)
        header.pop("__metadata__", None)
        _check_places(header, len(body))
        return {name: tuple(row["shape"]) for name, row in header.items()}
    except KeyError as error:
        raise InvalidModel(
            f"{path.name} is damaged or no safetensors file: {error} is missing in its header"
        ) from error
    except (OSError, struct.error, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise InvalidModel(f"{path.name} is damaged or no safetensors file: {error}") from error


def check_readable(path: Path) -> None:
    """Refuse, before anything is read, what is no file of weights at all.

    Raises InvalidRequest where there is no regular file (a FIFO would wait for ever), InvalidModel for a pickle and for
    a Git LFS pointer.
    """
    try:
        if path.exists() and not path.is_file():
            raise InvalidRequest(f"{path} is not a file")
        with path.open("rb") as file:
            start = file.read(2)
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read ({error.strerror})") from error
    if start in (b"\x80\x02", b"PK"):
        raise InvalidModel(f"{path.name} is a pickle, which can run code when opened; only safetensors are read")
    refuse_pointer(path)


def _header(data: Bytes) -> tuple[dict[str, Any], Bytes]:
    """The header, and the bytes that its offsets count in."""
    (length,) = struct.unpack("<Q", data[:8].tobytes())
    if length > min(HEADER_LIMIT, len(data) - 8):
        raise ValueError(f"a header of {length} bytes in a file of {len(data)}")
    header = parse_json(data[8 : 8 + length].tobytes().decode(), object_pairs_hook=_once)
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    return header, data[8 + length :]


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{twice!r} is there twice")
    return found


def _check_places(header: dict[str, Any], size: int) -> None:
    """Raise ValueError unless the tensors, in the order of their offsets, fill `size` bytes without gap or overlap."""
    reached = 0
    for start, stop, key in sorted((*_offsets(row, key), key) for key, row in header.items()):
        if start != reached:
            raise ValueError(f"{key} overlaps another tensor" if start < reached else f"a hole before {key}")
        reached = stop
    if reached != size:
        what = f"{size - reached} bytes after its last tensor" if reached < size else f"{reached - size} bytes too few"
        raise ValueError(what)


def _offsets(row: dict[str, Any], key: str) -> tuple[int, int]:
    start, stop = row["data_offsets"]
    shape, kind = row["shape"], row["dtype"]
    if kind not in DTYPES:
        raise ValueError(f"{key} is of type {kind}; supported: {choices(DTYPES)}")
    if not _are_counts((start, stop)) or not isinstance(shape, list) or not _are_counts(shape):
        raise ValueError(f"{key} has the shape {shape} and the offsets {start}, {stop}")
    if stop - start != math.prod(shape) * np.dtype(DTYPES[kind]).itemsize:
        raise ValueError(f"{key} has {stop - start} bytes, not those of {kind} {shape}")
    return start, stop


def _are_counts(values: Iterable[Any]) -> bool:
    return all(type(value) is int and value >= 0 for value in values)


def _tensor(body: Bytes, row: dict[str, Any]) -> NDArray[Any]:
    start, stop = row["data_offsets"]
    found = body[start:stop].view(DTYPES[row["dtype"]])
    decode = _DECODED.get(row["dtype"])
    wide: NDArray[Any] = found if decode is None else decode(found)
    return wide.reshape(tuple(row["shape"]))


def _e4m3() -> NDArray[np.float32]:
    """The 256 numbers of float8 e4m3fn (Micikevicius et al. 2022, arXiv:2209.05433): bias 7, no infinity, one NaN."""
    bits = np.arange(256)
    exponent, mantissa = bits >> 3 & 15, bits & 7
    numbers = np.where(exponent, (1 + mantissa / 8) * 2.0 ** (exponent - 7), mantissa / 8 * 2.0**-6)
    numbers[bits & 127 == 127] = np.nan
    return np.where(bits & 128, -numbers, numbers).astype(np.float32)


_DECODED: dict[str, Callable[[NDArray[Any]], NDArray[np.float32]]] = {
    # Its bits are the upper half of a float32's.
    "BF16": lambda bits: (bits.astype(np.uint32) << 16).view(np.float32),
    "F8_E4M3": lambda bits: _e4m3()[bits],
    # Its bits are the upper half of a float16's.
    "F8_E5M2": lambda bits: (bits.astype(np.uint16) << 8).view(np.float16).astype(np.float32),
}
