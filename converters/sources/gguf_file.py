"""GGUF files (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): where each tensor lies, and its numbers.

A file has a header of keys and values, a row for each tensor, and the tensors, each aligned. Such files come from
strangers, and the library's own reader believes every count in them, so the header is read here, within the bounds of
the file. The numbers of quantized blocks are the library's business.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_sd.errors import InvalidModel, MissingExtra, choices

MAGIC, VERSIONS, ALIGNMENT, DIMENSIONS = b"GGUF", (2, 3), 32, 4
# Types of values in the header, by number, as struct writes them; of strings and lists there is more to say.
SCALARS = "BbHhIif?"  # 0 to 7
STRING, ARRAY, WIDE = 8, 9, {10: "Q", 11: "q", 12: "d"}
# Items of a list that are kept: shapes are as short as this. Vocabularies are passed over.
KEPT = 16
# Numbers that are decoded at once.
CHUNK = 1 << 22


@dataclass(frozen=True)
class Stored:
    """A tensor in the file: shape in numpy's order, type as Q4_K, first byte and number of bytes."""

    shape: tuple[int, ...]
    kind: str
    start: int
    size: int


@dataclass(frozen=True)
class Gguf:
    """A file whose header was read: what it says of itself, and its tensors by name."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Stored]

    def read(self, name: str) -> Iterator[NDArray[np.float32]]:
        """The numbers of a tensor in float32, flat, some at a time."""
        from gguf import GGMLQuantizationType, dequantize

        row = self.tensors[name]
        kind = GGMLQuantizationType[row.kind]
        values, size = block(row.kind)
        data = np.memmap(self.path, np.uint8, "r", row.start, (row.size // size, size))
        step = max(1, CHUNK // values)
        for first in range(0, len(data), step):
            part = np.ascontiguousarray(data[first : first + step])
            yield np.asarray(dequantize(part.view(FLOATS.get(row.kind, np.uint8)), kind), np.float32).reshape(-1)


# Types that the library takes as numbers, not as bytes.
FLOATS: dict[str, Any] = {"F32": np.float32, "F16": np.float16}
# Those that are read: plain numbers, and llama.cpp's blocks.
KINDS = (
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL",
    "IQ4_XS",
)  # fmt: skip


def block(kind: str) -> tuple[int, int]:
    """Numbers and bytes of a block of a type."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    values, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return int(values), int(size)


def is_gguf(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


def open_gguf(path: Path) -> Gguf:
    """Read the header of a GGUF file.

    Raises MissingExtra without the library, InvalidModel for what is damaged, too new, or of a type that is not read.
    """
    from importlib.util import find_spec

    if find_spec("gguf") is None:
        raise MissingExtra(f"reading {path.name}, a GGUF file,", "gguf")
    try:
        return _Reader(np.memmap(path, np.uint8, "r")).file(path)
    except (OSError, ValueError, struct.error, OverflowError) as error:
        raise InvalidModel(f"{path.name} is damaged or no GGUF file: {error}") from error


class _Reader:
    """Reads on from byte to byte, and raises ValueError before it would leave the file."""

    def __init__(self, data: NDArray[np.uint8]) -> None:
        self.data, self.place = data, 0

    def file(self, path: Path) -> Gguf:
        if self.take(4) != MAGIC:
            raise ValueError("it does not begin with GGUF")
        (version,) = self.numbers("I")
        if version not in VERSIONS:
            known = choices([str(each) for each in VERSIONS])
            raise ValueError(f"version {version}; supported, in little-endian order: {known}")
        tensors, keys = self.numbers("QQ")
        # A key is 12 bytes with its value's type, and a tensor's row 24, at the least.
        if 12 * keys + 24 * tensors > len(self.data):
            raise ValueError(f"{keys} keys and {tensors} tensors in {len(self.data)} bytes")
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = self.string()
            if key in metadata:
                raise ValueError(f"the key {key[:80]!r} is there twice")
            metadata[key] = self.value(self.numbers("I")[0])
        rows = [self.row() for _ in range(tensors)]
        if len({name for name, *_ in rows}) < tensors:
            raise ValueError("a tensor is there twice")
        return Gguf(path, metadata, self.placed(rows, metadata))

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.place:
            raise ValueError(f"{count} bytes are wanted at {self.place} of {len(self.data)}")
        self.place += count
        return self.data[self.place - count : self.place].tobytes()

    def numbers(self, form: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))

    def string(self) -> str:
        text = self.take(self.numbers("Q")[0])
        try:
            return text.decode()
        except UnicodeDecodeError as error:
            raise ValueError("a name is not UTF-8") from error

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.take(self.numbers("Q")[0]).decode("utf-8", "replace")
        if kind != ARRAY:
            return self.numbers(_scalar(kind))[0]
        item, count = self.numbers("IQ")
        if item == ARRAY:
            raise ValueError("a list of lists in its header")
        if item != STRING:
            size = struct.calcsize(f"<{_scalar(item)}")
            data = self.take(size * count)
            return list(struct.unpack(f"<{count}{_scalar(item)}", data)) if count <= KEPT else None
        if 8 * count > len(self.data) - self.place:
            raise ValueError(f"a list of {count} strings at {self.place} of {len(self.data)}")
        for _ in range(count):
            self.take(self.numbers("Q")[0])
        return None

    def row(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, type and offset of a tensor."""
        name = self.string()
        (count,) = self.numbers("I")
        if not 1 <= count <= DIMENSIONS:
            raise ValueError(f"{name[:80]!r} has {count} dimensions; 1 to {DIMENSIONS} are valid")
        shape = tuple(reversed(self.numbers(f"{count}Q")))
        if not all(shape):
            raise ValueError(f"{name[:80]!r} has the shape {list(shape)}")
        return name, shape, *self.numbers("IQ")

    def placed(self, rows: list[tuple[str, tuple[int, ...], int, int]], metadata: Mapping[str, Any]) -> dict[str, Any]:
        """Where each tensor lies. Raises ValueError for one outside of the file, or two in one place."""
        from gguf import GGMLQuantizationType

        align = metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(align, int) or isinstance(align, bool) or align < 8 or align & (align - 1):
            raise ValueError(f"general.alignment is {str(align)[:80]}")
        base = -(-self.place // align) * align
        found: dict[str, Any] = {}
        for name, shape, number, offset in rows:
            try:
                kind = GGMLQuantizationType(number).name
            except ValueError:
                kind = str(number)
            if kind not in KINDS:
                raise ValueError(f"{name[:80]!r} is of type {kind}, which is not read; supported: {choices(KINDS)}")
            values, size = block(kind)
            total = math.prod(shape)
            if shape[-1] % values or offset % align or base + offset + total // values * size > len(self.data):
                raise ValueError(f"{name[:80]!r}, {kind} {list(shape)} at {offset}, has no place in {len(self.data)}")
            found[name] = Stored(self.given_shape(name, shape, metadata), kind, base + offset, total // values * size)
        reached = 0
        for name, row in sorted(found.items(), key=lambda each: each[1].start):
            if row.start < reached:
                raise ValueError(f"{name[:80]!r} overlaps another tensor")
            reached = row.start + row.size
        return found

    def given_shape(self, name: str, shape: tuple[int, ...], metadata: Mapping[str, Any]) -> tuple[int, ...]:
        """The shape before a converter changed it so that rows are whole blocks, which some record under this key."""
        own = metadata.get(f"comfy.gguf.orig_shape.{name}")
        if own is None:
            return shape
        whole = isinstance(own, list) and all(type(each) is int and each > 0 for each in own)
        if not whole or math.prod(own) != math.prod(shape):
            raise ValueError(f"{name[:80]!r} is said to have had the shape {own}, and has {list(shape)}")
        return tuple(own)


def _scalar(kind: int) -> str:
    if kind < len(SCALARS):
        return SCALARS[kind]
    if kind not in WIDE:
        raise ValueError(f"a value of type {kind} in its header")
    return WIDE[kind]
