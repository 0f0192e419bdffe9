"""Samplers as users choose them: a solver, the levels it runs on, and the names it goes by."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from ..errors import InvalidRequest, choices
from . import solvers, stochastic
from .schedule import Level, NoiseSchedule
from .sigmas import SIGMA_SPACINGS
from .solver import PLAIN, Denoise, Latents, Noise, Solve, Step, Stochasticity

# Spacings of timesteps, not of sigmas: what a request calls them.
TIMESTEPS = ("sgm_uniform", "simple")

__all__ = ["SAMPLERS", "Denoise", "Latents", "Noise", "Sampler", "Step", "Stochasticity", "refuse_idle"]


@dataclass(frozen=True)
class Sampler:
    """A sampler as users choose it: a solver and the levels it runs on.

    name is the CLI's, title is A1111's in PNG metadata; diffusers_class and diffusers_options name the scheduler that
    it reproduces, where diffusers has one.
    """

    name: str
    title: str
    solve: Solve
    make_levels: Callable[[NoiseSchedule, int], list[Level]]
    diffusers_class: str = ""
    diffusers_options: Mapping[str, Any] = field(default_factory=dict)
    draws_noise: bool = False
    from_sigma: bool = False  # diffusers runs it in x = x0 + sigma * eps, and may start at sigma * noise
    sigmas: tuple[str, ...] = (*SIGMA_SPACINGS, *TIMESTEPS)  # spacings that it may be given
    takes: tuple[str, ...] = ()  # of Stochasticity's fields those that it looks at

    def levels(self, schedule: NoiseSchedule, steps: int) -> list[Level]:
        """The steps + 1 noise levels, falling, the last one being where the sampler ends (sigma 0, or DDIM's).

        Raises:
            ValueError: steps is below 1 or more than the schedule has room for.
        """
        return [level._replace(schedule=schedule, steps=steps) for level in self.make_levels(schedule, steps)]

    def diffusers_config(self, schedule: NoiseSchedule) -> dict[str, Any]:
        """What makes diffusers' scheduler for `schedule`'s model take this sampler's levels.

        Raises InvalidRequest where diffusers has no such scheduler, or not these levels.
        """
        theirs = ("karras", "exponential", "beta")
        own = schedule.sigma_spacing not in (None, *theirs) or schedule.timestep_spacing == "simple"
        if own or not self.diffusers_class:
            raise InvalidRequest(f"diffusers has no scheduler for {self.title} with these levels")
        spaced = {f"use_{name}_sigmas": name == schedule.sigma_spacing for name in theirs if name in self.sigmas}
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

    def head(
        self, denoise: Denoise, x: Latents, levels: Sequence[Level], noise: Noise, how: Stochasticity = PLAIN
    ) -> Iterator[Step]:
        """Sample over the first of the levels: the latents stay x, for another model to go on from."""
        if how == PLAIN:  # Solvers of other packages may take no more.
            return self.solve(denoise, x, levels, noise)
        return self.solve(denoise, x, levels, noise, how)

    def run(
        self, denoise: Denoise, x: Latents, levels: Sequence[Level], noise: Noise, how: Stochasticity = PLAIN
    ) -> Iterator[Step]:
        """Sample over levels, or any tail of them; the latents of the last step are what the decoder takes.

        Where they end above sigma 0, diffusers decodes x_vp = alpha * x if that is what it computes in, and so do we.
        """
        end = 1.0 if self.from_sigma or levels[-1].data else levels[-1].alpha
        for step in self.head(denoise, x, levels, noise, how):
            last = step.index == step.total - 1
            yield replace(step, latents=step.latents * end) if last else step


def refuse_idle(sampler: Sampler, how: Stochasticity) -> None:
    """Raise InvalidRequest for a field of `how` that was set and that `sampler` does not look at."""
    set_ = [name for name in ("eta", "s_churn", "s_noise") if getattr(how, name) != getattr(PLAIN, name)]
    for name in set_:
        if name not in sampler.takes:
            able = choices(each.name for each in SAMPLERS.values() if name in each.takes)
            raise InvalidRequest(f"the sampler {sampler.name} has no {name}; it belongs to: {able}")


_S = NoiseSchedule

CHURN = ("s_churn", "s_noise")
FRESH = ("eta", "s_noise")

_OWN: dict[str, Sampler] = {
    sampler.name: sampler
    for sampler in (
        Sampler(
            "euler", "Euler", solvers.sample_euler, _S.euler_levels, "EulerDiscreteScheduler", from_sigma=True,
            takes=CHURN,
        ),
        Sampler(
            "euler_a", "Euler a", stochastic.sample_euler_ancestral, _S.euler_levels, "EulerAncestralDiscreteScheduler",
            draws_noise=True, from_sigma=True, takes=FRESH,
        ),
        Sampler(
            "heun", "Heun", solvers.sample_heun, _S.euler_levels, "HeunDiscreteScheduler", from_sigma=True, takes=CHURN
        ),
        Sampler("lms", "LMS", solvers.sample_lms, _S.euler_levels, "LMSDiscreteScheduler", from_sigma=True),
        Sampler(
            "dpm2", "DPM2", stochastic.sample_dpm2, _S.euler_levels, "KDPM2DiscreteScheduler", from_sigma=True,
            takes=CHURN,
        ),
        Sampler(
            "dpm2_a", "DPM2 a", stochastic.sample_dpm2_ancestral, _S.euler_levels, "KDPM2AncestralDiscreteScheduler",
            draws_noise=True, from_sigma=True, takes=FRESH,
        ),
        Sampler("dpmpp_2m", "DPM++ 2M", solvers.sample_dpmpp_2m, _S.dpmpp_levels, "DPMSolverMultistepScheduler"),
        Sampler(
            "dpmpp_3m", "DPM++ 3M", solvers.sample_dpmpp_3m, _S.dpmpp_levels, "DPMSolverMultistepScheduler",
            {"solver_order": 3},
        ),
        Sampler(
            "dpmpp_2s_a", "DPM++ 2S a", stochastic.sample_dpmpp_2s_ancestral, _S.euler_levels, draws_noise=True,
            from_sigma=True, takes=FRESH,
        ),
        Sampler(
            "dpmpp_sde", "DPM++ SDE", stochastic.sample_dpmpp_sde, _S.euler_levels, "DPMSolverSDEScheduler",
            draws_noise=True, from_sigma=True, takes=FRESH,
        ),
        Sampler(
            "dpmpp_2m_sde", "DPM++ 2M SDE", stochastic.sample_dpmpp_2m_sde, _S.dpmpp_levels,
            "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, draws_noise=True, takes=FRESH,
        ),
        Sampler(
            "dpmpp_2m_sde_heun", "DPM++ 2M SDE Heun", stochastic.sample_dpmpp_2m_sde_heun, _S.dpmpp_levels,
            "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"},
            draws_noise=True, takes=FRESH,
        ),
        Sampler(
            "dpmpp_3m_sde", "DPM++ 3M SDE", stochastic.sample_dpmpp_3m_sde, _S.dpmpp_levels, draws_noise=True,
            takes=FRESH,
        ),
        Sampler("unipc", "UniPC", solvers.sample_unipc, _S.dpmpp_levels, "UniPCMultistepScheduler"),
        Sampler("deis", "DEIS", solvers.sample_deis, _S.deis_levels, "DEISMultistepScheduler"),
        Sampler(
            "restart", "Restart", stochastic.sample_restart, _S.restart_levels, from_sigma=True, takes=("s_noise",)
        ),
        Sampler(
            "ddim", "DDIM", stochastic.sample_ddim, _S.ddim_levels, "DDIMScheduler", sigmas=TIMESTEPS, takes=FRESH
        ),
        Sampler(
            "ddpm", "DDPM", stochastic.sample_euler_ancestral, _S.ddpm_levels, "DDPMScheduler", draws_noise=True,
            sigmas=TIMESTEPS,
        ),
        Sampler("lcm", "LCM", stochastic.sample_lcm, _S.lcm_levels, "LCMScheduler", draws_noise=True, sigmas=()),
        Sampler("tcd", "TCD", stochastic.sample_tcd, _S.tcd_levels, "TCDScheduler", draws_noise=True, sigmas=()),
        Sampler(
            "pndm", "PLMS", solvers.sample_pndm, _S.pndm_levels, "PNDMScheduler", {"skip_prk_steps": True},
            sigmas=TIMESTEPS,
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
    except Exception as error:  # A package of anyone's is imported, which may raise anything.
        return f"{type(error).__name__}: {error}"
    if not isinstance(made, Sampler) or made.name != point.name:
        return f"it is no Sampler called {point.name!r}"
    return made


SAMPLERS = Samplers()
