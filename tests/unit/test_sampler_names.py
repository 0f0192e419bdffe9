"""Samplers by the names that other programs have for them."""

from __future__ import annotations

import pytest

from edge_sd import Request
from edge_sd.backends.fake import fake_bundle
from edge_sd.errors import InvalidRequest
from edge_sd.pipeline.settings import Settings
from edge_sd.sampling.names import choose_sampler, find_sampler, sampler_of_config
from edge_sd.sampling.samplers import SAMPLERS


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=list(SAMPLERS))
def test_every_sampler_is_found_by_its_title_and_its_class(sampler) -> None:  # type: ignore[no-untyped-def]
    assert find_sampler(sampler.name) == find_sampler(sampler.title) == (sampler.name, None)
    if sampler.diffusers_class:
        found, _ = find_sampler(sampler.diffusers_class)
        assert SAMPLERS[found].diffusers_class == sampler.diffusers_class
    for sigmas, label in (("karras", "Karras"), ("sgm_uniform", "SGM Uniform")):
        if sigmas in sampler.sigmas:
            assert find_sampler(f"{sampler.title} {label}") == (sampler.name, sigmas)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("DPM++ 2M Karras", ("dpmpp_2m", "karras")),
        ("DPM++ 2M SDE Exponential", ("dpmpp_2m_sde", "exponential")),
        ("Euler a", ("euler_a", None)),
        ("euler_ancestral", ("euler_a", None)),
        ("dpmpp_2m_karras", ("dpmpp_2m", "karras")),
        ("uni_pc", ("unipc", None)),
        ("PLMS", ("pndm", None)),
        ("DPMSolverMultistepScheduler", ("dpmpp_2m", None)),
        ("EulerAncestralDiscreteScheduler", ("euler_a", None)),
        ("FlowMatchEulerDiscreteScheduler", ("euler", None)),
    ],
)
def test_names_of_other_programs(name: str, found: tuple[str, str | None]) -> None:
    assert find_sampler(name) == found


@pytest.mark.parametrize(
    ("sampler", "sigmas", "told"),
    [
        ("DPM++ 4M", None, "nearest: dpmpp_.*; valid: ddim, ddpm, deis"),
        ("eular", None, "nearest: euler"),
        ("%%%", None, "unknown sampler '%%%'; valid: ddim"),
        ("", None, "unknown sampler ''; valid"),
        ("the model's own SASolverScheduler", None, 'unknown sampler "the model\'s own SASolverScheduler"'),
        ("euler", "even", "unknown sigmas 'even'; valid: align_your_steps, align_your_steps_xl, automatic"),
        ("ddim", "karras", "ddim has its own sigmas, not karras; that goes with: deis, dpm2"),
        ("LCM Karras", None, "lcm has its own sigmas"),
    ],
)
def test_names_that_are_none_list_the_nearest(sampler: str, sigmas: str | None, told: str) -> None:
    with pytest.raises(InvalidRequest, match=told):
        choose_sampler(sampler, sigmas)


def test_sigmas_go_before_the_samplers_name() -> None:
    assert choose_sampler("DPM++ 2M Karras", "beta") == ("dpmpp_2m", "beta")
    assert choose_sampler("DPM++ 2M Karras", "automatic") == ("dpmpp_2m", None)
    assert choose_sampler("ddim", "SGM Uniform") == ("ddim", "sgm_uniform")


def test_a_request_is_recorded_in_our_names() -> None:
    settings = Settings.of(Request("a cat", sampler="DPM++ 2M Karras"), fake_bundle().defaults, 0)
    assert (settings.sampler, settings.sigmas) == ("dpmpp_2m", "karras")
    schedule = settings.schedule(fake_bundle().facts.schedule)
    assert schedule.sigma_spacing == "karras"
    trailing = Settings.of(Request("a cat", sigmas="sgm-uniform"), fake_bundle().defaults, 0).schedule(schedule)
    assert (trailing.timestep_spacing, trailing.sigma_spacing) == ("trailing", None)
    with pytest.raises(ValueError, match="zero_snr needs a model of v_prediction; this one is of epsilon"):
        Settings.of(Request("a cat", zero_snr=True), fake_bundle().defaults, 0).schedule(schedule)


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"_class_name": "DPMSolverMultistepScheduler"}, "dpmpp_2m"),
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"}, "dpmpp_2m_sde"),
        ({"_class_name": "PNDMScheduler", "skip_prk_steps": True}, "pndm"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "euler"),
        ({"_class_name": "DDIMParallelScheduler"}, "ddim"),
        ({"_class_name": "DPMSolverSDEScheduler"}, "dpmpp_sde"),
        ({"_class_name": "DEISMultistepScheduler"}, "deis"),
        ({"_class_name": "KDPM2AncestralDiscreteScheduler"}, "dpm2_a"),
        ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3}, "dpmpp_3m"),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3, "algorithm_type": "sde-dpmsolver++"},
            "the model's own DPMSolverMultistepScheduler with solver_order 3, algorithm_type sde-dpmsolver++",
        ),
        ({"_class_name": "SASolverScheduler"}, "the model's own SASolverScheduler"),
        ({}, "the model's own scheduler"),
    ],
)
def test_a_models_config_names_its_sampler(config: dict[str, object], found: str) -> None:
    assert sampler_of_config(config) == found
