"""Solvers that add noise on their way, one generator function each (see solver.py)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from .schedule import Level
from .sigmas import space
from .solver import PLAIN, Denoise, Latents, Noise, Step, Stochasticity, ancestral, is_short_end, move


def sample_euler_ancestral(
    denoise: Denoise, x: Latents, levels: Sequence[Level], noise: Noise, how: Stochasticity = PLAIN
) -> Iterator[Step]:
    """Euler down to sigma_down, then fresh noise back up to the next sigma (k-diffusion's sample_euler_ancestral).

    In these coordinates it is also the posterior of DDPM (Ho et al. 2020, arXiv:2006.11239, equation 7).
    """
    yield from _euler_with_noise(denoise, x, levels, how.scaled(noise), how.share(1.0))


def sample_ddim(
    denoise: Denoise, x: Latents, levels: Sequence[Level], noise: Noise, how: Stochasticity = PLAIN
) -> Iterator[Step]:
    """DDIM (Song et al. 2021, arXiv:2010.02502, equation 12), which is Euler's method with the noise of eta."""
    yield from _euler_with_noise(denoise, x, levels, how.scaled(noise), how.share(0.0))


def _euler_with_noise(
    denoise: Denoise, x: Latents, levels: Sequence[Level], noise: Noise, eta: float
) -> Iterator[Step]:
    for i, (level, target) in enumerate(pairwise(levels)):
        x0 = denoise(x, level)
        down, up = ancestral(level.sigma, target.sigma, eta)
        x = move(x, x0, level.sigma, down)
        if up > 0:
            x = x + noise(x.shape) * up
        yield Step(i, len(levels) - 1, x, x0, target.sigma)


def sample_dpmpp_2m_sde(
    denoise: Denoise, x: Latents, levels: Sequence[Level], noise: Noise, how: Stochasticity = PLAIN
) -> Iterator[Step]:
    """SDE-DPM-Solver++(2M), the midpoint form (Lu et al. 2022, arXiv:2211.01095, section 5.1)."""
    yield from _dpmpp_sde(denoise, x, levels, noise, how, midpoint=True, order=2)


def sample_tcd(
    denoise: Denoise, x: Latents, levels: Sequence[Level], noise: Noise, how: Stochasticity = PLAIN
) -> Iterator[Step]:
    """Trajectory consistency (Zheng et al. 2024, arXiv:2402.19159, algorithm 4): down to `via`, up again by noise."""
    for i, (level, target) in enumerate(pairwise(levels)):
        x0 = denoise(x, level)
        x = move(x, x0, level.sigma, target.via)
        if i < len(levels) - 2:
            x = x + noise(x.shape) * math.sqrt(target.sigma**2 - target.via**2)
        yield Step(i, len(levels) - 1, x, x0, target.sigma)


def sample_lcm(
    denoise: Denoise, x: Latents, levels: Sequence[Level], noise: Noise, how: Stochasticity = PLAIN
) -> Iterator[Step]:
    """Multistep consistency sampling (Luo et al. 2023, arXiv:2310.04378, algorithm 3): jump to x0, noise again.

    The boundary condition f(x, t) = c_skip x + c_out x0 is that of diffusers: sigma_data 0.5, timesteps scaled. Flow
    models have none (SANA-Sprint, Chen et al. 2025, arXiv:2503.09641).
    """
    sigma_data = 0.5
    for i, (level, target) in enumerate(pairwise(levels)):
        x0 = denoise(x, level)
        if level.boundary:
            s = level.t * level.boundary
            c_skip = sigma_data**2 / (s**2 + sigma_data**2)
            c_out = s / math.sqrt(s**2 + sigma_data**2)
            x0 = x0 * c_out + x * (level.alpha * c_skip)
        x = x0 + noise(x.shape) * target.sigma if target.sigma > 0 else x0
        yield Step(i, len(levels) - 1, x, x0, target.sigma)


def sample_dpmpp_2m_sde_heun(
    denoise: Denoise, x: Latents, levels: Sequence[Level], noise: Noise, how: Stochasticity = PLAIN
) -> Iterator[Step]:
    """SDE-DPM-Solver++(2M) in the other form of its second order (k-diffusion's and diffusers' solver_type "heun")."""
    yield from _dpmpp_sde(denoise, x, levels, noise, how, midpoint=False, order=2)


def sample_dpmpp_3m_sde(
    denoise: Denoise, x: Latents, levels: Sequence[Level], noise: Noise, how: Stochasticity = PLAIN
) -> Iterator[Step]:
    """SDE-DPM-Solver++(3M), of third order from the third step on, as k-diffusion's sample_dpmpp_3m_sde.

    Diffusers' third order has the sign of its last half turned round, so that it does not vanish with the step.
    """
    yield from _dpmpp_sde(denoise, x, levels, noise, how, midpoint=False, order=3)


def _dpmpp_sde(
    denoise: Denoise, x: Latents, levels: Sequence[Level], noise: Noise, how: Stochasticity, midpoint: bool, order: int
) -> Iterator[Step]:
    """SDE-DPM-Solver++ of several steps (Lu et al. 2022, arXiv:2211.01095, section 5.1), H = (1 + eta) h.

    Part of the way down is drift, the rest is made up for by fresh noise.
    """
    eta, noise = how.share(1.0), how.scaled(noise)
    past: list[tuple[Latents, float]] = []  # x0 and the h of the step that followed, the newest first
    for i, (level, target) in enumerate(pairwise(levels)):
        x0 = denoise(x, level)
        h = math.inf
        if target.sigma == 0:
            x = x0
        else:
            h = math.log(level.sigma / target.sigma)
            H = (1 + eta) * h
            known = [] if is_short_end(levels, i) else past
            x = x * math.exp(-H) + x0 * -math.expm1(-H) + _corrected(x0, known[: order - 1], h, H, midpoint)
            if eta and h:
                x = x + noise(x.shape) * (target.sigma * math.sqrt(-math.expm1(-2 * eta * h)))
        past = [(x0, h), *past[:1]]
        yield Step(i, len(levels) - 1, x, x0, target.sigma)


def _corrected(x0: Latents, past: Sequence[tuple[Latents, float]], h: float, H: float, midpoint: bool) -> Latents:
    """The terms of second and third order, of the differences of x0 to `past`; 0 where there is none."""
    if not past or h == 0:
        return np.zeros_like(x0)
    phi_2 = math.expm1(-H) / H + 1
    (x0_1, h_1), *older = past
    d_10 = (x0 - x0_1) * (h / h_1)
    if not older:
        return d_10 * (-0.5 * math.expm1(-H) if midpoint else phi_2)
    x0_2, h_2 = older[0]
    r0, r1 = h_1 / h, h_2 / h
    d_11 = (x0_1 - x0_2) / np.float32(r1)
    d_1, d_2 = d_10 + (d_10 - d_11) * (r0 / (r0 + r1)), (d_10 - d_11) / np.float32(r0 + r1)
    return np.asarray(d_1 * phi_2 - d_2 * (phi_2 / H - 0.5), np.float32)


def sample_dpmpp_sde(
    denoise: Denoise, x: Latents, levels: Sequence[Level], noise: Noise, how: Stochasticity = PLAIN
) -> Iterator[Step]:
    """SDE-DPM-Solver++ of one step (Lu et al. 2022, arXiv:2211.01095), through the middle of each in log sigma.

    Steps but the last evaluate twice. The noise on the way to the middle is part of that of the whole step, as it is on
    one Brownian path: variances of such parts are as their lengths in sigma.
    """
    eta, noise = how.share(1.0), how.scaled(noise)
    total, index = _twice(levels), 0
    for level, target in pairwise(levels):
        x0 = denoise(x, level)
        if target.sigma == 0:
            x = move(x, x0, level.sigma, 0.0)
            yield Step(index, total, x, x0, target.sigma)
            break
        middle = level.at(math.sqrt(level.sigma * target.sigma))
        first, second = noise(x.shape), noise(x.shape)
        down, up = ancestral(level.sigma, middle.sigma, eta)
        x_middle = move(x, x0, level.sigma, down) + first * up
        yield Step(index, total, x_middle, x0, middle.sigma)
        x0 = denoise(x_middle, middle)
        down, up = ancestral(level.sigma, target.sigma, eta)
        parts = math.sqrt(level.sigma - middle.sigma), math.sqrt(middle.sigma - target.sigma)
        whole = (first * parts[0] + second * parts[1]) / np.float32(math.sqrt(level.sigma - target.sigma))
        x = move(x, x0, level.sigma, down) + whole * up
        yield Step(index + 1, total, x, x0, target.sigma)
        index += 2


def sample_dpmpp_2s_ancestral(
    denoise: Denoise, x: Latents, levels: Sequence[Level], noise: Noise, how: Stochasticity = PLAIN
) -> Iterator[Step]:
    """DPM-Solver++(2S) down to sigma_down, then noise (k-diffusion's sample_dpmpp_2s_ancestral)."""
    yield from _through_the_middle(denoise, x, levels, noise, how, eta=how.share(1.0), of_x0=True)


def sample_dpm2(
    denoise: Denoise, x: Latents, levels: Sequence[Level], noise: Noise, how: Stochasticity = PLAIN
) -> Iterator[Step]:
    """DPM-Solver-2 (Lu et al. 2022, arXiv:2206.00927): steps by the slope in their middle, as k-diffusion's."""
    yield from _through_the_middle(denoise, x, levels, noise, how, eta=0.0, of_x0=False)


def sample_dpm2_ancestral(
    denoise: Denoise, x: Latents, levels: Sequence[Level], noise: Noise, how: Stochasticity = PLAIN
) -> Iterator[Step]:
    """DPM-Solver-2 down to sigma_down, then noise (k-diffusion's sample_dpm_2_ancestral)."""
    yield from _through_the_middle(denoise, x, levels, noise, how, eta=how.share(1.0), of_x0=False)


def _through_the_middle(
    denoise: Denoise, x: Latents, levels: Sequence[Level], noise: Noise, how: Stochasticity, eta: float, of_x0: bool
) -> Iterator[Step]:
    """Steps down to sigma_down by what is predicted in their middle in log sigma: x0 there, or the slope."""
    total, index, steps = _twice(levels), 0, len(levels) - 1
    for level, target in pairwise(levels):
        x, level = how.churned(x, level, steps, noise)
        x0 = denoise(x, level)
        down, up = ancestral(level.sigma, target.sigma, eta)
        if down == 0:
            x = move(x, x0, level.sigma, 0.0)
        else:
            middle = level.at(math.sqrt(level.sigma * down))
            x_middle = move(x, x0, level.sigma, middle.sigma)
            yield Step(index, total, x_middle, x0, middle.sigma)
            index += 1
            x0 = denoise(x_middle, middle)
            slope = (x_middle - x0) / np.float32(middle.sigma)
            x = move(x, x0, level.sigma, down) if of_x0 else x + slope * (down - level.sigma)
        if up > 0:
            x = x + how.scaled(noise)(x.shape) * up
        yield Step(index, total, x, x0, target.sigma)
        index += 1


def sample_restart(
    denoise: Denoise, x: Latents, levels: Sequence[Level], noise: Noise, how: Stochasticity = PLAIN
) -> Iterator[Step]:
    """Restart sampling (Xu et al. 2023, arXiv:2306.14878): Heun's method, whose last part is run again from more noise.

    As AUTOMATIC1111 does: with 20 steps or more 9 of them, from 36 on half of them in two goes, are spent between sigma
    0.1 and 2; the others are Karras'. With fewer there is no restart.
    """
    path = _restarts(levels)
    total, index, reached = sum(2 if b.sigma > 0 else 1 for _, b in path), 0, path[0][0] if path else levels[0]
    for level, target in path:
        if level.sigma > reached.sigma:
            x = x + how.scaled(noise)(x.shape) * math.sqrt(level.sigma**2 - reached.sigma**2)
        x0 = denoise(x, level)
        x_next = move(x, x0, level.sigma, target.sigma)
        yield Step(index, total, x_next, x0, target.sigma)
        index += 1
        if target.sigma > 0:
            slope = (x - x0) / np.float32(level.sigma)
            x0 = denoise(x_next, target)
            x_next = x_next + ((x_next - x0) / np.float32(target.sigma) - slope) * ((target.sigma - level.sigma) / 2)
            yield Step(index, total, x_next, x0, target.sigma)
            index += 1
        x, reached = x_next, target


def _restarts(levels: Sequence[Level]) -> list[tuple[Level, Level]]:
    """The steps of restart sampling in order, in the place of those of `levels`."""
    steps = len(levels) - 1
    if steps < 20:
        return list(pairwise(levels))
    again, times = (9, 1) if steps < 36 else (steps // 4, 2)
    sigmas = [*space("karras", levels[0].sigma, levels[-2].sigma, steps - again * times), 0.0]
    low, high = (int(np.argmin(np.abs(np.array(sigmas) - at))) for at in (0.1, 2.0))
    path = list(pairwise(sigmas))
    if high < low:
        once = list(pairwise(space("karras", sigmas[high], sigmas[low], again + 1)))
        path[low:low] = once * times
    return [(levels[0].at(float(a)), levels[0].at(float(b))) for a, b in path]


def _twice(levels: Sequence[Level]) -> int:
    """Evaluations of a solver that makes two for each step but those that end at sigma 0."""
    return sum(2 if target.sigma > 0 else 1 for _, target in pairwise(levels))
