"""The steps that take part where a share of them is asked for: of guidance, of a ControlNet."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def active_timesteps(timesteps: Sequence[float], start: float, end: float) -> frozenset[float]:
    """Those of the steps that lie within a share of all, 0 to 1, as a UNet is given them.

    Counted as diffusers does: a step takes part if all of it lies between start and end.
    """
    count = len(timesteps)
    within = [n for n in range(count) if n / count >= start and (n + 1) / count <= end]
    return frozenset(float(np.float32(timesteps[n])) for n in within)


def within(active: frozenset[float], t: float) -> bool:
    """Whether t is one of the steps in `active`, or lies between two: solvers also evaluate in the middle of a step."""
    return bool(active) and min(active) <= t <= max(active)
