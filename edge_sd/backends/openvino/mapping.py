"""Pages of files that this process has mapped, given back: what is read again comes from the system's cache.

Mapped weights count as this process's memory from the first read until the system needs it. `forgetting` gives pages
back during a call, so that only the pages of a moment are resident.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

# Interval between madvise calls, in seconds; the short one is for low memory and costs 2 %.
SELDOM, OFTEN = 0.1, 0.005
_MADV_DONTNEED = 4


Places = Sequence[tuple[int, int]]


def forget(places: Places) -> None:
    """Give the pages of these places back."""
    if not places:
        # Windows has no library that goes by no name.
        return
    libc = ctypes.CDLL(None)
    for start, size in places:
        # Where pages can't be given back, they stay.
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), _MADV_DONTNEED)


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


def mapped(files: Iterable[Path], writable: bool = False) -> Places:
    """Address and bytes of the places where this process has these files to read; none where there is no /proc.

    With `writable` also where it could write: if it has, that is lost.
    """
    if sys.platform != "linux":
        return []
    names, found = {str(path.resolve()) for path in files}, []
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            where, rights, _, _, _, *name = line.rstrip("\n").split(maxsplit=5)
            if name and name[0] in names and (writable or "w" not in rights):
                start, end = (int(each, 16) for each in where.split("-"))
                found.append((start, end - start))
    return found
