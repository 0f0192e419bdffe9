"""Weights of a torch module that are read where their file is mapped: which pages can be given back, and read again.

torch maps safetensors so that they could be written to; written pages would be lost when they are given back. So only
a mapping that nothing was written to is taken, and from then on it can only be read.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edge_sd.backends.openvino.mapping import Place, Places

_PROT_READ = 1
_HEAD = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \S+ +(/.*)$")


def places_of_module(module: Any) -> Places:
    """Where the weights of `module` are mapped, read-only from now on; none where they are not or /proc is not."""
    if sys.platform != "linux":
        return ()
    tensors = sorted(module.parameters(), key=lambda each: each.data_ptr())
    found = []
    for start, end in _clean():
        owner = next((each for each in tensors if start <= each.data_ptr() < end), None)
        if owner is not None and not _protect(start, end - start):
            found.append(Place(start, end - start, owner))
    return tuple(found)


def _clean() -> Iterator[tuple[int, int]]:
    """Ranges of mapped safetensors whose pages are all as in the file."""
    at: tuple[int, int] | None = None
    for line in Path("/proc/self/smaps").read_text("utf-8", "surrogateescape").splitlines():
        if head := _HEAD.match(line):
            at = (int(head[1], 16), int(head[2], 16)) if head[3].endswith(".safetensors") else None
        elif at is not None and line.startswith("Anonymous:"):
            if line.split()[1] == "0":
                yield at
            at = None


def _protect(start: int, size: int) -> int:
    return int(ctypes.CDLL(None).mprotect(ctypes.c_void_p(start), ctypes.c_size_t(size), _PROT_READ))
