"""Canvas: the picture that a request starts from, and where it is drawn anew; a part of a larger picture, or all."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidRequest
from ..sampling.samplers import Latents
from .files import MAX_PIXELS

if TYPE_CHECKING:
    from PIL.Image import Image


# An extended picture of up to so many times the model's own number of pixels is drawn at its own size.
NEAR = 2.25
# A note is given where the pasted part is enlarged more than this.
ENLARGED = 1.5
# A note is given where at least this share of a picture is cropped.
CROPPED = 0.005


Box = tuple[int, int, int, int]  # left, top, right, bottom


LOST = "the mask's white is lost at this size; make it larger, or give --mask-padding"


@dataclass(frozen=True)
class Frame:
    """The whole picture, pixels [H, W, 3] with its mask [H, W], of which a canvas is what lies in `box`, scaled."""

    pixels: NDArray[np.uint8]
    mask: NDArray[np.bool_]
    box: Box


@dataclass(frozen=True)
class Canvas:
    """What a picture starts from.

    pixels   uint8 [H, W, 3]
    mask     where it is drawn anew, bool [H, W]; None is everywhere
    frame    the picture that the result is pasted into; None where the canvas is the whole picture
    notes    what was lost on the way here
    """

    pixels: NDArray[np.uint8]
    mask: NDArray[np.bool_] | None = None
    frame: Frame | None = None
    notes: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        """Pixels across of the picture that the mask is blended in: the whole, or the part that is drawn."""
        whole = self.frame is not None and self.frame.box == (0, 0, *self.frame.pixels.shape[1::-1])
        return int(self.frame.pixels.shape[1] if self.frame is not None and whole else self.pixels.shape[1])

    def latent_mask(self, factor: int) -> Latents | None:
        """1 for each latent that has a pixel of the mask under it, float32 [1, 1, H / factor, W / factor]."""
        if self.mask is None:
            return None
        height, width = self.mask.shape
        blocks = self.mask.reshape(height // factor, factor, width // factor, factor)
        touched: NDArray[np.bool_] = np.asarray(blocks.any(axis=(1, 3)))
        return touched[None, None].astype(np.float32)

    def finish(self, drawn: NDArray[np.uint8], blur: float, colour: bool) -> NDArray[np.uint8]:
        """The result made of what was drawn: recoloured, pasted, or as it is."""
        return self.paste(self.recolour(drawn) if colour else drawn, blur)

    def paste(self, drawn: NDArray[np.uint8], blur: float) -> NDArray[np.uint8]:
        """`drawn` inside the mask and the picture itself outside, byte for byte, but for a seam of `blur` pixels."""
        if self.mask is None:
            return drawn
        from PIL import Image, ImageFilter

        whole = self.frame or Frame(self.pixels, self.mask, (0, 0, self.pixels.shape[1], self.pixels.shape[0]))
        left, top, right, bottom = whole.box
        before = Image.fromarray(whole.pixels)
        after = before.copy()
        after.paste(Image.fromarray(drawn).resize((right - left, bottom - top), Image.Resampling.LANCZOS), (left, top))
        mask = Image.fromarray(whole.mask.astype(np.uint8) * 255).filter(ImageFilter.GaussianBlur(blur))
        return np.asarray(Image.composite(after, before, mask))

    def recolour(self, drawn: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Chroma of `drawn`, luma of the canvas (BT.601)."""
        from PIL import Image

        luma = Image.fromarray(self.pixels).convert("YCbCr").getchannel("Y")
        _, blue, red = Image.fromarray(drawn).convert("YCbCr").split()
        return np.asarray(Image.merge("YCbCr", (luma, blue, red)).convert("RGB"))


def proportioned(size: tuple[int, int], area: int, multiple: int, limit: int) -> tuple[int, int]:
    """Width and height for a picture of `size`, multiples of `multiple` up to `limit`, of at most `area` pixels.

    Both sides are chosen together: of all such pairs the one that crops least, where a tenth fewer pixels cost as much
    as 1 % that is cropped.

    Example: proportioned((640, 480), 128 * 128, 32, 512) is (128, 96), which crops nothing.
    """
    ratio = size[0] / size[1]

    def cost(pair: tuple[int, int]) -> float:
        return cropped(size, pair) + (1 - pair[0] * pair[1] / area) / 10

    pairs = []
    for width in range(multiple, limit + 1, multiple):
        below = int(width / ratio / multiple) * multiple
        pairs += [(width, height) for height in (below, below + multiple) if multiple <= height <= limit]
    fitting = [pair for pair in pairs if pair[0] * pair[1] <= area]
    # A narrow picture, or a model of few pixels: nothing fits, and the least is taken.
    return min(fitting, key=cost) if fitting else (multiple, multiple)


def cropped(size: tuple[int, int], to: tuple[int, int]) -> float:
    """The share of a picture of `size` that is cut to have the proportions of `to`."""
    ratio = size[0] * to[1] / (size[1] * to[0])
    return 1 - min(ratio, 1 / ratio)


@dataclass(frozen=True)
class Start:
    """The pictures that a request starts from, opened.

    image    as large as the result, RGB
    mask     of its size, white where it is drawn anew; None is everywhere
    box      the part of it that the model is shown; None is all
    framed   whether the rest of the image is put around what was drawn
    """

    image: Image
    mask: Image | None = None
    box: Box | None = None
    framed: bool = False

    def size(self, area: int, multiple: int, limit: int) -> tuple[int, int]:
        """Width and height to draw at: about `area` pixels, or an extended picture's own size where that is near."""
        left, top, right, bottom = self.box or (0, 0, *self.image.size)
        sides = right - left, bottom - top
        own = tuple(-side // multiple * -multiple for side in sides)
        if self.framed and self.box is None and max(own) <= limit and own[0] * own[1] <= NEAR * area:
            return own[0], own[1]
        return proportioned(sides, area, multiple, limit)

    def canvas(self, width: int, height: int) -> Canvas:
        """What lies in the box, cut and scaled to width x height."""
        if not self.framed:
            return make_canvas(self.image, self.mask, width, height)
        from PIL import Image as Images

        assert self.mask is not None
        whole = (0, 0, *self.image.size)
        box = whole if self.box is None else grown(self.box, width / height, self.image.size)
        pixels = np.asarray(self.image.crop(box).resize((width, height), Images.Resampling.LANCZOS))
        inside = np.asarray(self.mask.crop(box).resize((width, height), Images.Resampling.BILINEAR)) >= 128
        if not inside.any():
            raise InvalidRequest(LOST)
        times = max((box[2] - box[0]) / width, (box[3] - box[1]) / height)
        notes: tuple[str, ...] = ()
        if times > ENLARGED:
            hint = "" if self.box is not None else "; mask_padding draws the mask's surroundings alone, at more detail"
            notes = (f"what is new was drawn at {width}x{height} and enlarged {times:.1f} times{hint}",)
        frame = Frame(np.asarray(self.image), np.asarray(self.mask) >= 128, box)
        return Canvas(pixels, inside, frame, notes)


def extended(image: Image, mask: Image | None, sides: Sequence[int]) -> tuple[Image, Image]:
    """The image with (left, right, top, bottom) pixels more, its edges repeated, and a mask of those and `mask`."""
    from PIL import Image as Images

    left, right, top, bottom = sides
    width, height = image.width + left + right, image.height + top + bottom
    if width * height > MAX_PIXELS:
        raise InvalidRequest(f"an image extended to {width}x{height} pixels is too many")
    margins = ((top, bottom), (left, right))
    pixels = np.pad(np.asarray(image), (*margins, (0, 0)), mode="edge")
    old = np.zeros((image.height, image.width), np.uint8) if mask is None else np.asarray(mask)
    return Images.fromarray(pixels), Images.fromarray(np.pad(old, margins, constant_values=255))


def around(mask: Image, padding: int) -> Box:
    """The smallest box around the white of `mask`, and `padding` pixels more where the picture has them."""
    found = mask.point([0] * 128 + [255] * 128).getbbox()
    assert found is not None
    left, top, right, bottom = found
    return (
        max(0, left - padding), max(0, top - padding),
        min(mask.width, right + padding), min(mask.height, bottom + padding),
    )  # fmt: skip


def grown(box: Box, ratio: float, size: tuple[int, int]) -> Box:
    """`box` made larger to `ratio`, width to height, as far as a picture of `size` has room, about its middle."""
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    width, height = max(width, min(size[0], round(height * ratio))), max(height, min(size[1], round(width / ratio)))
    left = min(max(0, (left + right - width) // 2), size[0] - width)
    top = min(max(0, (top + bottom - height) // 2), size[1] - height)
    return left, top, left + width, top + height


def check_mask(image: Image, mask: Image) -> None:
    """Raise InvalidRequest for a mask of another size than its image, or without white."""
    if mask.size != image.size:
        raise InvalidRequest(f"the mask has {_size(mask)} pixels, the image {_size(image)}; make them equal")
    if np.asarray(mask).max() < 128:
        raise InvalidRequest("the mask is all black; white is where the picture is drawn anew")


def grain(side: int, factor: int) -> int:
    """Pixels of which sides are best multiples, for a model whose own are `side`: converted UNets halve latents without
    a remainder, three times in Stable Diffusion, less often in smaller ones."""
    pixels = factor
    while pixels < 8 * factor and side % (8 * pixels) == 0:
        pixels *= 2
    return pixels


def make_canvas(image: Image, mask: Image | None, width: int, height: int) -> Canvas:
    """`image` and its mask, cut and scaled to width x height. Raises InvalidRequest for a mask that does not fit."""
    from PIL import Image as Images
    from PIL import ImageOps

    pixels = np.asarray(ImageOps.fit(image, (width, height), Images.Resampling.LANCZOS))
    share = cropped(image.size, (width, height))
    notes = (f"{share:.0%} of the image was cut to fit {width}x{height}",) if share > CROPPED else ()
    if mask is None:
        return Canvas(pixels, notes=notes)
    check_mask(image, mask.convert("L"))
    inside = np.asarray(ImageOps.fit(mask.convert("L"), (width, height), Images.Resampling.BILINEAR)) >= 128
    if not inside.any():
        raise InvalidRequest(LOST)
    return Canvas(pixels, inside, notes=notes)


def _size(image: Image) -> str:
    return f"{image.width}x{image.height}"


def content_hash(image: Image) -> str:
    """First ten hex digits of the hash of a picture's pixels. Its path is not recorded."""
    parts: Iterator[bytes] = iter((repr(image.size).encode(), image.tobytes()))
    return hashlib.sha256(b"".join(parts)).hexdigest()[:10]
