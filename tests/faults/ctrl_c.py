"""Interrupts the main thread at random moments of drawing; prints after each whether the next picture is as before."""

from __future__ import annotations

import random
import signal
import sys
from types import FrameType

import numpy as np

from edge_sd import Pipeline, Request

REQUEST = Request("a cat", steps=2, width=64, height=64, seed=1)
SOON, LATE = 1e-4, 1e-2


def interrupt(_signal: int, _frame: FrameType | None) -> None:
    """What Python does at Ctrl-C."""
    raise KeyboardInterrupt


def main(count: int) -> None:
    """Print "same" or "other" for each of `count` interrupts."""
    signal.signal(signal.SIGALRM, interrupt)
    moments = random.Random(1)
    with Pipeline.open(device="cpu") as pipeline:
        fresh = np.asarray(pipeline.generate(REQUEST).pictures[0].image)
        for _ in range(count):
            signal.setitimer(signal.ITIMER_REAL, moments.uniform(SOON, LATE))
            try:
                while True:
                    pipeline.generate(REQUEST)
            except KeyboardInterrupt:
                after = np.asarray(pipeline.generate(REQUEST).pictures[0].image)
            print("same" if np.array_equal(fresh, after) else "other", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
