"""Samplers: from noise to latents, one generator function each.

All of them work in the variance exploding coordinates of Karras et al. 2022 (arXiv:2206.00364) and k-diffusion,
x = x0 + sigma * eps, where most solvers of the variance preserving papers become a line. ``denoise(x, level)`` returns
the predicted x0, so prediction type, guidance and batch limits end inside it; it calls the UNet with level.alpha * x
and level.t. A sampler takes any tail of a list of levels: image to image starts at x0 + levels[0].sigma * noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.polynomial import Polynomial
from numpy.typing import NDArray

from .schedule import Level, NoiseSchedule
from .sigmas import SIGMA_SPACINGS

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
    """

    index: int
    total: int
    latents: Latents
    denoised: Latents


Solve = Callable[[Denoise, Latents, Sequence[Level], Noise], Iterator[Step]]


def sample_euler(denoise: Denoise, x: Latents, levels: Sequence[Level], noise: Noise) -> Iterator[Step]:
    """Euler's method on dx/dsigma = (x - x0) / sigma (Karras et al. 2022, algorithm 1 without churn).

    In these coordinates it is also deterministic DDIM (Song et al. 2021, arXiv:2010.02502, equation 12 with eta = 0).
    """
    for i, (level, target) in enumerate(pairwise(levels)):
        x0 = denoise(x, level)
        x = _move(x, x0, level.sigma, target.sigma)
        yield Step(i, len(levels) - 1, x, x0)


def sample_euler_ancestral(denoise: Denoise, x: Latents, levels: Sequence[Level], noise: Noise) -> Iterator[Step]:
    """Euler down to sigma_down, then fresh noise back up to the next sigma (k-diffusion's sample_euler_ancestral)."""
    for i, (level, target) in enumerate(pairwise(levels)):
        x0 = denoise(x, level)
        sigma_up = target.sigma * math.sqrt(1 - (target.sigma / level.sigma) ** 2)
        sigma_down = math.sqrt(target.sigma**2 - sigma_up**2)
        x = _move(x, x0, level.sigma, sigma_down)
        if sigma_up > 0:
            x = x + noise(x.shape) * sigma_up
        yield Step(i, len(levels) - 1, x, x0)


def sample_dpmpp_2m(denoise: Denoise, x: Latents, levels: Sequence[Level], noise: Noise) -> Iterator[Step]:
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
            if x0_last is not None and not _is_short_end(levels, i):
                D = x0 + (x0 - x0_last) * (h / (2 * h_last))
            h_last = h
        x = _move(x, D, level.sigma, target.sigma)
        x0_last = x0
        yield Step(i, len(levels) - 1, x, x0)


def sample_dpmpp_2m_sde(denoise: Denoise, x: Latents, levels: Sequence[Level], noise: Noise) -> Iterator[Step]:
    """SDE-DPM-Solver++(2M), the midpoint form (Lu et al. 2022, arXiv:2211.01095, section 5.1): half of the way down is
    drift, the rest is made up for by fresh noise. In these coordinates exp(-h) = sigma' / sigma.
    """
    x0_last: Latents | None = None
    h_last = 0.0
    for i, (level, target) in enumerate(pairwise(levels)):
        x0 = denoise(x, level)
        D, share = x0, (target.sigma / level.sigma) ** 2  # exp(-2h)
        if target.sigma > 0:
            h = math.log(level.sigma / target.sigma)
            if x0_last is not None and not _is_short_end(levels, i):
                D = x0 + (x0 - x0_last) * (h / (2 * h_last))
            h_last = h
        x = D + (x - D) * share
        if target.sigma > 0:
            x = x + noise(x.shape) * (target.sigma * math.sqrt(1 - share))
        x0_last = x0
        yield Step(i, len(levels) - 1, x, x0)


def sample_heun(denoise: Denoise, x: Latents, levels: Sequence[Level], noise: Noise) -> Iterator[Step]:
    """Heun's method, the trapezoidal rule (Karras et al. 2022, algorithm 1 without churn).

    n steps evaluate the model 2 n - 1 times and yield as often: at the end that Euler predicts, and corrected. The last
    step is Euler's where it reaches sigma 0.
    """
    pairs = list(pairwise(levels))
    total = sum(2 if target.sigma > 0 else 1 for _, target in pairs)
    index = 0
    for level, target in pairs:
        x0 = denoise(x, level)
        d: Latents = (x - x0) / level.sigma
        x_next = _move(x, x0, level.sigma, target.sigma)
        yield Step(index, total, x_next, x0)
        index += 1
        if target.sigma > 0:
            x0 = denoise(x_next, target)
            d_next = (x_next - x0) / target.sigma
            x_next = x_next + (d_next - d) * ((target.sigma - level.sigma) / 2)
            yield Step(index, total, x_next, x0)
            index += 1
        x = x_next


def sample_lms(denoise: Denoise, x: Latents, levels: Sequence[Level], noise: Noise) -> Iterator[Step]:
    """Linear multistep: dx/dsigma is the polynomial through its last four values (Liu et al. 2022's Adams-Bashforth on
    uneven steps, as k-diffusion's sample_lms), integrated exactly.
    """
    history: list[Latents] = []  # dx/dsigma, the newest first
    for i, (level, target) in enumerate(pairwise(levels)):
        x0 = denoise(x, level)
        history = [(x - x0) / level.sigma, *history[:3]]
        past = [each.sigma for each in levels[max(0, i - 3) : i + 1]][::-1]
        # The weights' sum is the step, so all but Euler's part is in differences, and nothing large cancels.
        x = _move(x, x0, level.sigma, target.sigma)
        for weight, slope in zip(_adams_weights(past, target.sigma)[1:], history[1:], strict=True):
            x = x + (slope - history[0]) * weight
        yield Step(i, len(levels) - 1, x, x0)


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


def sample_unipc(denoise: Denoise, x: Latents, levels: Sequence[Level], noise: Noise) -> Iterator[Step]:
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
        yield Step(i, len(levels) - 1, x, x0)


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
        return _move(x, m0, sigma, sigma_to)
    weights = [0.5]  # exact for one slope to the order that counts; the values of the paper's official code
    if len(slopes) > 1:
        phi_2 = math.expm1(hh) / hh - 1
        phi_3 = phi_2 / hh - 1 / 2
        b = np.array([phi_2, 2 * phi_3]) / math.expm1(hh)
        weights = np.linalg.solve(np.array([np.ones(2), rks]), b).tolist()
    return _move(x, m0 + _combine(weights, slopes), sigma, sigma_to)


def sample_tcd(denoise: Denoise, x: Latents, levels: Sequence[Level], noise: Noise) -> Iterator[Step]:
    """Trajectory consistency (Zheng et al. 2024, arXiv:2402.19159, algorithm 4): down to `via`, up again by noise."""
    for i, (level, target) in enumerate(pairwise(levels)):
        x0 = denoise(x, level)
        x = _move(x, x0, level.sigma, target.via)
        if i < len(levels) - 2:
            x = x + noise(x.shape) * math.sqrt(target.sigma**2 - target.via**2)
        yield Step(i, len(levels) - 1, x, x0)


def sample_lcm(denoise: Denoise, x: Latents, levels: Sequence[Level], noise: Noise) -> Iterator[Step]:
    """Multistep consistency sampling (Luo et al. 2023, arXiv:2310.04378, algorithm 3): jump to x0, noise again.

    The boundary condition f(x, t) = c_skip x + c_out x0 is that of diffusers: sigma_data 0.5, timesteps scaled.
    """
    sigma_data = 0.5
    for i, (level, target) in enumerate(pairwise(levels)):
        x0 = denoise(x, level)
        s = level.t * level.boundary
        c_skip = sigma_data**2 / (s**2 + sigma_data**2)
        c_out = s / math.sqrt(s**2 + sigma_data**2)
        x0 = x0 * c_out + x * (level.alpha * c_skip)
        x = x0 + noise(x.shape) * target.sigma if target.sigma > 0 else x0
        yield Step(i, len(levels) - 1, x, x0)


def sample_pndm(denoise: Denoise, x: Latents, levels: Sequence[Level], noise: Noise) -> Iterator[Step]:
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
        eps = _combine(weights[len(history) - 1], history)
        x_next = x + eps * (target.sigma - level.sigma)
        yield Step(index, total, x_next, x0)
        index += 1
        if i == 0 and total > 1:
            x0 = denoise(x_next, target)
            eps = _combine((1 / 2, 1 / 2), [eps, (x_next - x0) / target.sigma])
            x_next = x + eps * (target.sigma - level.sigma)
            yield Step(index, total, x_next, x0)
            index += 1
        x = x_next


def _move(x: Latents, x0: Latents, sigma: float, sigma_to: float) -> Latents:
    """x0 + sigma_to * eps with eps = (x - x0) / sigma; in this form nothing cancels when sigma is huge."""
    return x0 + (x - x0) * (sigma_to / sigma)


def _is_short_end(levels: Sequence[Level], i: int) -> bool:
    """Whether step i ends a schedule of few steps: there diffusers' multistep solvers fall back to first order."""
    return i == len(levels) - 2 and levels[-1].t == 0 and len(levels) <= 15


def _combine(weights: Sequence[float], arrays: Sequence[Latents]) -> Latents:
    total = arrays[0] * weights[0]
    for weight, array in zip(weights[1:], arrays[1:], strict=True):
        total = total + array * weight
    return total


@dataclass(frozen=True)
class Sampler:
    """A sampler as users choose it: a solver and the levels it runs on.

    name is the CLI's, title is A1111's in PNG metadata; diffusers_class and diffusers_options name the scheduler that
    it reproduces.
    """

    name: str
    title: str
    solve: Solve
    make_levels: Callable[[NoiseSchedule, int], list[Level]]
    diffusers_class: str
    diffusers_options: Mapping[str, Any] = field(default_factory=dict)
    draws_noise: bool = False
    from_sigma: bool = False  # diffusers runs it in x = x0 + sigma * eps, and may start at sigma * noise
    sigmas: tuple[str, ...] = ("karras", "exponential", "beta", "sgm_uniform")  # spacings that it may be given

    def levels(self, schedule: NoiseSchedule, steps: int) -> list[Level]:
        """The steps + 1 noise levels, falling, the last one being where the sampler ends (sigma 0, or DDIM's).

        Raises:
            ValueError: steps is below 1 or more than the schedule has room for.
        """
        return self.make_levels(schedule, steps)

    def diffusers_config(self, schedule: NoiseSchedule) -> dict[str, Any]:
        """What makes diffusers' scheduler for `schedule`'s model take this sampler's levels."""
        spaced = {
            f"use_{name}_sigmas": name == schedule.sigma_spacing for name in SIGMA_SPACINGS if name in self.sigmas
        }
        rescaled = {"rescale_betas_zero_snr": schedule.rescale_betas_zero_snr}
        spacing = {"timestep_spacing": schedule.timestep_spacing} if schedule.timestep_spacing else {}
        return {**self.diffusers_options, **spaced, **spacing, **rescaled}

    def start(self, noise: Latents, levels: Sequence[Level], schedule: NoiseSchedule) -> Latents:
        """The first x, of the shape of noise (standard normal), for text to image.

        diffusers starts at the noise alone in x_vp = alpha * x; its Euler schedulers do so with "leading" spacing only
        and start at sigma * noise otherwise. Its EDM schedulers start at that of unit data, whatever sigma_data is.
        """
        if schedule.is_edm:
            return noise * math.sqrt(1 + levels[0].sigma ** 2)
        if self.from_sigma and schedule.timestep_spacing != "leading":
            return noise * levels[0].sigma
        return noise * (1 / levels[0].alpha)

    def run(self, denoise: Denoise, x: Latents, levels: Sequence[Level], noise: Noise) -> Iterator[Step]:
        """Sample over levels, or any tail of them; the latents of the last step are what the decoder takes.

        Where they end above sigma 0, diffusers decodes x_vp = alpha * x if that is what it computes in, and so do we.
        """
        end = 1.0 if self.from_sigma or levels[-1].data else levels[-1].alpha
        for step in self.solve(denoise, x, levels, noise):
            last = step.index == step.total - 1
            yield replace(step, latents=step.latents * end) if last else step


_S = NoiseSchedule

_OWN: dict[str, Sampler] = {
    sampler.name: sampler
    for sampler in (
        Sampler("euler", "Euler", sample_euler, _S.euler_levels, "EulerDiscreteScheduler", from_sigma=True),
        Sampler(
            "euler_a", "Euler a", sample_euler_ancestral, _S.euler_levels, "EulerAncestralDiscreteScheduler",
            draws_noise=True, from_sigma=True,
        ),
        Sampler("heun", "Heun", sample_heun, _S.euler_levels, "HeunDiscreteScheduler", from_sigma=True),
        Sampler("lms", "LMS", sample_lms, _S.euler_levels, "LMSDiscreteScheduler", from_sigma=True),
        Sampler("dpmpp_2m", "DPM++ 2M", sample_dpmpp_2m, _S.dpmpp_levels, "DPMSolverMultistepScheduler"),
        Sampler(
            "dpmpp_2m_sde", "DPM++ 2M SDE", sample_dpmpp_2m_sde, _S.dpmpp_levels, "DPMSolverMultistepScheduler",
            {"algorithm_type": "sde-dpmsolver++"}, draws_noise=True,
        ),
        Sampler("unipc", "UniPC", sample_unipc, _S.dpmpp_levels, "UniPCMultistepScheduler"),
        Sampler("ddim", "DDIM", sample_euler, _S.ddim_levels, "DDIMScheduler", sigmas=("sgm_uniform",)),
        Sampler("lcm", "LCM", sample_lcm, _S.lcm_levels, "LCMScheduler", draws_noise=True, sigmas=()),
        Sampler("tcd", "TCD", sample_tcd, _S.tcd_levels, "TCDScheduler", draws_noise=True, sigmas=()),
        Sampler(
            "pndm", "PLMS", sample_pndm, _S.pndm_levels, "PNDMScheduler", {"skip_prk_steps": True},
            sigmas=("sgm_uniform",),
        ),
    )
}  # fmt: skip

# Where an installed package offers samplers of its own: name -> an object of the class Sampler with that name.
GROUP = "edge_sd.samplers"


class Samplers(Mapping[str, Sampler]):
    """Ours, and those that installed packages offer; these are looked up at first use."""

    @property
    def refused(self) -> list[str]:
        """A line for each that an installed package offers and that can't be used."""
        return self._found[1]

    @property
    def _all(self) -> dict[str, Sampler]:
        return self._found[0]

    @cached_property
    def _found(self) -> tuple[dict[str, Sampler], list[str]]:
        found, refused = dict(_OWN), list[str]()
        for point in sorted(entry_points(group=GROUP)):
            made = _offered(point, found)
            if isinstance(made, Sampler):
                found[point.name] = made
            else:
                refused.append(f"the sampler {point.name!r} of {point.value} is not used: {made}")
        return found, refused

    def __getitem__(self, name: str) -> Sampler:
        return self._all[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)


def _offered(point: EntryPoint, known: Mapping[str, Sampler]) -> Sampler | str:
    """The sampler of an entry point, or why it can't be used."""
    if point.name in known:
        return "there is one of that name"
    try:
        made = point.load()
    except (ImportError, AttributeError) as error:
        return str(error)
    if not isinstance(made, Sampler) or made.name != point.name:
        return f"it is no Sampler called {point.name!r}"
    return made


SAMPLERS = Samplers()
