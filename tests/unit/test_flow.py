"""Levels of flow matching beside diffusers' scheduler and pipelines, and beside published values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from edge_sd.sampling.flow import flux2_mu, linear_mu
from edge_sd.sampling.schedule import Level, NoiseSchedule

FLUX, SMALL, LARGE = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}, 1024, 4096


def read(**config: Any) -> NoiseSchedule:
    return NoiseSchedule.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler", **config})


def levels_s(levels: list[Level]) -> list[float]:
    """s of each level but the last: t is 1000 s."""
    return [level.t / 1000 for level in levels[:-1]]


def diffusers_s(config: dict[str, Any], steps: int, **given: Any) -> np.ndarray:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    scheduler.set_timesteps(steps, **given)
    return scheduler.sigmas.numpy()[:-1]


@pytest.mark.parametrize("steps", [1, 4, 28])
def test_a_fixed_shift_is_applied_twice_at_the_low_end_as_in_diffusers(steps: int) -> None:
    found = levels_s(read(shift=3.0).for_tokens(LARGE, steps).euler_levels(steps))
    np.testing.assert_allclose(found, diffusers_s({"shift": 3.0}, steps), rtol=1e-5)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("tokens", [64, SMALL, LARGE])
def test_a_dynamic_shift_is_that_of_diffusers(kind: str, tokens: int) -> None:
    from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

    config = {**FLUX, "shift": 3.0, "time_shift_type": kind}
    mu = calculate_shift(tokens, 256, 4096, 0.5, 1.15)
    schedule = read(**config).for_tokens(tokens, 5)
    np.testing.assert_allclose(levels_s(schedule.euler_levels(5)), diffusers_s(config, 5, mu=mu), rtol=1e-5)


def test_a_dynamic_shift_needs_the_size() -> None:
    """The config's own number, 3, would be used in silence."""
    with pytest.raises(ValueError, match="depends on the picture's size"):
        read(**FLUX, shift=3.0).euler_levels(4)


def test_the_mu_of_each_family_has_the_published_values() -> None:
    points = (256, 0.5), (4096, 1.15)
    assert [round(linear_mu(tokens, *points), 3) for tokens in (SMALL, LARGE)] == [0.630, 1.150]
    assert [round(flux2_mu(tokens, 4), 3) for tokens in (SMALL, LARGE)] == [2.031, 2.291]


@pytest.mark.parametrize("tokens", [256, SMALL, LARGE, 4301])
@pytest.mark.parametrize("steps", [4, 50])
def test_the_mu_of_flux2_is_that_of_diffusers(tokens: int, steps: int) -> None:
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    assert flux2_mu(tokens, steps) == pytest.approx(compute_empirical_mu(tokens, steps), rel=1e-6)


@pytest.mark.parametrize(
    ("fields", "tokens", "expected"),
    [
        ({**FLUX, "flow_mu": "flux2", "flow_grid": "even"}, SMALL, [1, 0.9581, 0.8840, 0.7175]),
        ({**FLUX, "flow_mu": "flux2", "flow_grid": "even"}, LARGE, [1, 0.9674, 0.9081, 0.7672]),
        ({"shift": 3.0, "flow_grid": "even"}, LARGE, [1, 0.9545, 0.9, 0.8333, 0.75, 0.6429, 0.5, 0.3]),
    ],
)
def test_levels_of_klein_and_of_z_image_have_the_published_values(
    fields: dict[str, Any], tokens: int, expected: list[float]
) -> None:
    own = {name: fields.pop(name) for name in ("flow_mu", "flow_grid") if name in fields}
    schedule = replace(read(**fields), **own).for_tokens(tokens, len(expected))
    np.testing.assert_allclose(levels_s(schedule.euler_levels(len(expected))), expected, atol=5e-5)


def test_the_grid_of_dpm_is_that_of_sana() -> None:
    from diffusers import DPMSolverMultistepScheduler

    theirs = DPMSolverMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction")
    theirs.set_timesteps(20)
    schedule = NoiseSchedule.from_config(dict(theirs.config, _class_name="DPMSolverMultistepScheduler"))
    assert (schedule.flow_grid, schedule.flow_shift, schedule.is_flow) == ("dpm", 3.0, True)
    levels = schedule.dpmpp_levels(20)
    np.testing.assert_allclose([1 - level.alpha for level in levels], theirs.sigmas.numpy(), rtol=1e-5)
    np.testing.assert_array_equal([level.t for level in levels[:-1]], theirs.timesteps.numpy())


@pytest.mark.parametrize(
    ("steps", "angles"), [(1, [np.pi / 2]), (2, [np.pi / 2, 1.3]), (3, [np.pi / 2, 1.0472, 0.5236])]
)
def test_the_levels_of_sprint_are_the_angles_of_diffusers(steps: int, angles: list[float]) -> None:
    from diffusers import SCMScheduler

    theirs = SCMScheduler()
    theirs.set_timesteps(steps, intermediate_timesteps=1.3 if steps == 2 else None)
    np.testing.assert_allclose(theirs.timesteps.numpy()[:-1], angles, atol=1e-4)
    levels = NoiseSchedule.from_config(dict(theirs.config, _class_name="SCMScheduler")).lcm_levels(steps)
    # A ratio of noise to picture of infinity, which a float32 of pi/2 has passed, is the largest that we have.
    np.testing.assert_allclose(np.arctan([level.sigma for level in levels]), theirs.timesteps.numpy(), atol=1e-5)


def test_the_levels_of_sprint_have_the_published_values() -> None:
    levels = NoiseSchedule.from_config({"_class_name": "SCMScheduler"}).lcm_levels(2)
    np.testing.assert_allclose(levels_s(levels), [1, 0.7827], atol=5e-5)


def test_what_a_flow_model_predicts_on_a_path_is_what_the_pipeline_of_sprint_makes_of_it() -> None:
    """Its algebra in angles, with 0.5 for the spread of the data, is x0 = x_s - s u."""
    rng, angle, spread = np.random.default_rng(0), 1.1, 0.5
    x, u = rng.normal(size=(2, 8))
    s = np.sin(angle) / (np.sin(angle) + np.cos(angle))
    root = np.sqrt(s**2 + (1 - s) ** 2)
    x_s = x / spread * root
    predicted = ((1 - 2 * s) * x_s + (1 - 2 * s + 2 * s**2) * u) / root * spread
    np.testing.assert_allclose((np.cos(angle) * x - np.sin(angle) * predicted) / spread, x_s - s * u, rtol=1e-12)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"use_flow_sigmas": True}, "use_flow_sigmas True beside prediction_type 'epsilon' is not offered"),
        ({"prediction_type": "flow_prediction"}, "use_flow_sigmas False beside prediction_type 'flow_prediction'"),
        ({"use_flow_sigmas": True, "prediction_type": "flow_prediction", "final_sigmas_type": "sigma_min"},
         "final_sigmas_type 'sigma_min' of flow sigmas is not offered"),
    ],
)  # fmt: skip
def test_levels_of_one_kind_of_model_beside_the_prediction_of_another_are_refused(
    config: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        NoiseSchedule.from_config({"_class_name": "DPMSolverMultistepScheduler", **config})


@pytest.mark.parametrize(
    "wrong", [{"flow_grid": "odd"}, {"flow_mu": "cubic"}, {"time_shift_type": "log"}, {"base_image_seq_len": 4096}]
)
def test_nonsense_is_refused_with_the_field(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        NoiseSchedule.from_config(wrong)
