"""What the UNet is shown: each trained drawing in several ways, in other colours than its own, and in scenes.

What differs from the drawing as it is, is said in half of the captions ("mirrored", "off center", "small"). Always
said, it would be an option that nobody asks for, and all seeds of one prompt would be one picture; never said, the
network would draw the average of all places, a blur (Karras et al. 2020 on leaky augmentation).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .data import BACKGROUNDS, SIZE, STYLES, Artwork, core_vocabulary
from .recolour import COLOURS, has_colour_word, is_held_out_colour, recoloured
from .scenes import random_scene, shrunk

# Ways in which each drawing is shown, and shares of those that are mirrored, moved and shrunk.
VARIANTS = 4
MIRRORED, MOVED, SMALL = 0.2, 0.2, 0.12
SAID = 0.5
# Drawings in another colour, and scenes.
RECOLOURED, SCENES = 2000, 2000


class Lesson(Protocol):
    """A picture, float32 [3, 128, 128] in [-1, 1], and one of its wordings; one in ten is empty."""

    def picture(self, artwork: Artwork) -> NDArray[np.float32]: ...
    def caption(self, artwork: Artwork, rng: np.random.Generator) -> str: ...


@dataclass(frozen=True)
class Shown:
    """One drawing on a plain colour.

    background: the colour's name; colour: RGB of exactly this one; shift: (y, x) in pixels; scale: of its size;
    adjective: the colour that it is drawn in, "" for its own.
    """

    label: str
    style: str
    background: str
    colour: tuple[float, float, float]
    mirrored: bool = False
    shift: tuple[int, int] = (0, 0)
    scale: float = 1.0
    adjective: str = ""

    def picture(self, artwork: Artwork) -> NDArray[np.float32]:
        rgba = artwork.drawing(self.label, self.style)
        if self.adjective:
            painted = recoloured(rgba, self.adjective)
            rgba = rgba if painted is None else painted
        side = round(SIZE * self.scale)
        drawing = shrunk(rgba[:, ::-1] if self.mirrored else rgba, side)
        whole = np.zeros((SIZE, SIZE, 4), np.float32)
        top, left = ((SIZE - side) // 2 + by for by in self.shift)
        rows, columns = (slice(max(at, 0), min(at + side, SIZE)) for at in (top, left))
        whole[rows, columns] = drawing[
            rows.start - top : rows.stop - top, columns.start - left : columns.stop - left
        ]  # fmt: skip
        rgb = whole[..., :3] + np.asarray(self.colour, np.float32) * (1 - whole[..., 3:] / 255)
        return np.ascontiguousarray((rgb / 127.5 - 1).transpose(2, 0, 1))

    def caption(self, artwork: Artwork, rng: np.random.Generator) -> str:
        done = {"mirrored": self.mirrored, "off center": self.shift != (0, 0), "small": self.scale < 1}
        changes = [word for word, true in done.items() if true and rng.random() < SAID]
        return artwork.caption(self.label, self.style, self.background, rng, changes, self.adjective)


def shown(label: str, style: str, rng: np.random.Generator, adjective: str = "") -> Shown:
    """The drawing in one of its ways: in its place or not, on one of the backgrounds, four in ten times on white."""
    names = list(BACKGROUNDS)
    background = "white" if rng.random() < 0.35 else str(rng.choice(names))
    colour = np.clip(np.asarray(BACKGROUNDS[background]) + rng.normal(0, 4, 3), 0, 255)
    y, x = (int(v) for v in rng.integers(-12, 13, 2))
    return Shown(
        label, style, background, (float(colour[0]), float(colour[1]), float(colour[2])),
        mirrored=bool(rng.random() < MIRRORED),
        shift=(y, x) if rng.random() < MOVED else (0, 0),
        scale=float(rng.uniform(0.55, 0.85)) if rng.random() < SMALL else 1.0,
        adjective=adjective,
    )  # fmt: skip


def colourable(artwork: Artwork, label: str, style: str) -> bool:
    """Whether the drawing has one colour that can be another, and no colour in its name."""
    return not has_colour_word(label) and recoloured(artwork.drawing(label, style), "red") is not None


def plan(artwork: Artwork, seed: int) -> list[Lesson]:
    """All lessons of a training; no held-out drawing, pair, count or colour is among them."""
    rng = np.random.default_rng(seed)
    pairs = list(artwork.pairs())
    lessons: list[Lesson] = [shown(label, style, rng) for label, style in pairs for _ in range(VARIANTS)]
    paintable = [pair for pair in pairs if colourable(artwork, *pair)]
    for n in range(RECOLOURED if paintable else 0):
        label, style = paintable[n % len(paintable)]
        colours = [colour for colour in COLOURS if not is_held_out_colour(colour, label)]
        if colours:
            lessons.append(shown(label, style, rng, str(rng.choice(colours))))
    if len(core_vocabulary()) > 1 and len(STYLES) > 1:
        lessons += [random_scene(rng) for _ in range(SCENES)]
    return lessons
