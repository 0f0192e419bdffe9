"""Deterministic solvers of dx/dsigma = (x - x0) / sigma, one generator function each (see solver.py)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.polynomial import Polynomial

from .schedule import Level
from .solver import PLAIN, Denoise, Latents, Noise, Step, Stochasticity, combine, is_short_end, move


def sample_euler(
    denoise: Denoise, x: Latents, levels: Sequence[Level], noise: Noise, how: Stochasticity = PLAIN
) -> Iterator[Step]:
    """Euler's method on dx/dsigma = (x - x0) / sigma (Karras et al. 2022, algorithm 2 with steps of first order)."""
    for i, (level, target) in enumerate(pairwise(levels)):
        x, level = how.churned(x, level, len(levels) - 1, noise)
        x0 = denoise(x, level)
        x = move(x, x0, level.sigma, target.sigma)
        yield Step(i, len(levels) - 1, x, x0, target.sigma)


def sample_dpmpp_2m(
    denoise: Denoise, x: Latents, levels: Sequence[Level], noise: Noise, how: Stochasticity = PLAIN
) -> Iterator[Step]:
    """DPM-Solver++(2M), the midpoint form (Lu et al. 2022, arXiv:2211.01095, algorithm 2), in lambda = -log sigma.

    The first step, and the last one where it reaches sigma 0 (h is infinite), are of first order.
    """
    x0_last: Latents | None = None
    h_last = 0.0
    for i, (level, target) in enumerate(pairwise(levels)):
        x0 = denoise(x, level)
        D = x0
        if target.sigma > 0:
            h = math.log(level.sigma / target.sigma)
            if x0_last is not None and not is_short_end(levels, i):
                D = x0 + (x0 - x0_last) * (h / (2 * h_last))
            h_last = h
        x = move(x, D, level.sigma, target.sigma)
        x0_last = x0
        yield Step(i, len(levels) - 1, x, x0, target.sigma)


def sample_heun(
    denoise: Denoise, x: Latents, levels: Sequence[Level], noise: Noise, how: Stochasticity = PLAIN
) -> Iterator[Step]:
    """Heun's method, the trapezoidal rule (Karras et al. 2022, algorithm 2).

    n steps evaluate the model 2 n - 1 times and yield as often: at the end that Euler predicts, and corrected. The last
    step is Euler's where it reaches sigma 0.
    """
    pairs = list(pairwise(levels))
    total = sum(2 if target.sigma > 0 else 1 for _, target in pairs)
    index = 0
    for level, target in pairs:
        x, level = how.churned(x, level, len(pairs), noise)
        x0 = denoise(x, level)
        d: Latents = (x - x0) / level.sigma
        x_next = move(x, x0, level.sigma, target.sigma)
        yield Step(index, total, x_next, x0, target.sigma)
        index += 1
        if target.sigma > 0:
            x0 = denoise(x_next, target)
            d_next = (x_next - x0) / target.sigma
            x_next = x_next + (d_next - d) * ((target.sigma - level.sigma) / 2)
            yield Step(index, total, x_next, x0, target.sigma)
            index += 1
        x = x_next


def sample_lms(
    denoise: Denoise, x: Latents, levels: Sequence[Level], noise: Noise, how: Stochasticity = PLAIN
) -> Iterator[Step]:
    """Linear multistep: dx/dsigma is the polynomial through its last four values (Liu et al. 2022's Adams-Bashforth on
    uneven steps, as k-diffusion's sample_lms), integrated exactly.
    """
    history: list[Latents] = []  # dx/dsigma, the newest first
    for i, (level, target) in enumerate(pairwise(levels)):
        x0 = denoise(x, level)
        history = [(x - x0) / level.sigma, *history[:3]]
        past = [each.sigma for each in levels[max(0, i - 3) : i + 1]][::-1]
        # The weights' sum is the step, so all but Euler's part is in differences, and nothing large cancels.
        x = move(x, x0, level.sigma, target.sigma)
        for weight, slope in zip(_adams_weights(past, target.sigma)[1:], history[1:], strict=True):
            x = x + (slope - history[0]) * weight
        yield Step(i, len(levels) - 1, x, x0, target.sigma)


def _adams_weights(past: Sequence[float], target: float) -> list[float]:
    """The integrals from past[0] to target of the Lagrange polynomials over `past`."""
    h = target - past[0]
    nodes = [(sigma - past[0]) / h for sigma in past]
    weights = []
    for j, node in enumerate(nodes):
        others = nodes[:j] + nodes[j + 1 :]
        basis = Polynomial.fromroots(others) if others else Polynomial([1.0])
        weights.append(h * float(basis.integ()(1.0)) / math.prod(node - other for other in others))
    return weights


def sample_unipc(
    denoise: Denoise, x: Latents, levels: Sequence[Level], noise: Noise, how: Stochasticity = PLAIN
) -> Iterator[Step]:
    """UniPC-2 with B(h) = e^h - 1 on x0 (Zhao et al. 2023, arXiv:2302.04867, algorithms 5 to 8), lambda = -log sigma.

    Each evaluation first corrects the x it was made at, which costs nothing, and then predicts the next. The first and
    the last step are of first order.
    """
    x_last = x
    history: list[tuple[Latents, float]] = []  # (x0, sigma), the newest first
    order = 1
    for i, (level, target) in enumerate(pairwise(levels)):
        x0 = denoise(x, level)
        if i > 0:
            x = _unipc_move(x_last, history[:order], level.sigma, x0)
        history = [(x0, level.sigma), *history[:1]]
        order = min(2, i + 1, len(levels) - 1 - i)
        x_last = x
        x = _unipc_move(x, history[:order], target.sigma, None)
        yield Step(i, len(levels) - 1, x, x0, target.sigma)


def _unipc_move(
    x: Latents, history: Sequence[tuple[Latents, float]], sigma_to: float, x0_to: Latents | None
) -> Latents:
    """One step from x at history[0]'s sigma, knowing x0 there and before, and, to correct, `x0_to` at its end."""
    m0, sigma = history[0]
    if sigma_to == 0:
        return m0
    hh = math.log(sigma_to / sigma)  # -h, as x0 is what is predicted
    slopes, rks = [], []  # (m - m0) / r at r = (lambda - lambda_0) / h
    for m, past in history[1:]:
        rks.append(math.log(past / sigma) / hh)
        slopes.append((m - m0) / np.float32(rks[-1]))
    if x0_to is not None:
        rks.append(1.0)
        slopes.append(x0_to - m0)
    if not slopes:
        return move(x, m0, sigma, sigma_to)
    weights = [0.5]  # exact for one slope to the order that counts; the values of the paper's official code
    if len(slopes) > 1:
        phi_2 = math.expm1(hh) / hh - 1
        phi_3 = phi_2 / hh - 1 / 2
        b = np.array([phi_2, 2 * phi_3]) / math.expm1(hh)
        weights = np.linalg.solve(np.array([np.ones(2), rks]), b).tolist()
    return move(x, m0 + combine(weights, slopes), sigma, sigma_to)


def sample_pndm(
    denoise: Denoise, x: Latents, levels: Sequence[Level], noise: Noise, how: Stochasticity = PLAIN
) -> Iterator[Step]:
    """PLMS: Adams-Bashforth on eps (Liu et al. 2022, arXiv:2202.09778, equations 9 and 12), without Runge-Kutta steps.

    The first step evaluates both its ends and takes their mean, so n > 1 steps yield n + 1 times; the first two reach
    the same level. It is eps that is extrapolated, as in the paper, whatever the model predicts.
    """
    weights = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
    total = len(levels) if len(levels) > 2 else len(levels) - 1
    index = 0
    history: list[Latents] = []  # eps, the newest first
    for i, (level, target) in enumerate(pairwise(levels)):
        x0 = denoise(x, level)
        history = [(x - x0) / level.sigma, *history[:3]]
        eps = combine(weights[len(history) - 1], history)
        x_next = x + eps * (target.sigma - level.sigma)
        yield Step(index, total, x_next, x0, target.sigma)
        index += 1
        if i == 0 and total > 1:
            x0 = denoise(x_next, target)
            eps = combine((1 / 2, 1 / 2), [eps, (x_next - x0) / target.sigma])
            x_next = x + eps * (target.sigma - level.sigma)
            yield Step(index, total, x_next, x0, target.sigma)
            index += 1
        x = x_next


def sample_dpmpp_3m(
    denoise: Denoise, x: Latents, levels: Sequence[Level], noise: Noise, how: Stochasticity = PLAIN
) -> Iterator[Step]:
    """DPM-Solver++(3M) (Lu et al. 2022, arXiv:2211.01095) as diffusers' with solver_order 3.

    The first step is of first order, the second of second, and so are, of less than 15, the last but one and the last.
    """
    past: list[tuple[Latents, float]] = []  # x0 and the h of the step that followed, the newest first
    for i, (level, target) in enumerate(pairwise(levels)):
        x0 = denoise(x, level)
        h, D = math.inf, x0
        x_next = move(x, x0, level.sigma, target.sigma)
        if target.sigma > 0:
            h = math.log(level.sigma / target.sigma)
            few = levels[-1].steps < 15
            order = 1 if is_short_end(levels, i) else 2 if few and i == len(levels) - 3 else 3
            known = past[: order - 1]
            if len(known) == 1:
                D = x0 + (x0 - known[0][0]) * (h / (2 * known[0][1]))
                x_next = move(x, D, level.sigma, target.sigma)
            elif known:
                (x0_1, h_1), (x0_2, h_2) = known
                r0, r1 = h_1 / h, h_2 / h
                d_10, d_11 = (x0 - x0_1) / np.float32(r0), (x0_1 - x0_2) / np.float32(r1)
                d_1, d_2 = d_10 + (d_10 - d_11) * (r0 / (r0 + r1)), (d_10 - d_11) / np.float32(r0 + r1)
                phi_2 = math.expm1(-h) / h + 1
                x_next = x_next + d_1 * phi_2 - d_2 * (phi_2 / h - 0.5)
        past = [(x0, h), *past[:1]]
        x = x_next
        yield Step(i, len(levels) - 1, x, x0, target.sigma)


def sample_deis(
    denoise: Denoise, x: Latents, levels: Sequence[Level], noise: Noise, how: Stochasticity = PLAIN
) -> Iterator[Step]:
    """DEIS of second order (Zhang and Chen 2022, arXiv:2204.13902) on log rho: eps is a line in log sigma, integrated.

    As diffusers' DEISMultistepScheduler, whose last of less than 15 steps is of first order.
    """
    last: tuple[Latents, float] | None = None  # eps and sigma of the step before
    for i, (level, target) in enumerate(pairwise(levels)):
        x0 = denoise(x, level)
        eps = (x - x0) / np.float32(level.sigma)
        if last is None or target.sigma == 0 or is_short_end(levels, i):
            x = move(x, x0, level.sigma, target.sigma)
        elif target.sigma < level.sigma:
            eps_last, sigma_last = last
            # The integral of log(sigma / sigma_last) / log(level / sigma_last) over the step, and of 1 less that.
            span = math.log(level.sigma / sigma_last)

            def integral(sigma: float, span: float = span, sigma_last: float = sigma_last) -> float:
                return sigma * (math.log(sigma / sigma_last) - 1) / span

            own = integral(target.sigma) - integral(level.sigma)
            x = x + eps * own + eps_last * (target.sigma - level.sigma - own)
        last = eps, level.sigma
        yield Step(i, len(levels) - 1, x, x0, target.sigma)
