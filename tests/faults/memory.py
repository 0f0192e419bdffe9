"""The most memory that a process had while something was done, by the account of Linux."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass
class Peak:
    """Bytes more than before, at most."""

    bytes: int = 0


@contextlib.contextmanager
def peak() -> Iterator[Peak]:
    """Measure what is done inside. The test is skipped where the system does not tell."""
    found = Peak()
    gc.collect()
    try:
        # Forget the highest value until now (proc(5)).
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
    except OSError:
        pytest.skip("no /proc/self/clear_refs")
    try:
        yield found
    finally:
        found.bytes = max(0, _status("VmHWM") - before)


def _status(name: str) -> int:
    (line,) = [each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024
