"""ControlNet (Zhang et al. 2023, arXiv:2302.05543): lines say where, the prompt says what.

A trainable copy of the UNet's encoder reads the lines; its outputs are added to the locked UNet's skip connections.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .backends.base import Array, Component
from .edges import canny
from .errors import InvalidRequest, choices

if TYPE_CHECKING:
    from PIL.Image import Image

# How a picture becomes white lines on black.
READINGS = ("auto", "canny", "scribble", "lines")
# A drawing has hardly any grey: this share of its pixels is nearly black or nearly white.
DRAWN = 0.9


def read_lines(image: Image, width: int, height: int, reading: str = "auto") -> NDArray[np.float32]:
    """The condition of a ControlNet, white lines on black, float32 [1, 3, H, W] in [0, 1].

    reading   "canny": the edges of a picture; "scribble": dark strokes on paper; "lines": it is the condition already;
              "auto": a drawing is one of the last two by its background, and everything else has edges
    """
    from PIL import Image as Images
    from PIL import ImageOps

    pixels = np.asarray(ImageOps.fit(image, (width, height), Images.Resampling.LANCZOS))
    if reading == "auto":
        reading = _looks_like(pixels)
    if reading == "canny":
        lines = np.repeat(canny(pixels)[..., None], 3, axis=2).astype(np.float32)
    else:
        lines = np.asarray(255 - pixels if reading == "scribble" else pixels, np.float32) / np.float32(255)
    return np.ascontiguousarray(lines.transpose(2, 0, 1)[None])


def _looks_like(pixels: NDArray[np.uint8]) -> str:
    light, dark = float((pixels.min(axis=2) > 200).mean()), float((pixels.max(axis=2) < 55).mean())
    if light + dark < DRAWN or min(light, dark) == 0:
        return "canny"
    return "scribble" if light > dark else "lines"


def check_reading(reading: str) -> None:
    """Raise InvalidRequest for what is none."""
    if reading not in READINGS:
        raise InvalidRequest(f"unknown control reading {reading!r}; valid: {choices(READINGS)}")


@dataclass
class ControlledUNet:
    """A UNet and its ControlNet as one Component: sample and timestep in, out_sample out.

    weight   of the residuals; 1 is what was trained
    active   the timesteps at which the ControlNet is asked; at others the UNet is left alone
    """

    unet: Component
    controlnet: Component
    weight: float
    active: frozenset[float]
    _silent: dict[str, Array] = field(default_factory=dict)

    def bind(self, **constants: Array) -> None:
        """Text goes to both; controlnet_cond, the lines, to the ControlNet."""
        self.controlnet.bind(**constants)
        self.unet.bind(**{name: value for name, value in constants.items() if name != "controlnet_cond"})

    def __call__(self, **inputs: Array) -> dict[str, Array]:
        if float(inputs["timestep"][0]) in self.active or not self._silent:
            residuals = self.controlnet(**inputs)
            self._silent = {name: np.zeros_like(value) for name, value in residuals.items()}
            residuals = {name: value * np.float32(self.weight) for name, value in residuals.items()}
        if float(inputs["timestep"][0]) not in self.active:
            residuals = self._silent
        return self.unet(**inputs, **residuals)

    def close(self) -> None:
        self.controlnet.close()
        self.unet.close()
