"""One weight file for torch and OpenVINO: constants that the safetensors file already holds are not stored again.

A graph's constants are byte ranges of its weights. `link` finds each of them in the safetensors files of a model and
writes the graph again so that its ranges lie in those, taken one after the other; the few that are not there (shapes,
small tables) go into a file of their own, which is taken to follow them. All of them are what `Artifact.weights` names.
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from edge_sd.errors import ConversionError

# Beyond this the weights were changed on the way (folded, transposed), and linking them would save nothing.
LARGEST_REST = 1 << 20


def link(graph: Path, weights: Path, safetensors: list[Path], linked: Path, rest: Path) -> None:
    """Write `linked`, the graph with its constants in `safetensors` + `rest`; ConversionError if most are not there."""
    places, end = tensor_places(safetensors)
    data = np.memmap(weights, np.uint8, "r")
    kept = bytearray()
    kept_places: dict[bytes, int] = {}
    tree = ElementTree.parse(graph)
    for node in tree.iterfind("./layers/layer[@type='Const']/data"):
        offset, size = int(node.attrib["offset"]), int(node.attrib["size"])
        value = data[offset : offset + size].tobytes()
        key = hashlib.sha256(value).digest()
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
        raise ConversionError(f"{graph}: {len(kept)} bytes of its constants are not in {safetensors[0].name}")
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
