"""Tiles: a component that was loaded for small pictures runs on large ones, window by window, overlaps blended.

For the UNet this is MultiDiffusion (Bar-Tal et al. 2023, arXiv:2302.08113): at every step the windows agree about what
they share, so no seam arises. For the autoencoder it bounds memory; group norms see a window instead of the whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from ..bundle.parts import TINY
from .base import Array, Component, Shapes

# Overlap of neighbouring tiles as a fraction of the tile's side.
OVERLAP = 1 / 4


def scales_of(part: str, factor: int) -> tuple[str, dict[str, int]]:
    """The input that gives the picture's size, and the pixels per latent of each spatial input and output."""
    if part in ("vae_decoder", TINY):
        return "latent_sample", {"latent_sample": 1, "sample": factor}
    if part == "vae_encoder":
        return "sample", {"sample": factor, "latent_parameters": 1, "latent_sample": 1}
    return "sample", {"sample": 1, "controlnet_cond": factor, "out_sample": 1}


def starts(length: int, window: int, overlap: int) -> list[int]:
    """Starts of windows that cover `length` evenly and overlap by `overlap` or more. One window if it is enough."""
    if length <= window:
        return [0]
    count = math.ceil((length - overlap) / (window - overlap))
    return [round(each) for each in np.linspace(0, length - window, count).tolist()]


def windows(whole: tuple[int, int], window: tuple[int, int]) -> int:
    """How many windows (height, width) cover a whole of that height and width."""
    rows, columns = (
        len(starts(length, side, round(side * OVERLAP))) for length, side in zip(whole, window, strict=True)
    )
    return rows * columns


def ramp(window: int, overlap: int) -> Array:
    """The weight of each place of a window: it rises linearly from the edges, float32 [window]."""
    place = np.arange(window)
    return np.minimum(np.minimum(place + 1, window - place), overlap + 1).astype(np.float32)


@dataclass
class Tiled:
    """`component` as one that takes larger pictures than it was loaded for.

    shapes    of its inputs, as loaded
    picture   the input that says how large the whole is: "sample" or "latent_sample", [B, C, H, W]
    factors   pixels to a latent, for inputs and outputs that are so; 1 for latents
    """

    component: Component
    shapes: Shapes
    picture: str
    factors: dict[str, int]
    _bound: dict[str, Array] = field(default_factory=dict)

    def bind(self, **constants: Array) -> None:
        """Bind inputs. Those that are pictures are cut at each call."""
        self._bound |= {name: value for name, value in constants.items() if name in self.factors}
        self.component.bind(**{name: value for name, value in constants.items() if name not in self.factors})

    def __call__(self, **inputs: Array) -> dict[str, Array]:
        inputs = {**self._bound, **inputs}
        unit = self.factors[self.picture]
        height, width = (side // unit for side in inputs[self.picture].shape[2:])
        totals: dict[str, Array] = {}
        weights: dict[str, Array] = {}
        for rows, columns, weight in self._windows(height, width, unit):
            cut = {
                name: value[:, :, _scaled(rows, factor), _scaled(columns, factor)]
                for name, value in inputs.items()
                if (factor := self.factors.get(name))
            }
            for name, value in self.component(**{**inputs, **cut}).items():
                if (scale := self.factors.get(name)) is None:
                    continue
                if name not in totals:
                    totals[name] = np.zeros((*value.shape[:2], height * scale, width * scale), np.float32)
                    weights[name] = np.zeros((height * scale, width * scale), np.float32)
                there, grown = (_scaled(rows, scale), _scaled(columns, scale)), _grown(weight, scale)
                totals[name][:, :, there[0], there[1]] += value * grown
                weights[name][there] += grown
        return {name: total / weights[name] for name, total in totals.items()}

    def _windows(self, height: int, width: int, unit: int) -> Iterator[tuple[slice, slice, Array]]:
        """In latents: rows and columns of each window, and the weight of each of its places."""
        tall, wide = (side // unit for side in self.shapes[self.picture][2:])
        above, beside = round(tall * OVERLAP), round(wide * OVERLAP)
        weight = ramp(tall, above)[:, None] * ramp(wide, beside)[None]
        for row in starts(height, tall, above):
            for column in starts(width, wide, beside):
                yield slice(row, row + tall), slice(column, column + wide), weight

    def close(self) -> None:
        self.component.close()


def fitted(component: Component, part: str, shapes: Shapes, latents: tuple[int, ...], factor: int) -> Component:
    """`component`, loaded for `shapes`, for `latents` of that shape: as it is, or in tiles where these are larger."""
    picture, factors = scales_of(part, factor)
    wanted = tuple(side * factors[picture] for side in latents[2:])
    return component if tuple(shapes[picture][2:]) == wanted else Tiled(component, shapes, picture, factors)


def _scaled(span: slice, factor: int) -> slice:
    return slice(span.start * factor, span.stop * factor)


def _grown(weight: Array, factor: int) -> Array:
    """Weights of latents as weights of pixels, linear between the latents' centres."""
    if factor == 1:
        return weight
    for axis in (0, 1):
        count = weight.shape[axis]
        places = np.clip((np.arange(count * factor) + 0.5) / factor - 0.5, 0, count - 1)
        below = np.minimum(places.astype(int), count - 2) if count > 1 else np.zeros(len(places), int)
        share = (places - below).astype(np.float32)
        share = share[:, None] if axis == 0 else share[None]
        above = np.minimum(below + 1, count - 1)
        weight = weight.take(below, axis) * (1 - share) + weight.take(above, axis) * share
    return weight
