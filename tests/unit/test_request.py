"""What may be asked for, and the line that says why something may not."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_sd import Control, Pipeline
from edge_sd.backends.fake import fake_bundle
from edge_sd.errors import InvalidRequest
from edge_sd.pipeline.presets import preset_named
from edge_sd.pipeline.request import MAX_SEED, Request
from edge_sd.pipeline.settings import Settings

from .test_pipeline import pipeline


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt": ""}, "empty"),
        ({"prompt": " \n\t"}, "empty"),
        ({"prompt": "\udcff"}, "not valid UTF-8"),
        ({"prompt": "a\0b"}, "NUL"),
        ({"prompt": "a" * 20_001}, "20001 characters"),
        ({"negative": "\ud800"}, "negative prompt is not valid UTF-8"),
        ({"width": 100}, "width 100 is not a multiple of 8"),
        ({"height": 0}, "height 0"),
        ({"height": -8}, "height -8"),
        ({"width": 20_000}, "8 to 16384"),
        ({"steps": 0}, "steps 0"),
        ({"steps": 1001}, "1 to 1000"),
        ({"guidance": math.nan}, "guidance nan"),
        ({"guidance": math.inf}, "guidance inf"),
        ({"guidance": -1.0}, "guidance -1.0"),
        ({"seed": -1}, "seed -1"),
        ({"seed": 2**32}, "seed 4294967296"),
        ({"seed": MAX_SEED, "count": 2}, "past the last seed"),
        ({"count": 0}, "count 0"),
        ({"sampler": "best"}, "valid: ddim, ddpm, deis"),
    ],
)
def test_nonsense_is_refused_in_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        Request(**{"prompt": "a cat", **values})
    assert "\n" not in str(caught.value)


def test_the_models_defaults_fill_what_is_not_said() -> None:
    settings = Settings.of(Request("a cat", steps=7), fake_bundle().defaults, seed=11)
    assert (settings.width, settings.height, settings.steps, settings.sampler, settings.seed) == (
        64,
        64,
        7,
        "euler",
        11,
    )
    assert Settings.of(Request(**asdict(settings)), fake_bundle().defaults, seed=0) == settings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": "20"}, "steps '20' is not a whole number from 1 to 1000"),
        ({"steps": True}, "steps True is not a whole number"),
        ({"negative": None}, "the negative prompt is None, not a text"),
        ({"prompt": 7}, "the prompt is 7, not a text"),
        ({"guidance": "much"}, "guidance 'much' is not a number from 0 to 100"),
        ({"zero_snr": "yes"}, "zero_snr 'yes' is neither True nor False"),
        ({"sampler": 3}, "3 is no name of a sampler"),
        ({"loras": ["a"]}, "loras is list, not a dict"),
        ({"loras": {"a": "1"}}, "the weight 1 of a LoRA is not a number"),
        ({"controls": ["a.png"]}, "controls are Control objects"),
        ({"count": 1.5}, "count 1.5 is not a whole number"),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        Request(**{"prompt": "a cat", **values})


def test_settings_are_fields_of_a_request() -> None:
    assert {each.name for each in fields(Settings)} <= {each.name for each in fields(Request)}


def test_a_preset_is_one_thing_wherever_it_is_named() -> None:
    turbo = preset_named("turbo")
    asked = turbo.applied(Request("a cat"))
    assert (asked.merge_tokens, asked.decoder) == (True, "auto")
    kept = turbo.applied(Request("a cat", decoder="full", merge_tokens=False))
    assert (kept.merge_tokens, kept.decoder) == (False, "full"), "what a request says goes before it"
    with Pipeline.open(preset="turbo") as opened:
        assert opened.resolve("a cat").merge_tokens
        assert opened.resolve("a cat").decoder == "tiny"


def test_noise_can_be_handed_in() -> None:
    class Still:
        def normal(self, shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.float32]]:
            return np.zeros(shape, np.float32)

    with pipeline() as opened:
        first, second = (opened.generate(Request("a cat", seed=n), noise=lambda seed: Still()) for n in (1, 2))
    assert first.pictures[0].image.tobytes() == second.pictures[0].image.tobytes()


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": None}, {"controls": None}, {"controls": Control("a.png")}, {"controls": ["a.png"]}, {"extend": 5},
        {"refiner_start": "a"}, {"lora_folder": 5}, {"embeddings": {1: "a"}}, {"embeddings": {"a": 2}}, {"image": 5},
        {"references": "a.png"}, {"references": Path("a.png")}, {"references": None}, {"references": 5},
        {"references": [5]}, {"references": b"png"}, {"references": ["a.png"] * 11},
        {"image": b"png"}, {"image": np.zeros((8, 8, 3))}, {"mask": 5}, {"loras": {5: 1}}, {"refiner": 5},
        {"wildcards": 5}, {"decoder": ["tiny"]}, {"steps": np.float32(20)}, {"steps": True},
    ],
)  # fmt: skip
def test_a_value_of_another_type_is_refused_at_once(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        Request(**{"prompt": "a cat", **fields})


def test_numpys_numbers_are_numbers() -> None:
    request = Request("a cat", steps=np.int64(20), guidance=np.float32(7))  # type: ignore[arg-type]
    assert (request.steps, request.guidance) == (20, 7.0)
    assert {type(request.steps), type(request.guidance)} == {int, float}, "as JSON takes them"


def test_controls_of_an_iterable_are_kept() -> None:
    assert len(Request("a cat", controls=(Control(name) for name in ("a.png", "b.png"))).controls) == 2  # type: ignore[arg-type]


def test_a_model_that_takes_no_reference_pictures_says_so() -> None:
    said = "^fake takes no reference pictures; FLUX.2 klein does, and a model converted with --ip-adapter FILE$"
    with pipeline() as opened, pytest.raises(InvalidRequest, match=said):
        opened.resolve(Request("a cat", references=["no.png"]))


def test_what_is_asked_for_comes_first() -> None:
    assert [each.name for each in dataclasses.fields(Request)][:3] == ["prompt", "negative", "width"]
    assert [each.name for each in dataclasses.fields(Settings)][:3] == ["prompt", "negative", "width"]
