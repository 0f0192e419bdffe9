"""Spacings: where between the highest and the lowest sigma the levels lie. All return falling float64 [steps]."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

SigmaSpacing = Literal["karras", "exponential", "beta", "kl_optimal", "align_your_steps", "align_your_steps_xl"]
SIGMA_SPACINGS: tuple[SigmaSpacing, ...] = get_args(SigmaSpacing)

# Levels that were optimized for SD 1's and SDXL's networks, ten steps of each (Sabour et al. 2024, arXiv:2404.14507).
ALIGNED: dict[str, tuple[float, ...]] = {
    "align_your_steps": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "align_your_steps_xl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
}

Sigmas = NDArray[np.float64]

RHO = 7.0  # Karras et al. 2022 (arXiv:2206.00364), below equation 5
_BETA = 0.6  # Lee et al. 2024 (arXiv:2407.12173): both parameters of the beta distribution


def space(spacing: SigmaSpacing, high: float, low: float, steps: int, rho: float = RHO) -> Sigmas:
    """From `high` to `low`, both included (one step: `high` alone); `rho` is Karras' exponent."""
    functions: dict[str, Callable[[float, float, int], Sigmas]] = {
        "karras": partial(_karras, rho=rho), "exponential": _exponential, "beta": _beta, "kl_optimal": _kl_optimal,
    }  # fmt: skip
    if spacing in ALIGNED:
        return _aligned(ALIGNED[spacing], steps)
    return functions[spacing](high, low, steps)


def _karras(high: float, low: float, steps: int, rho: float) -> Sigmas:
    """Karras et al. 2022, equation 5, without the final 0."""
    ramp = np.linspace(0, 1, steps)
    inverse_high, inverse_low = high ** (1 / rho), low ** (1 / rho)
    return np.asarray((inverse_high + ramp * (inverse_low - inverse_high)) ** rho, np.float64)


def _exponential(high: float, low: float, steps: int) -> Sigmas:
    return np.exp(np.linspace(math.log(high), math.log(low), steps))


def _kl_optimal(high: float, low: float, steps: int) -> Sigmas:
    """Even steps of arctan sigma (Sabour et al. 2024, arXiv:2404.14507, equation 9)."""
    return np.asarray(np.tan(np.linspace(math.atan(high), math.atan(low), steps)), np.float64)


def _aligned(levels: tuple[float, ...], steps: int) -> Sigmas:
    """Align Your Steps: its levels, interpolated in log sigma for other numbers of steps; 0 takes the last."""
    places = np.linspace(0, 1, steps + 1)[:-1]
    return np.asarray(np.exp(np.interp(places, np.linspace(0, 1, len(levels)), np.log(levels))), np.float64)


def _beta(high: float, low: float, steps: int) -> Sigmas:
    """Dense at both ends: sigma rises as the quantiles of the beta distribution."""
    return np.asarray(low + _beta_quantile(1 - np.linspace(0, 1, steps), _BETA) * (high - low), np.float64)


def _beta_quantile(p: Sigmas, a: float) -> Sigmas:
    """The x at which the regularized incomplete beta function I_x(a, a) is p, for p in [0, 1], 0 < a < 1.

    It is symmetric about 1/2. Below that its series, x^a sum_n (1-a)_n / (n! (a+n)) x^n / B(a, a), gains a bit with
    each term, and 60 halvings of [0, 1/2] find x.
    """
    lower = np.minimum(p, 1 - p)
    complete = math.gamma(a) ** 2 / math.gamma(2 * a)
    low, high = np.zeros_like(p), np.full_like(p, 0.5)
    for _ in range(60):
        x = (low + high) / 2
        term, total = np.ones_like(x), np.full_like(x, 1 / a)
        for n in range(1, 60):
            term = term * x * (n - a) / n
            total = total + term / (a + n)
        below = x**a * total / complete < lower
        low, high = np.where(below, x, low), np.where(below, high, x)
    x = (low + high) / 2
    return np.where(p == 0, 0.0, np.where(p == 1, 1.0, np.where(p > 0.5, 1 - x, x)))
