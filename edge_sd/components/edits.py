"""Edits: changes of a component, made while it is loaded. The model's files stay as they are."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .lora import Lora, Unplaced


@dataclass(frozen=True)
class Shortcuts:
    """Optional UNet optimisations. A backend that lacks one ignores it.

    deep    it returns its `DEEP` features, and takes them back
    merge   keys and values of the finest self-attention are averaged over 2 x 2 tokens
    apart   it is also called with the prompt's half of the batch alone
    lean    as little of it as possible is in memory at a time
    """

    deep: bool = False
    merge: bool = False
    apart: bool = False
    lean: bool = False


PLAIN = Shortcuts()


@dataclass(frozen=True)
class Edits:
    """Changes of one component; two are equal if their `key` and numbers are.

    key        the hashes of all that came out of files
    clip_skip  a text encoder stops this many layers before its end, less one: 1 is the last layer, 2 the last but one,
               as AUTOMATIC1111 counts; its final norm is applied all the same
    vectors    float32 [n, C]: what the ids from text.textual_inversion.FIRST on stand for
    shortcuts  optional UNet optimisations
    loras      differences that are added to weights, each with its factor
    part       the component that `loras` change: "unet", "text_encoder", …
    states     "hidden_states.N" where hidden states are attended to, as in SDXL, and not those of the training: for
               encoders that return them of one layer
    unplaced   where loading records which modules of `loras` the component lacks
    """

    key: str = ""
    clip_skip: int = 1
    vectors: NDArray[np.float32] | None = field(default=None, compare=False)
    loras: tuple[tuple[Lora, float], ...] = ()
    part: str = ""
    shortcuts: Shortcuts = PLAIN
    states: str = ""
    unplaced: Unplaced | None = field(default=None, compare=False, repr=False)


NONE = Edits()
