"""The shapes of components' inputs: for a size, and for what a request asks for."""

from __future__ import annotations

from ..bundle.facts import Facts
from ..bundle.parts import DECODER, IMAGE_ENCODER, SAFETY_CHECKER
from ..components.base import Shapes
from ..components.image_prompt import PIXELS, shapes_of_pictures
from ..components.shapes import rows_of_batch, shapes_of
from ..components.transformer import REFERENCE
from .settings import Settings


def batch_of(facts: Facts, settings: Settings) -> int:
    """Prompts of a call: the negative one has a row, and each part of the prompt. The denoiser itself may take the
    guidance scale instead.
    """
    return 1 + len(settings.weights) if settings.guided and not facts.takes_guidance else 1


def pictures_for(facts: Facts, settings: Settings) -> dict[str, tuple[int, ...]]:
    """The shapes of what a UNet with an IP-Adapter is shown; of other models there are none."""
    return shapes_of_pictures(facts, rows_of_batch(facts, batch_of(facts, settings)), len(settings.references))


def shapes_for(facts: Facts, settings: Settings, chunks: int, view: int = 0) -> dict[str, Shapes]:
    """What `settings` need of which components, but for the UNet that takes a ControlNet's residuals.

    `chunks`: how many times the text encoder's length the longer prompt is; `view`: the side in pixels of what the
    safety checker looks at.
    """
    width, height = settings.window
    shapes = shapes_of(facts, width, height, batch_of(facts, settings), chunks)
    factor, channels = facts.latents.factor, facts.latents.channels
    seen: dict[str, tuple[int, ...]] = pictures_for(facts, settings)
    if facts.refers:
        for n, each in enumerate(settings.references):
            seen[f"{REFERENCE}{n}"] = 1, channels, each.height // factor, each.width // factor
    shapes[facts.denoiser] = {**shapes[facts.denoiser], **seen}
    if settings.controls:
        unet = shapes.pop("unet")
        rows, _, *sides = unet["sample"]
        # A net sees the latents alone, whatever else the UNet takes.
        unet = {name: shape for name, shape in unet.items() if name not in seen}
        net = {**unet, "sample": (rows, facts.latents.channels, *sides), "controlnet_cond": (rows, 3, height, width)}
        shapes |= {each.part: net for each in settings.controls}
    width, height = settings.vae_window
    del shapes["vae_decoder"]
    shapes[DECODER[settings.decoder]] = shapes_of(facts, width, height, 1)["vae_decoder"]
    if settings.safety:
        shapes[SAFETY_CHECKER] = {"clip_input": (1, 3, view, view)}
    if facts.image_prompt and settings.references:
        shapes[IMAGE_ENCODER] = {PIXELS: (1, 3, facts.image_side, facts.image_side)}
    if settings.image is not None:
        shapes["vae_encoder"] = {"sample": (1, 3, height, width)}
    return shapes
