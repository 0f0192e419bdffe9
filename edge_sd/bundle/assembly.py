"""A package of Apple's without its weight file, which is assembled at first use from other files of the model.

A Core ML package's weight file is its tensors, a 64-byte record before each; a Core AI asset's is its program, with the
tensors in it. In the embedded model the tensors stand in the safetensors files that diffusers reads, so a package ships
without that file, and beside it, as JSON, what the file is made of:

    {"file": "Data/…/weight.bin", "bytes": 27325184, "sha256": "…", "pieces": [[offset, bytes], …]}

Pieces follow one another. Each is a range in the bytes of `Artifact.weights`, one file after the other. One with a
third number is float16 numbers times that factor: the softmax scale, which the Neural Engine's form has in its queries.
`link.py` of converters/coreml and converters/coreai writes all this. Reading it needs numpy alone, and bytes count only
if their hash is right.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ..caches import cache_folder
from ..errors import InvalidModel, OutputError
from ..files import FileRecord, hash_file, inside, parse_json, record_file, scratch, sweep
from .bundle import ModelBundle
from .variants import Artifact

# A package is at most so many times as large as the files that it is made of.
MOST_COPIES = 4
# Characters of a path.
LONGEST = 200
Piece = tuple[int, int] | tuple[int, int, float]


@dataclass(frozen=True)
class Assembly:
    """How one weight file is made: its path inside the package, what it must become, and its pieces in order."""

    file: str
    record: FileRecord
    pieces: tuple[Piece, ...]

    @classmethod
    def read(cls, path: Path) -> Assembly:
        """Raises InvalidModel naming what is wrong."""
        try:
            document = parse_json(path.read_text("utf-8"))
            pieces = tuple(_piece(row) for row in document["pieces"])
            record = FileRecord(document["bytes"], document["sha256"])
            if sum(piece[1] for piece in pieces) != record.bytes:
                raise ValueError(f"its pieces are not {record.bytes} bytes together")
            file = PurePosixPath(str(document["file"]))
            if not file.name or len(str(file)) > LONGEST:
                raise ValueError(f"{str(file)[:80]!r} is no name of a file")
            return cls(str(file), record, pieces)
        except OSError as error:
            raise InvalidModel(f"{path} cannot be read ({error.strerror})") from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InvalidModel(f"{path} does not say how weights are put together: {error}") from error

    def save(self, path: Path) -> None:
        row = {"file": self.file, "bytes": self.record.bytes, "sha256": self.record.sha256, "pieces": self.pieces}
        path.write_text(json.dumps(row, separators=(",", ":")) + "\n", "utf-8")

    def write(self, weights: Sequence[Path], package: Path) -> None:
        """Write the weight file into `package`. Raises InvalidModel if it does not become what it must, or OSError."""
        sources = _Files(weights)
        if self.record.bytes > MOST_COPIES * sources.starts[-1]:
            raise InvalidModel(f"{package.name} asks for {self.record.bytes} bytes of {sources.starts[-1]}")
        target = inside(package, self.file)
        if target.is_dir() or any(each.is_file() for each in target.parents):
            raise InvalidModel(f"{package.name} has something else at {self.file}")
        target.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        with target.open("wb") as file:
            for offset, size, *factor in self.pieces:
                piece = sources.read(int(offset), int(size))
                if factor:
                    piece = (piece.view("<f2").astype("<f4") * np.float32(factor[0])).astype("<f2").view(np.uint8)
                digest.update(piece.data)
                file.write(piece.data)
        if digest.hexdigest() != self.record.sha256:
            raise InvalidModel(f"the weights of {package.name} are not those that its graph was made with")

    def is_whole(self, package: Path) -> bool:
        """Whether `package` holds this very weight file."""
        path = inside(package, self.file)
        return path.is_file() and record_file(path) == self.record


def whole_package(bundle: ModelBundle, artifact: Artifact) -> Path:
    """The package of an artifact that has `pieces`, with its weights; kept in the cache and hashed at every use.

    Raises InvalidModel if the files that it is made of are not as they were, OutputError if the cache can't hold it.
    """
    assert artifact.pieces is not None, artifact.graph
    graph, pieces = bundle.path(artifact.graph), bundle.path(artifact.pieces)
    assembly = Assembly.read(pieces)
    files = [path for path in sorted(graph.rglob("*")) if path.is_file()]
    key = hashlib.sha256("".join(hash_file(path) for path in (*files, pieces)).encode()).hexdigest()[:16]
    home = cache_folder("assembled")
    kept = home / key / graph.name
    if assembly.is_whole(kept):
        return kept
    try:
        home.mkdir(parents=True, exist_ok=True)
        sweep(home)
        # Written beside and renamed, so that a reader never sees half of it.
        with scratch(home / key) as beside:
            made = beside / key / graph.name
            for path in files:
                copy = made / path.relative_to(graph)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
            assembly.write([bundle.path(name) for name in artifact.weights], made)
            _replace_folder(made.parent, kept.parent, beside / "damaged")
    except OSError as error:
        # Another process may have written it meanwhile.
        if not assembly.is_whole(kept):
            raise OutputError(f"{home} cannot keep {graph.name} ({error.strerror or error})") from error
    return kept


def _replace_folder(new: Path, place: Path, old: Path) -> None:
    if place.exists():
        os.replace(place, old)
    os.replace(new, place)


def _piece(row: Any) -> Piece:
    offset, size, *factor = row
    whole = type(offset) is int and type(size) is int and offset >= 0 and size > 0
    scaled = not factor or (len(factor) == 1 and isinstance(factor[0], float) and math.isfinite(factor[0]))
    if not whole or not scaled or (factor and size % 2):
        raise ValueError(f"{row} is no piece")
    return (offset, size, factor[0]) if factor else (offset, size)


class _Files:
    """Several files as one row of bytes, mapped into memory."""

    def __init__(self, paths: Sequence[Path]) -> None:
        try:
            # An empty file can't be mapped, and has nothing to read.
            self.paths = [path for path in paths if path.stat().st_size]
            self.maps = [np.memmap(path, np.uint8, "r") for path in self.paths]
        except OSError as error:
            raise InvalidModel(f"{error.filename} cannot be read ({error.strerror})") from error
        self.starts = list(accumulate((len(each) for each in self.maps), initial=0))

    def read(self, offset: int, size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        n = bisect_right(self.starts, offset) - 1
        if n >= len(self.maps) or offset + size > self.starts[n + 1]:
            names = ", ".join(path.name for path in self.paths)
            raise InvalidModel(f"weights are put together of {size} bytes at {offset}, which {names} do not have")
        start = offset - self.starts[n]
        return np.asarray(self.maps[n][start : start + size])
