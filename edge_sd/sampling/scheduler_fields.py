"""What every field of every scheduler class of diffusers does here: the one table, and the check of configs against it.

A field is one of four things:

    READ      it decides noise levels, and NoiseSchedule reads it
    CHOOSES   it decides the solver, and names.sampler_of_config chooses by it
    IDLE      it changes no picture: another field that it belongs to is at the only value that is offered
    a tuple   the values that are offered; another one is refused by name

The tests hold the table against the parameters of diffusers' classes, all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

READ: Final = "read"
CHOOSES: Final = "chooses"
IDLE: Final = "idle"
Rule = str | tuple[Any, ...]

_BETAS: dict[str, Rule] = {
    "num_train_timesteps": READ, "beta_start": READ, "beta_end": READ, "beta_schedule": READ, "trained_betas": READ,
    "prediction_type": READ,
}  # fmt: skip
_TIMESTEPS: dict[str, Rule] = {"timestep_spacing": READ, "steps_offset": READ}
_SPACINGS: dict[str, Rule] = {"use_karras_sigmas": READ, "use_exponential_sigmas": READ, "use_beta_sigmas": READ}
_ENDS: dict[str, Rule] = {"sigma_min": READ, "sigma_max": READ}
# Dynamic thresholding (Saharia et al. 2022) is for models of pixels.
_THRESHOLD: dict[str, Rule] = {"thresholding": (False,), "dynamic_thresholding_ratio": IDLE, "sample_max_value": IDLE}
_CLIP: dict[str, Rule] = {"clip_sample": (False,), "clip_sample_range": IDLE}
_FLOW: dict[str, Rule] = {
    "use_flow_sigmas": (False,), "flow_shift": IDLE, "use_dynamic_shifting": (False,), "time_shift_type": IDLE,
}  # fmt: skip
_VARIANCE: dict[str, Rule] = {"variance_type": (None,), "lambda_min_clipped": (-math.inf,)}
_DPM: dict[str, Rule] = {
    "solver_order": CHOOSES, "algorithm_type": CHOOSES, "solver_type": CHOOSES, "lower_order_final": (True,),
    "euler_at_final": (False,), "final_sigmas_type": READ,
}  # fmt: skip
_DDIM: dict[str, Rule] = {
    **_BETAS, **_TIMESTEPS, **_THRESHOLD, **_CLIP, "set_alpha_to_one": READ, "rescale_betas_zero_snr": READ
}  # fmt: skip
_DISTILLED: dict[str, Rule] = {
    **_DDIM, "timestep_spacing": IDLE, "steps_offset": IDLE, "set_alpha_to_one": IDLE,
    "original_inference_steps": READ, "timestep_scaling": READ,
}  # fmt: skip
_DDPM: dict[str, Rule] = {
    **_BETAS, **_TIMESTEPS, **_THRESHOLD, **_CLIP, "rescale_betas_zero_snr": READ,
    # The two are one variance, by its logarithm or itself.
    "variance_type": ("fixed_small", "fixed_small_log"),
}  # fmt: skip
_EULER: dict[str, Rule] = {**_BETAS, **_TIMESTEPS, "rescale_betas_zero_snr": READ}
_EDM: dict[str, Rule] = {
    **_ENDS, "sigma_data": READ, "sigma_schedule": READ, "rho": READ, "prediction_type": READ,
    "final_sigmas_type": READ, "num_train_timesteps": IDLE,
}  # fmt: skip

# Classes that are drawn with: field -> what it does.
CLASSES: dict[str, dict[str, Rule]] = {
    "EulerDiscreteScheduler": {
        **_EULER, **_SPACINGS, **_ENDS, "interpolation_type": READ, "timestep_type": READ, "final_sigmas_type": READ,
    },
    "EulerAncestralDiscreteScheduler": _EULER,
    "HeunDiscreteScheduler": {**_BETAS, **_TIMESTEPS, **_SPACINGS, **_CLIP},
    "LMSDiscreteScheduler": {**_BETAS, **_TIMESTEPS, **_SPACINGS},
    "DPMSolverMultistepScheduler": {
        **_BETAS, **_TIMESTEPS, **_SPACINGS, **_THRESHOLD, **_FLOW, **_VARIANCE, **_DPM,
        "use_lu_lambdas": READ, "rescale_betas_zero_snr": READ, "use_flow_sigmas": READ, "flow_shift": READ,
    },
    "UniPCMultistepScheduler": {
        **_BETAS, **_TIMESTEPS, **_SPACINGS, **_ENDS, **_THRESHOLD, **_FLOW, "solver_order": (2,),
        "predict_x0": (True,), "solver_type": ("bh2",), "lower_order_final": (True,), "disable_corrector": ([], ()),
        "solver_p": (None,), "final_sigmas_type": READ, "rescale_betas_zero_snr": READ, "shift_terminal": (None,),
    },
    "DDIMScheduler": _DDIM,
    "DDIMParallelScheduler": _DDIM,
    "LCMScheduler": _DISTILLED,
    "TCDScheduler": {**_DISTILLED, "timestep_scaling": IDLE},
    "PNDMScheduler": {**_BETAS, **_TIMESTEPS, "set_alpha_to_one": READ, "skip_prk_steps": (True,)},
    "DDPMScheduler": _DDPM,
    "DDPMParallelScheduler": _DDPM,
    "DEISMultistepScheduler": {
        **_BETAS, **_TIMESTEPS, **_SPACINGS, **_THRESHOLD, **_FLOW, "solver_order": (2,), "algorithm_type": ("deis",),
        "solver_type": ("logrho",), "lower_order_final": (True,),
    },
    "DPMSolverSDEScheduler": {**_BETAS, **_TIMESTEPS, **_SPACINGS, "noise_sampler_seed": (None,)},
    "KDPM2DiscreteScheduler": {**_BETAS, **_TIMESTEPS, **_SPACINGS},
    "KDPM2AncestralDiscreteScheduler": {**_BETAS, **_TIMESTEPS, **_SPACINGS},
    "EDMEulerScheduler": _EDM,
    "EDMDPMSolverMultistepScheduler": {**_EDM, **_THRESHOLD, **_DPM},
    "FlowMatchEulerDiscreteScheduler": {
        **_SPACINGS, "num_train_timesteps": READ, "shift": READ, "use_dynamic_shifting": READ, "base_shift": READ,
        "max_shift": READ, "base_image_seq_len": READ, "max_image_seq_len": READ, "invert_sigmas": (False,),
        "shift_terminal": (None,), "time_shift_type": READ, "stochastic_sampling": (False,),
    },
    # Its pipelines divide by sigma_data what they multiplied by it.
    "SCMScheduler": {"num_train_timesteps": READ, "prediction_type": ("trigflow",), "sigma_data": (0.5,)},
}  # fmt: skip
# Classes of such models whose solver is not offered: the schedule is read, and a request has to choose a sampler.
OTHER_SOLVERS = ("DPMSolverSinglestepScheduler", "SASolverScheduler")
# Classes of other kinds of models, and those that run a schedule backwards.
OTHER_MODELS = (
    "AmusedScheduler", "BlockRefinementScheduler", "CMStochasticIterativeScheduler", "CogVideoXDDIMScheduler",
    "CogVideoXDPMScheduler", "ConsistencyDecoderScheduler", "CosineDPMSolverMultistepScheduler", "DDIMInverseScheduler",
    "DDPMWuerstchenScheduler", "DPMSolverMultistepInverseScheduler", "DiscreteDDIMScheduler", "EntropyBoundScheduler",
    "FlowMapEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler", "HeliosDMDScheduler",
    "HeliosScheduler", "IPNDMScheduler", "KarrasVeScheduler", "LTXEulerAncestralRFScheduler", "RePaintScheduler",
    "ScoreSdeVeScheduler", "ScoreSdeVpScheduler", "UnCLIPScheduler", "VQDiffusionScheduler",
)  # fmt: skip
_HEUN = {"beta_start": 0.00085, "beta_end": 0.012}
_LATENT_CONSISTENCY = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
# What a class takes for a field that a config leaves out, where that is not NoiseSchedule's default or not offered.
DEFAULTS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {"clip_sample": True},
    "DDIMParallelScheduler": {"clip_sample": True},
    "PNDMScheduler": {"skip_prk_steps": False},
    "DDPMScheduler": {"clip_sample": True},
    "DDPMParallelScheduler": {"clip_sample": True},
    "HeunDiscreteScheduler": _HEUN,
    "KDPM2DiscreteScheduler": _HEUN,
    "KDPM2AncestralDiscreteScheduler": _HEUN,
    "DPMSolverSDEScheduler": _HEUN,
    "LCMScheduler": _LATENT_CONSISTENCY,
    "TCDScheduler": _LATENT_CONSISTENCY,
    "EDMEulerScheduler": {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "sigma_schedule": "karras"},
    "EDMDPMSolverMultistepScheduler": {
        "sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "sigma_schedule": "karras",
    },
    "SCMScheduler": {"prediction_type": "trigflow", "sigma_data": 0.5},
}  # fmt: skip


def class_of(config: Mapping[str, Any]) -> str:
    """The scheduler class of a config; Flax's are those of torch. "" where it has none."""
    return str(config.get("_class_name") or "").removeprefix("Flax")


def checked(config: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler config with its class's defaults. Raises ValueError for a class or a value that is not offered."""
    kind = class_of(config)
    full = {**DEFAULTS.get(kind, {}), **config}
    if kind in OTHER_MODELS or (kind and kind not in CLASSES and kind not in OTHER_SOLVERS):
        raise ValueError(f"{kind} is the scheduler of another kind of model; supported: {', '.join(sorted(CLASSES))}")
    for name, rule in CLASSES.get(kind, {}).items():
        if isinstance(rule, tuple) and name in full and not _offered(full[name], rule) and not _idle(kind, name, full):
            given = "" if name in config else f", which {kind} takes where it is left out"
            valid = ", ".join(map(repr, rule))
            raise ValueError(f"{name} {full[name]!r}{given} is not offered in {kind}; supported: {valid}")
    if CLASSES.get(kind, {}).get("use_flow_sigmas") == READ:
        _check_flow(kind, full)
    return full


def _check_flow(kind: str, config: Mapping[str, Any]) -> None:
    """Raise ValueError where a solver of both kinds of models has the levels of one and the prediction of the other."""
    flow, predicted = bool(config.get("use_flow_sigmas")), config.get("prediction_type", "epsilon")
    if flow != (predicted == "flow_prediction"):
        what = f"use_flow_sigmas {flow} beside prediction_type {predicted!r}"
        raise ValueError(f"{what} is not offered in {kind}; supported: True beside 'flow_prediction', and False")
    if flow and (last := config.get("final_sigmas_type", "zero")) != "zero":
        raise ValueError(f"final_sigmas_type {last!r} of flow sigmas is not offered in {kind}; supported: 'zero'")


def _offered(value: Any, valid: tuple[Any, ...]) -> bool:
    # JSON has no infinity, and some files say it as a text.
    return value in valid or (value == "-Infinity" and -math.inf in valid)


def _idle(kind: str, name: str, config: Mapping[str, Any]) -> bool:
    """Whether a field changes nothing beside the others: a last step down to 0 is of first order whatever they say."""
    to_zero = config.get("final_sigmas_type", "zero") == "zero" and config.get("solver_order", 2) == 2
    return name in ("lower_order_final", "euler_at_final") and to_zero and "DPMSolverMultistep" in kind
