"""QuantRecipe: how the weights of an artifact are stored, and how close to torch float32 it must stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edge_sd.errors import InvalidRequest, choices


@dataclass(frozen=True)
class QuantRecipe:
    """A named way of storing weights.

    bits     32 and 16 are floating point, 8 and 4 integers with a scale per output channel (8) or per group (4)
    floor    PSNR in dB against torch float32 that every component must reach
    """

    name: str
    bits: Literal[32, 16, 8, 4]
    floor: float
    group_size: int | None = None


RECIPES = {
    recipe.name: recipe
    for recipe in (
        QuantRecipe("fp32", 32, floor=80.0),
        QuantRecipe("fp16", 16, floor=45.0),
        QuantRecipe("int8", 8, floor=30.0),
        QuantRecipe("int4", 4, floor=15.0, group_size=32),
    )
}


def recipe_named(name: str) -> QuantRecipe:
    if name not in RECIPES:
        raise InvalidRequest(f"unknown precision {name!r}; valid: {choices(RECIPES)}")
    return RECIPES[name]
