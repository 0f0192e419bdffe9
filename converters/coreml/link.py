"""One weight file for torch and Core ML: a package's tensors that the safetensors files already hold are not stored.

As `converters/openvino/link.py` does for OpenVINO; but Core ML reads its own weight file and no other, so what is
stored is how to put that file together (`edge_sd/bundle/assembly.py`). Float16 tensors are the same bytes in both,
linear layers that became 1x1 convolutions too. The queries of the Neural Engine's form are those of the model times the
softmax scale.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_sd.bundle.assembly import Assembly, Piece
from edge_sd.bundle.mlpackage.package import SENTINEL
from edge_sd.errors import ConversionError
from edge_sd.files import record_file

from ..openvino.link import LARGEST_REST, tensor_places

# coremltools' mlmodel/src/MILBlob/Blob/StorageFormat.hpp: the file's header and each blob's record take 64 bytes, and
# records start at multiples of 64.
_UNIT = 64
_FLOAT16 = 1


def link(package: Path, safetensors: list[Path], linked: Path, constants: Path, pieces: Path) -> None:
    """Write `linked`, the package without its weights; `pieces`, how they are made; and `constants`, the rest of them.

    The weights are ranges in `safetensors` + `constants`, one file after the other. Raises ConversionError if most of
    them are not there.
    """
    files = [path for path in sorted(package.rglob("*")) if path.is_file()]
    weights = [path for path in files if path.suffix == ".bin"]
    if len(weights) != 1:
        raise ConversionError(f"{package} has {len(weights)} weight files, not one")
    row, kept = _pieces(weights[0], safetensors)
    if len(kept) > LARGEST_REST:
        raise ConversionError(f"{package}: {len(kept)} bytes of its weights are not in {safetensors[0].name}")
    for path in files:
        if path not in weights:
            copy = linked / path.relative_to(package)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    constants.write_bytes(kept)
    assembly = Assembly(weights[0].relative_to(package).as_posix(), record_file(weights[0]), tuple(row))
    assembly.save(pieces)
    # Assemble it once here, so that it can't fail at first use.
    with TemporaryDirectory() as scratch:
        Assembly.read(pieces).write([*safetensors, constants], Path(scratch))


def _pieces(weights: Path, safetensors: list[Path]) -> tuple[list[Piece], bytes]:
    """The pieces of a weight file, and the bytes that are in none of the safetensors files."""
    places, end = tensor_places(safetensors)
    data = np.memmap(weights, np.uint8, "r")
    halves = _Halves(safetensors, places.values())
    row: list[Piece] = []
    kept = bytearray()
    at = 0
    for kind, start, size in _blobs(data, weights):
        value = data[start : start + size]
        place = places.get(hashlib.sha256(value.tobytes()).digest())
        found: Piece | None = (place[0], size) if place else None
        if found is None and kind == _FLOAT16:
            found = halves.scaled(value.view("<f2"))
        if found is None:
            continue
        # Bytes that were not found since the last piece: records, padding, small tables.
        if start > at:
            row.append((end + len(kept), start - at))
            kept += data[at:start].tobytes()
        row.append(found)
        at = start + size
    if len(data) > at:
        row.append((end + len(kept), len(data) - at))
        kept += data[at:].tobytes()
    return row, bytes(kept)


def _blobs(data: NDArray[np.uint8], path: Path) -> Iterator[tuple[int, int, int]]:
    """(type, where its data start, bytes) of each blob of a weight file. Raises ConversionError."""
    (count,) = struct.unpack("<I", data[:4].tobytes())
    at = _UNIT
    for _ in range(count):
        record = data[at : at + _UNIT].tobytes()
        sentinel, kind, size, start = struct.unpack_from("<IIQQ", record) if len(record) == _UNIT else (0, 0, 0, 0)
        if sentinel != SENTINEL or start + size > len(data):
            raise ConversionError(f"{path} has no blob at {at}")
        yield kind, start, size
        at = -(-(start + size) // _UNIT) * _UNIT


class _Halves:
    """The tensors of safetensors files by their size, to find those that a graph holds multiplied."""

    def __init__(self, safetensors: list[Path], places: Any) -> None:
        self.data = np.concatenate([np.fromfile(path, np.uint8) for path in safetensors])
        self.by_size: dict[int, list[int]] = {}
        for place, size in places:
            self.by_size.setdefault(size, []).append(place)

    def scaled(self, value: NDArray[np.float16]) -> Piece | None:
        """The tensor that `value` is 1/sqrt(n) times of, for a whole n: the width of an attention's heads."""
        for place in self.by_size.get(value.nbytes, []):
            stock = self.data[place : place + value.nbytes].view("<f2").astype(np.float32)
            largest = int(np.abs(stock).argmax())
            ratio = float(value[largest]) / float(stock[largest]) if stock[largest] else 0.0
            width = round(ratio**-2) if 0 < ratio < 1 else 1
            factor = 1 / math.sqrt(width)
            if width > 1 and np.array_equal((stock * np.float32(factor)).astype(np.float16), value):
                return place, value.nbytes, factor
        return None
