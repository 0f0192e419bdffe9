"""QuantRecipe: how the weights of a variant are stored, and how close to torch float32 its components must stay."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from edge_sd.bundle.parts import IMAGE_ENCODER, NET, SAFETY_CHECKER, TEXT_ENCODERS, TINY, UPSCALER, kind_of
from edge_sd.errors import InvalidRequest, choices

# A part of a model, as a precision of its own is given to it -> its components.
PARTS = {
    "unet": ("unet", "controlled_unet"),
    "transformer": ("transformer",),
    "text": TEXT_ENCODERS,
    "image": (IMAGE_ENCODER,),
    "vae": ("vae_decoder", "vae_encoder"),
    "tiny": (TINY,),
    "controlnet": (NET,),
    "safety": (SAFETY_CHECKER,),
    "upscaler": (UPSCALER,),
}


# How numbers are chosen that weights are rounded to.
METHODS = {
    "scale": "scales by least squares over a layer's inputs",
    "awq": "channels scaled by the size of their inputs (Lin et al. 2023, arXiv:2306.00978), and scale",
    "gptq": "column by column, errors made good in those that follow (Frantar et al. 2022, arXiv:2210.17323)",
    "lowrank": "the nearest, and a branch of low rank for the error",
    "nf4": "the nearest of sixteen quantiles of a normal distribution (Dettmers et al. 2023, arXiv:2305.14314)",
    "fp8": "the nearest of 8-bit floating point, four bits of it the exponent",
}
# Those that look at what layers see.
LEARNED = ("scale", "awq", "gptq", "lowrank")


@dataclass(frozen=True)
class QuantRecipe:
    """A named way of storing weights.

    bits        32 and 16 are floating point, fewer are integers with a scale (8: per output channel, 4: per group),
                or, with `palette`, indices of a table that k-means made
    floor       PSNR in dB against torch float32 that every component must reach
    activations whether inputs of layers are rounded to integers too (W8A8); calibrated on several pictures
    hybrid      with `activations`: those of the UNet's convolutions only; all else has 8-bit weights and no more
    mixed       `bits` is for the weights that need most, others get fewer, as a sensitivity analysis says
    method      how weights are rounded, where not each to the nearest number of an even grid: one of METHODS
    group_size  the channels or inputs that share a scale or a table; None is the whole channel or tensor
    parts       parts of the model (keys of PARTS) that are stored by another recipe, in the order of PARTS
    """

    name: str
    bits: Literal[32, 16, 8, 6, 4, 2, 1]
    floor: float
    group_size: int | None = None
    palette: bool = False
    mixed: bool = False
    activations: bool = False
    hybrid: bool = False
    method: str = ""
    parts: tuple[tuple[str, QuantRecipe], ...] = ()

    @property
    def base(self) -> QuantRecipe:
        """That of all parts without one of their own."""
        return replace(self, name=self.name.split("_")[0], parts=())

    @property
    def each(self) -> tuple[QuantRecipe, ...]:
        """All that there are in it."""
        return self.base, *(recipe for _, recipe in self.parts)

    @property
    def learns(self) -> bool:
        """Whether weights are rounded by what several pictures show of a layer's inputs."""
        return self.method in LEARNED

    @property
    def calibrated(self) -> bool:
        """Whether any of it rounds activations."""
        return any(recipe.activations for recipe in self.each)

    def of(self, part: str) -> QuantRecipe:
        """That of one component."""
        return next((recipe for name, recipe in self.parts if kind_of(part) in PARTS[name]), self.base)


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
        *(QuantRecipe(f"int4{name}", 4, floor=15.0, group_size=32, method=name) for name in LEARNED),
        QuantRecipe("nf4", 4, floor=15.0, group_size=32, method="nf4"),
        QuantRecipe("fp8", 8, floor=25.0, method="fp8"),
        QuantRecipe("p8", 8, floor=35.0, palette=True),
        QuantRecipe("p6", 6, floor=30.0, palette=True),
        QuantRecipe("p4", 4, floor=15.0, palette=True),
        QuantRecipe("p4g16", 4, floor=18.0, group_size=16, palette=True),
        QuantRecipe("p2", 2, floor=5.0, palette=True),
        QuantRecipe("p1", 1, floor=0.0, palette=True),
        # As near as 4.65 bits a weight allow.
        QuantRecipe("mixed4", 4, floor=20.0, palette=True, mixed=True),
        # The floor of fp16 in as few bits as that takes.
        QuantRecipe("mixed", 16, floor=45.0, palette=True, mixed=True),
    )
}


# The safety checker's verdict must be the same in every variant, the tiny decoder is too small to gain, and an upscaler
# is there for its detail.
KEPT = (SAFETY_CHECKER, TINY, UPSCALER)


def recipe_for(part: str, recipe: QuantRecipe) -> QuantRecipe:
    """The recipe of one component in a variant of `recipe`.

    Parts that gain nothing from fewer bits keep float16, unless one of their own is given.
    """
    own = recipe.of(part)
    return RECIPES["fp16"] if part in KEPT and own == recipe.base and own.bits < 16 else own


def recipe_named(text: str, offered: Iterable[str] = RECIPES) -> QuantRecipe:
    """The recipe of a name out of those `offered`, or of names for the parts of a model: "unet=w8a8,vae=fp16".

    What stands without a part is for the others ("int8,vae=fp16"); without it, that is the first that is named.
    Raises InvalidRequest for unknown names and parts, and for a part that is named twice.
    """
    offered, named, base = tuple(offered), {}, None
    for word in text.split(","):
        part, equals, name = (each.strip() for each in word.rpartition("="))
        if name not in offered:
            raise InvalidRequest(f"unknown precision {name!r}; valid: {choices(offered)}")
        if equals and part not in PARTS:
            raise InvalidRequest(f"{part!r} is no part that a precision is for; valid: {choices(PARTS)}")
        if part in named or (not equals and base):
            raise InvalidRequest(f"the precision {text!r} says twice how {part or 'the other parts'} are stored")
        if equals:
            named[part] = RECIPES[name]
        else:
            base = RECIPES[name]
    first = base or next(iter(named.values()))
    parts = tuple((part, named[part]) for part in PARTS if part in named and named[part] != first)
    return replace(first, name="_".join([first.name, *(f"{part}-{each.name}" for part, each in parts)]), parts=parts)
