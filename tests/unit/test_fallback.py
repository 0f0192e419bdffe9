"""A device that fails at loading or in the middle of a picture: the pipeline goes on elsewhere, from the same step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edge_sd import Pipeline, Request
from edge_sd.backends.base import LoadRequest
from edge_sd.backends.fake import FakeBackend, FakeComponent, fake_bundle
from edge_sd.components.base import Array, Component
from edge_sd.components.fallback import fault
from edge_sd.devices.choose import choose
from edge_sd.errors import DeviceError, EdgeSDError, NumericalError
from edge_sd.pipeline.loader import Components
from edge_sd.sampling.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
TWO = ("first", "second")
STEPS = 4
PARTS = ("text_encoder", "unet", "vae_decoder")
FAULTS = ("nan", "flat", "raise", "memory")


def pipeline(backend: FakeBackend, wish: str = "auto") -> Pipeline:
    bundle = fake_bundle(SCHEDULE)
    return Pipeline(Components(bundle, choose(bundle, backend.devices(), wish), backend))


class Switching(FakeBackend):
    """No fault: one component that is the first device's for `after` calls and the second's from then on."""

    def load(self, request: LoadRequest) -> Component:
        first, second = (super(Switching, self).load(replace(request, device=each))
                         for each in FakeBackend(devices=TWO).devices())  # fmt: skip
        return _Switch(first, second, self.after) if request.part == self.poison else first


class _Switch:
    def __init__(self, first: Component, second: Component, after: int) -> None:
        self.both, self.left = (first, second), after

    def bind(self, **constants: Array) -> None:
        for each in self.both:
            each.bind(**constants)

    def __call__(self, **inputs: Array) -> dict[str, Array]:
        self.left -= 1
        return self.both[self.left < 0](**inputs)

    def close(self) -> None: ...


def draw(backend: FakeBackend) -> tuple[Array, list[int], Pipeline, list[str]]:
    seen: list[int] = []
    with pipeline(backend) as opened:
        request = Request("a cat", seed=1, steps=STEPS, sampler="dpmpp_2m")
        result = opened.generate(request, lambda n, step: seen.append(step.index))
        return np.asarray(result.pictures[0].image), seen, opened, result.notes


@pytest.mark.fault(13, "NaN, flat, errors and no memory at each step: goes on elsewhere")
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("after", range(STEPS))
def test_a_picture_goes_on_from_the_same_step(fault: str, after: int) -> None:
    found, seen, opened, notes = draw(FakeBackend("unet", after, devices=TWO, fault=fault))
    expected, *_ = draw(Switching("unet", after, devices=TWO))
    assert np.array_equal(found, expected), "as if the second device had taken over at that very call"
    assert seen == list(range(STEPS)), "no step is drawn twice, none is left out"
    assert opened.plan.device.name == "second"
    assert any(note.startswith("unet moved from fake on first to fake on second: ") for note in notes)


@pytest.mark.fault(13, "NaN, flat, errors and no memory in encoder and decoder")
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("part", ["text_encoder", "vae_decoder"])
def test_the_other_components_move_alone(part: str, fault: str) -> None:
    found, _, opened, _ = draw(FakeBackend(part, devices=TWO, fault=fault))
    expected, *_ = draw(Switching(part, devices=TWO))
    assert np.array_equal(found, expected)
    places = {name: placement.device.name for name, placement in opened.plan.parts.items()}
    assert places == {each: "second" if each == part else "first" for each in PARTS}


@pytest.mark.parametrize("part", PARTS)
def test_a_device_that_refuses_a_component_at_loading_is_left_with_a_reason(part: str) -> None:
    _, _, opened, notes = draw(FakeBackend(part, devices=TWO, fault="refuse"))
    assert opened.plan.parts[part].device.name == "second"
    assert any(f"first refused {part}" in note for note in notes)
    assert f"first failed: first refused {part}" in opened.plan.explain()


@pytest.mark.parametrize("fault", [*FAULTS, "refuse"])
def test_nothing_moves_away_from_a_device_that_was_asked_for(fault: str) -> None:
    backend = FakeBackend("unet", 1, devices=TWO, fault=fault)
    kind = NumericalError if fault in ("nan", "flat") else DeviceError
    with pipeline(backend, "first") as opened, pytest.raises(kind):
        opened.generate(Request("a cat", seed=1, steps=STEPS))


@pytest.mark.fault(13, "the same with nowhere to go")
@pytest.mark.parametrize("fault", [*FAULTS, "refuse"])
@pytest.mark.parametrize("part", PARTS)
def test_with_nowhere_to_go_it_is_an_error_in_one_line(part: str, fault: str) -> None:
    with pipeline(FakeBackend(part, fault=fault)) as opened, pytest.raises(EdgeSDError) as raised:
        opened.generate(Request("a cat", seed=1, steps=STEPS))
    assert "\n" not in str(raised.value)
    assert str(raised.value).endswith("try a variant in fp32") is (fault in ("nan", "flat"))


@pytest.mark.fault(23, "decoders poisoned to one colour once clipped, and beyond range")
@pytest.mark.parametrize("fault", ["black", "red", "far"])
def test_a_decoder_whose_pixels_are_no_picture_is_left_or_said(fault: str) -> None:
    """Its values differ, and what would be saved of them does not; or they are beyond any picture's."""
    found, _, opened, notes = draw(FakeBackend("vae_decoder", devices=TWO, fault=fault))
    expected, *_ = draw(Switching("vae_decoder", devices=TWO))
    assert np.array_equal(found, expected)
    assert opened.plan.parts["vae_decoder"].device.name == "second"
    assert any("the decoder returned" in note for note in notes)
    alone, said = pipeline(FakeBackend("vae_decoder", fault=fault)), r"the decoder returned (one flat|values up to)"
    with alone, pytest.raises(NumericalError, match=said):
        alone.generate(Request("a cat", seed=1, steps=STEPS))


def test_a_damaged_file_is_no_reason_to_go_elsewhere(tmp_path: Path) -> None:
    from edge_sd.errors import InvalidModel

    class Damaged(FakeBackend):
        def load(self, request: LoadRequest) -> Component:
            raise InvalidModel("cannot be read")

    with pipeline(Damaged(devices=TWO)) as opened, pytest.raises(InvalidModel):
        opened.generate(Request("a cat", seed=1, steps=1))


def test_a_variant_without_a_part_is_a_place_where_it_cannot_be() -> None:
    """Variants that were made before the model had, say, a checker."""
    bundle, backend = fake_bundle(SCHEDULE), FakeBackend()
    plan = choose(bundle, backend.devices())
    name = plan.parts["vae_decoder"].variant
    artifacts = {part: each for part, each in bundle.variant(name).artifacts.items() if part != "vae_encoder"}
    older = replace(bundle, variants={name: replace(bundle.variant(name), artifacts=artifacts)})
    with pytest.raises(DeviceError, match=f"{name} has no vae_encoder"):
        Components(older, plan, backend).prepare({"vae_encoder": {}}, {})


def test_what_a_fault_is() -> None:
    assert "NaN" in fault({"x": np.array([1, np.nan])})
    assert "NaN" in fault({"x": np.array([1, -np.inf])})
    assert "flat" in fault({"x": np.full((1, 3, 8, 8), 0.5, np.float32)})
    assert fault({"x": np.array([0.0, 0.01])}) == ""
    component = FakeComponent(fake_bundle(SCHEDULE), "vae_decoder", None)
    assert fault(component(latent_sample=np.zeros((1, 4, 8, 8), np.float32))) in ("", "returned one flat value")
