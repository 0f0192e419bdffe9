"""One weight file for torch and OpenVINO: constants that the safetensors file already holds are not stored again.

A graph's constants are byte ranges of its weights. `link` finds each of them in the safetensors files of a model and
writes the graph again so that its ranges lie in those, taken one after the other; the few that are not there (shapes,
small tables) go into a file of their own, which is taken to follow them. All of them are what `Artifact.weights` names.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from edge_sd.errors import ConversionError

# Beyond this the weights were changed on the way (folded, transposed), and linking them would save nothing.
LARGEST_REST = 1 << 20
CONSTANTS = "./layers/layer[@type='Const']/data"


Places = dict[bytes, tuple[int, int]]


def link(graph: Path, weights: list[Path], safetensors: list[Path], linked: Path, rest: Path) -> None:
    """Write `linked`, the graph with its constants in `safetensors` + `rest`; ConversionError if most are not there.

    `weights` are the files of the constants as they are, one after the other.
    """
    _relocate(graph, weights, *tensor_places(safetensors), linked, rest)


def share_weights(graph: Path, other: Path, rest: Path) -> None:
    """Let `graph` take the weights that it has in common with `other`, its .bin beside each, from `other`'s.

    The rest goes into `rest`, and `graph`'s own .bin is removed. Raises ConversionError if little is common.
    """
    weights, shared = graph.with_suffix(".bin"), other.with_suffix(".bin")
    places = {key: (offset, len(value)) for key, offset, value in _constants(ElementTree.parse(other), [shared])}
    _relocate(graph, [weights], places, shared.stat().st_size, graph, rest)
    weights.unlink()


def _constants(tree: ElementTree.ElementTree[Any], weights: list[Path]) -> Iterator[tuple[bytes, int, bytes]]:
    """Hash, offset and bytes of each constant of a graph."""
    parts = [np.memmap(path, np.uint8, "r") for path in weights if path.stat().st_size]
    data = parts[0] if len(parts) == 1 else np.concatenate(parts)
    for node in tree.iterfind(CONSTANTS):
        offset, size = int(node.attrib["offset"]), int(node.attrib["size"])
        value = data[offset : offset + size].tobytes()
        yield hashlib.sha256(value).digest(), offset, value


def _relocate(graph: Path, weights: list[Path], places: Places, end: int, linked: Path, rest: Path) -> None:
    """Write `graph` as `linked` with its constants at `places`, in files of `end` bytes, or behind them in `rest`."""
    kept = bytearray()
    kept_places: dict[bytes, int] = {}
    tree = ElementTree.parse(graph)
    nodes = tree.iterfind(CONSTANTS)
    for node, (key, _, value) in zip(nodes, _constants(tree, weights), strict=True):
        place, _ = places.get(key, (None, 0))
        if place is None:
            if key not in kept_places:
                # Constants of any element type may be read in place: keep them aligned.
                kept += bytes(-(end + len(kept)) % 64)
                kept_places[key] = end + len(kept)
                kept += value
            place = kept_places[key]
        node.attrib["offset"] = str(place)
    if len(kept) > LARGEST_REST:
        raise ConversionError(f"{graph}: {len(kept)} bytes of its constants are not in the other files")
    rest.write_bytes(kept)
    tree.write(linked, "utf-8", xml_declaration=True)


def tensor_places(safetensors: list[Path]) -> tuple[dict[bytes, tuple[int, int]], int]:
    """Hash of each tensor's bytes -> where they start in the files, taken one after the other, and their number.

    Beside it the length of all files together.
    """
    places: dict[bytes, tuple[int, int]] = {}
    end = 0
    for path in safetensors:
        places |= {key: (end + start, size) for key, (start, size) in _places(path).items()}
        end += path.stat().st_size
    return places, end


def _places(safetensors: Path) -> dict[bytes, tuple[int, int]]:
    with safetensors.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    data = np.memmap(safetensors, np.uint8, "r", offset=8 + length)
    places = {}
    for name, row in header.items():
        if name != "__metadata__":
            start, stop = row["data_offsets"]
            places[hashlib.sha256(data[start:stop].tobytes()).digest()] = (8 + length + start, stop - start)
    return places
