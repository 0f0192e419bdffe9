"""The safety checker of Stable Diffusion's pipelines: a CLIP that looks at a picture and knows 17 concepts.

Its component returns, for each concept, how much nearer the picture is to it than its threshold; a verdict is
arithmetic on these (Rando et al. 2022, arXiv:2210.04610, describe it). What is flagged is blacked out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidModel
from ..images.clip import SIDE

# A picture near a special concept gets this much closer to every other concept.
ADJUSTMENT = 0.01


def side_of(graph: Path) -> int:
    """Pixels a side that a checker looks at: its package says it, or the config.json beside. Raises InvalidModel."""
    from ..bundle.mlpackage.compiled import SUFFIXES, inputs
    from ..files import read_json

    if graph.suffix in SUFFIXES:
        ports = inputs(graph)
        if "clip_input" not in ports:
            raise InvalidModel(f"{graph} has no input clip_input; it is not in Apple's layout")
        return ports["clip_input"].shape[-1]
    vision = read_json(graph.parent / "config.json").get("vision_config")
    return int(vision.get("image_size", SIDE)) if isinstance(vision, dict) else SIDE


def adjusted(scores: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float32]:
    """The concepts' scores [1, 17], all of them higher where the picture is near a special concept.

    special_scores [1, 3], concept_scores [1, 17]: cosine similarity less the concept's threshold, to three decimals.
    """
    special = any(round(float(score), 3) > 0 for score in scores["special_scores"][0])
    return np.asarray(scores["concept_scores"] + np.float32(ADJUSTMENT if special else 0.0))


def is_flagged(scores: Mapping[str, NDArray[np.float32]]) -> bool:
    """Whether a picture is to be blacked out, by what the component returned for it.

    Either what `adjusted` takes, or adjusted_scores, what it returns, where the component does that itself.
    """
    final = scores["adjusted_scores"] if "adjusted_scores" in scores else adjusted(scores)
    return any(round(float(score), 3) > 0 for score in final[0])
