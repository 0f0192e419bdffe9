"""The noise levels of every sampler beside diffusers' schedulers, and configs that make no sense."""

from __future__ import annotations

import math
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sd.sampling.samplers import SAMPLERS
from edge_sd.sampling.schedule import NoiseSchedule
from edge_sd.sampling.sigmas import space

from .schedulers import SD, SPACINGS, make_scheduler, spaced


def schedule_end(config: dict[str, Any]) -> float:
    """The smallest sigma that a schedule knows, at its first timestep."""
    abar = float(NoiseSchedule.from_config(config).compute_alphas_cumprod()[0])
    return ((1 - abar) / abar) ** 0.5


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("rescale", [False, True])
def test_sigmas_and_timesteps_equal_diffusers(beta_schedule: str, rescale: bool) -> None:
    for name, sigmas in product(("euler", "heun", "lms", "dpmpp_2m", "unipc"), (None, "karras", "exponential", "beta")):
        if rescale and name in ("heun", "lms"):
            continue  # diffusers' know no zero terminal SNR.
        for spacing in SPACINGS if sigmas is None else ("linspace",):
            for steps in (1, 7, 99):
                config = {
                    **SD,
                    "beta_schedule": beta_schedule,
                    "timestep_spacing": spacing,
                    "rescale_betas_zero_snr": rescale,
                }
                config = spaced(config, sigmas)
                scheduler = make_scheduler(SAMPLERS[name], config)
                scheduler.set_timesteps(steps)
                levels = SAMPLERS[name].levels(NoiseSchedule.from_config(config), steps)
                own, timesteps = scheduler.sigmas, scheduler.timesteps
                if name == "heun":  # It lists what it visits twice twice.
                    own, timesteps = [own[0], *own[1:-1:2], own[-1]], timesteps[[0, *range(1, len(timesteps), 2)]]
                # diffusers takes 1 - abar in float32, whose rounding differs between processors and is a large part of
                # the smallest sigma^2; Karras' spacing starts from that sigma, so all of its levels share the error.
                found = [level.sigma for level in levels]
                error = np.finfo(np.float32).eps / schedule_end(config) ** 2
                np.testing.assert_allclose(found, own, rtol=max(5e-5, error))
                # DPM++ makes spaced timesteps whole, and where they lie between two that error decides.
                whole = 1 if sigmas and name in ("dpmpp_2m", "unipc") else 2e-3
                np.testing.assert_allclose(
                    [level.t for level in levels[:-1]], timesteps, rtol=max(1e-5, error), atol=whole
                )


def test_trained_betas_equal_diffusers() -> None:
    betas = np.linspace(0.001, 0.03, 200).tolist()
    config = {"num_train_timesteps": 200, "trained_betas": betas}
    scheduler = make_scheduler(SAMPLERS["euler"], config)
    np.testing.assert_allclose(
        NoiseSchedule.from_config(config).compute_alphas_cumprod(), scheduler.alphas_cumprod, rtol=1e-6
    )


def test_pndm_refuses_zero_terminal_snr_only_where_it_starts_there() -> None:
    config = {**SD, "rescale_betas_zero_snr": True}
    for spacing in ("trailing", "linspace"):
        with pytest.raises(ValueError, match="zero terminal SNR"):
            SAMPLERS["pndm"].levels(NoiseSchedule.from_config({**config, "timestep_spacing": spacing}), 20)
    assert SAMPLERS["pndm"].levels(NoiseSchedule.from_config(config), 20)[0].t == 950


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
    assert all(level.via <= level.sigma or level.sigma == 0 for level in levels)
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
        {"prediction_type": "flow"},
        {"sigma_spacing": "even"},
        {"flow_shift": 0},
        {"flow_shift": "3"},
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
    schedule = NoiseSchedule.from_config({"x": "y", "num_train_timesteps": 1, "trained_betas": [0.1]})
    assert schedule == NoiseSchedule(num_train_timesteps=1, trained_betas=(0.1,))
    assert isinstance(hash(schedule), int)


@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_the_quantiles_of_the_beta_distribution_are_scipys(steps: int) -> None:
    scipy = pytest.importorskip("scipy.stats")
    p = 1 - np.linspace(0, 1, steps)
    np.testing.assert_allclose(space("beta", 1.0, 0.0, steps), scipy.beta.ppf(p, 0.6, 0.6), rtol=1e-9, atol=1e-12)


def test_a_config_says_how_sigmas_are_spaced_and_whether_paths_are_straight() -> None:
    assert NoiseSchedule.from_config({"use_karras_sigmas": True}).sigma_spacing == "karras"
    flow = NoiseSchedule.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3})
    assert (flow.prediction_type, flow.flow_shift, flow.is_flow) == ("flow_prediction", 3, True)
