"""Scenes composed of the drawings: two things, several of one, things on a ground; and the words people use for them.

A drawing that stands alone teaches what a thing looks like; only pictures of several can teach "a cat and a dog",
"three apples", "a small house under a large moon". They cost nothing: the drawings have no background, so they can be
put anywhere at any size.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .data import BACKGROUNDS, SIZE, STYLES, Artwork, core_vocabulary, is_held_out, spoken_names
from .wordnet import plural

NUMBERS = ("one", "two", "three", "four")
# Centres (y, x) and side of 1 to 4 equal things; 126 pixels hold three in a row.
PLACES = {
    1: (((64, 64),), 96),
    2: (((64, 33), (64, 95)), 60),
    3: (((36, 64), (93, 34), (93, 94)), 56),
    4: (((34, 34), (34, 94), (94, 34), (94, 94)), 54),
}
SIDES = {"small": 40, "": 58, "large": 74}
GROUNDS = {"grass": "on grass", "sea": "on the sea", "night sky": "in the night sky", "gradient": "on a gradient"}
Arrangement = Literal["beside", "above"]


@dataclass(frozen=True)
class Thing:
    """One drawing of a scene: its concept, the middle (y, x) and the side of its square, in pixels."""

    label: str
    y: int
    x: int
    side: int

    def box(self) -> tuple[slice, slice]:
        """Where its square lies inside the picture."""
        top, left = self.y - self.side // 2, self.x - self.side // 2
        return slice(max(top, 0), min(top + self.side, SIZE)), slice(max(left, 0), min(left + self.side, SIZE))


@dataclass(frozen=True)
class Scene:
    """Things of one style before a colour's name or a ground's.

    `order`: how two things stand, the first left of the second or above it; None where there is one kind of thing.
    `sizes`: the word for each thing's size, "" for the usual.
    """

    things: tuple[Thing, ...]
    style: str
    ground: str
    order: Arrangement | None = None
    sizes: tuple[str, ...] = ()

    def picture(self, artwork: Artwork) -> NDArray[np.float32]:
        """The scene, float32 [3, 128, 128] in [-1, 1]; later things stand before earlier ones."""
        canvas = ground(self.ground)
        for thing in self.things:
            top, left = thing.y - thing.side // 2, thing.x - thing.side // 2
            rows, columns = thing.box()
            drawing = shrunk(artwork.drawing(thing.label, self.style), thing.side)
            drawing = drawing[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
            alpha = drawing[..., 3:].astype(np.float32) / 255
            canvas[rows, columns] = drawing[..., :3] + canvas[rows, columns] * (1 - alpha)
        return np.ascontiguousarray((canvas / 127.5 - 1).transpose(2, 0, 1))

    def caption(self, artwork: Artwork, rng: np.random.Generator) -> str:
        """One wording; one in ten is empty, which is what guidance needs."""
        if rng.random() < 0.1:
            return ""
        parts = [self.words(rng)]
        where = GROUNDS.get(self.ground)
        if where is not None:
            parts[0] += f" {where}"
        elif self.ground != "white" or rng.random() < 0.25:
            parts.append(f"{self.ground} background")
        if rng.random() < 0.7:
            parts.insert(int(rng.integers(1, len(parts) + 1)), f"{self.style} style")
        return ", ".join(parts)

    def words(self, rng: np.random.Generator) -> str:
        """What stands where, without style and ground."""
        first = self.things[0].label
        if self.order is None:
            return f"{NUMBERS[len(self.things) - 1]} {plural(name(first, rng))}" if len(self.things) > 1 else article(
                name(first, rng)
            )  # fmt: skip
        a, b = (article(f"{size} {name(thing.label, rng)}".strip())
                for thing, size in zip(self.things, self.sizes, strict=True))  # fmt: skip
        after, before = {
            "beside": (("to the left of", "left of"), ("to the right of", "right of")),
            "above": (("above", "over"), ("below", "under")),
        }[self.order]
        chance = rng.random()
        if chance < 0.4:
            # "and" says no order; what is read first mostly stands left or above.
            return f"{a} and {b}" if rng.random() < 0.8 else f"{b} and {a}"
        return f"{a} {rng.choice(after)} {b}" if chance < 0.7 else f"{b} {rng.choice(before)} {a}"


def name(label: str, rng: np.random.Generator) -> str:
    """One of the names that a concept has in captions."""
    return str(rng.choice(spoken_names(label)))


def article(phrase: str) -> str:
    """The phrase after "a" or "an"."""
    return ("an " if phrase[0].lower() in "aeiou" else "a ") + phrase


def shrunk(rgba: NDArray[np.uint8], side: int) -> NDArray[np.float32]:
    """The drawing at another size with its colours multiplied by their opacity, float32 [side, side, 4] in 0..255."""
    from PIL import Image

    # Premultiplied, so that what is transparent lends its colour to no edge.
    small = Image.fromarray(rgba).convert("RGBa").resize((side, side), Image.Resampling.LANCZOS)
    return np.asarray(small, np.float32)


def ground(which: str) -> NDArray[np.float32]:
    """A plain colour by its name, or one of GROUNDS; float32 [128, 128, 3] in 0..255."""
    canvas: NDArray[np.float32] = _ground(which).copy()
    return canvas


@lru_cache
def _ground(which: str) -> NDArray[np.float32]:
    if which in BACKGROUNDS:
        return np.broadcast_to(np.asarray(BACKGROUNDS[which], np.float32), (SIZE, SIZE, 3))
    rows = np.linspace(0, 1, SIZE, dtype=np.float32)[:, None, None]

    def blend(above: tuple[int, ...], below: tuple[int, ...]) -> NDArray[np.float32]:
        mixed = np.asarray(above, np.float32) * (1 - rows) + np.asarray(below, np.float32) * rows
        return np.array(np.broadcast_to(mixed, (SIZE, SIZE, 3)))

    if which == "night sky":
        canvas = blend((14, 18, 52), (44, 48, 104))
        spots = np.random.default_rng(0)
        for y, x in spots.integers(2, SIZE - 2, (40, 2)):
            canvas[y, x : x + int(spots.integers(1, 3))] = 235
        return canvas
    if which == "gradient":
        return blend((250, 190, 120), (190, 120, 210))
    canvas = blend((150, 205, 245), (215, 238, 252))
    horizon = {"grass": 84, "sea": 76}[which]
    colour, line = {"grass": ((96, 176, 80), (78, 152, 66)), "sea": ((56, 124, 200), (120, 176, 228))}[which]
    canvas[horizon:] = colour
    columns = np.arange(SIZE)
    for n, y in enumerate(range(horizon + 8, SIZE - 2, 11)):
        wave = y + np.round(1.5 * np.sin((columns + 17 * n) / 6)).astype(int)
        canvas[wave, columns] = line
    return canvas


def is_held_out_pair(a: str, b: str) -> bool:
    """Whether two concepts are never shown together (10 %, by a hash of both, in either order)."""
    return hashlib.sha256("+".join(sorted((a, b))).encode()).digest()[0] < 26


def is_held_out_count(count: int, label: str) -> bool:
    """Whether a concept is never shown so many times (10 %, by a hash)."""
    return hashlib.sha256(f"{count} {label}".encode()).digest()[0] < 26


def two(a: str, b: str, style: str, ground: str, rng: np.random.Generator, order: Arrangement | None = None,
        sizes: tuple[str, str] | None = None) -> Scene:  # fmt: skip
    """A scene of two things; how they stand and how large they are is drawn where it is not given."""
    order = order or ("beside" if rng.random() < 0.6 else "above")
    if sizes is None:
        unequal = {0: ("small", "large"), 1: ("large", "small")}
        sizes = unequal.get(int(rng.integers(6)), ("", ""))
    dy, dx = (int(v) for v in rng.integers(-5, 6, 2))
    things = []
    for label, size, place in zip((a, b), sizes, (34, 94), strict=True):
        y, x = (64, place) if order == "beside" else (place, 64)
        things.append(Thing(label, y + dy, x + dx, SIDES[size]))
    return Scene(tuple(things), style, ground, order, sizes)


def several(label: str, count: int, style: str, ground: str, rng: np.random.Generator) -> Scene:
    """One to four of a thing."""
    places, side = PLACES[count]
    dy, dx = (int(v) for v in rng.integers(-3, 4, 2))
    return Scene(tuple(Thing(label, y + dy, x + dx, side) for y, x in places), style, ground)


def random_scene(rng: np.random.Generator) -> Scene:
    """A scene that training may see: no held-out drawing, pair or count is in it."""
    labels, styles = core_vocabulary(), list(STYLES)
    while True:
        a, b = (str(label) for label in rng.choice(labels, 2, replace=False))
        style = str(rng.choice(styles))
        kind = rng.random()
        where = str(rng.choice(list(GROUNDS if rng.random() < (1.0 if kind > 0.8 else 0.15) else BACKGROUNDS)))
        if where in BACKGROUNDS and rng.random() < 0.5:
            where = "white"
        if is_held_out(a, style):
            continue
        if kind < 0.5:
            if not is_held_out(b, style) and not is_held_out_pair(a, b):
                return two(a, b, style, where, rng)
        else:
            count = int(rng.integers(2, 5)) if kind < 0.8 else 1
            if not is_held_out_count(count, a):
                return several(a, count, style, where, rng)
