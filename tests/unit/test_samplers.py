"""Every sampler, step by step, against the diffusers scheduler that it reproduces; and properties without an oracle."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sd.sampling.noise import TorchNoise
from edge_sd.sampling.samplers import SAMPLERS, Latents, Step
from edge_sd.sampling.schedule import Level, NoiseSchedule
from edge_sd.sampling.scheduler_fields import CLASSES
from edge_sd.sampling.solvers import _adams_weights

from .schedulers import (
    SD,
    SD15,
    SHAPE,
    SPACINGS,
    STEPS,
    assert_same,
    denoiser_of,
    make_scheduler,
    model,
    noise_of,
    run_diffusers,
    run_ours,
    run_timesteps,
    spaced,
)  # fmt: skip


def steps_on_a_regular_grid(name: str, spacing: str) -> Sequence[int]:
    """diffusers' DDIM and PNDM assume that timesteps are num_train_timesteps // steps apart; linspace's are not."""
    return (1,) if name in ("ddim", "pndm") and spacing == "linspace" else STEPS


# Those that diffusers has; test_k_diffusion.py holds all others beside k-diffusion.
THEIRS = [name for name, sampler in SAMPLERS.items() if sampler.diffusers_class]
# Every one on every spacing of timesteps, and of sigmas where its class in diffusers has them.
SPACED = [(name, spacing, None) for name in THEIRS for spacing in SPACINGS] + [
    (name, "leading", sigmas) for name in THEIRS for sigmas in ("karras", "exponential", "beta")
    if "use_karras_sigmas" in CLASSES[SAMPLERS[name].diffusers_class]
]  # fmt: skip


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("name", "spacing", "sigmas"), SPACED)
def test_each_step_equals_diffusers(name: str, spacing: str, sigmas: str | None, prediction_type: str) -> None:
    if (name, prediction_type) == ("pndm", "v_prediction"):
        pytest.skip("has its own test: diffusers extrapolates v where we extrapolate eps")
    sampler = SAMPLERS[name]
    for beta_end, offset, to_one in ((0.012, 1, False), (0.02, 0, True)):
        config = {
            **SD,
            "beta_end": beta_end,
            "steps_offset": offset,
            "set_alpha_to_one": to_one,
            "timestep_spacing": spacing,
            "prediction_type": prediction_type,
            "clip_sample": False,
        }
        config = spaced(config, sigmas)
        schedule = NoiseSchedule.from_config(config)
        for steps in (1, 4, 20) if sigmas else steps_on_a_regular_grid(name, spacing):
            levels = sampler.levels(schedule, steps)
            # diffusers truncates these timesteps; where one is whole but for rounding, either side is right.
            truncated = levels if sigmas in ("exponential", "beta") and not sampler.from_sigma else None
            theirs = run_diffusers(make_scheduler(sampler, config), steps, noise_of(), given=truncated)
            assert len(levels) == steps + 1
            assert_same(run_ours(sampler, schedule, levels, sampler.start(noise_of(), levels, schedule)), theirs)


@pytest.mark.parametrize("name", THEIRS)
def test_start_equals_the_initial_latents_of_diffusers(name: str) -> None:
    sampler = SAMPLERS[name]
    for spacing in SPACINGS:
        config = {**SD, "timestep_spacing": spacing}
        schedule = NoiseSchedule.from_config(config)
        for steps in STEPS:
            scheduler = make_scheduler(sampler, config)
            scheduler.set_timesteps(steps)
            levels = sampler.levels(schedule, steps)
            x = sampler.start(noise_of(), levels, schedule) * (1 if sampler.from_sigma else levels[0].alpha)
            np.testing.assert_allclose(x, noise_of() * float(scheduler.init_noise_sigma), rtol=1e-5)


@pytest.mark.parametrize("name", THEIRS)
def test_a_config_of_another_class_resolves_its_defaults_as_diffusers_does(name: str) -> None:
    """SD 1.5's config names no spacing: Euler then spaces by linspace, DDIM and PNDM by leading."""
    schedule = NoiseSchedule.from_config(SD15)
    sampler = SAMPLERS[name]
    levels = sampler.levels(schedule, 20)
    theirs = run_diffusers(make_scheduler(sampler, SD15), 20, noise_of())
    assert_same(run_ours(sampler, schedule, levels, sampler.start(noise_of(), levels, schedule)), theirs)


@pytest.mark.parametrize("name", ["euler", "euler_a", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "ddim", "lcm", "tcd"])
@pytest.mark.parametrize("steps", STEPS)
def test_zero_terminal_snr_equals_diffusers(name: str, steps: int) -> None:
    config = {
        **SD,
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
        "rescale_betas_zero_snr": True,
        "clip_sample": False,
    }
    sampler, schedule = SAMPLERS[name], NoiseSchedule.from_config(config)
    levels = sampler.levels(schedule, steps)
    assert levels[0].sigma >= 4095
    theirs = run_diffusers(make_scheduler(sampler, config), steps, noise_of())
    ours = run_ours(sampler, schedule, levels, sampler.start(noise_of(), levels, schedule))
    # diffusers' Euler adds (x - x0) / sigma * (sigma' - sigma) to x, which in float32 loses 4096 * 2**-24 = 2.4e-4
    assert_same(ours, theirs, rtol=5e-4 if sampler.from_sigma else 1e-4)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "pndm"])
def test_zero_terminal_snr_stays_finite_for_epsilon(name: str) -> None:
    schedule = NoiseSchedule.from_config({**SD, "timestep_spacing": "trailing", "rescale_betas_zero_snr": True})
    sampler = SAMPLERS[name]
    levels = sampler.levels(schedule, 10)
    for _, latents in run_ours(sampler, schedule, levels, sampler.start(noise_of(), levels, schedule)):
        assert np.isfinite(latents).all()


@pytest.mark.parametrize("steps", [2, 4, 20, 30])
@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
def test_ddim_steps_to_the_next_timestep_on_uneven_grids(spacing: str, steps: int) -> None:
    """There diffusers' DDIM does not. First-order DPM-Solver++ on the same timesteps is DDIM that does."""
    diffusers = pytest.importorskip("diffusers")
    import torch

    sampler, schedule = SAMPLERS["ddim"], NoiseSchedule.from_config({**SD, "timestep_spacing": spacing})
    levels = sampler.levels(schedule, steps)
    own = make_scheduler(sampler, {**SD, "timestep_spacing": spacing})
    own.set_timesteps(steps)
    assert [level.t for level in levels[:-1]] == own.timesteps.tolist()
    oracle = diffusers.DPMSolverMultistepScheduler(**SD, solver_order=1)
    oracle.set_timesteps(timesteps=own.timesteps.tolist())
    theirs = run_timesteps(oracle, torch.from_numpy(noise_of()), oracle.timesteps)
    assert_same(run_ours(sampler, schedule, levels, sampler.start(noise_of(), levels, schedule)), theirs)


@pytest.mark.parametrize("steps", [2, 4, 20, 30])
@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
def test_pndm_steps_to_the_next_timestep_on_uneven_grids(spacing: str, steps: int) -> None:
    """diffusers' own PNDM formulas, given the true neighbours in the grid instead of t -+ 1000 // steps."""
    diffusers = pytest.importorskip("diffusers")

    class OnItsGrid(diffusers.PNDMScheduler):  # type: ignore[name-defined,misc]
        def _get_prev_sample(self, sample: Any, timestep: Any, prev_timestep: Any, output: Any) -> Any:
            grid = [*dict.fromkeys(self.timesteps.tolist()), -1]
            place = max(self.counter - 1, 0)
            return super()._get_prev_sample(sample, grid[place], grid[place + 1], output)

    config = {**SD, "timestep_spacing": spacing}
    theirs = run_diffusers(OnItsGrid.from_config({**config, "skip_prk_steps": True}), steps, noise_of())
    sampler, schedule = SAMPLERS["pndm"], NoiseSchedule.from_config(config)
    levels = sampler.levels(schedule, steps)
    assert_same(run_ours(sampler, schedule, levels, sampler.start(noise_of(), levels, schedule)), theirs)


@pytest.mark.parametrize("steps", STEPS)
def test_pndm_of_a_v_model_equals_diffusers_given_its_eps(steps: int) -> None:
    sampler = SAMPLERS["pndm"]
    schedule = NoiseSchedule.from_config({**SD15, "prediction_type": "v_prediction"})
    abar = make_scheduler(sampler, SD15).alphas_cumprod.numpy()

    def eps_of_v(x_t: Latents, t: float) -> Latents:
        a = float(abar[int(t)])
        return model(x_t, t) * math.sqrt(a) + x_t * math.sqrt(1 - a)

    levels = sampler.levels(schedule, steps)
    theirs = run_diffusers(make_scheduler(sampler, SD15), steps, noise_of(), eps_of_v)
    assert_same(run_ours(sampler, schedule, levels, sampler.start(noise_of(), levels, schedule)), theirs)


@pytest.mark.parametrize("first", [1, 7, 19])
@pytest.mark.parametrize(
    ("name", "sigmas"),
    [(name, None) for name in THEIRS if name not in ("pndm", "lms", "dpmpp_sde")]
    + [("euler", "karras"), ("dpmpp_2m", "karras")],
)
def test_a_tail_of_the_levels_equals_image_to_image_of_diffusers(name: str, sigmas: str | None, first: int) -> None:
    """LMS is not among them: diffusers takes its coefficients for a history that a tail does not have."""
    import torch

    config = spaced({**SD, "timestep_spacing": "leading", "steps_offset": 1, "clip_sample": False}, sigmas)
    sampler, schedule = SAMPLERS[name], NoiseSchedule.from_config(config)
    levels = sampler.levels(schedule, 20)[first:]
    picture = np.tanh(noise_of(1))
    scheduler = make_scheduler(sampler, config)
    scheduler.set_timesteps(20)
    first *= scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    timesteps = scheduler.timesteps[first:]
    x = scheduler.add_noise(torch.from_numpy(picture), torch.from_numpy(noise_of()), timesteps[:1])
    theirs = run_timesteps(scheduler, x, timesteps)
    ours = run_ours(sampler, schedule, levels, picture + noise_of() * levels[0].sigma)
    assert_same(ours, theirs)


@pytest.mark.parametrize("name", list(SAMPLERS))
@given(steps=st.integers(1, 50), first=st.integers(0, 49), seed=st.integers(0, 999), rescale=st.booleans())
@settings(max_examples=15, deadline=None)
def test_a_perfect_denoiser_reaches_its_picture_from_any_tail(
    name: str, steps: int, first: int, seed: int, rescale: bool
) -> None:
    sampler = SAMPLERS[name]
    rescale = rescale and name != "pndm"
    schedule = NoiseSchedule.from_config(
        {**SD, "set_alpha_to_one": True, "rescale_betas_zero_snr": rescale, "timestep_spacing": "trailing"}
    )
    levels = sampler.levels(schedule, steps)[min(first, steps - 1) :]
    picture = np.tanh(noise_of(seed))
    x = picture + noise_of(seed + 1) * levels[0].sigma
    last: Step | None = None
    for last in sampler.run(lambda x, level: picture, x, levels, TorchNoise(seed).normal):
        np.testing.assert_allclose(last.denoised, picture, rtol=2e-2 if name == "lcm" else 0, atol=1e-2)
    assert last is not None
    # LCM keeps c_skip of x, TCD ends at sigma_0
    np.testing.assert_allclose(
        last.latents, picture, rtol=0, atol={"lcm": 1e-2, "tcd": 0.15, "deis": 0.15}.get(name, 2e-4)
    )


def test_a_list_of_only_the_terminal_level_yields_no_step() -> None:
    for sampler in SAMPLERS.values():
        assert list(sampler.run(lambda x, level: x, noise_of(), [Level(0.0, 0.0)], TorchNoise(0).normal)) == []


def test_ancestral_and_lcm_draw_noise_and_the_others_do_not() -> None:
    schedule = NoiseSchedule.from_config(SD)
    for sampler in SAMPLERS.values():
        draws: list[tuple[int, ...]] = []

        def noise(shape: tuple[int, ...], draws: list[tuple[int, ...]] = draws) -> Latents:
            draws.append(shape)
            return np.zeros(shape, np.float32)

        list(sampler.run(denoiser_of(schedule), noise_of(), sampler.levels(schedule, 5), noise))
        each = 2 if sampler.name == "dpmpp_sde" else 1
        assert draws == ([SHAPE] * (4 * each) if sampler.draws_noise else [])


@pytest.mark.parametrize("sigmas", ["karras", "exponential", "beta"])
def test_euler_ancestral_on_other_sigmas_equals_diffusers_given_those_of_its_euler(sigmas: str) -> None:
    """diffusers' EulerAncestral has no spacings of its own; its step takes any."""
    import torch

    config = spaced(SD, sigmas)
    euler = make_scheduler(SAMPLERS["euler"], config)
    euler.set_timesteps(12)
    scheduler = make_scheduler(SAMPLERS["euler_a"], SD)
    scheduler.set_timesteps(12)
    scheduler.sigmas, scheduler.timesteps = euler.sigmas, euler.timesteps
    theirs = run_timesteps(scheduler, torch.from_numpy(noise_of()) * euler.sigmas[0], euler.timesteps)
    sampler, schedule = SAMPLERS["euler_a"], NoiseSchedule.from_config(config)
    levels = sampler.levels(schedule, 12)
    assert_same(run_ours(sampler, schedule, levels, sampler.start(noise_of(), levels, schedule)), theirs)


def test_the_weights_of_lms_integrate_cubics_exactly() -> None:
    cubic = np.polynomial.Polynomial([1.0, -2.0, 0.5, 0.25])
    past, target = [3.0, 4.5, 7.0, 7.5], 2.2
    found = sum(w * cubic(sigma) for w, sigma in zip(_adams_weights(past, target), past, strict=True))
    assert found == pytest.approx(cubic.integ()(target) - cubic.integ()(3.0), rel=1e-12)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("sigmas", [None, "karras", "exponential", "beta"])
@pytest.mark.parametrize("steps", [1, 4, 28])
def test_euler_on_a_flow_model_equals_diffusers(shift: float, sigmas: str | None, steps: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    import torch

    config = spaced({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": shift}, sigmas)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
    scheduler.set_timesteps(steps)
    schedule = NoiseSchedule.from_config(config)
    levels = SAMPLERS["euler"].levels(schedule, steps)
    x = torch.from_numpy(noise_of())
    theirs = []
    for t in scheduler.timesteps:
        x = scheduler.step(torch.from_numpy(model(x.numpy(), float(t))), t, x).prev_sample
        theirs.append((float(t), x.numpy()))
    sampler = replace(SAMPLERS["euler"], from_sigma=False)  # So that x is compared as x_s.
    assert_same(run_ours(sampler, schedule, levels, sampler.start(noise_of(), levels, schedule)), theirs)


@pytest.mark.parametrize("name", ["dpmpp_2m", "dpmpp_2m_sde", "unipc", "ddim", "euler_a"])
def test_other_solvers_reach_what_many_steps_of_euler_reach_on_a_flow_model(name: str) -> None:
    """Those that add noise end elsewhere, but where the model is sure of its picture, at the same."""
    schedule = NoiseSchedule(prediction_type="flow_prediction", flow_shift=3.0)
    picture = np.tanh(noise_of(1))

    def denoise(x: Latents, level: Level) -> Latents:
        return picture + np.float32(0.02) * np.tanh(x * level.alpha)

    def end(name: str, steps: int) -> Latents:
        sampler = SAMPLERS[name]
        levels = sampler.levels(schedule, steps)
        *_, last = sampler.run(denoise, sampler.start(noise_of(), levels, schedule), levels, TorchNoise(5).normal)
        return last.latents

    np.testing.assert_allclose(end(name, 20), end("euler", 400), atol=5e-3)


def test_lcm_is_sure_of_a_flow_models_picture_and_adds_noise_to_it() -> None:
    """SANA-Sprint's sampler: no boundary condition, and each level's noise is all new."""
    schedule = NoiseSchedule(prediction_type="flow_prediction", flow_grid="trig")
    lcm, picture, noise = SAMPLERS["lcm"], np.tanh(noise_of(1)), TorchNoise(5)
    levels = lcm.levels(schedule, 3)
    found = list(lcm.run(lambda x, level: picture, noise_of(), levels, TorchNoise(5).normal))
    for step, level in zip(found[:-1], levels[1:], strict=False):
        np.testing.assert_allclose(step.latents, picture + level.sigma * noise.normal(picture.shape), rtol=1e-6)
    np.testing.assert_array_equal(found[-1].latents, picture)


@pytest.mark.parametrize("name", ["tcd", "pndm"])
def test_samplers_that_a_flow_model_can_not_have_say_so(name: str) -> None:
    with pytest.raises(ValueError, match="no sampler for a flow-matching model"):
        SAMPLERS[name].levels(NoiseSchedule(prediction_type="flow_prediction"), 4)
