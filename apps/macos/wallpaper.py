"""A picture as a wallpaper: a small one is set on a ground of its own colour, since macOS fills the screen with it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edge_sd.images.files import save
from edge_sd.images.opening import open_picture

if TYPE_CHECKING:
    from PIL.Image import Image

# Pixels of the ground, in the proportions of a MacBook's screen; on another screen its margins are cut.
WIDTH, HEIGHT = 2560, 1600
# A picture takes at most this share of the height, and is enlarged at most so many times.
SHARE, TIMES = 0.5, 5


def wallpaper_of(picture: Path) -> Path:
    """The file to hand to macOS: `picture` itself where it is large, else NAME-wallpaper.png beside it.

    Raises InvalidRequest or OutputError.
    """
    image = open_picture(picture, "picture")
    if image.width >= WIDTH * SHARE and image.height >= HEIGHT * SHARE:
        return picture
    return save(on_ground(image), picture.with_name(f"{picture.stem}-wallpaper.png"))


def on_ground(image: Image) -> Image:
    """The picture, enlarged without another shape, in the middle of the colour that most of its rim has."""
    from PIL import Image as Images

    pixels = np.asarray(image)
    rim = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    times = min(TIMES, HEIGHT * SHARE / image.height, WIDTH * SHARE / image.width)
    large = image.resize((round(image.width * times), round(image.height * times)), Images.Resampling.LANCZOS)
    red, green, blue = (int(value) for value in np.median(rim, axis=0))
    ground = Images.new("RGB", (WIDTH, HEIGHT), (red, green, blue))
    ground.paste(large, ((WIDTH - large.width) // 2, (HEIGHT - large.height) // 2))
    return ground
