"""Reference pictures as a model is shown them: prepared as diffusers' Flux2ImageProcessor does."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..errors import InvalidRequest
from .canvas import CROPPED

if TYPE_CHECKING:
    from PIL.Image import Image

# Pixels above which a picture is scaled down to that many.
MOST = 1024 * 1024
# The fewest pixels a side, and how many times the shorter side the longer one may be.
LEAST, NARROW = 64, 8


def shown(image: Image, multiple: int, name: str) -> tuple[Image, str]:
    """`image`, of MOST pixels at most and with sides that are multiples of `multiple`; and a note of what was cut.

    What is beyond the multiples is cut off around the middle. Raises InvalidRequest, with `name` in it, for a picture
    that is too small or too narrow.
    """
    from PIL import Image as Images

    size, least = f"{image.width}x{image.height}", max(LEAST, multiple)
    if min(image.size) < least:
        raise InvalidRequest(f"{name} has {size} pixels; at least {least} a side are needed")
    if max(image.size) > NARROW * min(image.size):
        raise InvalidRequest(f"{name} has {size} pixels; its longer side may be at most {NARROW} times the other")
    if image.width * image.height > MOST:
        scale = math.sqrt(MOST / (image.width * image.height))
        image = image.resize((int(image.width * scale), int(image.height * scale)), Images.Resampling.LANCZOS)
    width, height = (side // multiple * multiple for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    share = 1 - width * height / (image.width * image.height)
    note = f"{share:.0%} of {name} was cut off: its sides are multiples of {multiple}" if share > CROPPED else ""
    return image.crop((left, top, left + width, top + height)), note
