"""What a CLIP that looks at pictures sees of one: its middle, at the size that the network takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image

# CLIP's own mean and deviation of red, green and blue.
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
DEVIATION = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
SIDE = 224


def view(pixels: NDArray[np.uint8], side: int = SIDE) -> NDArray[np.float32]:
    """What CLIP sees of a picture [H, W, 3]: its middle, the shorter side scaled to `side`; float32 [1, 3, S, S]."""
    from PIL import Image

    seen = np.asarray(middle(Image.fromarray(pixels), side), np.float32) / np.float32(255)
    return np.asarray(((seen - MEAN) / DEVIATION).transpose(2, 0, 1)[None], np.float32)


def middle(image: Image, side: int = SIDE) -> Image:
    """The square in the middle of a picture, its shorter side scaled to `side` pixels as CLIP's processor does."""
    from PIL import Image as Images

    scale = side / min(image.size)
    width, height = (side if each == min(image.size) else int(each * scale) for each in image.size)
    image = image.resize((width, height), Images.Resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    return image.crop((left, top, left + side, top + side))
