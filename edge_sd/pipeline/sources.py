"""The pictures of a request, opened: what it starts from."""

from __future__ import annotations

from typing import Any

from ..images.canvas import Start, around, check_mask, content_hash, extended
from ..images.opening import open_mask, open_picture
from .request import Request


def open_start(request: Request) -> tuple[Start, dict[str, Any]] | None:
    """The canvas of `request` and the hashes of its pictures. None for text to image. Raises InvalidRequest."""
    if request.image is None:
        return None
    image = open_picture(request.image, "image")
    hashes: dict[str, Any] = {"image": content_hash(image)}
    mask = None
    if request.mask is not None:
        opened = open_mask(request.mask)
        hashes["mask"] = content_hash(opened)
        mask = opened.convert("L")
        check_mask(image, mask)
    if request.extend is not None:
        image, mask = extended(image, mask, request.extend)
    box = None
    if request.mask_padding is not None:
        assert mask is not None
        box = around(mask, request.mask_padding)
    # Where no size was asked for, an image comes back as large as it is, with all outside of the mask as it was.
    whole = mask is not None and request.width is None and request.height is None
    return Start(image, mask, box, request.extend is not None or box is not None or whole), hashes
