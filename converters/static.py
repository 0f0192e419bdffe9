"""Static sizes: the pixels and batch that packages of fixed shapes are made for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edge_sd.bundle.diffusers import DETERMINISTIC
from edge_sd.bundle.facts import Facts
from edge_sd.bundle.parts import NET
from edge_sd.errors import InvalidRequest

from .sources.source import Source

# (width, height) in pixels; none is the model's own.
Pixels = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Sizes:
    """The static sizes of one function: pixels, and the batch of the UNet (2 with guidance in one call)."""

    height: int
    width: int
    batch: int = 2


def pixels_of(sizes: Pixels, facts: Facts) -> Pixels:
    """`sizes`, or the model's own."""
    return sizes or ((facts.defaults.width, facts.defaults.height),)


def latents_of(sizes: Pixels, facts: Facts) -> list[tuple[int, int]]:
    """Heights and widths of the latents of `sizes`."""
    factor = facts.latents.factor
    return [(height // factor, width // factor) for width, height in pixels_of(sizes, facts)]


def check_denoiser(source: Source, name: str) -> None:
    """Raise InvalidRequest for a transformer or an IP-Adapter, of which the form called `name` has no layout."""
    if source.facts.image_prompt:
        raise InvalidRequest(
            f"{source.facts.name} has an IP-Adapter, of which {name} has no form yet; valid: --to openvino"
        )
    if source.facts.denoiser != "unet":
        raise InvalidRequest(
            f"{source.facts.name} has a {source.facts.denoiser}, of which {name} has no form yet; valid: --to openvino"
        )


def check_nets(source: Source) -> None:
    """Raise InvalidRequest for several ControlNets: Apple's layouts have a place for the one called controlnet."""
    if nets := [part for part in source.parts if part.startswith(NET) and part != NET]:
        raise InvalidRequest(
            f"Apple's layout has a place for one ControlNet; {source.facts.name} also has {', '.join(nets)}; "
            "valid: --to openvino"
        )


def check_encoder(source: Source) -> None:
    """Raise InvalidRequest for an encoder that returns latents: Apple's layouts have their mean and log variance."""
    kind = source.config("vae_encoder").get("_class_name")
    if kind in DETERMINISTIC:
        raise InvalidRequest(
            f"{source.facts.name} has an {kind}, which returns no distribution of latents, as Apple's layout has it; "
            "valid: --to openvino"
        )


def check_sizes(sizes: Pixels, source: Source) -> None:
    """Raise InvalidRequest for a side that the UNet's halvings leave a remainder of."""
    factor = source.facts.latents.factor * 2 ** (len(source.config("unet")["block_out_channels"]) - 1)
    for width, height in pixels_of(sizes, source.facts):
        for name, side in (("width", width), ("height", height)):
            if side < factor or side % factor:
                raise InvalidRequest(f"{name} {side} is not a multiple of {factor}, as this model's UNet needs")


def named(sizes: Pixels, batch: int) -> list[str]:
    """The parts of a variant's name that say which sizes and batch were asked for."""
    return [f"{width}x{height}" for width, height in sizes] + ([f"b{batch}"] if batch != 2 else [])
