"""The pictures of a request, opened: what it starts from."""

from __future__ import annotations

from typing import Any

from ..images.canvas import Start, around, check_mask, content_hash, extended, open_picture
from .request import Request


def open_start(request: Request) -> tuple[Start, dict[str, Any]] | None:
    """The canvas of `request` and the hashes of its pictures. None for text to image. Raises InvalidRequest."""
    if request.image is None:
        return None
    image = open_picture(request.image, "image")
    hashes: dict[str, Any] = {"image": content_hash(image)}
    mask = None
    if request.mask is not None:
        opened = open_picture(request.mask, "mask")
        hashes["mask"] = content_hash(opened)
        mask = opened.convert("L")
        check_mask(image, mask)
    if request.extend is not None:
        image, mask = extended(image, mask, request.extend)
    box = None
    if request.mask_padding is not None:
        assert mask is not None
        box = around(mask, request.mask_padding)
    return Start(image, mask, box, request.extend is not None or box is not None), hashes
