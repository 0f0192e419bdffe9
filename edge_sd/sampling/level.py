"""Level: one noise level that a sampler visits, in the coordinates of schedule.py."""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol


class Timed(Protocol):
    """What knows the timestep of any noise level: a NoiseSchedule."""

    def timestep_at(self, sigma: float) -> float:
        """The t of any sigma above 0."""


class Level(NamedTuple):
    """One noise level: sigma = sqrt((1 - abar) / abar), and t, the timestep as the UNet is given it.

    flow   whether it lies on a straight path, where sigma = s / (1 - s)
    via    the sigma that TCD goes down to on its way to this level, before it adds noise
    data   standard deviation of the data, where the network is preconditioned as EDM's are (Karras et al. 2022); else 0
    boundary   what LCM multiplies t by in its boundary condition; 0 where it has none
    schedule   its schedule; `at` makes levels between its steps
    steps      of the whole schedule that it is one of
    """

    sigma: float
    t: float
    flow: bool = False
    via: float = 0.0
    data: float = 0.0
    boundary: float = 10.0
    schedule: Timed | None = None
    steps: int = 0

    def at(self, sigma: float) -> Level:
        """The level of the same schedule at another sigma; its t lies between integers."""
        if sigma == 0 or self.schedule is None:
            return self._replace(sigma=sigma, t=0.0 if sigma == 0 else self.t)
        return self._replace(sigma=sigma, t=self.schedule.timestep_at(sigma))

    @property
    def alpha(self) -> float:
        """sqrt(abar), 1 - s, or EDM's c_in: scales latents into what the UNet was trained on, unet(alpha * x, t)."""
        if self.flow:
            return 1.0 / (1.0 + self.sigma)
        return 1.0 / math.sqrt((self.data or 1.0) ** 2 + self.sigma**2)
