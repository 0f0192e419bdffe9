"""How long reading a text takes, on a machine that does other work beside it."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable


def seconds(run: Callable[[], object]) -> float:
    """Processor time of this thread, the best of three runs, without the garbage collections of what else is held."""
    best = float("inf")
    collects = gc.isenabled()
    gc.disable()
    try:
        for _ in range(3):
            started = time.thread_time()
            run()
            best = min(best, time.thread_time() - started)
    finally:
        if collects:
            gc.enable()
    return best


def check_linear(read: Callable[[str], object], text: Callable[[int], str], count: int) -> float:
    """Seconds for four times the text: at most 8 times as many. They are 16 times where the growth is quadratic."""
    short, long = text(count), text(4 * count)
    quarter, whole = seconds(lambda: read(short)), seconds(lambda: read(long))
    assert whole < 8 * quarter + 0.02, f"{whole:.3f} s for {len(long)} characters, {quarter:.3f} s for {len(short)}"
    return whole
