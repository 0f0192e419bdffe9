"""Pictures opened from files of anyone: three formats, limits before any pixel is decoded, and 8 bits a channel."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidRequest
from .files import MAX_PIXELS

if TYPE_CHECKING:
    from PIL.Image import Image

# Formats whose decoders are fuzzed by their makers and that every program writes; the others are refused by name.
READABLE = ("PNG", "JPEG", "WEBP")
# Rows that are put on a background at once: a strip takes memory for its pixels three times.
STRIP = 512


def open_picture(source: str | Path | Image, what: str = "picture") -> Image:
    """A picture in RGB, turned as its camera was; transparent pixels, whose colours are not visible, are white.

    Raises InvalidRequest for what is no PNG, JPEG or WebP file or has too many pixels; `what` names it there.

    Example:
        Request("a red apple", image=open_picture("sketch.png"))
    """
    return _on(_opened(source, what), "white")


def open_mask(source: str | Path | Image) -> Image:
    """A mask in RGB, turned as its camera was; transparent pixels are black: unpainted areas are kept.

    Raises InvalidRequest as `open_picture` does.
    """
    return _on(_opened(source, "mask"), "black")


def _opened(source: str | Path | Image, what: str) -> Image:
    """The picture of a file, or a copy of one that is open."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    if isinstance(source, Image.Image):
        _check_pixels(source, f"the {what}")
        return source.copy()
    name = f"{what} {str(source)!r}"
    try:
        if Path(source).exists() and not Path(source).is_file():
            # A pipe would be waited for without end.
            raise InvalidRequest(f"{name} is no file")
        with Image.open(source, formats=READABLE) as file:
            image: Image.Image = file
            _check_pixels(image, name)
            image.load()
            # In place: a copy of the largest picture would be 150 MB.
            ImageOps.exif_transpose(image, in_place=True)
            return image
    except UnidentifiedImageError:
        raise InvalidRequest(f"{name} is no picture that can be read: {', '.join(READABLE)}") from None
    except InvalidRequest:
        raise  # It is a ValueError too.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InvalidRequest(f"{name} cannot be read ({reason})") from error


def _check_pixels(image: Image, name: str) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise InvalidRequest(f"{name} has {image.width}x{image.height} pixels; at most {MAX_PIXELS // 1_000_000} MP")


def _on(image: Image, background: str) -> Image:
    """RGB of a picture on a background, a strip at a time."""
    from PIL import Image as Images

    if image.mode.startswith("I") or image.mode == "F":
        return Images.fromarray(_eight_bits(np.asarray(image))).convert("RGB")
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if "A" not in image.getbands() and "a" not in image.getbands() and "transparency" not in image.info:
        return image.convert("RGB")
    made = Images.new("RGB", image.size)
    for top in range(0, image.height, STRIP):
        box = (0, top, image.width, min(image.height, top + STRIP))
        strip = image.crop(box).convert("RGBA")
        made.paste(Images.alpha_composite(Images.new("RGBA", strip.size, background), strip).convert("RGB"), (0, top))
    return made


def _eight_bits(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Grey of 16 bits, as depth maps are, in 8: 65535 is white. Pillow would make all above 255 white."""
    return np.asarray(np.round(np.clip(values, 0, 65535) / 257), np.uint8)
