"""What a solver is: the types, and the arithmetic that several share.

All solvers work in the variance exploding coordinates of Karras et al. 2022 (arXiv:2206.00364) and k-diffusion,
x = x0 + sigma * eps, where most solvers of the variance preserving papers become a line. ``denoise(x, level)`` returns
the predicted x0, so prediction type, guidance and batch limits end inside it; it calls the UNet with level.alpha * x
and level.t. A solver takes any tail of a list of levels: image to image starts at x0 + levels[0].sigma * noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .schedule import Level

Latents = NDArray[np.float32]
Denoise = Callable[[Latents, Level], Latents]
Noise = Callable[[tuple[int, ...]], Latents]


@dataclass(frozen=True)
class Step:
    """What a sampler yields after each evaluation of the model.

    Args:
        index: 0 to total - 1.
        total: Evaluations of the whole picture.
        latents: x at the level reached, float32 [1, C, h, w].
        denoised: The predicted x0, of the same shape, which makes a preview.
        sigma: The noise level of `latents`: they are x0 + sigma * noise. 0 at the end.

    Example:
        for step in pipeline.steps("a red apple"):
            print(f"{step.index + 1} of {step.total}, noise {step.sigma:.2f}")
            preview = pipeline.decode(step.denoised, "auto", preview=True)
    """

    index: int
    total: int
    latents: Latents
    denoised: Latents
    sigma: float


@dataclass(frozen=True)
class Stochasticity:
    """How much noise a solver adds on its way, in k-diffusion's terms.

    eta        share of a step's noise that is fresh: 0 is deterministic; None is the solver's own
    s_churn    noise added before a step, over all steps together (Karras et al. 2022, algorithm 2)
    s_tmin, s_tmax   the sigmas between which it is
    s_noise    factor of all noise that is added
    """

    eta: float | None = None
    s_churn: float = 0.0
    s_tmin: float = 0.0
    s_tmax: float = math.inf
    s_noise: float = 1.0

    def scaled(self, noise: Noise) -> Noise:
        return noise if self.s_noise == 1 else lambda shape: noise(shape) * np.float32(self.s_noise)

    def share(self, usual: float) -> float:
        """eta, `usual` where it is not set."""
        return usual if self.eta is None else self.eta

    def churned(self, x: Latents, level: Level, steps: int, noise: Noise) -> tuple[Latents, Level]:
        """x and its level with the noise of one of `steps` added (Karras et al. 2022, algorithm 2, lines 4 to 6)."""
        gamma = min(self.s_churn / steps, math.sqrt(2) - 1) if self.s_tmin <= level.sigma <= self.s_tmax else 0.0
        if gamma <= 0:
            return x, level
        raised = level.at(level.sigma * (1 + gamma))
        return x + self.scaled(noise)(x.shape) * math.sqrt(raised.sigma**2 - level.sigma**2), raised


PLAIN = Stochasticity()


class Solve(Protocol):
    """A solver: yields after each evaluation of the model."""

    def __call__(
        self, denoise: Denoise, x: Latents, levels: Sequence[Level], noise: Noise, how: Stochasticity = PLAIN
    ) -> Iterator[Step]: ...


def move(x: Latents, x0: Latents, sigma: float, sigma_to: float) -> Latents:
    """x0 + sigma_to * eps with eps = (x - x0) / sigma; in this form nothing cancels when sigma is huge."""
    return x0 + (x - x0) * (sigma_to / sigma)


def ancestral(sigma: float, target: float, eta: float) -> tuple[float, float]:
    """sigma_down to step to, and sigma_up of the noise that makes it `target` again (k-diffusion's ancestral step)."""
    up = min(target, eta * target * math.sqrt(1 - (target / sigma) ** 2))
    return math.sqrt(target**2 - up**2), up


def is_short_end(levels: Sequence[Level], i: int) -> bool:
    """Whether step i ends a schedule of few steps: there diffusers' multistep solvers fall back to first order."""
    return i == len(levels) - 2 and levels[-1].t == 0 and levels[-1].steps < 15


def combine(weights: Sequence[float], arrays: Sequence[Latents]) -> Latents:
    total = arrays[0] * weights[0]
    for weight, array in zip(weights[1:], arrays[1:], strict=True):
        total = total + array * weight
    return total
