"""Every field of every scheduler of diffusers: it is read, changes nothing, or is refused by name."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_sd.sampling.names import sampler_of_config
from edge_sd.sampling.samplers import SAMPLERS
from edge_sd.sampling.schedule import NoiseSchedule
from edge_sd.sampling.scheduler_fields import (
    CHOOSES,
    CLASSES,
    DEFAULTS,
    IDLE,
    OTHER_MODELS,
    OTHER_SOLVERS,
    READ,
)

from .schedulers import SD, assert_same, noise_of, run_diffusers, run_ours

diffusers = pytest.importorskip("diffusers")


def parameters() -> dict[str, dict[str, Any]]:
    """Class -> the parameters of its __init__, read from diffusers' sources: some modules need packages to import."""
    found = {}
    for path in Path(diffusers.schedulers.__path__[0]).rglob("scheduling_*.py"):
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith("Scheduler"):
                for method in node.body:
                    if isinstance(method, ast.FunctionDef) and method.name == "__init__":
                        found[node.name] = [each.arg for each in method.args.args[1:]]
    return found


THEIRS = parameters()


def test_every_class_of_diffusers_is_in_the_table_once() -> None:
    torch_classes = {name for name in THEIRS if not name.startswith("Flax")}
    assert len(torch_classes) >= 45
    assert sorted([*CLASSES, *OTHER_SOLVERS, *OTHER_MODELS]) == sorted(torch_classes)
    for name in set(THEIRS) - torch_classes:
        assert name.removeprefix("Flax") in torch_classes


@pytest.mark.parametrize("kind", CLASSES)
def test_every_parameter_of_a_class_has_a_rule(kind: str) -> None:
    assert set(CLASSES[kind]) == set(THEIRS[kind])


@pytest.mark.parametrize("kind", CLASSES)
def test_defaults_of_classes_are_diffusers_where_ours_are_others(kind: str) -> None:
    own = {name: each.default for name, each in NoiseSchedule.__dataclass_fields__.items()}
    for name, parameter in inspect.signature(getattr(diffusers, kind).__init__).parameters.items():
        rule = CLASSES[kind].get(name)
        told = DEFAULTS.get(kind, {}).get(name, own.get(name, parameter.default))
        left_to_samplers = name in ("timestep_spacing", "set_alpha_to_one")
        if (rule == READ and not left_to_samplers) or isinstance(rule, tuple):
            assert told == parameter.default, name


OTHER_VALUES: dict[str, Any] = {
    "dynamic_thresholding_ratio": 0.5, "sample_max_value": 3.0, "clip_sample_range": 0.1, "flow_shift": 3.0,
    "time_shift_type": "linear", "num_train_timesteps": 500, "timestep_spacing": "trailing", "steps_offset": 3,
    "set_alpha_to_one": False, "timestep_scaling": 3.0, "base_shift": 0.1, "max_shift": 3.0, "base_image_seq_len": 9,
    "max_image_seq_len": 99,
}  # fmt: skip


def drawn(kind: str, config: dict[str, Any], steps: int = 6) -> list[Any]:
    """diffusers' own steps, with every field at a value that is offered."""
    fixed = {name: rule[0] for name, rule in CLASSES[kind].items() if isinstance(rule, tuple)}
    scheduler = getattr(diffusers, kind).from_config({**fixed, **config})
    if kind == "FlowMatchEulerDiscreteScheduler":
        scheduler.scale_model_input = lambda x, t: x
        scheduler.init_noise_sigma = 1.0
    return run_diffusers(scheduler, steps, noise_of())


@pytest.mark.parametrize(
    ("kind", "field"), [(kind, name) for kind, rules in CLASSES.items() for name, rule in rules.items() if rule == IDLE]
)
def test_fields_that_change_nothing_change_nothing_in_diffusers(kind: str, field: str) -> None:
    changed = drawn(kind, {field: OTHER_VALUES[field]})
    for (t, plain), (u, other) in zip(drawn(kind, {}), changed, strict=True):
        assert t == u
        np.testing.assert_array_equal(plain, other)


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("EulerDiscreteScheduler", "sigma_min", None),
        ("DDIMScheduler", "thresholding", True),
        ("DDIMScheduler", "clip_sample", True),
        ("DDIMScheduler", "clip_sample", ...),
        ("PNDMScheduler", "skip_prk_steps", ...),
        ("DPMSolverMultistepScheduler", "variance_type", "learned"),
        ("DPMSolverMultistepScheduler", "lambda_min_clipped", -5.1),
        ("DPMSolverMultistepScheduler", "use_flow_sigmas", True),
        ("UniPCMultistepScheduler", "solver_order", 3),
        ("UniPCMultistepScheduler", "disable_corrector", [0]),
        ("FlowMatchEulerDiscreteScheduler", "shift_terminal", 0.1),
    ],
)
def test_a_value_that_is_not_offered_is_refused_with_its_field(kind: str, field: str, value: Any) -> None:
    offered = {name: rule[0] for name, rule in CLASSES[kind].items() if isinstance(rule, tuple)}
    config = {"_class_name": kind, **offered, field: value}
    if value is ...:
        del config[field]
    if value is None:
        NoiseSchedule.from_config(config)
        return
    with pytest.raises(ValueError, match=f"{field} .* is not offered in {kind}; supported: "):
        NoiseSchedule.from_config(config)


def test_every_fixed_value_has_one_that_is_refused() -> None:
    for kind, rules in CLASSES.items():
        offered = {name: rule[0] for name, rule in rules.items() if isinstance(rule, tuple)}
        for name in offered:
            config = {"_class_name": kind, **offered, name: "another", "final_sigmas_type": "sigma_min"}
            with pytest.raises(ValueError, match=name):
                NoiseSchedule.from_config(config)


def test_a_scheduler_of_another_kind_of_model_is_refused_and_another_solver_has_to_be_chosen() -> None:
    for kind in (*OTHER_MODELS, "MyScheduler"):
        with pytest.raises(ValueError, match=f"{kind} is the scheduler of another kind of model"):
            NoiseSchedule.from_config({"_class_name": kind})
    for kind in OTHER_SOLVERS:
        assert NoiseSchedule.from_config({"_class_name": kind, **SD}).beta_start == SD["beta_start"]
        assert sampler_of_config({"_class_name": kind}) == f"the model's own {kind}"
    assert NoiseSchedule.from_config({"_class_name": "FlaxDDIMScheduler", "clip_sample": False}) == NoiseSchedule()


def equal(config: dict[str, Any], sampler: str, steps: int, rtol: float = 1e-4) -> None:
    """Our steps and diffusers' from one config, by the sampler that the config names."""
    own = SAMPLERS[sampler]
    assert sampler_of_config(config) == sampler
    schedule = NoiseSchedule.from_config(config)
    levels = own.levels(schedule, steps)
    x = own.start(noise_of(), levels, schedule)
    kind = config["_class_name"]
    scheduler = getattr(diffusers, kind).from_config({name: each for name, each in config.items() if name[0] != "_"})
    # Spaced timesteps are truncated there; where one is whole but for rounding, either side is right.
    truncated = levels if "DPMSolverM" in kind and schedule.sigma_spacing in ("exponential", "beta") else None
    truncated = None if schedule.is_edm else truncated
    theirs = run_diffusers(scheduler, steps, noise_of(), given=truncated)
    assert_same(run_ours(own, schedule, levels, x), theirs, rtol)


EULER = {"_class_name": "EulerDiscreteScheduler", **SD}
DPM = {"_class_name": "DPMSolverMultistepScheduler", **SD}
UNIPC = {"_class_name": "UniPCMultistepScheduler", **SD}
ENDS = {"sigma_min": 0.03, "sigma_max": 14.0}
FLOW = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}


@pytest.mark.parametrize("steps", [4, 10, 20])
@pytest.mark.parametrize(
    ("config", "sampler"),
    [
        ({**EULER, **ENDS, "use_karras_sigmas": True}, "euler"),
        ({**EULER, **ENDS, "use_exponential_sigmas": True}, "euler"),
        ({**EULER, **ENDS, "use_beta_sigmas": True}, "euler"),
        ({**EULER, **ENDS}, "euler"),
        ({**EULER, "final_sigmas_type": "sigma_min", "timestep_spacing": "leading", "steps_offset": 1}, "euler"),
        ({**EULER, "final_sigmas_type": "sigma_min", "use_karras_sigmas": True}, "euler"),
        ({**EULER, "interpolation_type": "log_linear"}, "euler"),
        ({**EULER, "interpolation_type": "log_linear", "use_karras_sigmas": True}, "euler"),
        ({**EULER, "timestep_type": "continuous", "prediction_type": "v_prediction", **ENDS,
          "use_exponential_sigmas": True}, "euler"),
        ({**EULER, "timestep_type": "continuous"}, "euler"),
        ({**DPM, "use_lu_lambdas": True}, "dpmpp_2m"),
        ({**DPM, "final_sigmas_type": "sigma_min", "lower_order_final": True}, "dpmpp_2m"),
        ({**DPM, "lower_order_final": False, "euler_at_final": True}, "dpmpp_2m"),
        ({**DPM, **FLOW}, "dpmpp_2m"),
        ({**UNIPC, **ENDS, "use_karras_sigmas": True}, "unipc"),
        ({**UNIPC, "final_sigmas_type": "sigma_min"}, "unipc"),
    ],
)  # fmt: skip
def test_fields_of_levels_are_what_diffusers_makes_of_them(config: dict[str, Any], sampler: str, steps: int) -> None:
    equal(config, sampler, steps)


EDM = [
    (kind, {"sigma_schedule": schedule, "prediction_type": prediction, **more})
    for kind in ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
    for schedule in ("karras", "exponential")
    for prediction in ("epsilon", "v_prediction")
    for more in (
        {},
        {"sigma_data": 1.0, "sigma_max": 120.0},
        {"rho": 5.0, "sigma_min": 0.01},
        {"final_sigmas_type": "sigma_min"},
    )
]


@pytest.mark.parametrize(("kind", "config"), EDM)
def test_edm_schedulers_equal_diffusers(kind: str, config: dict[str, Any]) -> None:
    for steps in (2, 8, 20):
        equal({"_class_name": kind, **config}, "euler" if "Euler" in kind else "dpmpp_2m", steps, rtol=3e-4)


def test_edm_with_noise_equals_diffusers() -> None:
    equal({"_class_name": "EDMDPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"}, "dpmpp_2m_sde", 12)


@pytest.mark.parametrize("kind", ["LCMScheduler", "TCDScheduler"])
def test_distilled_models_have_their_own_grid_and_scale(kind: str) -> None:
    for config in ({}, {"original_inference_steps": 100}, {"timestep_scaling": 0.01}):
        equal({"_class_name": kind, **config}, "lcm" if kind == "LCMScheduler" else "tcd", 4)


@pytest.mark.parametrize("name", ["pndm", "lcm", "tcd"])
def test_samplers_that_need_timesteps_refuse_an_edm_model(name: str) -> None:
    schedule = NoiseSchedule.from_config({"_class_name": "EDMEulerScheduler"})
    with pytest.raises(ValueError, match="no sampler for an EDM model"):
        SAMPLERS[name].levels(schedule, 4)


def test_options_of_a_class_choose_its_sampler_or_are_named() -> None:
    assert {rule for rules in CLASSES.values() for rule in rules.values() if isinstance(rule, str)} == {
        READ, CHOOSES, IDLE
    }  # fmt: skip
    for options in ({"algorithm_type": "dpmsolver"}, {"solver_order": 1}, {"solver_type": "heun"}):
        ((name, value),) = options.items()
        assert (
            sampler_of_config({**DPM, **options}) == f"the model's own DPMSolverMultistepScheduler with {name} {value}"
        )
