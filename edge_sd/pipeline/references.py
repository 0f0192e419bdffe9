"""Reference pictures: what the prompt speaks of, opened, prepared, and encoded once for all pictures of a request.

FLUX.2 takes their latents. A UNet with an IP-Adapter takes tokens that its image encoder makes of their middles.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle.facts import Facts
from ..bundle.parts import IMAGE_ENCODER
from ..components.autoencoder import encode_mean
from ..components.base import Array, Resting
from ..components.image_prompt import PIXELS, TOKENS, seen
from ..components.shapes import rows_of_batch
from ..components.transformer import REFERENCE
from ..images.canvas import CROPPED, content_hash
from ..images.clip import view
from ..images.opening import open_picture
from ..images.references import shown
from .loader import Components
from .run import Run
from .settings import Reference
from .shapes import batch_of

VAE = "vae_encoder"


@dataclass(frozen=True)
class Shown:
    """A reference picture as the model is shown it: pixels [H, W, 3]; `note` says what was cut off, "" for little."""

    reference: Reference
    pixels: NDArray[np.uint8]
    note: str = ""


def encoder_of(facts: Facts) -> str:
    """The component that reads reference pictures."""
    return IMAGE_ENCODER if facts.image_prompt else VAE


def open_references(pictures: Sequence[Any], facts: Facts) -> tuple[Shown, ...]:
    """The pictures as a model of these facts is shown them. Raises InvalidRequest for one that can't be shown."""
    found = []
    for n, source in enumerate(pictures, 1):
        name = "the reference picture" if len(pictures) == 1 else f"reference picture {n}"
        opened = open_picture(source, "reference picture")
        if facts.image_prompt:
            # CLIP's view of it is made where it is encoded.
            side, share = facts.image_side, 1 - min(opened.size) / max(opened.size)
            note = f"{share:.0%} of {name} was cut off: the model sees a square" if share > CROPPED else ""
            found.append(Shown(Reference(content_hash(opened), side, side), np.asarray(opened), note))
            continue
        image, note = shown(opened, facts.grain, name)
        found.append(Shown(Reference(content_hash(opened), *image.size), np.asarray(image), note))
    return tuple(found)


class References:
    """What encoders make of reference pictures. That of the last request is kept: the next may well have the same."""

    def __init__(self) -> None:
        self._known: dict[Any, Array] = {}

    def inputs(self, run: Run, components: Components) -> dict[str, Array]:
        """What the denoiser of `run` is bound, by name. Raises NumericalError, or what loading the encoder raises."""
        facts, settings = run.facts, run.settings
        before, self._known = self._known, {}
        found = []
        for pixels in run.source.references:
            window = settings.vae_window_of(pixels.shape[1], pixels.shape[0]) if facts.refers else ()
            key = window, pixels.shape, hashlib.sha256(pixels.tobytes()).digest()
            if key not in self._known:
                self._known[key] = before[key] if key in before else _encoded(run, components, pixels)
            found.append(self._known[key])
        if not facts.image_prompt:
            return {f"{REFERENCE}{n}": latents for n, latents in enumerate(found)}
        if not found:
            return {}
        assert settings.reference_weight is not None, "the resolver fills it in"
        rows = rows_of_batch(facts, batch_of(facts, settings))
        # All rows but the prompt's are without them.
        without = rows - len(settings.weights)
        return seen(found, settings.reference_weight, rows, without)


def _encoded(run: Run, components: Components, pixels: NDArray[np.uint8]) -> Array:
    """Tokens of no picture and of this one, or the mean of its latents as the denoiser has them."""
    part = encoder_of(run.facts)
    if run.facts.image_prompt:
        encoded: Array = components[part](**{PIXELS: view(pixels, run.facts.image_side)})[TOKENS]
    else:
        space, (height, width) = run.facts.latents, pixels.shape[:2]
        window = run.settings.vae_window_of(width, height)
        components.prepare({part: {"sample": (1, 3, window[1], window[0])}}, {})
        shape = 1, space.channels, height // space.factor, width // space.factor
        encoded = space.normalized(encode_mean(components.fitted(part, shape), pixels))
    encoder = components[part]
    if isinstance(encoder, Resting):
        # What it computed with and what the denoiser does need not be there at once.
        encoder.rest()
    return encoded
