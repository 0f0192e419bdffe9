"""An upscaler around a picture: whole where it is small, else in windows that overlap."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .base import Component

# Sides are multiples of this: some networks fold so many pixels into channels.
MULTIPLE = 4
# Pixels a side that are enlarged at once, and those around a window that are computed and left out.
WINDOW, MARGIN = 256, 16
# Pixels a side of the window of a graph whose shapes were fixed when it was converted.
FIXED = 128


def window_of(height: int, width: int, static: bool = False) -> tuple[int, int]:
    """The sides of what is given to the network at once, for a picture of this size; `static`: whatever its size."""
    if static:
        return FIXED, FIXED
    return tuple(min(-(-side // MULTIPLE) * MULTIPLE, WINDOW) for side in (height, width))  # type: ignore[return-value]


def enlarge(upscaler: Component, pixels: NDArray[np.uint8], sides: tuple[int, int]) -> NDArray[np.uint8]:
    """Pixels [H, W, 3] -> [f H, f W, 3], f being the network's, which was loaded for windows of these sides."""
    height, width = pixels.shape[:2]
    image = np.ascontiguousarray(pixels.transpose(2, 0, 1)[None], np.float32) / np.float32(255)
    beyond = (max(0, sides[0] - height), max(0, sides[1] - width))
    whole = np.pad(image, [(0, 0), (0, 0), (0, beyond[0]), (0, beyond[1])], "edge")
    out: NDArray[np.float32] | None = None
    for top in _starts(whole.shape[2], sides[0]):
        for left in _starts(whole.shape[3], sides[1]):
            window = whole[:, :, top : top + sides[0], left : left + sides[1]]
            large = upscaler(image=np.ascontiguousarray(window))["sample"]
            f = large.shape[2] // sides[0]
            if out is None:
                factor, out = f, np.zeros((1, 3, whole.shape[2] * f, whole.shape[3] * f), np.float32)
            # A window's rim is computed with less around it: what is there already of its neighbour stays.
            y, x = (MARGIN * bool(start) for start in (top, left))
            rows = slice((top + y) * f, (top + sides[0]) * f)
            out[:, :, rows, (left + x) * f : (left + sides[1]) * f] = large[:, :, y * f :, x * f :]
    assert out is not None
    made = out[0, :, : height * factor, : width * factor]
    return np.ascontiguousarray((np.clip(made, 0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0))


def _starts(length: int, side: int) -> list[int]:
    """Where windows begin, so that each shows MARGIN pixels of both neighbours, and the last ends at the edge."""
    step = side - 2 * MARGIN
    return [*range(0, max(length - side, 0), step), max(length - side, 0)]
