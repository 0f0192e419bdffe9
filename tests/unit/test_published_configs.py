"""Scheduler configs as people publish them, word for word but for fields that no scheduler reads, beside diffusers.

They were collected from public repositories: first releases of 2022 that lack most fields, fine-tunes, distilled
models, UniPC and DPM++ as tools save them, stable video's continuous levels. Each is drawn with in 4, 20 and 25 steps.
"""

from __future__ import annotations

from typing import Any

import pytest

from edge_sd.bundle.diffusers import diffusers_facts
from edge_sd.errors import InvalidModel
from edge_sd.sampling.names import sampler_of_config
from edge_sd.sampling.samplers import SAMPLERS
from edge_sd.sampling.schedule import NoiseSchedule

from .schedulers import assert_same, noise_of, run_diffusers, run_ours

BETAS: dict[str, Any] = {
    "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "num_train_timesteps": 1000,
    "trained_betas": None,
}  # fmt: skip
OLD = {**BETAS, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
SAVED = {**OLD, "prediction_type": "epsilon", "skip_prk_steps": True}
EULER = {**SAVED, "interpolation_type": "linear", "sample_max_value": 1.0}
DDIM = {**SAVED, "clip_sample_range": 1.0, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0,
        "rescale_betas_zero_snr": False, "thresholding": False, "timestep_spacing": "leading"}  # fmt: skip
DPM = {**BETAS, "algorithm_type": "dpmsolver++", "lower_order_final": True, "prediction_type": "epsilon",
       "solver_order": 2, "solver_type": "midpoint", "steps_offset": 1, "thresholding": False}  # fmt: skip

CONFIGS: dict[str, dict[str, Any]] = {
    "SD 1.4's variations, 0.4": {"_class_name": "PNDMScheduler", **BETAS, "skip_prk_steps": True},
    "SD 1.5, 0.6": {"_class_name": "PNDMScheduler", **OLD, "skip_prk_steps": True},
    "SD 1.5 fine-tuned, 0.21": {"_class_name": "PNDMScheduler", **SAVED, "timestep_spacing": "leading"},
    "inpainting, 0.6": {"_class_name": "DDIMScheduler", **OLD},
    "dreambooth, 0.12": {"_class_name": "DDIMScheduler", **OLD, "prediction_type": "epsilon"},
    "DDIM, 0.17": {"_class_name": "DDIMScheduler", **DDIM},
    "SD 2.1 by Flax, 0.9": {"_class_name": "FlaxDDIMScheduler", **SAVED, "prediction_type": "v_prediction"},
    "dreambooth's training scheduler, 0.13": {
        "_class_name": "DDPMScheduler", **OLD, "clip_sample_range": 1.0, "prediction_type": "epsilon",
        "variance_type": "fixed_small",
    },
    "waifu, 0.4": {"_class_name": "LMSDiscreteScheduler", **BETAS},
    "SDXL, 0.18": {
        "_class_name": "EulerDiscreteScheduler", **EULER, "timestep_spacing": "leading", "use_karras_sigmas": False,
    },
    "SDXL, 0.27": {
        "_class_name": "EulerDiscreteScheduler", **EULER, "timestep_spacing": "leading", "use_karras_sigmas": False,
        "rescale_betas_zero_snr": False, "sigma_max": None, "sigma_min": None, "timestep_type": "discrete",
    },
    "Turbo, 0.24": {"_class_name": "EulerAncestralDiscreteScheduler", **EULER, "timestep_spacing": "trailing"},
    "a trainer's samples": {
        "_class_name": "EulerAncestralDiscreteScheduler", **EULER, "steps_offset": 0, "timestep_spacing": "leading",
    },
    "another view, 0.17": {
        "_class_name": "EulerAncestralDiscreteScheduler", **SAVED, "beta_schedule": "linear",
        "prediction_type": "v_prediction",
    },
    "stable video, 0.24": {
        "_class_name": "EulerDiscreteScheduler", **EULER, "prediction_type": "v_prediction", "sigma_max": 124.8983,
        "sigma_min": 0.0485, "timestep_spacing": "leading", "timestep_type": "continuous", "use_karras_sigmas": True,
    },
    "UniPC, 0.20": {
        "_class_name": "UniPCMultistepScheduler", **SAVED, "disable_corrector": [], "lower_order_final": True,
        "predict_x0": True, "solver_order": 2, "solver_p": None, "solver_type": "bh2", "thresholding": False,
        "timestep_spacing": "linspace", "use_karras_sigmas": False,
    },
    "DPM++, linspace": {
        "_class_name": "DPMSolverMultistepScheduler", **DPM, "timestep_spacing": "linspace", "variance_type": None,
        "use_karras_sigmas": False,
    },
    "DPM++ Karras, 0.21": {
        "_class_name": "DPMSolverMultistepScheduler", **BETAS, "prediction_type": "epsilon", "solver_order": 2,
        "solver_type": "midpoint", "thresholding": False, "timestep_spacing": "leading", "use_karras_sigmas": True,
    },
    "DPM++ with linear betas, 0.22": {
        "_class_name": "DPMSolverMultistepScheduler", **DPM, "beta_end": 0.02, "beta_schedule": "linear",
        "beta_start": 0.0001, "dynamic_thresholding_ratio": 0.995, "euler_at_final": False, "sample_max_value": 1.0,
        "lambda_min_clipped": "-Infinity", "steps_offset": 0, "timestep_spacing": "linspace",
        "use_karras_sigmas": False, "use_lu_lambdas": False, "variance_type": None,
    },
    "LCM": {
        "_class_name": "LCMScheduler", **OLD, "clip_sample_range": 1.0, "original_inference_steps": 50,
        "prediction_type": "epsilon", "rescale_betas_zero_snr": False, "thresholding": False,
        "timestep_spacing": "leading", "timestep_scaling": 10.0, "set_alpha_to_one": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("steps", [4, 20, 25])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_published_config_is_drawn_with_as_diffusers_does(name: str, steps: int) -> None:
    import diffusers

    config = CONFIGS[name]
    theirs = {key: float(value) if value == "-Infinity" else value for key, value in config.items()}
    scheduler = getattr(diffusers, config["_class_name"].removeprefix("Flax")).from_config(theirs)
    schedule, sampler = NoiseSchedule.from_config(config), SAMPLERS[sampler_of_config(config)]
    levels, noise = sampler.levels(schedule, steps), noise_of()
    expected = run_diffusers(scheduler, steps, noise)
    assert_same(run_ours(sampler, schedule, levels, sampler.start(noise, levels, schedule)), expected)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"_class_name": "DDPMWuerstchenScheduler", "s": 0.008}, "DDPMWuerstchenScheduler is the scheduler"),
        ({"_class_name": "DDPMScheduler", "clip_sample": True, "variance_type": "fixed_small"}, "clip_sample True"),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "use_flow_sigmas True"),
        ({"_class_name": "CogVideoXDDIMScheduler"}, "CogVideoXDDIMScheduler is the scheduler of another kind"),
    ],
)  # fmt: skip
def test_a_config_of_another_kind_of_model_is_refused_by_name(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        NoiseSchedule.from_config({**config, "beta_schedule": "linear"})


def test_a_config_with_marks_of_a_merge_is_no_json(miniature: Any, tmp_path: Any) -> None:
    import shutil

    folder = shutil.copytree(miniature, tmp_path / "m")
    path = folder / "scheduler/scheduler_config.json"
    path.write_text(f"<<<<<<< HEAD\n{path.read_text()}=======\n{{}}\n>>>>>>> 0123456\n")
    with pytest.raises(InvalidModel, match=r"scheduler_config\.json is not valid JSON"):
        diffusers_facts(folder)
