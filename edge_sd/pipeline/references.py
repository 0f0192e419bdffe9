"""Reference pictures: what the prompt speaks of, opened, prepared, and encoded once for all pictures of a request."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..components.autoencoder import Latents, encode_mean
from ..components.base import Resting
from ..components.transformer import REFERENCE
from ..images.canvas import content_hash
from ..images.opening import open_picture
from ..images.references import shown
from .loader import Components
from .run import Run
from .settings import Reference

ENCODER = "vae_encoder"


@dataclass(frozen=True)
class Shown:
    """A reference picture as the model is shown it: pixels [H, W, 3]; `note` says what was cut off, "" for little."""

    reference: Reference
    pixels: NDArray[np.uint8]
    note: str = ""


def open_references(pictures: Sequence[Any], multiple: int) -> tuple[Shown, ...]:
    """The pictures with sides of multiples of `multiple`. Raises InvalidRequest for one that can't be shown."""
    found = []
    for n, source in enumerate(pictures, 1):
        name = "the reference picture" if len(pictures) == 1 else f"reference picture {n}"
        opened = open_picture(source, "reference picture")
        image, note = shown(opened, multiple, name)
        found.append(Shown(Reference(content_hash(opened), *image.size), np.asarray(image), note))
    return tuple(found)


class References:
    """The latents of reference pictures. Those of the last request are kept: the next may well have the same."""

    def __init__(self) -> None:
        self._known: dict[Any, Latents] = {}

    def latents(self, run: Run, components: Components) -> dict[str, Latents]:
        """What the denoiser of `run` is given, by name. Raises NumericalError, or what loading the encoder raises."""
        before, self._known = self._known, {}
        found = {}
        for n, pixels in enumerate(run.source.references):
            window = run.settings.vae_window_of(pixels.shape[1], pixels.shape[0])
            key = window, pixels.shape, hashlib.sha256(pixels.tobytes()).digest()
            if key not in self._known:
                self._known[key] = before[key] if key in before else _encoded(run, components, pixels, window)
            found[f"{REFERENCE}{n}"] = self._known[key]
        return found


def _encoded(run: Run, components: Components, pixels: NDArray[np.uint8], window: tuple[int, int]) -> Latents:
    """The mean of a picture's latents, as the denoiser has them; the encoder is loaded for `window` (width, height)."""
    space, (height, width) = run.facts.latents, pixels.shape[:2]
    components.prepare({ENCODER: {"sample": (1, 3, window[1], window[0])}}, {})
    shape = 1, space.channels, height // space.factor, width // space.factor
    z = space.normalized(encode_mean(components.fitted(ENCODER, shape), pixels))
    encoder = components[ENCODER]
    if isinstance(encoder, Resting):
        # What it computed with and what the denoiser does need not be there at once.
        encoder.rest()
    return z
