"""Precisions by name, of a whole model and of its parts."""

from __future__ import annotations

import pytest

from edge_sd import InvalidRequest
from edge_sd.converters.recipes import RECIPES, recipe_for, recipe_named


def test_a_name_alone_is_for_all_parts_but_those_that_gain_nothing() -> None:
    recipe = recipe_named("int4")
    assert recipe == recipe.base == RECIPES["int4"]
    assert recipe_for("unet", recipe).name == "int4"
    assert recipe_for("tiny_decoder", recipe).name == "fp16"
    assert recipe_for("tiny_decoder", recipe_named("fp32")).name == "fp32"


@pytest.mark.parametrize(
    ("text", "name", "parts"),
    [
        ("unet=w8a8,text=int8,vae=fp16", "w8a8_text-int8_vae-fp16",
         {"unet": "w8a8", "controlled_unet": "w8a8", "text_encoder_2": "int8", "vae_encoder": "fp16",
          "controlnet_depth": "w8a8", "safety_checker": "fp16"}),
        (" vae=fp16 , int8", "int8_vae-fp16", {"unet": "int8", "vae_decoder": "fp16", "text_encoder": "int8"}),
        ("int8,text=int8", "int8", {"text_encoder": "int8"}),
        ("fp16,tiny=int8,controlnet=int4", "fp16_tiny-int8_controlnet-int4",
         {"tiny_decoder": "int8", "controlnet": "int4", "controlnet_depth": "int4", "unet": "fp16"}),
    ],
)  # fmt: skip
def test_parts_have_their_own(text: str, name: str, parts: dict[str, str]) -> None:
    recipe = recipe_named(text)
    assert recipe.name == name
    assert {part: recipe_for(part, recipe).name for part in parts} == parts
    assert recipe.base == RECIPES[name.split("_")[0]]
    assert recipe.calibrated == ("w8a8" in text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("int3", "unknown precision 'int3'; valid: fp16, int8"),
        ("unet=int3", "unknown precision 'int3'"),
        ("lungs=int8", "'lungs' is no part that a precision is for; valid: controlnet, "),
        ("int8,fp16", "says twice how the other parts are stored"),
        ("vae=int8,vae=fp16", "says twice how vae are stored"),
        ("", "unknown precision ''"),
        ("unet=", "unknown precision ''"),
        ("=int8", "'' is no part"),
    ],
)
def test_what_no_precision_is(text: str, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        recipe_named(text, ("fp16", "int8"))
