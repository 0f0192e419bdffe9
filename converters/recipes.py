"""QuantRecipe: how the weights of an artifact are stored, and how close to torch float32 it must stay."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from edge_sd.bundle.parts import SAFETY_CHECKER, TINY, UPSCALER
from edge_sd.errors import InvalidRequest, choices


@dataclass(frozen=True)
class QuantRecipe:
    """A named way of storing weights.

    bits        32 and 16 are floating point, fewer are integers with a scale (8: per output channel, 4: per group),
                or, with `palette`, indices of a table that k-means made
    floor       PSNR in dB against torch float32 that every component must reach
    activations whether inputs of layers are rounded to integers too (W8A8); calibrated on several pictures
    hybrid      with `activations`: those of the UNet's convolutions only; all else has 8-bit weights and no more
    mixed       `bits` is for the weights that need most, others get fewer, as a sensitivity analysis says
    group_size  the channels or inputs that share a scale or a table; None is the whole channel or tensor
    """

    name: str
    bits: Literal[32, 16, 8, 6, 4, 2, 1]
    floor: float
    group_size: int | None = None
    palette: bool = False
    mixed: bool = False
    activations: bool = False
    hybrid: bool = False


RECIPES = {
    recipe.name: recipe
    for recipe in (
        QuantRecipe("fp32", 32, floor=80.0),
        QuantRecipe("fp16", 16, floor=45.0),
        QuantRecipe("int8", 8, floor=30.0),
        QuantRecipe("w8a8", 8, floor=25.0, activations=True),
        QuantRecipe("hybrid", 8, floor=25.0, activations=True, hybrid=True),
        QuantRecipe("int4", 4, floor=15.0, group_size=32),
        QuantRecipe("int4g64", 4, floor=12.0, group_size=64),
        QuantRecipe("int4g128", 4, floor=10.0, group_size=128),
        QuantRecipe("p8", 8, floor=35.0, palette=True),
        QuantRecipe("p6", 6, floor=30.0, palette=True),
        QuantRecipe("p4", 4, floor=15.0, palette=True),
        QuantRecipe("p4g16", 4, floor=18.0, group_size=16, palette=True),
        QuantRecipe("p2", 2, floor=5.0, palette=True),
        QuantRecipe("p1", 1, floor=0.0, palette=True),
        # As near as 4.5 bits a weight allow.
        QuantRecipe("mixed4", 4, floor=20.0, palette=True, mixed=True),
        # The floor of fp16 in as few bits as that takes.
        QuantRecipe("mixed", 16, floor=45.0, palette=True, mixed=True),
    )
}


# The safety checker's verdict must be the same in every variant, the tiny decoder is too small to gain, and an upscaler
# is there for its detail.
KEPT = (SAFETY_CHECKER, TINY, UPSCALER)


def recipe_for(part: str, recipe: QuantRecipe) -> QuantRecipe:
    """The recipe of one component in a variant of `recipe`: parts that gain nothing from fewer bits keep float16."""
    return recipe if part not in KEPT or recipe.bits == 32 else RECIPES["fp16"]


def recipe_named(name: str, offered: Iterable[str] = RECIPES) -> QuantRecipe:
    """The recipe of that name out of those `offered`. Raises InvalidRequest listing them."""
    if name not in offered:
        raise InvalidRequest(f"unknown precision {name!r}; valid: {choices(offered)}")
    return RECIPES[name]
