"""Samplers beside k-diffusion, step by step, on the levels of ours: its functions are run as they are published."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_sd.sampling.noise import TorchNoise
from edge_sd.sampling.samplers import SAMPLERS, Latents, Stochasticity
from edge_sd.sampling.schedule import NoiseSchedule
from edge_sd.sampling.sigmas import ALIGNED, space

from .schedulers import SD, SHAPE, denoiser_of, noise_of, one_path

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def sampling() -> Any:
    """k_diffusion.sampling without the rest of the package, which wants a dozen others."""
    found = importlib.util.find_spec("k_diffusion")
    if found is None or not found.submodule_search_locations:
        pytest.skip("k-diffusion is not installed")
    kept = {name: sys.modules.get(name) for name in ("k_diffusion", "k_diffusion.utils", "k_diffusion.sampling")}
    package = types.ModuleType("k_diffusion")
    package.__path__ = [str(Path(found.submodule_search_locations[0]))]
    utils = types.ModuleType("k_diffusion.utils")
    utils.append_dims = lambda x, dims: x[(...,) + (None,) * (dims - x.ndim)]  # type: ignore[attr-defined]
    sys.modules |= {"k_diffusion": package, "k_diffusion.utils": utils}
    package.utils = utils  # type: ignore[attr-defined]
    yield importlib.import_module("k_diffusion.sampling")
    for name, module in kept.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module


FUNCTIONS = {
    "euler": "sample_euler", "euler_a": "sample_euler_ancestral", "heun": "sample_heun", "dpm2": "sample_dpm_2",
    "dpm2_a": "sample_dpm_2_ancestral", "dpmpp_2s_a": "sample_dpmpp_2s_ancestral", "dpmpp_sde": "sample_dpmpp_sde",
    "dpmpp_2m_sde": "sample_dpmpp_2m_sde", "dpmpp_2m_sde_heun": "sample_dpmpp_2m_sde",
    "dpmpp_3m_sde": "sample_dpmpp_3m_sde",
}  # fmt: skip
CHURNED = ("euler", "heun", "dpm2")


@pytest.mark.parametrize("steps", [3, 18])
@pytest.mark.parametrize(("name", "how"), [
    *((name, Stochasticity()) for name in FUNCTIONS),
    *((name, Stochasticity(s_churn=8.0, s_tmin=0.1, s_tmax=9.0, s_noise=1.01)) for name in CHURNED),
    *((name, Stochasticity(eta=eta, s_noise=0.9)) for name in FUNCTIONS if name not in CHURNED for eta in (0.0, 0.6)),
])  # fmt: skip
def test_each_sampler_ends_where_k_diffusions_does(sampling: Any, name: str, how: Stochasticity, steps: int) -> None:
    schedule = NoiseSchedule.from_config({**SD, "use_karras_sigmas": True})
    sampler = SAMPLERS[name]
    levels = sampler.levels(schedule, steps)
    denoise = denoiser_of(schedule)
    ours, theirs = TorchNoise(5), TorchNoise(5)

    def model(x: Any, sigma: Any) -> Any:
        # A level's own t, which some samplers round, where it is one of theirs.
        level = min(levels[:-1], key=lambda each: abs(each.sigma - float(sigma[0])))
        if abs(level.sigma - float(sigma[0])) > 1e-5 * level.sigma:
            level = levels[0].at(float(sigma[0]))
        return torch.from_numpy(denoise(x.numpy(), level))

    options: dict[str, Any] = {"s_noise": how.s_noise}
    if name in CHURNED:
        options |= {"s_churn": how.s_churn, "s_tmin": how.s_tmin, "s_tmax": how.s_tmax}
    else:
        plain = lambda *_: torch.from_numpy(theirs.normal(SHAPE))  # noqa: E731
        sampler_of_noise = one_path(theirs.normal) if name == "dpmpp_sde" else plain
        options |= {"eta": how.share(1.0), "noise_sampler": sampler_of_noise}
    if name == "dpmpp_2m_sde_heun":
        options["solver_type"] = "heun"
    x = noise_of() * np.float32(levels[0].sigma)
    draw, sampling.torch.randn_like = sampling.torch.randn_like, lambda x: torch.from_numpy(theirs.normal(SHAPE))
    sigmas = torch.tensor([level.sigma for level in levels])
    if name in CHURNED and how.s_churn:
        # k-diffusion draws noise in every step, ours only where it is added.
        within = iter([how.s_tmin <= level.sigma <= how.s_tmax for level in levels[:-1]])
        sampling.torch.randn_like = lambda x: torch.from_numpy(theirs.normal(SHAPE)) if next(within) else x
    try:
        expected = getattr(sampling, FUNCTIONS[name])(model, torch.from_numpy(x), sigmas, disable=True, **options)
    finally:
        sampling.torch.randn_like = draw
    *_, last = sampler.solve(denoise, x, levels, ours.normal, how)
    error = np.abs(last.latents - expected.numpy()).max() / np.abs(expected.numpy()).max()
    assert error < 2e-4, f"{error:.1e}"


def heun(x: Latents, denoise: Any, a: Any, b: Any) -> Latents:
    """One step of Heun's method as the paper on restart sampling has it (algorithm 1)."""
    d = (x - denoise(x, a)) / a.sigma
    x_next = x + d * (b.sigma - a.sigma)
    if b.sigma == 0:
        return x_next
    d_next = (x_next - denoise(x_next, b)) / b.sigma
    return x + (b.sigma - a.sigma) * (d + d_next) / 2


@pytest.mark.parametrize(("steps", "again", "times"), [(8, 0, 0), (20, 9, 1), (40, 10, 2)])
def test_restart_runs_a_part_again_from_more_noise(sampling: Any, steps: int, again: int, times: int) -> None:
    """The paper's algorithm, on the sigmas and the part that AUTOMATIC1111 restarts, by k-diffusion's Karras sigmas."""
    schedule = NoiseSchedule.from_config(SD)
    sampler, noise, denoise = SAMPLERS["restart"], TorchNoise(3), denoiser_of(schedule)
    levels = sampler.levels(schedule, steps)
    high, low = levels[0].sigma, levels[-2].sigma
    sigmas = sampling.get_sigmas_karras(steps - again * times, low, high).tolist()
    x = noise_of() * np.float32(high)
    end = min(range(len(sigmas)), key=lambda n: abs(sigmas[n] - 0.1)) if times else -1
    start = min(range(len(sigmas)), key=lambda n: abs(sigmas[n] - 2)) if times else -1
    expected = x
    for n, (a, b) in enumerate(pairwise(sigmas)):
        expected = heun(expected, denoise, levels[0].at(a), levels[0].at(b))
        if n + 1 == end:
            once = sampling.get_sigmas_karras(again + 1, sigmas[end], sigmas[start]).tolist()[:-1]
            for _ in range(times):
                expected = expected + noise.normal(SHAPE) * (once[0] ** 2 - once[-1] ** 2) ** 0.5
                for c, d in pairwise(once):
                    expected = heun(expected, denoise, levels[0].at(c), levels[0].at(d))
    taken = list(sampler.solve(denoise, x, levels, TorchNoise(3).normal))
    assert len(taken) == taken[0].total == 2 * steps - 1
    error = np.abs(taken[-1].latents - expected).max() / np.abs(expected).max()
    assert error < 2e-4, f"{error:.1e}"


def test_spacings_are_those_that_were_published(sampling: Any) -> None:
    from diffusers.schedulers import AysSchedules

    for name, theirs in (
        ("align_your_steps", "StableDiffusionSigmas"),
        ("align_your_steps_xl", "StableDiffusionXLSigmas"),
    ):
        np.testing.assert_allclose(space(name, 15, 0.03, 10), AysSchedules[theirs][:-1], rtol=1e-6)  # type: ignore[arg-type]
        # Of twice the steps every other level is one of the ten.
        np.testing.assert_allclose(space(name, 15, 0.03, 20)[::2], ALIGNED[name][:-1], rtol=1e-6)  # type: ignore[arg-type]
    optimal = space("kl_optimal", 14.6, 0.03, 7)
    np.testing.assert_allclose(np.diff(np.arctan(optimal)), (np.arctan(0.03) - np.arctan(14.6)) / 6, rtol=1e-9)
    np.testing.assert_allclose(
        space("karras", 14.6, 0.03, 9), sampling.get_sigmas_karras(9, 0.03, 14.6)[:-1], rtol=1e-4
    )
    simple = SAMPLERS["euler"].levels(NoiseSchedule.from_config({**SD, "timestep_spacing": "simple"}), 7)
    # ComfyUI: the sigma of the training's at -(1 + int(n * 1000 / steps)).
    assert [level.t for level in simple[:-1]] == [999 - int(n * 1000 / 7) for n in range(7)]


def test_levels_of_other_models_are_no_align_your_steps() -> None:
    zero = NoiseSchedule.from_config({**SD, "rescale_betas_zero_snr": True})
    with pytest.raises(ValueError, match="holds levels from 14"):
        SAMPLERS["euler"].levels(replace(zero, sigma_spacing="align_your_steps"), 10)
