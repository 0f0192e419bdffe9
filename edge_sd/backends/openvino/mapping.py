"""Pages of files that this process has mapped, given back: what is read again comes from the system's cache.

Mapped weights count as this process's memory from the first read until the system needs it. `forgetting` gives pages
back during a call, so that only the pages of a moment are resident.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Interval between madvise calls, in seconds; the short one is for low memory and costs 2 %.
SELDOM, OFTEN = 0.1, 0.005
_MADV_DONTNEED = 4


@dataclass(frozen=True)
class Place:
    """Address and bytes of a file's pages, and what keeps them mapped there.

    Without an owner the address could be anyone's by the time its pages are given back: pages of memory that belongs to
    others would be zero then.
    """

    start: int
    size: int
    owner: Any


Places = Sequence[Place]


def place_of_array(array: NDArray[np.uint8]) -> Place:
    """Where a mapped array is."""
    return Place(array.ctypes.data, array.nbytes, array)


def places_of_model(model: Any, files: Sequence[Path]) -> Places:
    """Where OpenVINO mapped the weights of a model as it was read; none where it did not, or there is no /proc."""
    if sys.platform != "linux":
        return ()
    constants = [node for node in model.get_ops() if node.get_type_name() == "Constant"]
    largest = max(constants, key=lambda node: node.get_byte_size(), default=None)
    if largest is None:
        return ()
    address, names = largest.data.ctypes.data, {str(path.resolve()) for path in files}
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            where, rights, _, _, _, *name = line.rstrip("\n").split(maxsplit=5)
            start, end = (int(each, 16) for each in where.split("-"))
            # What could have been written to would be lost.
            if start <= address < end and name and name[0] in names and "w" not in rights:
                # The node holds the mapping as long as it lives.
                return (Place(start, end - start, largest),)
    return ()


def forget(places: Places) -> None:
    """Give the pages of these places back, where the system is Linux."""
    if not places or sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    for place in places:
        # Where pages can't be given back, they stay.
        libc.madvise(ctypes.c_void_p(place.start), ctypes.c_size_t(place.size), _MADV_DONTNEED)


def trim() -> None:
    """Give back what was freed and is kept for later; nothing where the C library is not GNU's."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def forgetting(places: Places, every: float = SELDOM) -> Iterator[None]:
    """Context in which the pages of these places are given back every `every` seconds."""
    if not places:
        yield
        return
    done = threading.Event()

    def work() -> None:
        while not done.wait(every):
            forget(places)

    thread = threading.Thread(target=work, name="edge-sd-forgetting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        forget(places)
