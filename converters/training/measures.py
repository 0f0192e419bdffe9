"""What pixels say without a network: a picture's background, the things before it, their colours, their variety.

No generator has seen these sums, and none was trained against them.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from .recolour import COLOURS, dominant_colour, lab_of

Pixels = NDArray[np.uint8]
# From this colour difference on a pixel is not background.
DIFFERENT = 18.0
# The smallest thing that counts, as a share of the picture; smaller are sparks and crumbs.
LEAST_THING = 0.012
BORDER = 3


def background_colour(rgb: Pixels) -> NDArray[np.float64]:
    """The median colour of the picture's border, in CIELAB."""
    lab = lab_of(rgb)
    edge = np.ones(rgb.shape[:2], bool)
    edge[BORDER:-BORDER, BORDER:-BORDER] = False
    return np.asarray(np.median(lab[edge], axis=0))


def foreground(rgb: Pixels) -> NDArray[np.bool_]:
    """Where the picture is not its background's colour, bool [H, W]."""
    away = np.linalg.norm(lab_of(rgb) - background_colour(rgb), axis=2)
    return np.asarray(away > DIFFERENT)


def things(rgb: Pixels) -> list[tuple[slice, slice]]:
    """The boxes of the separate things before a plain background, largest first.

    Parts of a drawing that nearly touch are one thing: gaps of up to four pixels are closed.
    """
    from scipy import ndimage

    closed = ndimage.binary_closing(np.pad(foreground(rgb), 4), iterations=2)[4:-4, 4:-4]
    labelled, count = ndimage.label(closed, structure=np.ones((3, 3)))
    boxes = ndimage.find_objects(labelled)
    sizes = [int((labelled == n + 1).sum()) for n in range(count)]
    order = sorted(range(count), key=lambda n: -sizes[n])
    return [boxes[n] for n in order if sizes[n] >= LEAST_THING * closed.size]


def difference(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """CIEDE2000 of two colours in CIELAB; 1 is about what an eye can tell."""
    from skimage.color import deltaE_ciede2000

    return float(deltaE_ciede2000(a, b))


def colour_name(rgb: Pixels) -> str:
    """Which of COLOURS the thing's dominant colour is nearest to."""
    found = dominant_colour(rgb, foreground(rgb))
    table = {name: lab_of(np.array([[value]], np.uint8))[0, 0] for name, value in COLOURS.items()}
    return min(table, key=lambda name: difference(found, table[name]))


def unevenness(rgb: Pixels, inside: NDArray[np.bool_]) -> float:
    """The standard deviation of background pixels, in grey levels of 255: what a mottled background has.

    `inside`: where the drawing is. Pixels near it and those of the picture's thing itself don't count.
    """
    from scipy import ndimage

    grey = rgb.astype(np.float64).mean(2)
    bare = ~ndimage.binary_dilation(inside | foreground(rgb), iterations=4)
    return float(grey[bare].std()) if bare.any() else 0.0


def variety(features: NDArray[np.float32]) -> float:
    """The mean distance of N pictures' unit vectors from one another, [N, D]."""
    return float(np.mean([np.linalg.norm(a - b) for a, b in combinations(features, 2)]))
