"""Drawings that are still hard come more often (importance sampling, Katharopoulos & Fleuret 2018, for generation).

How large the error is depends on the timestep far more than on the drawing, so each error is held beside the mean of
its part of the timesteps. A drawing's difficulty is the moving average of that ratio; it is drawn in proportion to the
`POWER`-th power of it, within limits, so that nothing is forgotten and no outlier takes all lessons.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

PARTS, STEPS = 20, 1000
POWER = 3.0
LEAST, MOST = 0.3, 4.0
# How fast the averages follow: of a part's errors, and of a drawing's ratios.
QUICK, SLOW = 0.02, 0.1


class Emphasis:
    """`share`: float64 [N], how often each of N drawings is to be drawn; sums to 1."""

    def __init__(self, count: int) -> None:
        self.ratio = np.ones(count)
        self._mean = np.zeros(PARTS)

    def learned(self, which: NDArray[np.integer[Any]], t: NDArray[np.integer[Any]], error: NDArray[np.float32]) -> None:
        """Of a batch: which drawings, at which timesteps, with which mean squared errors; parallel arrays."""
        part = t * PARTS // STEPS
        for n, p, e in zip(which, part, error, strict=True):
            self._mean[p] += (QUICK if self._mean[p] else 1.0) * (e - self._mean[p])
            self.ratio[n] += SLOW * (e / max(self._mean[p], 1e-9) - self.ratio[n])

    @property
    def share(self) -> NDArray[np.float64]:
        weight = np.clip(self.ratio**POWER, LEAST, MOST)
        return np.asarray(weight / weight.sum())
