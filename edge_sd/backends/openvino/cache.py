"""Compiled graphs on disk: the second start reads what the first one compiled.

One file for each component, named by all that decides its bytes (the model's files, edits, shapes, settings, device,
driver, and this code): a line of JSON that says what follows and its checksums, then OpenVINO's blobs. A file gets its
name in one rename; one that is damaged, or that this OpenVINO does not take, goes, and is made again. The least used go
first where there are too many bytes.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...caches import cache_folder
from ...files import partial, sweep

Bytes = NDArray[np.uint8]
# Limit in bytes for all entries together; the newest entry is always kept.
LIMIT = 6 << 30
# Blobs begin at multiples of this, as mapped memory does.
PAGE = 4096
# Checksums are of pieces of so many bytes, so that several cores check a large file.
PIECE = 32 << 20
HEAD_LIMIT = 1 << 20


def home() -> Path:
    return cache_folder("openvino")


def path(key: str) -> Path:
    """Where an entry is, or would be."""
    return home() / f"{key}.blob"


def read(key: str) -> dict[str, Bytes] | None:
    """The blobs of an entry by name, mapped; None where there is none, or a damaged one, which is removed."""
    file = path(key)
    try:
        # OpenVINO's tensors want memory that could be written to; copy-on-write keeps the file as it is.
        data: Bytes = np.memmap(file, np.uint8, "c")
    except OSError:
        return None
    except ValueError:  # An empty file can't be mapped.
        drop(key)
        return None
    try:
        end = bytes(data[:HEAD_LIMIT]).index(b"\n")
        found: dict[str, Bytes] = {}
        place = -(-(end + 1) // PAGE) * PAGE
        for name, size, pieces in json.loads(bytes(data[:end])):
            blob = data[place : place + size]
            if len(blob) != size:
                raise ValueError(f"{name} is cut short")
            if _checksums(name, blob) != pieces:
                raise ValueError(f"the checksums of {name} differ")
            found[name] = blob
            place += -(-size // PAGE) * PAGE
    except (ValueError, TypeError, AttributeError, RecursionError):
        drop(key)
        return None
    with suppress(OSError):
        os.utime(file)
    return found


def write(key: str, blobs: Mapping[str, bytes | memoryview]) -> None:
    """Keep an entry if the disk has four times its size free. Without it, the graph is compiled again next time."""
    folder, size = home(), sum(map(len, blobs.values()))
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)
        beside = partial(path(key))
        if shutil.disk_usage(folder).free < 4 * size:
            return
        head = [[name, len(blob), _checksums(name, np.frombuffer(blob, np.uint8))] for name, blob in blobs.items()]
        try:
            with beside.open("wb") as file:
                file.write(json.dumps(head).encode() + b"\n")
                for blob in blobs.values():
                    file.seek(-(-file.tell() // PAGE) * PAGE)
                    file.write(blob)
            os.replace(beside, path(key))
        finally:
            beside.unlink(missing_ok=True)
        _make_room(folder, path(key))


def drop(key: str) -> None:
    with suppress(OSError):
        (home() / f"{key}.blob").unlink()


def _make_room(folder: Path, newest: Path) -> None:
    entries = sorted((path for path in folder.glob("*.blob") if path != newest), key=lambda path: path.stat().st_mtime)
    total = sum(path.stat().st_size for path in (*entries, newest))
    for path in entries:
        if total <= LIMIT:
            break
        total -= path.stat().st_size
        path.unlink()


def _checksums(name: str, blob: Bytes) -> list[int]:
    pieces = [blob[start : start + PIECE] for start in range(0, len(blob), PIECE)]
    with ThreadPoolExecutor(4) as pool:
        # A damaged name would be another graph.
        return [zlib.crc32(name.encode()), *pool.map(zlib.crc32, pieces)]
