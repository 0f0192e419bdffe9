"""ControlNet (Zhang et al. 2023, arXiv:2302.05543): lines say where, the prompt says what.

A trainable copy of the UNet's encoder reads the lines; its outputs are added to the locked UNet's skip connections.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..bundle.parts import NET
from ..errors import InvalidRequest, choices
from ..images.canny import canny
from ..sampling.schedule import active_timesteps
from .base import Array, Component

if TYPE_CHECKING:
    from PIL.Image import Image

# How a picture becomes what a ControlNet follows: white lines on black, its greys, or its colours.
READINGS = ("auto", "canny", "scribble", "lines", "grey", "tile")
MAX_WEIGHT = 2
# A drawing has hardly any grey: this share of its pixels is nearly black or nearly white.
DRAWN = 0.9


def read_lines(image: Image, width: int, height: int, reading: str = "auto") -> NDArray[np.float32]:
    """The condition of a ControlNet, float32 [1, 3, H, W] in [0, 1]: white lines on black for nets that follow lines.

    reading   "canny": the edges of a picture; "scribble": dark strokes on paper; "lines": it is the condition already;
              "auto": a drawing is one of the last two by its background, and everything else has edges;
              "grey": light and dark alone, for nets that colour; "tile": the picture itself, for nets that refine
    """
    from PIL import Image as Images
    from PIL import ImageOps

    pixels = np.asarray(ImageOps.fit(image, (width, height), Images.Resampling.LANCZOS))
    if reading == "auto":
        reading = _looks_like(pixels)
    if reading == "canny":
        lines = np.repeat(canny(pixels)[..., None], 3, axis=2).astype(np.float32)
    else:
        if reading == "grey":
            pixels = np.asarray(Images.fromarray(pixels).convert("L").convert("RGB"))
        lines = np.asarray(255 - pixels if reading == "scribble" else pixels, np.float32) / np.float32(255)
    return np.ascontiguousarray(lines.transpose(2, 0, 1)[None])


def _looks_like(pixels: NDArray[np.uint8]) -> str:
    light, dark = float((pixels.min(axis=2) > 200).mean()), float((pixels.max(axis=2) < 55).mean())
    if light + dark < DRAWN or min(light, dark) == 0:
        return "canny"
    return "scribble" if light > dark else "lines"


@dataclass(frozen=True)
class Control:
    """One net's share of a drawing: the picture that it follows (or its hash), how closely, and when.

    net          which of the variant's: "" is its only or first one
    weight       of the residuals, 0 to 2; 1 is what was trained
    start, end   the share of the steps at which it is asked, 0 to 1
    reading      one of READINGS

    Raises InvalidRequest on any value that makes no sense.
    """

    picture: Any
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0
    reading: str = "auto"
    net: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= MAX_WEIGHT:
            raise InvalidRequest(f"control weight {self.weight} is not a number from 0 to {MAX_WEIGHT}")
        if not 0 <= self.start < self.end <= 1:
            raise InvalidRequest(f"control from {self.start} to {self.end} is no part of the steps, such as 0 to 0.6")
        if self.reading not in READINGS:
            raise InvalidRequest(f"unknown control reading {self.reading!r}; valid: {choices(READINGS)}")

    @property
    def part(self) -> str:
        """The name of its component."""
        return f"{NET}_{self.net}" if self.net else NET

    def active(self, timesteps: Sequence[float]) -> frozenset[float]:
        """The timesteps at which this ControlNet runs."""
        return active_timesteps(timesteps, self.start, self.end)


def controls_of(control: Any, **each: Any) -> list[Control]:
    """One Control for each picture; other values are one for all, or a list as long. Raises InvalidRequest."""
    if control is None:
        # Options without a picture are checked too.
        Control(None, **{name: _one(value) for name, value in each.items()})
        return []
    pictures = list(control) if isinstance(control, (list, tuple)) else [control]
    rows: dict[str, list[Any]] = {}
    for name, value in each.items():
        many = list(value) if isinstance(value, (list, tuple)) else [value] * len(pictures)
        if len(many) == 1:
            many *= len(pictures)
        if len(many) != len(pictures):
            raise InvalidRequest(f"{len(pictures)} control pictures have {len(many)} values of {name}; give one or all")
        rows[name] = many
    return [Control(picture, **{name: rows[name][n] for name in rows}) for n, picture in enumerate(pictures)]


def _one(value: Any) -> Any:
    return value[0] if isinstance(value, (list, tuple)) and value else value


@dataclass
class ControlledUNet:
    """A UNet and its ControlNets as one Component: sample and timestep in, out_sample out. Residuals add up.

    nets   each with the weight of its residuals and the timesteps at which it runs
    """

    unet: Component
    nets: Sequence[tuple[Component, float, frozenset[float]]]
    _lines: Array | None = None
    _silent: dict[str, Array] = field(default_factory=dict)

    def bind(self, **constants: Array) -> None:
        """Text goes to all; controlnet_cond is what the nets follow, three channels for each of them."""
        self._lines = constants.pop("controlnet_cond", self._lines)
        for net in (self.unet, *(net for net, _, _ in self.nets)):
            net.bind(**constants)

    def __call__(self, **inputs: Array) -> dict[str, Array]:
        lines = inputs.pop("controlnet_cond", self._lines)
        assert lines is not None
        heard: dict[str, Array] = {}
        for n, (net, weight, active) in enumerate(self.nets):
            if float(inputs["timestep"][0]) in active:
                for name, value in net(**inputs, controlnet_cond=lines[:, 3 * n : 3 * n + 3]).items():
                    heard[name] = heard.get(name, 0) + value * np.float32(weight)
        if not heard:
            if not self._silent:
                # Only a ControlNet knows the shapes of its residuals.
                first = self.nets[0][0](**inputs, controlnet_cond=lines[:, :3])
                self._silent = {name: np.zeros_like(value) for name, value in first.items()}
            heard = self._silent
        return self.unet(**inputs, **heard)

    def close(self) -> None:
        for net, _, _ in self.nets:
            net.close()
        self.unet.close()
