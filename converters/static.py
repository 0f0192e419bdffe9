"""Static sizes: the pixels and batch that packages of fixed shapes are made for."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from edge_sd.bundle.diffusers import DETERMINISTIC
from edge_sd.bundle.facts import Facts
from edge_sd.bundle.parts import NET
from edge_sd.components.rotary import AXES, THETA
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


def check_denoiser(source: Source, name: str, compute: str, families: Collection[str]) -> None:
    """Raise InvalidRequest for an IP-Adapter, or a transformer of which the form called `name` has no layout.

    Those of `families` have one, for the GPU.
    """
    facts = source.facts
    if facts.image_prompt:
        raise InvalidRequest(f"{facts.name} has an IP-Adapter, of which {name} has no form yet; valid: --to openvino")
    if facts.denoiser == "unet":
        return
    if facts.family not in families:
        raise InvalidRequest(
            f"{facts.name} has a {facts.denoiser}, of which {name} has no form yet; valid: --to openvino"
        )
    if compute != "gpu":
        raise InvalidRequest(
            f"{facts.name} has a {facts.denoiser}, which {name} arranges for the GPU alone; valid: --compute gpu"
        )


def check_rotary(source: Source) -> None:
    """Raise InvalidRequest for a FLUX.2 whose places are turned by other frequencies than all that are published."""
    if source.facts.family != "flux2":
        return
    config = source.config("transformer")
    width, axes = int(config["attention_head_dim"]), [int(each) for each in config["axes_dims_rope"]]
    if axes != [width // AXES] * AXES or float(config.get("rope_theta", THETA)) != THETA:
        raise InvalidRequest(
            f"{source.facts.name} turns places by axes of {axes} and theta {config.get('rope_theta', THETA)}; Apple's "
            f"layouts are for {AXES} axes of one width and {THETA:g}; valid: --to openvino"
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
    """Raise InvalidRequest for a side that the denoiser's halvings or patches leave a remainder of, or beyond it."""
    facts = source.facts
    whose, grain = str(facts.denoiser), facts.grain
    if whose == "unet":
        whose, grain = "UNet", facts.latents.factor * 2 ** (len(source.config("unet")["block_out_channels"]) - 1)
    for width, height in pixels_of(sizes, facts):
        for name, side in (("width", width), ("height", height)):
            if side < grain or side % grain:
                raise InvalidRequest(f"{name} {side} is not a multiple of {grain}, as this model's {whose} needs")
            if facts.denoiser != "unet" and side > facts.defaults.max_side:
                raise InvalidRequest(f"{name} {side} is beyond this model's limit of {facts.defaults.max_side}")


def rows_of(batch: int | None, facts: Facts) -> int:
    """Rows of the denoiser: those asked for, or as Apple's pipelines call it, 2 with guidance in one call."""
    return batch or (1 if facts.family == "flux2" else 2)


def check_rows(batch: int | None, facts: Facts) -> None:
    """Raise InvalidRequest for two rows of a denoiser that Apple's layout has one of."""
    if facts.family == "flux2" and batch == 2:
        raise InvalidRequest(f"{facts.name} is called with one row at a time; valid: --batch 1")


def named(sizes: Pixels, batch: int | None) -> list[str]:
    """The parts of a variant's name that say which sizes and batch were asked for."""
    return [f"{width}x{height}" for width, height in sizes] + ([f"b{batch}"] if batch == 1 else [])
