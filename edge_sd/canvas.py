"""Canvas: the picture that a request starts from, and where it is drawn anew."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .errors import InvalidRequest
from .samplers import Denoise, Latents
from .schedule import Level

if TYPE_CHECKING:
    from PIL.Image import Image

# Decoders of a few kilobytes of PNG can ask for gigabytes.
MAX_PIXELS = 100_000_000
READABLE = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")


@dataclass(frozen=True)
class Canvas:
    """What a picture starts from.

    pixels   uint8 [H, W, 3]
    mask     where it is drawn anew, bool [H, W]; None is everywhere
    """

    pixels: NDArray[np.uint8]
    mask: NDArray[np.bool_] | None = None

    def latent_mask(self, factor: int) -> Latents | None:
        """1 for each latent that has a pixel of the mask under it, float32 [1, 1, H / factor, W / factor]."""
        if self.mask is None:
            return None
        height, width = self.mask.shape
        blocks = self.mask.reshape(height // factor, factor, width // factor, factor)
        touched: NDArray[np.bool_] = np.asarray(blocks.any(axis=(1, 3)))
        return touched[None, None].astype(np.float32)

    def paste(self, drawn: NDArray[np.uint8], blur: float) -> NDArray[np.uint8]:
        """`drawn` inside the mask and the picture itself outside, byte for byte, but for a seam of `blur` pixels."""
        if self.mask is None:
            return drawn
        from PIL import Image, ImageFilter

        mask = Image.fromarray(self.mask.astype(np.uint8) * 255).filter(ImageFilter.GaussianBlur(blur))
        return np.asarray(Image.composite(Image.fromarray(drawn), Image.fromarray(self.pixels), mask))


@dataclass(frozen=True)
class Inpainting:
    """A denoiser that knows the picture outside the mask: its x_0 is replaced there by the picture's latents.

    The samplers then keep  x = x_0 + sigma eps  there, with the noise that it began with, at every level.

    known   latents of the picture [1, C, h, w]
    mask    1 where the model draws, [1, 1, h, w]
    """

    denoise: Denoise
    known: Latents
    mask: Latents

    def __call__(self, x: Latents, level: Level) -> Latents:
        x_0: Latents = self.mask * self.denoise(x, level) + (1 - self.mask) * self.known
        return x_0


def open_picture(source: str | Path | Image, what: str) -> Image:
    """A picture in RGB, turned as its camera was. Raises InvalidRequest for what is none; `what` names it there."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    if isinstance(source, Image.Image):
        return source.convert("RGB")
    try:
        with Image.open(source, formats=READABLE) as image:
            if image.width * image.height > MAX_PIXELS:
                raise InvalidRequest(f"{what} {str(source)!r} has {image.width}x{image.height} pixels, too many")
            return _on_white(ImageOps.exif_transpose(image))
    except UnidentifiedImageError:
        raise InvalidRequest(f"{what} {str(source)!r} is no picture that can be read: {', '.join(READABLE)}") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InvalidRequest(f"{what} {str(source)!r} cannot be read ({reason})") from error


def _on_white(image: Image) -> Image:
    """Transparent pixels hold colours that nobody sees."""
    from PIL import Image as Images

    rgba = image.convert("RGBA")
    return Images.alpha_composite(Images.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def proportioned(size: tuple[int, int], area: int, multiple: int, limit: int) -> tuple[int, int]:
    """Width and height in the proportions of `size` with about `area` pixels, multiples of `multiple`, <= `limit`."""
    scale = math.sqrt(area / (size[0] * size[1]))
    width, height = (min(limit, max(1, round(side * scale / multiple)) * multiple) for side in size)
    return width, height


def make_canvas(image: Image, mask: Image | None, width: int, height: int) -> Canvas:
    """`image` and its mask, cut and scaled to width x height. Raises InvalidRequest for a mask that does not fit."""
    from PIL import Image as Images
    from PIL import ImageOps

    pixels = np.asarray(ImageOps.fit(image, (width, height), Images.Resampling.LANCZOS))
    if mask is None:
        return Canvas(pixels)
    if mask.size != image.size:
        raise InvalidRequest(f"the mask has {_size(mask)} pixels, the image {_size(image)}; make them equal")
    inside = np.asarray(ImageOps.fit(mask.convert("L"), (width, height), Images.Resampling.BILINEAR)) >= 128
    if not inside.any():
        raise InvalidRequest("the mask is all black; white is where the picture is drawn anew")
    return Canvas(pixels, inside)


def _size(image: Image) -> str:
    return f"{image.width}x{image.height}"


def content_hash(image: Image) -> str:
    """Ten hex digits that name a picture's pixels; its path is nobody's business."""
    parts: Iterator[bytes] = iter((repr(image.size).encode(), image.tobytes()))
    return hashlib.sha256(b"".join(parts)).hexdigest()[:10]
