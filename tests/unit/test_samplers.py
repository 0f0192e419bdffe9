"""Every sampler, step by step, against the diffusers scheduler that it reproduces; and properties that need no oracle.

The model is an analytic, non-linear function of (x, t), so both sides run in milliseconds and errors cannot hide.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sd.noise import TorchNoise
from edge_sd.samplers import SAMPLERS, Denoise, Latents, Sampler, Step
from edge_sd.schedule import Level, NoiseSchedule

SHAPE = (1, 4, 5, 3)
STEPS = (1, 2, 4, 20, 50)
SPACINGS = ("leading", "trailing", "linspace")
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
SD15 = {
    "_class_name": "PNDMScheduler",
    **SD,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}


def model(x_t: Latents, t: float) -> Latents:
    """Stands for the UNet: smooth, non-linear in x_t (of unit variance), dependent on t."""
    output = 0.7 * x_t + 0.3 * np.sin(2 * x_t + t / 150) + 0.1 * math.cos(t / 90)
    return output.astype(np.float32)


def denoiser_of(schedule: NoiseSchedule) -> Denoise:
    def denoise(x: Latents, level: Level) -> Latents:
        output = model(x * level.alpha, level.t)
        if schedule.prediction_type == "epsilon":
            return x - output * level.sigma
        return x * level.alpha**2 - output * (level.sigma * level.alpha)

    return denoise


def make_scheduler(sampler: Sampler, config: dict[str, Any]) -> Any:
    diffusers = pytest.importorskip("diffusers")
    return getattr(diffusers, sampler.diffusers_class).from_config({**config, **sampler.diffusers_options})


def run_diffusers(
    scheduler: Any, steps: int, noise: Latents, evaluate: Callable[[Latents, float], Latents] = model
) -> list[tuple[float, Latents]]:
    """(t, latents after the step) of each step, in the coordinates of the scheduler."""
    import torch

    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "set_begin_index"):  # else DPM++ skips a step where two rounded timesteps are equal
        scheduler.set_begin_index(0)
    return run_timesteps(scheduler, torch.from_numpy(noise) * scheduler.init_noise_sigma, scheduler.timesteps, evaluate)


def run_timesteps(scheduler: Any, x: Any, timesteps: Any, evaluate: Callable[[Latents, float], Latents] = model) -> Any:
    import inspect

    import torch

    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    options = {"generator": torch.Generator().manual_seed(5)} if takes_generator else {}
    trace = []
    for t in timesteps:
        output = torch.from_numpy(evaluate(scheduler.scale_model_input(x, t).numpy(), float(t)))
        x = scheduler.step(output, t, x, **options).prev_sample
        trace.append((float(t), x.numpy()))
    return trace


def run_ours(
    sampler: Sampler, schedule: NoiseSchedule, levels: Sequence[Level], x: Latents
) -> list[tuple[float, Latents]]:
    """The same, in the scheduler's coordinates, t being what the UNet was called with."""
    seen: list[float] = []
    denoise = denoiser_of(schedule)

    def listen(x: Latents, level: Level) -> Latents:
        seen.append(level.t)
        return denoise(x, level)

    steps = list(sampler.run(listen, x, levels, TorchNoise(5).normal))
    assert [step.index for step in steps] == list(range(len(steps)))
    assert {step.total for step in steps} == {len(steps)}
    extra = len(steps) - (len(levels) - 1)  # PNDM evaluates its second level twice
    trace = []
    for t, step in zip(seen, steps, strict=True):
        assert step.latents.dtype == step.denoised.dtype == np.float32
        reached = levels[max(1, step.index + 1 - extra)]
        finished = step.index == step.total - 1 or sampler.from_sigma
        trace.append((t, step.latents if finished else step.latents * reached.alpha))
    return trace


def noise_of(seed: int = 0) -> Latents:
    return TorchNoise(seed).normal(SHAPE)


def assert_same(ours: list[tuple[float, Latents]], theirs: list[tuple[float, Latents]], rtol: float = 1e-4) -> None:
    assert [t for t, _ in ours] == pytest.approx([t for t, _ in theirs], rel=1e-6, abs=1e-4)
    for i, ((_, a), (_, b)) in enumerate(zip(ours, theirs, strict=True)):
        assert np.isfinite(a).all()
        error = np.abs(a - b).max() / np.abs(b).max()
        assert error <= rtol, f"step {i} of {len(ours)}: relative error {error:.2e}"


def steps_on_a_regular_grid(name: str, spacing: str) -> Sequence[int]:
    """diffusers' DDIM and PNDM assume that timesteps are num_train_timesteps // steps apart; linspace's are not."""
    return (1,) if name in ("ddim", "pndm") and spacing == "linspace" else STEPS


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", list(SAMPLERS))
def test_each_step_equals_diffusers(name: str, spacing: str, prediction_type: str) -> None:
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
        schedule = NoiseSchedule.from_config(config)
        for steps in steps_on_a_regular_grid(name, spacing):
            theirs = run_diffusers(make_scheduler(sampler, config), steps, noise_of())
            levels = sampler.levels(schedule, steps)
            assert len(levels) == steps + 1
            assert_same(run_ours(sampler, schedule, levels, sampler.start(noise_of(), levels, schedule)), theirs)


@pytest.mark.parametrize("name", list(SAMPLERS))
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


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_a_config_of_another_class_resolves_its_defaults_as_diffusers_does(name: str) -> None:
    """SD 1.5's config names no spacing: Euler then spaces by linspace, DDIM and PNDM by leading."""
    schedule = NoiseSchedule.from_config(SD15)
    sampler = SAMPLERS[name]
    levels = sampler.levels(schedule, 20)
    theirs = run_diffusers(make_scheduler(sampler, SD15), 20, noise_of())
    assert_same(run_ours(sampler, schedule, levels, sampler.start(noise_of(), levels, schedule)), theirs)


def schedule_end(config: dict[str, Any]) -> float:
    """The smallest sigma that a schedule knows, at its first timestep."""
    abar = float(NoiseSchedule.from_config(config).compute_alphas_cumprod()[0])
    return ((1 - abar) / abar) ** 0.5


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("rescale", [False, True])
def test_sigmas_and_timesteps_equal_diffusers(beta_schedule: str, rescale: bool) -> None:
    for name in ("euler", "euler_karras", "dpmpp_2m", "dpmpp_2m_karras"):
        for spacing in SPACINGS:
            for steps in (1, 3, 7, 30, 99):
                config = {
                    **SD,
                    "beta_schedule": beta_schedule,
                    "timestep_spacing": spacing,
                    "rescale_betas_zero_snr": rescale,
                }
                scheduler = make_scheduler(SAMPLERS[name], config)
                scheduler.set_timesteps(steps)
                levels = SAMPLERS[name].levels(NoiseSchedule.from_config(config), steps)
                # diffusers takes 1 - abar in float32, whose rounding differs between processors and is a large part of
                # the smallest sigma^2; Karras' spacing starts from that sigma, so all of its levels share the error.
                sigmas = [level.sigma for level in levels]
                error = np.finfo(np.float32).eps / schedule_end(config) ** 2
                np.testing.assert_allclose(sigmas, scheduler.sigmas, rtol=max(5e-5, error))
                # DPM++ rounds Karras' timesteps to whole ones, and where they lie between two that error decides.
                whole = 1 if name == "dpmpp_2m_karras" else 2e-3
                np.testing.assert_allclose(
                    [level.t for level in levels[:-1]], scheduler.timesteps, rtol=max(1e-5, error), atol=whole
                )


def test_trained_betas_equal_diffusers() -> None:
    betas = np.linspace(0.001, 0.03, 200).tolist()
    config = {"num_train_timesteps": 200, "trained_betas": betas}
    scheduler = make_scheduler(SAMPLERS["euler"], config)
    np.testing.assert_allclose(
        NoiseSchedule.from_config(config).compute_alphas_cumprod(), scheduler.alphas_cumprod, rtol=1e-6
    )


@pytest.mark.parametrize("name", ["euler", "euler_a", "dpmpp_2m", "dpmpp_2m_karras", "ddim", "lcm"])
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


def test_pndm_refuses_zero_terminal_snr_only_where_it_starts_there() -> None:
    config = {**SD, "rescale_betas_zero_snr": True}
    for spacing in ("trailing", "linspace"):
        with pytest.raises(ValueError, match="zero terminal SNR"):
            SAMPLERS["pndm"].levels(NoiseSchedule.from_config({**config, "timestep_spacing": spacing}), 20)
    assert SAMPLERS["pndm"].levels(NoiseSchedule.from_config(config), 20)[0].t == 950


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


@pytest.mark.parametrize("name", ["euler", "euler_karras", "euler_a", "dpmpp_2m", "dpmpp_2m_karras", "ddim", "lcm"])
@pytest.mark.parametrize("first", [1, 7, 19])
def test_a_tail_of_the_levels_equals_image_to_image_of_diffusers(name: str, first: int) -> None:
    import torch

    config = {**SD, "timestep_spacing": "leading", "steps_offset": 1, "clip_sample": False}
    sampler, schedule = SAMPLERS[name], NoiseSchedule.from_config(config)
    levels = sampler.levels(schedule, 20)[first:]
    picture = np.tanh(noise_of(1))
    scheduler = make_scheduler(sampler, config)
    scheduler.set_timesteps(20)
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
    # LCM keeps c_skip of x
    np.testing.assert_allclose(last.latents, picture, rtol=0, atol=1e-2 if name == "lcm" else 2e-4)


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
        assert draws == ([SHAPE] * 4 if sampler.draws_noise else [])


@given(
    steps=st.integers(1, 400),
    spacing=st.sampled_from(SPACINGS),
    offset=st.integers(0, 2),
    rescale=st.booleans(),
    name=st.sampled_from(list(SAMPLERS)),
)
@settings(max_examples=150, deadline=None)
def test_levels_fall_and_stay_inside_the_schedule_or_are_refused(
    steps: int, spacing: str, offset: int, rescale: bool, name: str
) -> None:
    schedule = NoiseSchedule.from_config(
        {**SD, "timestep_spacing": spacing, "steps_offset": offset, "rescale_betas_zero_snr": rescale}
    )
    refusal = ""
    try:
        levels = SAMPLERS[name].levels(schedule, steps)
    except ValueError as error:
        refusal = str(error)
    if refusal:
        assert (steps > 50 and "too many" in refusal) or (name == "pndm" and rescale and "zero terminal SNR" in refusal)
        return
    assert len(levels) == steps + 1
    assert all(a.sigma > b.sigma and a.t >= b.t for a, b in pairwise(levels[:-1]))
    assert all(0 <= level.t <= 999 and math.isfinite(level.sigma) for level in levels)
    assert levels[-1].sigma <= levels[-2].sigma


@pytest.mark.parametrize("name", list(SAMPLERS))
@pytest.mark.parametrize("steps", [0, -3, 2.5, True])
def test_senseless_step_counts_are_rejected(name: str, steps: Any) -> None:
    with pytest.raises(ValueError, match="steps"):
        SAMPLERS[name].levels(NoiseSchedule(), steps)


@pytest.mark.parametrize(
    "config",
    [
        {"prediction_type": "flow_prediction"},
        {"prediction_type": None},
        {"beta_schedule": "sigmoid"},
        {"timestep_spacing": "karras"},
        {"num_train_timesteps": 0},
        {"num_train_timesteps": "1000"},
        {"num_train_timesteps": True},
        {"steps_offset": -1},
        {"beta_start": 0.0},
        {"beta_start": 0.5, "beta_end": 0.1},
        {"beta_end": 1.0},
        {"beta_end": math.nan},
        {"beta_end": "0.02"},
        {"trained_betas": [0.1, 0.2]},
        {"trained_betas": [0.1, 2.0], "num_train_timesteps": 2},
        {"trained_betas": 0.1},
        {"set_alpha_to_one": "yes"},
        {"rescale_betas_zero_snr": 1},
    ],
)
def test_nonsense_in_a_config_is_rejected_in_one_line_that_names_the_field(config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="|".join(config)) as caught:
        NoiseSchedule.from_config(config)
    assert "\n" not in str(caught.value)


def test_an_invalid_choice_names_the_valid_ones() -> None:
    with pytest.raises(ValueError, match="epsilon, v_prediction, sample"):
        NoiseSchedule.from_config({"prediction_type": "flow"})


def test_unknown_keys_of_a_config_are_ignored_and_lists_become_hashable() -> None:
    schedule = NoiseSchedule.from_config({"_class_name": "X", "num_train_timesteps": 1, "trained_betas": [0.1]})
    assert schedule == NoiseSchedule(num_train_timesteps=1, trained_betas=(0.1,))
    assert isinstance(hash(schedule), int)
