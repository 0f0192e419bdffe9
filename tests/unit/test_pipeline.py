"""The whole pipeline on numpy functions in place of networks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_sd import Pipeline, Request, read_recorded
from edge_sd.backends.fake import FakeBackend, fake_bundle
from edge_sd.devices.choose import choose
from edge_sd.devices.plan import DevicePlan
from edge_sd.errors import DeviceError, InvalidRequest, NumericalError, VariantNotFound
from edge_sd.pipeline.loader import Components
from edge_sd.sampling.samplers import SAMPLERS, Stochasticity, refuse_idle
from edge_sd.sampling.schedule import NoiseSchedule
from edge_sd.sampling.windows import active_timesteps, within

SCHEDULE = NoiseSchedule(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)


def pipeline(poison: str = "", after: int = 0) -> Pipeline:
    bundle = fake_bundle(SCHEDULE)
    backend = FakeBackend(poison, after)
    return Pipeline(Components(bundle, choose(bundle, backend.devices()), backend))


def pixels(request: Request, **poison: object) -> np.ndarray:
    with pipeline() as opened:
        return np.asarray(opened.generate(request).pictures[0].image)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_ends_at_what_the_model_draws(sampler: str) -> None:
    """The fake UNet knows its picture nearly exactly, so the samplers may differ only in what is left of the noise."""
    reference = pixels(Request("a cat", seed=1, steps=50, sampler="euler", guidance=1.0)).astype(float)
    steps = 4 if sampler == "lcm" else 30
    found = pixels(Request("a cat", seed=2, steps=steps, sampler=sampler, guidance=1.0)).astype(float)
    assert np.abs(found - reference).mean() < 6


def test_a_seed_names_one_picture_and_count_goes_through_the_seeds() -> None:
    with pipeline() as opened:
        three = opened.generate(Request("a cat", seed=5, count=3, steps=2))
        assert [picture.settings.seed for picture in three.pictures] == [5, 6, 7]
        again = opened.generate(Request("a cat", seed=6, steps=2))
        assert np.array_equal(np.asarray(three.pictures[1].image), np.asarray(again.pictures[0].image))
        assert not np.array_equal(np.asarray(three.pictures[0].image), np.asarray(again.pictures[0].image))


def test_stopping_in_the_middle_leaves_the_next_picture_as_it_was() -> None:
    request = Request("a cat", seed=3, steps=6, sampler="dpmpp_2m")
    fresh = pixels(request)
    with pipeline() as opened:
        for step in opened.steps(Request("a dog", seed=4, steps=6)):
            if step.index == 2:
                break
        assert np.array_equal(np.asarray(opened.generate(request).pictures[0].image), fresh)


def test_another_size_loads_again_and_both_come_out_right() -> None:
    with pipeline() as opened:
        for width, height in ((64, 64), (96, 32), (64, 64)):
            image = opened.generate(Request("a cat", seed=1, width=width, height=height)).pictures[0].image
            assert image.size == (width, height)


def test_the_negative_prompt_matters_with_guidance_only() -> None:
    for guidance, same in ((1.0, True), (3.0, False)):
        plain, negated = (pixels(Request("a cat", n, seed=1, guidance=guidance)) for n in ("", "a dog"))
        assert np.array_equal(plain, negated) is same


@pytest.mark.fault(13, "NaN out of a component")
@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae_decoder"])
def test_nan_never_becomes_a_picture(part: str) -> None:
    with pipeline(part) as opened, pytest.raises(NumericalError, match=r"NaN or infinity.*try"):
        opened.generate(Request("a cat", seed=1))


@pytest.mark.fault(13, "NaN out of the denoiser at each step")
@pytest.mark.parametrize("after", range(4))
def test_nan_at_any_step_is_found_at_that_step(after: int) -> None:
    seen: list[int] = []
    with pipeline("unet", after) as opened, pytest.raises(NumericalError):
        opened.generate(Request("a cat", seed=1, steps=4), lambda n, step: seen.append(step.index))
    assert seen == list(range(after))


def test_a_long_prompt_is_heard_to_its_end() -> None:
    long = "a red apple " * 20
    assert not np.array_equal(pixels(Request(long, seed=1)), pixels(Request(f"{long} and a dog", seed=1)))
    with pipeline() as opened:
        assert opened.generate(Request(long, seed=1)).notes == []


def test_words_that_a_fixed_size_has_no_room_for_are_told() -> None:
    bundle = fake_bundle(SCHEDULE)
    fixed = replace(bundle, variants={"fake": replace(bundle.variant("fake"), backend="coreml")})
    backend = FakeBackend()
    with Pipeline(Components(fixed, choose(bundle, backend.devices()), backend)) as opened:
        result = opened.generate(Request("a red apple " * 20, negative="a dog", seed=1))
    assert len(result.notes) == 1
    assert result.notes[0].startswith("the prompt is longer than the 30 tokens that fake takes; not used: 'a red apple")


def test_a_template_is_expanded_by_each_pictures_seed() -> None:
    request = Request("a {cat|dog|bird|fish|boat} {1|2|3}", seed=5, count=6, steps=1, dynamic=True)
    with pipeline() as opened:
        prompts = [picture.settings.prompt for picture in opened.generate(request).pictures]
        assert opened.resolve(replace(request, seed=8, count=1)).prompt == prompts[3]
    assert len(set(prompts)) > 2
    assert not any("{" in prompt for prompt in prompts)


def test_a_size_beyond_the_models_limit_names_the_limit() -> None:
    bundle = fake_bundle(SCHEDULE)
    facts = replace(bundle.facts, defaults=replace(bundle.defaults, max_side=128))
    backend = FakeBackend()
    small = replace(bundle, facts=facts)
    with (
        Pipeline(Components(small, choose(small, backend.devices()), backend)) as opened,
        pytest.raises(InvalidRequest, match="128"),
    ):
        opened.generate(Request("a cat", width=136))


def test_more_steps_than_a_sampler_has_room_for_is_a_clear_error() -> None:
    with pipeline() as opened, pytest.raises(InvalidRequest, match="sampler lcm"):
        opened.generate(Request("a cat", steps=500, sampler="lcm"))


def test_choosing_names_what_there_is() -> None:
    bundle, devices = fake_bundle(), FakeBackend().devices()
    plan = choose(bundle, devices)
    assert isinstance(plan, DevicePlan)
    assert "fake" in plan.explain()
    with pytest.raises(DeviceError, match="valid: auto, fake"):
        choose(bundle, devices, "npu")
    with pytest.raises(VariantNotFound, match="it has: fake"):
        choose(bundle, devices, variant="int3")
    with pytest.raises(DeviceError, match="pip install"):
        choose(bundle, [])


def test_noise_on_the_way_is_an_option_of_the_samplers_that_have_it() -> None:
    schedule = fake_bundle().facts.schedule
    levels = SAMPLERS["dpmpp_sde"].levels(schedule, 5)
    assert within(active_timesteps([level.t for level in levels[:-1]], 0.2, 0.6), levels[1].at(levels[1].sigma * 0.9).t)
    with pytest.raises(InvalidRequest, match=r"dpmpp_2m has no eta; it belongs to: ddim, dpm2_a"):
        refuse_idle(SAMPLERS["dpmpp_2m"], Stochasticity(eta=0.5))
    refuse_idle(SAMPLERS["euler"], Stochasticity(s_churn=3.0, s_noise=1.1))


class Ones:
    """Noise of one's own."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def normal(self, shape: tuple[int, ...]) -> np.ndarray:
        return np.random.default_rng(self.seed).standard_normal(shape).astype(np.float32)


def test_noise_of_ones_own_is_that_of_the_variation_too_and_is_said(tmp_path: Path) -> None:
    varied = Request("a cat", seed=1, steps=2, variation_seed=2, variation_strength=1.0)
    with pipeline() as opened:
        whole = opened.generate(varied, noise=Ones)
        second = opened.generate(Request("a cat", seed=2, steps=2), noise=Ones)
        assert np.array_equal(np.asarray(whole.pictures[0].image), np.asarray(second.pictures[0].image))
        assert any("noise was handed in" in note for note in whole.notes)
        assert not opened.generate(varied).notes
        (path,) = second.save(tmp_path / "x.png")
    assert "noise of its own (Ones)" in read_recorded(path).notes({})[0]


@pytest.mark.parametrize("noise", [np.zeros(3), lambda seed: None, 5])
def test_noise_that_is_none_is_refused(noise: Any) -> None:
    with pipeline() as opened, pytest.raises(InvalidRequest, match="noise"):
        opened.generate("a cat", noise=noise)


@pytest.mark.parametrize("given", [{"decoder": "fulll"}, {"latents": np.zeros((1, 3, 8, 8))}, {"latents": 5}])
def test_what_can_not_be_decoded_is_refused(given: dict[str, Any]) -> None:
    with pipeline() as opened, pytest.raises(InvalidRequest):
        opened.decode(**{"latents": np.zeros((1, 4, 8, 8), np.float32), **given})


@pytest.mark.parametrize(
    "given",
    [{"model": 5}, {"model": None}, {"device": 5}, {"device": ["cpu"]}, {"plan": "x"}, {"plan": {}}],
)
def test_a_pipeline_of_no_such_thing_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        Pipeline.open(**{"model": "emoji", **given})


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_steps_say_the_noise_that_is_left(sampler: str) -> None:
    with pipeline() as opened:
        sigmas = [step.sigma for step in opened.steps(Request("a cat", seed=1, steps=5, sampler=sampler))]
    assert sigmas[-1] < 0.05, "DEIS ends at the least noise that a model knows"
    assert all(sigma > 0 for sigma in sigmas[:-1])
