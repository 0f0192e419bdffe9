"""ComfyUI's pictures: IMAGE is float32 [B, H, W, C] of 0 to 1, MASK float32 [B, H, W], 1 where it is drawn anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_sd.errors import InvalidRequest

if TYPE_CHECKING:
    from PIL.Image import Image


def from_image(images: Any, n: int) -> Image:
    """Picture `n` of an IMAGE."""
    return _picture(images[n])


def from_mask(masks: Any, n: int) -> Image:
    """Picture `n` of a MASK."""
    return _picture(masks[n])


def to_images(pictures: Sequence[Image]) -> Any:
    """An IMAGE of pictures of one size. Raises InvalidRequest where they have several."""
    import torch

    sizes = {each.size for each in pictures}
    if len(sizes) > 1:
        raise InvalidRequest(f"the pictures have {len(sizes)} sizes; ComfyUI takes one: give width and height")
    arrays = [np.asarray(each.convert("RGB"), np.float32) / 255 for each in pictures]
    return torch.from_numpy(np.stack(arrays))


def _picture(tensor: Any) -> Image:
    from PIL import Image

    return Image.fromarray(np.round(np.clip(tensor.cpu().numpy(), 0, 1) * 255).astype(np.uint8))
