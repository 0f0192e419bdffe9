"""Places of tokens as the cosines and sines that turn queries and keys (RoPE, Su et al. 2021, arXiv:2104.09864).

Apple's programs of FLUX.2 take these tables and no places. They are made here of float64 angles, as diffusers makes
them: at place 500 the angles of float16 are wrong by half a turn.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..bundle.apple_layout import TABLES
from .base import Array, Shapes

COSINES, SINES = TABLES
# Of FLUX.2: the base of its frequencies. Each axis of a place has as many numbers of a head as each other.
THETA = 2000.0
AXES = 4


def turned(inputs: Mapping[str, Array], width: int) -> dict[str, Array]:
    """Inputs with float32 tables [S + N, width] in place of `txt_ids` [1, S, 4] and `img_ids` [1, N, 4]."""
    rest = {name: value for name, value in inputs.items() if name not in ("txt_ids", "img_ids")}
    places = np.concatenate([inputs["txt_ids"][0], inputs["img_ids"][0]]).astype(np.float64)
    own = width // AXES
    frequencies = THETA ** (-np.arange(0, own, 2) / own)
    angles = (places[:, :, None] * frequencies).reshape(len(places), -1).repeat(2, axis=1)
    return {**rest, COSINES: np.cos(angles).astype(np.float32), SINES: np.sin(angles).astype(np.float32)}


def tabled(shapes: Shapes, width: int) -> dict[str, tuple[int, ...]]:
    """The shapes of `turned` inputs for those of inputs with places."""
    rest = {name: shape for name, shape in shapes.items() if name not in ("txt_ids", "img_ids")}
    table = shapes["txt_ids"][1] + shapes["img_ids"][1], width
    return {**rest, COSINES: table, SINES: table}
