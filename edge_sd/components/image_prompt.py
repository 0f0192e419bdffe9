"""Pictures beside the words: what a UNet with an IP-Adapter (Ye et al. 2023, arXiv:2308.06721) is bound.

Its cross-attention has keys and values of its own for tokens of pictures: softmax(Q K') V' times a weight is added to
what it attends to in the text. With the weight 0 the UNet is the one that it was without an adapter.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..bundle.facts import Facts
from .base import Array

# Inputs of the UNet: tokens of all pictures, one after the other, [B, N, C], and their weight, [1].
TOKENS, SCALE = "image_tokens", "image_scale"
# Input and second output of the image encoder: a picture as CLIP sees it [1, 3, S, S], tokens of no picture [1, N, C].
PIXELS, BLANK = "pixel_values", "blank_tokens"


def shapes_of_pictures(facts: Facts, rows: int, pictures: int = 1) -> dict[str, tuple[int, ...]]:
    """The shapes of these inputs for so many pictures; those of no picture are as for one."""
    if not facts.image_prompt:
        return {}
    return {TOKENS: (rows, max(pictures, 1) * facts.image_tokens, facts.text_width), SCALE: (1,)}


def unseen(facts: Facts, rows: int) -> dict[str, Array]:
    """What is bound where no picture is shown."""
    return {name: np.zeros(shape, np.float32) for name, shape in shapes_of_pictures(facts, rows).items()}


def seen(pictures: Sequence[tuple[Array, Array]], weight: float, rows: int, without: int) -> dict[str, Array]:
    """What is bound for pictures, each its tokens and those of no picture; the first `without` rows get the latter."""
    tokens, blank = (np.concatenate(each, axis=1) for each in zip(*pictures, strict=True))
    told = np.concatenate([blank] * without + [tokens] * (rows - without))
    return {TOKENS: np.ascontiguousarray(told, np.float32), SCALE: np.array([weight], np.float32)}
