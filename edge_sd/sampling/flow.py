"""Levels of flow matching: where a sampler visits the straight path x_s = (1 - s) x0 + s eps, s from 1 to 0.

Models of high resolution are trained with levels that are shifted towards the noise (Esser et al. 2024,
arXiv:2403.03206, equation 23):  s' = a s / (1 + (a - 1) s). The shift a is a number of the model, or e^mu with a mu
that grows with the number of image tokens. Programs agree on that formula and not on which s it is applied to, so the
grid is a fact of a model, too.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

# twice   from 1 to the shifted 1/T, then shifted: diffusers' FlowMatchEuler where the shift is a number (SD 3)
# full    from 1 to 1/T, shifted: the same class where the shift is dynamic
# even    from 1 to 1/N, shifted: what the pipelines of FLUX and Z-Image hand to it
# dpm     N + 1 from 1 - 1/T to 0 without the last, shifted: diffusers' DPM++ with flow sigmas (SANA)
# trig    even angles from pi/2 to 0, of two steps pi/2 and 1.3: diffusers' SCM (SANA-Sprint); there is no shift
FlowGrid = Literal["twice", "full", "even", "dpm", "trig"]
# linear   through (base_image_seq_len, base_shift) and (max_image_seq_len, max_shift)
# flux2    FLUX.2's fit to tokens and steps
FlowMu = Literal["linear", "flux2"]
TimeShift = Literal["exponential", "linear"]

# The second angle of two steps that SANA-Sprint's pipeline takes.
MIDDLE_ANGLE = 1.3
# FLUX.2's two lines: mu of 10 and of 200 steps, slope and value at 0 tokens; beyond so many tokens the latter holds.
_MU_OF_10, _MU_OF_200, _MOST_TOKENS = (8.73809524e-05, 1.89833333), (0.00016927, 0.45666666), 4300


def grid(kind: FlowGrid, steps: int, shift: float, trained: int) -> NDArray[np.float64]:
    """The `steps` falling levels s of a model with `trained` timesteps; the end at 0 is not among them."""
    if kind == "even":
        return shifted(np.linspace(1.0, 1 / steps, steps), shift)
    if kind == "dpm":
        # In the order of diffusers' sums: its timesteps are these, cut to integers.
        return np.asarray(shifted(1.0 - np.linspace(1.0, 1 / trained, steps + 1), shift)[:0:-1], np.float64)
    if kind == "trig":
        even = np.linspace(math.pi / 2, 0.0, steps + 1)[:-1]
        return of_angle(np.array([math.pi / 2, MIDDLE_ANGLE]) if steps == 2 else even)
    low = 1 / trained if kind == "full" else float(shifted(np.array(1 / trained), shift))
    return shifted(np.linspace(1.0, low, steps), shift)


def of_angle(angle: NDArray[np.float64]) -> NDArray[np.float64]:
    """The level s of x = cos(a) x0 + sin(a) eps (Chen et al. 2025, arXiv:2503.09641), the same path in other units."""
    return np.asarray(np.sin(angle) / (np.sin(angle) + np.cos(angle)), np.float64)


def shifted(s: NDArray[np.float64], shift: float) -> NDArray[np.float64]:
    """Esser et al. 2024, equation 23, in s."""
    return np.asarray(shift * s / (1 + (shift - 1) * s))


def linear_mu(tokens: int, low: tuple[int, float], high: tuple[int, float]) -> float:
    """mu of a picture of `tokens`: linear through two pairs of tokens and mu."""
    slope = (high[1] - low[1]) / (high[0] - low[0])
    return low[1] + slope * (tokens - low[0])


def flux2_mu(tokens: int, steps: int) -> float:
    """FLUX.2's mu of a picture of `tokens` in `steps`."""
    many = _MU_OF_200[0] * tokens + _MU_OF_200[1]
    if tokens > _MOST_TOKENS:
        return many
    few = _MU_OF_10[0] * tokens + _MU_OF_10[1]
    return many + (few - many) / (10 - 200) * (steps - 200)


def shift_of(mu: float, kind: TimeShift) -> float:
    """The shift a that a mu stands for."""
    return math.exp(mu) if kind == "exponential" else mu
