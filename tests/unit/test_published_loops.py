"""The full loops that diffusers' own tests publish (tests/schedulers, August 2026), by our samplers.

A loop is ten steps of  output = x_t t / (t + 1)  from a ramp; published is the sum, or the mean, of what it ends at.
Loops of sigma schedulers hand the scaled sample back as the sample itself, so that it is scaled again at each call; the
adapter does the same. 47 of 50 loops end where theirs end, and DIFFERENT says why the others do not. Left out are those
of options that are refused by name (thresholding, clip_sample where it clips, Runge-Kutta steps of PNDM,
lower_order_final False) and of DPMSolverSDEScheduler, whose noise is a Brownian tree's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest

from edge_sd.sampling.names import sampler_of_config
from edge_sd.sampling.noise import TorchNoise
from edge_sd.sampling.samplers import SAMPLERS, Latents
from edge_sd.sampling.schedule import Level, NoiseSchedule

RAMP = (np.arange(768, dtype=np.float32).reshape(3, 8, 8, 4) / 768).transpose(3, 0, 1, 2)
NOISE = (np.arange(768, dtype=np.float32)[::-1].reshape(3, 8, 8, 4) / 768).transpose(3, 0, 1, 2)
LINEAR = {"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
LONGER = {**LINEAR, "num_train_timesteps": 1100}
SCALED = {**LINEAR, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
V, KARRAS = {"prediction_type": "v_prediction"}, {"use_karras_sigmas": True}
# Their values stay in these, so nothing is clipped that we would have to refuse.
UNCLIPPED = {"clip_sample": False}


class Loop(NamedTuple):
    """total or mean: what is published of the absolute values; start: the first step of a loop from a picture on."""

    kind: str
    config: dict[str, Any]
    total: float | None = None
    mean: float | None = None
    steps: int = 10
    start: int = 0


def loops() -> list[Loop]:
    """Each loop once: those of other devices and of parallel classes are the same."""
    ddim, ddpm = {**LINEAR, **UNCLIPPED}, {**LINEAR, **UNCLIPPED, "variance_type": "fixed_small"}
    unipc = {**LINEAR, "final_sigmas_type": "sigma_min"}
    edm = {"sigma_min": 0.002, "sigma_max": 80.0}
    return [
        Loop("DDIMScheduler", ddim, 172.0067),
        Loop("DDIMScheduler", {**ddim, **V}, 52.5302),
        Loop("DDIMScheduler", {**ddim, "set_alpha_to_one": True, "beta_start": 0.01}, 149.8295),
        Loop("DDIMScheduler", {**ddim, "set_alpha_to_one": False, "beta_start": 0.01}, 149.0784),
        Loop("DDIMScheduler", ddim, 354.5418, start=8),
        Loop("DDIMParallelScheduler", ddim, 172.0067),
        Loop("DDIMParallelScheduler", {**ddim, **V}, 52.5302),
        Loop("DDIMParallelScheduler", {**ddim, "set_alpha_to_one": True, "beta_start": 0.01}, 149.8295),
        Loop("DDIMParallelScheduler", {**ddim, "set_alpha_to_one": False, "beta_start": 0.01}, 149.0784),
        Loop("DDIMParallelScheduler", ddim, 354.5418, start=8),
        Loop("DDPMScheduler", ddpm, 258.9606, steps=1000),
        Loop("DDPMScheduler", {**ddpm, **V}, 202.0296, steps=1000),
        Loop("DDPMScheduler", ddpm, 387.9466, steps=1000, start=998),
        Loop("DDPMParallelScheduler", ddpm, 258.9606, steps=1000),
        Loop("DDPMParallelScheduler", {**ddpm, **V}, 202.0296, steps=1000),
        Loop("DDPMParallelScheduler", ddpm, 387.9466, steps=1000, start=998),
        Loop("DEISMultistepScheduler", LINEAR, mean=0.23916),
        Loop("DEISMultistepScheduler", {**LINEAR, **V}, mean=0.091),
        Loop("DEISMultistepScheduler", LINEAR, 315.3016, start=8),
        Loop("EDMEulerScheduler", {**edm, "num_train_timesteps": 256}, 34.1855),
        Loop("EulerDiscreteScheduler", LONGER, 10.0807),
        Loop("EulerDiscreteScheduler", {**LONGER, **V}, 0.0002),
        Loop("EulerDiscreteScheduler", {**LONGER, **KARRAS}, 124.52299),
        Loop("EulerDiscreteScheduler", LONGER, 57062.9297, start=8),
        Loop("EulerAncestralDiscreteScheduler", LONGER, 152.3192),
        Loop("EulerAncestralDiscreteScheduler", {**LONGER, **V}, 108.4439),
        Loop("EulerAncestralDiscreteScheduler", LONGER, 56163.0508, start=8),
        Loop("HeunDiscreteScheduler", LONGER, 0.1233),
        Loop("HeunDiscreteScheduler", {**LONGER, **V}, 4.6934e-07),
        Loop("HeunDiscreteScheduler", {**LONGER, **KARRAS}, 0.00015),
        Loop("HeunDiscreteScheduler", LONGER, 75074.8906, start=8),
        Loop("KDPM2AncestralDiscreteScheduler", LONGER, 13979.9433),
        Loop("KDPM2AncestralDiscreteScheduler", {**LONGER, **V}, 331.8133),
        Loop("KDPM2AncestralDiscreteScheduler", LONGER, 93087.3437, start=8),
        Loop("KDPM2DiscreteScheduler", LONGER, 20.4125),
        Loop("KDPM2DiscreteScheduler", {**LONGER, **V}, 4.6934e-07),
        Loop("KDPM2DiscreteScheduler", LONGER, 70408.4062, start=8),
        Loop("LCMScheduler", SCALED, 18.7097, steps=1),
        Loop("LCMScheduler", SCALED, 197.7616),
        Loop("LMSDiscreteScheduler", LONGER, 1006.388),
        Loop("LMSDiscreteScheduler", {**LONGER, **V}, 0.0017),
        Loop("LMSDiscreteScheduler", {**LONGER, **KARRAS}, 3812.9927),
        Loop("LMSDiscreteScheduler", LONGER, 27663.6895, start=8),
        Loop("TCDScheduler", SCALED, 29.8715, steps=1),
        Loop("TCDScheduler", SCALED, 181.2040),
        Loop("UniPCMultistepScheduler", unipc, mean=0.2464),
        Loop("UniPCMultistepScheduler", {**unipc, **KARRAS}, mean=0.2925),
        Loop("UniPCMultistepScheduler", {**unipc, **V}, mean=0.1014),
        Loop("UniPCMultistepScheduler", {**unipc, **V, **KARRAS}, mean=0.1966),
        Loop("UniPCMultistepScheduler", unipc, 315.5757, start=8),
    ]


# (kind, total) -> why ours ends elsewhere. The tests below run diffusers without it.
DIFFERENT = {
    ("DDPMScheduler", 387.9466): "theirs takes 1 - abar_t / abar_s in float32, of which three digits are left at t = 1",
    ("DDPMParallelScheduler", 387.9466): "as DDPMScheduler",
    ("LMSDiscreteScheduler", 27663.6895): "theirs begins a tail with the weights of order 4 and one derivative",
}


def ended(loop: Loop) -> Latents:
    """What our sampler ends at."""
    config = {"_class_name": loop.kind, **loop.config}
    schedule, sampler = NoiseSchedule.from_config(config), SAMPLERS[sampler_of_config(config)]
    levels = sampler.levels(schedule, loop.steps)[loop.start :]
    of_sigma = sampler.from_sigma or schedule.is_edm
    if loop.kind == "TCDScheduler":
        # Theirs are with gamma 0: no way down beyond the next level, and no noise.
        levels = [level._replace(via=level.sigma) for level in levels]
    corrects = loop.kind == "HeunDiscreteScheduler"
    calls = 0

    def denoise(x: Latents, level: Level) -> Latents:
        alpha, sigma = np.float32(level.alpha), np.float32(level.sigma)
        if schedule.is_edm:
            output = np.float32(level.t / (level.t + 1)) * (x * alpha)
            out = np.float32(level.sigma * level.data * level.alpha)
            return x * np.float32((level.data * level.alpha) ** 2) + output * out
        nonlocal calls
        calls += 1
        scaled = x * alpha
        output = scaled * np.float32(level.t / (level.t + 1))
        if of_sigma:
            removed = (
                output * sigma
                if "v_" not in schedule.prediction_type
                else scaled * (1 - alpha**2) + output * sigma * alpha
            )
            if not (corrects and calls % 2 == 0):
                x *= alpha  # In place: the solver goes on from the scaled sample. Heun's corrector does from its first.
            return x - removed
        return x - output * sigma if "v_" not in schedule.prediction_type else x * alpha**2 - output * sigma * alpha

    def clipped(x: Latents, level: Level) -> Latents:
        return np.clip(denoise(x, level), -1, 1)

    first = np.ascontiguousarray(RAMP)
    x = sampler.start(first, levels, schedule) if of_sigma else first / np.float32(levels[0].alpha)
    if loop.start:
        clean = first * np.float32(
            sampler.start(np.ones((1,), np.float32), sampler.levels(schedule, loop.steps), schedule)[0]
        )
        x = (clean if of_sigma else first) + np.ascontiguousarray(NOISE) * np.float32(levels[0].sigma)
    *_, last = sampler.run(clipped if "DDPM" in loop.kind else denoise, x, levels, TorchNoise(0).normal)
    return last.latents


EQUAL = [each for each in loops() if (each.kind, each.total) not in DIFFERENT]


def test_nearly_all_are_equal() -> None:
    assert len(loops()) == 50
    assert len(EQUAL) == 47


@pytest.mark.parametrize("loop", EQUAL, ids=lambda each: f"{each.kind}-{each.total or each.mean}")
def test_a_published_loop_ends_where_theirs_ends(loop: Loop) -> None:
    found = np.abs(ended(loop).astype(np.float64))
    if loop.total is not None:
        assert found.sum() == pytest.approx(loop.total, abs=1e-2, rel=2e-6)
    if loop.mean is not None:
        assert found.mean() == pytest.approx(loop.mean, abs=1e-3)


def find(kind: str, total: float) -> Loop:
    return next(each for each in loops() if (each.kind, each.total) == (kind, total))


def test_ddpm_in_doubles_ends_where_ours_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from diffusers import DDPMScheduler
    from diffusers.schedulers import scheduling_ddpm

    loop = find("DDPMScheduler", 387.9466)
    theirs = DDPMScheduler(**{**loop.config, "clip_sample": True})
    theirs.alphas_cumprod = torch.cumprod(1 - theirs.betas.double(), 0)
    theirs.one = torch.tensor(1.0, dtype=torch.float64)
    noise = torch.from_numpy(TorchNoise(0).normal(RAMP.shape)).double()
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, **__: noise)
    timesteps = theirs.timesteps[loop.start :]
    x = theirs.add_noise(torch.from_numpy(RAMP.copy()).double(), torch.from_numpy(NOISE.copy()).double(), timesteps[:1])
    for t in timesteps:
        x = theirs.step(x * t / (t + 1), t, x).prev_sample
    assert np.abs(ended(loop)).sum(dtype=float) == pytest.approx(float(x.abs().sum()), abs=1e-3)


def test_lms_whose_order_grows_ends_where_ours_ends() -> None:
    import torch
    from diffusers import LMSDiscreteScheduler

    loop = find("LMSDiscreteScheduler", 27663.6895)
    theirs = LMSDiscreteScheduler(**loop.config)
    theirs.set_timesteps(loop.steps)
    timesteps = theirs.timesteps[loop.start :]
    x = torch.from_numpy(RAMP.copy()) * theirs.init_noise_sigma
    x = theirs.add_noise(x, torch.from_numpy(NOISE.copy()), timesteps[:1])
    for n, t in enumerate(timesteps):
        x = theirs.scale_model_input(x, t)
        x = theirs.step(x * t.float() / (t.float() + 1), t, x, order=n + 1).prev_sample
    assert np.abs(ended(loop)).sum(dtype=float) == pytest.approx(float(x.abs().sum()), rel=1e-6)
