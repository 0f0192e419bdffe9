"""Lines: a picture as what a ControlNet follows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .canny import canny

if TYPE_CHECKING:
    from PIL.Image import Image

# A drawing has hardly any grey: this share of its pixels is nearly black or nearly white.
DRAWN = 0.9


def read_lines(image: Image, width: int, height: int, reading: str = "auto") -> NDArray[np.float32]:
    """The condition of a ControlNet, float32 [1, 3, H, W] in [0, 1]: white lines on black, if it follows lines.

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
