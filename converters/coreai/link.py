"""One weight file for torch and Core AI: a program's tensors that the safetensors files already hold are not stored.

An asset of version 2.0 knows no weights outside its program, `main.mlirb`, but holds float16 tensors there as torch
does: those of linear layers are transposed as they run. So, as for Core ML, what is stored is how to put the program
together (`edge_sd/bundle/assembly.py`). Only what the converter changed, as the three projections of the autoencoder's
attention that it joins, is kept beside.
"""

from __future__ import annotations

import shutil
from bisect import bisect_left
from pathlib import Path
from tempfile import TemporaryDirectory

from edge_sd.backends.coreai.runtime import PROGRAM
from edge_sd.bundle.assembly import Assembly, Piece
from edge_sd.errors import ConversionError
from edge_sd.files import record_file

from ..openvino.link import LARGEST_REST, tensor_places

# Smaller tensors are not looked for: their pieces would take as much as they do.
SMALLEST = 64


def link(asset: Path, safetensors: list[Path], linked: Path, constants: Path, pieces: Path) -> None:
    """Write `linked`, the asset without its program; `pieces`, how that is made; and `constants`, the rest of it.

    The program is ranges in `safetensors` + `constants`, one file after the other. Raises ConversionError if most of
    it is not there.
    """
    row, kept = _pieces((asset / PROGRAM).read_bytes(), safetensors)
    if len(kept) > LARGEST_REST:
        raise ConversionError(f"{asset}: {len(kept)} bytes of its program are not in {safetensors[0].name}")
    for path in sorted(asset.iterdir()):
        if path.name != PROGRAM:
            linked.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, linked / path.name)
    constants.write_bytes(kept)
    Assembly(PROGRAM, record_file(asset / PROGRAM), tuple(row)).save(pieces)
    # Once here, so that it can't fail elsewhere.
    with TemporaryDirectory() as scratch:
        Assembly.read(pieces).write([*safetensors, constants], Path(scratch))


def _pieces(program: bytes, safetensors: list[Path]) -> tuple[list[Piece], bytes]:
    """The pieces of a program in order, and the bytes that are in none of the safetensors files."""
    held = b"".join(path.read_bytes() for path in safetensors)
    places, end = tensor_places(safetensors)
    starts: list[int] = []
    found: dict[int, tuple[int, int]] = {}
    # The largest first: a small tensor's bytes may stand by chance within a large one's.
    for offset, size in sorted(places.values(), key=lambda place: -place[1]):
        at = program.find(held[offset : offset + size]) if size >= SMALLEST else -1
        n = bisect_left(starts, at)
        before = starts[n - 1] + found[starts[n - 1]][1] if n else 0
        if at >= before and (n == len(starts) or at + size <= starts[n]):
            starts.insert(n, at)
            found[at] = offset, size
    row: list[Piece] = []
    kept = bytearray()
    done = 0
    for at in [*starts, len(program)]:
        if at > done:
            row.append((end + len(kept), at - done))
            kept += program[done:at]
        if at in found:
            row.append(found[at])
            done = at + found[at][1]
    return row, bytes(kept)
