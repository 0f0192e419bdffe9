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
# Input of the image encoder: a picture as CLIP sees it [1, 3, S, S]. Its output is TOKENS [2, N, C], of no picture and
# of this one.
PIXELS = "pixel_values"


def shapes_of_pictures(facts: Facts, rows: int, pictures: int = 1) -> dict[str, tuple[int, ...]]:
    """The shapes of these inputs for so many pictures; those of no picture are as for one."""
    if not facts.image_prompt:
        return {}
    return {TOKENS: (rows, max(pictures, 1) * facts.image_tokens, facts.text_width), SCALE: (1,)}


def unseen(facts: Facts, rows: int) -> dict[str, Array]:
    """What is bound where no picture is shown."""
    return {name: np.zeros(shape, np.float32) for name, shape in shapes_of_pictures(facts, rows).items()}


def seen(pictures: Sequence[Array], weight: float, rows: int, without: int) -> dict[str, Array]:
    """What is bound for pictures, as the image encoder returned each; the first `without` rows are shown none."""
    blank, tokens = np.split(np.concatenate(pictures, axis=1), 2)
    told = np.concatenate([blank] * without + [tokens] * (rows - without))
    return {TOKENS: np.ascontiguousarray(told, np.float32), SCALE: np.array([weight], np.float32)}
