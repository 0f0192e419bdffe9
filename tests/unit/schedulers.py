"""diffusers' schedulers and our samplers run side by side on one analytic model: what the tests of both share.

The model is a smooth, non-linear function of (x, t), so both sides run in milliseconds and errors cannot hide.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from edge_sd.sampling.noise import TorchNoise
from edge_sd.sampling.samplers import Denoise, Latents, Sampler
from edge_sd.sampling.schedule import Level, NoiseSchedule

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
        if level.data:
            out = level.sigma * level.data * level.alpha
            sign = -1 if schedule.prediction_type == "v_prediction" else 1
            return x * (level.data * level.alpha) ** 2 + output * (out * sign)
        if schedule.prediction_type == "epsilon":
            return x - output * level.sigma
        if schedule.is_flow:
            return x * level.alpha - output * (level.sigma * level.alpha)
        return x * level.alpha**2 - output * (level.sigma * level.alpha)

    return denoise


def make_scheduler(sampler: Sampler, config: dict[str, Any]) -> Any:
    diffusers = pytest.importorskip("diffusers")
    return getattr(diffusers, sampler.diffusers_class).from_config({**config, **sampler.diffusers_options})


def spaced(config: dict[str, Any], sigmas: str | None) -> dict[str, Any]:
    """`config` with the key that tells diffusers so."""
    return {**config, f"use_{sigmas}_sigmas": True} if sigmas else config


def run_diffusers(
    scheduler: Any,
    steps: int,
    noise: Latents,
    evaluate: Callable[[Latents, float], Latents] = model,
    given: Sequence[Level] | None = None,
) -> list[tuple[float, Latents]]:
    """(t, latents after the step) of each step, in the coordinates of the scheduler.

    given   levels whose timesteps are taken instead of the scheduler's, from which they may differ by one
    """
    import torch

    scheduler.set_timesteps(steps)
    if type(scheduler).__name__.startswith("KDPM2"):
        _in_doubles(scheduler)
    if given is not None:
        timesteps = torch.tensor([level.t for level in given[:-1]]).long()
        assert (timesteps - scheduler.timesteps).abs().max() <= 1
        scheduler.timesteps = timesteps
    if hasattr(scheduler, "set_begin_index"):  # else DPM++ skips a step where two rounded timesteps are equal
        scheduler.set_begin_index(0)
    return run_timesteps(scheduler, torch.from_numpy(noise) * scheduler.init_noise_sigma, scheduler.timesteps, evaluate)


def _in_doubles(scheduler: Any) -> None:
    """What diffusers' KDPM2 classes derive from their sigmas, by their own formulas, in float64 and unrounded.

    In float32 sigma^2 - sigma_down^2 of sigmas beyond 100 keeps three digits. With Karras sigmas these classes round
    the timesteps of whole steps; k-diffusion, where they come from, does not.
    """
    import torch

    alphas = scheduler.alphas_cumprod.numpy()
    logs = np.log((((1 - alphas) / alphas) ** 0.5).astype(np.float64))

    def timestep_of(sigma: Any) -> float:
        return float(np.interp(np.log(float(sigma)), logs, np.arange(len(logs))))

    sigmas = torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1:-1:2]]).double()
    timesteps = scheduler.timesteps.double()
    if scheduler.config.use_karras_sigmas:
        whole = [0, *range(2, len(timesteps), 2)]
        timesteps[whole] = torch.tensor([timestep_of(each) for each in sigmas[:-1]]).double()
    if hasattr(scheduler, "sigmas_down"):
        following = torch.cat([sigmas[1:], sigmas.new_zeros(1)])
        up = (following**2 * (sigmas**2 - following**2) / sigmas**2).nan_to_num().sqrt()
        down = (following**2 - up**2).clamp(min=0).sqrt()
        middles = sigmas.log().lerp(down.log(), 0.5).exp()
        middles[-2:] = 0.0
        scheduler.sigmas_up, scheduler.sigmas_down, scheduler.sigmas_interpol = (
            torch.cat([each[:1], each[1:].repeat_interleave(2), each[-1:]]) for each in (up, down, middles)
        )
        timesteps[1::2] = torch.tensor([timestep_of(each) for each in middles[:-2]]).double()
    scheduler.timesteps = timesteps


def one_path(noise: Callable[[tuple[int, ...]], Latents]) -> Callable[[Any, Any], Any]:
    """Noise on a Brownian path in sigma, as k-diffusion's noise samplers: for half a step, then for the whole."""
    import torch

    half: list[tuple[float, Any]] = []

    def between(sigma: Any, target: Any) -> Any:
        drawn = torch.from_numpy(noise(SHAPE))
        if not half or half[0][0] != float(sigma):
            half[:] = [(float(sigma), (float(target), drawn))]
            return drawn
        middle, first = half.pop()[1]
        parts = (float(sigma) - middle) ** 0.5, (middle - float(target)) ** 0.5
        return (first * parts[0] + drawn * parts[1]) / (float(sigma) - float(target)) ** 0.5

    return between


def run_timesteps(scheduler: Any, x: Any, timesteps: Any, evaluate: Callable[[Latents, float], Latents] = model) -> Any:
    import inspect

    import torch

    if hasattr(scheduler, "noise_sampler"):
        scheduler.noise_sampler = one_path(TorchNoise(5).normal)
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
    extra = len(steps) - (len(levels) - 1)  # PNDM evaluates its second level twice; Heun, from_sigma, each but two
    trace = []
    for t, step in zip(seen, steps, strict=True):
        assert step.latents.dtype == step.denoised.dtype == np.float32
        exploding = sampler.from_sigma or schedule.is_edm  # Then diffusers too computes in x0 + sigma * eps.
        reached = levels[-1] if exploding else levels[max(1, step.index + 1 - extra)]
        finished = step.index == step.total - 1 or exploding
        trace.append((t, step.latents if finished else step.latents * reached.alpha))
    return trace


def noise_of(seed: int = 0) -> Latents:
    return TorchNoise(seed).normal(SHAPE)


def assert_same(ours: list[tuple[float, Latents]], theirs: list[tuple[float, Latents]], rtol: float = 1e-4) -> None:
    assert [t for t, _ in ours] == pytest.approx([t for t, _ in theirs], rel=1e-6, abs=2e-3)
    for i, ((_, a), (_, b)) in enumerate(zip(ours, theirs, strict=True)):
        assert np.isfinite(a).all()
        error = np.abs(a - b).max() / np.abs(b).max()
        assert error <= rtol, f"step {i} of {len(ours)}: relative error {error:.2e}"
