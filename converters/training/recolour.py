"""Colour words bind to things: a drawing in another colour than its own ("blue bird", "green fire engine").

What changes is hue, chroma and lightness of the drawing's dominant colour and of all that is near it in hue; shading
stays, as differences of lightness, and so do outlines, eyes and wheels. All is done in CIELAB, where equal steps look
equal.
"""

from __future__ import annotations

import hashlib
import warnings

import numpy as np
from numpy.typing import NDArray

# The words are those of the backgrounds; things are drawn in purer colours than they are.
COLOURS = {
    "white": (245, 245, 245),
    "black": (42, 42, 46),
    "gray": (142, 146, 152),
    "red": (220, 48, 46),
    "orange": (245, 138, 38),
    "yellow": (250, 212, 62),
    "green": (66, 168, 76),
    "teal": (38, 168, 168),
    "blue": (52, 112, 222),
    "purple": (140, 82, 200),
    "pink": (245, 142, 190),
    "brown": (140, 92, 56),
}
# Below this chroma a colour has no hue to speak of.
GREY = 14.0
# Degrees of hue up to which all of a pixel changes, and from which nothing does.
NEAR_HUE, FAR_HUE = 32.0, 55.0
# The share of a drawing that has to change, or its new colour would not be what one names it by.
LEAST_SHARE = 0.35


def lab_of(rgb: NDArray[np.uint8]) -> NDArray[np.float64]:
    """CIELAB (D65) of sRGB bytes, float64 [..., 3]."""
    from skimage.color import rgb2lab

    lab: NDArray[np.float64] = rgb2lab(rgb)
    return lab


def _rgb_of(lab: NDArray[np.float64]) -> NDArray[np.uint8]:
    """sRGB bytes of CIELAB; what no screen can show is shown as near as it can."""
    from skimage.color import lab2rgb

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Conversion from CIE-LAB", UserWarning)
        rgb: NDArray[np.uint8] = (np.clip(lab2rgb(lab), 0, 1) * 255).round().astype(np.uint8)
    return rgb


def dominant_colour(rgb: NDArray[np.uint8], inside: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The commonest colour of `rgb` ([H, W, 3]) where `inside`, in CIELAB, float64 [3].

    The fullest cell of a coarse grid of colours, moved to the mean of what is within 20 of it until it rests.
    """
    lab = lab_of(rgb[inside][None])[0]
    if not len(lab):
        return np.zeros(3)
    cells, which = np.unique((lab // 12).astype(int), axis=0, return_inverse=True)
    centre = lab[which.ravel() == np.bincount(which.ravel(), minlength=len(cells)).argmax()].mean(0)
    for _ in range(5):
        near = np.linalg.norm(lab - centre, axis=1) < 20
        centre = lab[near].mean(0) if near.any() else centre
    return np.asarray(centre)


def _share_of_change(lab: NDArray[np.float64], own: NDArray[np.float64]) -> NDArray[np.float64]:
    """How much of each pixel changes, 0 to 1: what has the hue of `own`, or, where that is grey, its lightness."""
    chroma = np.hypot(lab[..., 1], lab[..., 2])
    if np.hypot(own[1], own[2]) < GREY:
        return np.asarray((chroma < GREY) & (np.abs(lab[..., 0] - own[0]) < 30), np.float64)
    turn = np.arctan2(lab[..., 2], lab[..., 1]) - np.arctan2(own[2], own[1])
    away = np.abs(np.rad2deg((turn + np.pi) % (2 * np.pi) - np.pi))
    near = np.clip((FAR_HUE - away) / (FAR_HUE - NEAR_HUE), 0, 1)
    return np.asarray(near * np.clip((chroma - 6) / 8, 0, 1))


def recoloured(rgba: NDArray[np.uint8], colour: str) -> NDArray[np.uint8] | None:
    """The drawing ([H, W, 4]) in `colour`; None where too little of it has one colour for the name to be true."""
    inside = rgba[..., 3] > 127
    lab = lab_of(rgba[..., :3])
    own = dominant_colour(rgba[..., :3], inside)
    change = _share_of_change(lab, own)
    if not inside.any() or change[inside].mean() < LEAST_SHARE:
        return None
    wanted = lab_of(np.array([[COLOURS[colour]]], np.uint8))[0, 0]
    shade = lab[..., 0] - own[0]
    # Light and dark sides keep some of their difference, less of it where there is no room above or below.
    room = np.where(shade > 0, min(1.0, (100 - wanted[0]) / 30), min(1.0, wanted[0] / 40))
    new = np.empty_like(lab)
    new[..., 0] = wanted[0] + 0.8 * shade * room
    strength = np.hypot(lab[..., 1], lab[..., 2]) / max(float(np.hypot(own[1], own[2])), GREY)
    depth = np.clip(strength, 0.5, 1.15) if np.hypot(own[1], own[2]) >= GREY else np.ones_like(strength)
    new[..., 1:] = wanted[1:] * depth[..., None]
    mixed = lab + change[..., None] * (new - lab)
    result: NDArray[np.uint8] = rgba.copy()
    result[..., :3] = _rgb_of(mixed)
    return result


def has_colour_word(label: str) -> bool:
    """Whether a name says a colour itself ("red apple"), so that another before it would contradict it."""
    return bool(set(label.split()) & set(COLOURS))


def is_held_out_colour(colour: str, label: str) -> bool:
    """Whether a concept is never shown in this colour (10 %, by a hash)."""
    return hashlib.sha256(f"{colour} {label}".encode()).digest()[0] < 26
