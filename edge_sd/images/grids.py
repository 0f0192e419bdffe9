"""Sheets: several pictures in one file, as a grid, a strip, or an animation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from io import BytesIO
from typing import TYPE_CHECKING

from ..errors import InvalidRequest
from .files import MAX_PIXELS

if TYPE_CHECKING:
    from PIL.Image import Image


def grid(images: Sequence[Image], columns: int | None = None) -> Image:
    """All in rows, left to right, as nearly square as may be, on white; `columns` is how many in a row."""
    from PIL import Image as Images

    across = columns or math.ceil(math.sqrt(len(images)))
    width, height = max(each.width for each in images), max(each.height for each in images)
    size = width * across, height * math.ceil(len(images) / across)
    if size[0] * size[1] > MAX_PIXELS or max(size) > 65_000:
        raise InvalidRequest(f"{len(images)} pictures of {width}x{height} are too many for one file; draw fewer")
    sheet = Images.new("RGB", size, "white")
    for n, each in enumerate(images):
        sheet.paste(each, (n % across * width, n // across * height))
    return sheet


def animation(images: Sequence[Image], seconds: float) -> bytes:
    """A GIF that goes through all in `seconds`, back again, and so on; its 256 colours are chosen for each."""
    frames = [*images, *images[-2:0:-1]]
    buffer = BytesIO()
    # GIF counts hundredths; browsers slow anything below 2 of them down.
    duration = max(20, round(1000 * seconds / len(images) / 10) * 10)
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=duration, loop=0)
    return buffer.getvalue()
