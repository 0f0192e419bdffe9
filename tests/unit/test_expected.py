"""What a request is expected to take, beside what a pipeline really computes: calls, rows and pixels are counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edge_sd import Pipeline, Request
from edge_sd.backends.base import LoadRequest
from edge_sd.backends.fake import FakeBackend, fake_bundle
from edge_sd.bundle.bundle import ModelBundle
from edge_sd.components.base import Array, Component
from edge_sd.devices.choose import choose
from edge_sd.devices.plan import DevicePlan
from edge_sd.files import FileRecord
from edge_sd.pipeline.control import Control
from edge_sd.pipeline.loader import Components

PICTURES = {"unet": "sample", "vae_decoder": "latent_sample", "vae_encoder": "sample"}


class Counting(FakeBackend):
    """Counts what its components compute: rows times places of their pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.work = Counter[str]()

    def load(self, request: LoadRequest) -> Component:
        return Counted(super().load(request), request.part, self.work)


class Counted:
    def __init__(self, component: Component, part: str, work: Counter[str]) -> None:
        self.component, self.part, self.work = component, part, work

    def bind(self, **constants: Array) -> None:
        self.component.bind(**constants)

    def __call__(self, **inputs: Array) -> dict[str, Array]:
        if self.part in PICTURES:
            value = inputs[PICTURES[self.part]]
            self.work[self.part] += len(value) * value.shape[2] * value.shape[3]
        return self.component(**inputs)

    def close(self) -> None:
        self.component.close()


def planned(bundle: ModelBundle, preference: str = "speed") -> DevicePlan:
    """A plan by the estimates for weights of a megabyte in each component; the bundle has no files."""
    ((name, variant),) = bundle.variants.items()
    sized = replace(variant, files={part: FileRecord(1 << 20, "") for part in variant.artifacts})
    return choose(replace(bundle, variants={name: sized}), FakeBackend().devices(), preference=preference)


def drawn(**wishes: Any) -> tuple[Counter[str], dict[str, float], str]:
    """What was computed, the seconds of each component that were expected, and the line that says so."""
    bundle, backend = fake_bundle(), Counting()
    pipeline = Pipeline(Components(bundle, planned(bundle), backend))
    run = pipeline.run(Request("a cat", seed=1, **wishes))
    plan = pipeline.expected(run)
    pipeline.draw(run)
    return backend.work, {part: placement.cost.draw for part, placement in plan.parts.items()}, plan.summary()


SKETCH = Image.new("RGB", (64, 64), (90, 150, 60))


@pytest.mark.parametrize(
    "wishes",
    [
        {"steps": 8},
        {"count": 3},
        {"width": 128, "height": 64},
        {"guidance": 1},
        {"guidance_start": 0.25, "guidance_end": 0.75},
        {"sampler": "heun"},
        {"sampler": "dpm2", "steps": 5},
        {"image": SKETCH, "strength": 0.5, "steps": 10},
        {"width": 256, "height": 192, "tile": 64},
        {"width": 256, "height": 192, "vae_tile": 64},
    ],
    ids=lambda wishes: "-".join(wishes),
)
def test_twice_the_work_is_twice_the_time(wishes: dict[str, Any]) -> None:
    """Each component's seconds grow as what it really computes does; its default picture stands for itself."""
    (own, seconds, _), (work, more, _) = drawn(), drawn(**wishes)
    assert more["unet"] / seconds["unet"] == pytest.approx(work["unet"] / own["unet"])
    # The encoder's pixels count as much as the decoder's: nothing is known of either's size here.
    pixels = work["vae_decoder"] * 64 + work["vae_encoder"]
    assert more["vae_decoder"] / seconds["vae_decoder"] == pytest.approx(pixels / (own["vae_decoder"] * 64))


def test_parts_of_a_prompt_are_rows() -> None:
    bundle, backend = fake_bundle(), Counting()
    pipeline = Pipeline(Components(bundle, planned(bundle), backend))
    costs = []
    for prompt in ("a cat", "a cat AND a dog AND a hat"):
        backend.work.clear()
        run = pipeline.run(Request(prompt, seed=1))
        pipeline.draw(run)
        costs.append((pipeline.expected(run).parts["unet"].cost.draw, backend.work["unet"]))
    (one, its), (three, theirs) = costs
    assert three / one == pytest.approx(theirs / its) == pytest.approx(2)


def test_the_line_names_what_is_drawn() -> None:
    assert "s for this picture, loading included, estimated" in drawn()[2]
    assert "s for these 3 pictures, loading included, estimated" in drawn(count=3)[2]
    # How much deep features save is not known beforehand.
    assert "estimated" not in drawn(deep_every=2)[2]


def test_a_plan_without_a_request_names_the_models_own_picture() -> None:
    assert "for a first picture of 64x64 in 4 steps, loading included" in planned(fake_bundle()).summary()
    joules = planned(fake_bundle(), "battery").summary()
    assert joules.endswith("J for a first picture of 64x64 in 4 steps, estimated")


def test_a_controlnet_counts_by_its_size_in_the_steps_that_it_takes_part_in(bundle: ModelBundle) -> None:
    variant = bundle.variant("openvino-fp32")
    net = variant.part_size("controlnet") / variant.part_size("unet")
    assert 0.2 < net < 1
    with Pipeline.open(bundle.root, "cpu", "openvino-fp32") as pipeline:

        def cost(**wishes: Any) -> float:
            run = pipeline.run(Request("a cat", seed=1, steps=10, sampler="euler", **wishes))
            return pipeline.expected(run).parts["unet"].cost.draw

        plain = cost()
        assert cost(controls=[Control(SKETCH)]) == pytest.approx(plain * (1 + net))
        assert cost(controls=[Control(SKETCH, end=0.5)]) == pytest.approx(plain * (1 + net / 2))
        assert np.isclose(cost(controls=[Control(SKETCH)], guidance=1) * 2, cost(controls=[Control(SKETCH)]))
