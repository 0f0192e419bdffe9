"""Whether it composes: colours bound to things, two things, counts, positions; all of them pairs never trained on.

Each question is asked of drawings first, composed as training's scenes are and seen through the autoencoder: what the
judges can say at best. Then of the model's pictures of the same prompts.

    colours     "a green fire engine": the dominant colour is nearest to the word's of twelve, and the thing is among
                the three of all drawings that are likest in shape (the judge goes by colour, too)
    two things  "a cat and a dog": in two crops of the picture the judge finds one and the other, each among its first
                three of all concepts
    positions   "a cat above a dog": the first in the upper crop, the second in the lower
    counts      "three apples": so many separate things stand before the background
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from . import evaluator, measures
from .data import SIZE, STYLES, Artwork, core_vocabulary, is_held_out, spoken_names
from .lessons import Shown, colourable
from .recolour import COLOURS, is_held_out_colour
from .scenes import (
    NUMBERS,
    Arrangement,
    Scene,
    article,
    is_held_out_count,
    is_held_out_pair,
    several,
    two,
)
from .wordnet import plural

# Faces and hearts differ from one another by a line or a colour: no judge of crops tells them surely.
UNSURE = (" face", "heart", "face ", "ball", "moon", "star")
WHITE = (255.0, 255.0, 255.0)


@dataclass(frozen=True)
class Question:
    """A prompt, a drawing that answers it, and whether a picture does."""

    kind: str
    prompt: str
    example: Shown | Scene
    is_answered: Callable[[Image.Image, Namer], bool]


class Namer:
    """The judge, asked for the concepts of crops."""

    def __init__(self, network: Any, labels: Sequence[str]) -> None:
        self.network, self.labels = network, list(labels)

    @torch.no_grad()
    def knows(self, crops: list[Image.Image], label: str, among: int = 3) -> list[bool]:
        """For each crop whether `label` is among the judge's first answers."""
        logits = self.network(evaluator.as_tensor(crops))[0]
        return [self.labels.index(label) in row for row in logits.topk(min(among, len(self.labels))).indices.tolist()]


class Shapes:
    """The drawings by their shape alone: histograms of gradients (Dalal & Triggs 2005), mirrored ones too."""

    def __init__(self, artwork: Artwork) -> None:
        self.labels = core_vocabulary()
        self.table = np.stack([
            [_shape(_paper(artwork.drawing(label, style)[:, ::step])) for style in STYLES for step in (1, -1)]
            for label in self.labels
        ])  # fmt: skip

    def knows(self, image: Image.Image, label: str, among: int = 3) -> bool:
        """Whether `label` is among the concepts whose drawings are nearest to the thing in the picture."""
        away = np.linalg.norm(self.table - _shape(image), axis=2).min(1)
        return self.labels.index(label) in np.argsort(away)[:among]


def _paper(rgba: NDArray[np.uint8]) -> Image.Image:
    alpha = rgba[..., 3:] / 255
    return Image.fromarray((rgba[..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8))


def _shape(image: Image.Image) -> NDArray[np.float32]:
    """Gradients' directions in 8x8 cells of what stands before the background, stretched to 64x64."""
    from skimage.feature import hog

    rgb = np.asarray(image.convert("RGB"))
    inside = measures.foreground(rgb)
    if not inside.any():
        inside[:] = True
    rows, columns = (np.flatnonzero(inside.any(axis)) for axis in (1, 0))
    box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    grey = np.asarray(image.convert("L").crop(box).resize((64, 64), Image.Resampling.BICUBIC))
    found: NDArray[np.float32] = hog(grey, 9, (8, 8), (2, 2)).astype(np.float32)
    return found


def crops(image: Image.Image, order: Arrangement) -> list[Image.Image]:
    """The two things of a picture, each in a square: what stands before the background left and right, or above and
    below; the halves where there are no two.
    """
    axis = 1 if order == "beside" else 0
    boxes = measures.things(np.asarray(image.convert("RGB")))[:2]
    if len(boxes) < 2:
        all_rows, all_columns = slice(0, image.height), slice(0, image.width)
        if order == "beside":
            boxes = [(all_rows, slice(0, image.width // 2)), (all_rows, slice(image.width // 2, image.width))]
        else:
            boxes = [(slice(0, image.height // 2), all_columns), (slice(image.height // 2, image.height), all_columns)]
    boxes.sort(key=lambda box: box[axis].start + box[axis].stop)
    return [square(image, rows, columns) for rows, columns in boxes]


def square(image: Image.Image, rows: slice, columns: slice) -> Image.Image:
    """The crop in the middle of a square of the background's colour, with a margin, at the judge's size."""
    side = round(1.15 * max(rows.stop - rows.start, columns.stop - columns.start))
    rgb = np.asarray(image.convert("RGB"))
    colour = tuple(int(v) for v in np.median(np.concatenate([rgb[0], rgb[-1]]), axis=0))
    paper = Image.new("RGB", (side, side), colour)
    crop = image.crop((columns.start, rows.start, columns.stop, rows.stop))
    paper.paste(crop, ((side - crop.width) // 2, (side - crop.height) // 2))
    return paper.resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def colour_questions(artwork: Artwork, count: int, rng: np.random.Generator) -> list[Question]:
    found, shapes = [], Shapes(artwork)
    pairs = [(c, label, s) for c in COLOURS for label in core_vocabulary() for s in STYLES
             if is_held_out_colour(c, label) and not is_held_out(label, s)]  # fmt: skip
    for n in rng.permutation(len(pairs)):
        colour, label, style = pairs[int(n)]
        if colour == "white" or not colourable(artwork, label, style):
            continue  # white things on white paper have no colour to measure

        def right(image: Image.Image, _: Namer, colour: str = colour, label: str = label) -> bool:
            named = measures.colour_name(np.asarray(image.convert("RGB")))
            return named == colour and shapes.knows(image, label)

        example = Shown(label, style, "white", WHITE, adjective=colour)
        found.append(
            Question("colours", f"{article(f'{colour} {spoken_names(label)[-1]}')}, {style} style", example, right)
        )
        if len(found) == count:
            break
    return found


def _sure(labels: Sequence[str]) -> list[str]:
    return [label for label in labels if not any(part in label for part in UNSURE)]


def pair_questions(kind: str, count: int, rng: np.random.Generator) -> list[Question]:
    """Two things, or their positions, on white."""
    labels, found = _sure(core_vocabulary()), list[Question]()
    pairs = [(a, b) for a in labels for b in labels if a != b and is_held_out_pair(a, b)]
    for n in rng.permutation(len(pairs))[:count]:
        a, b = pairs[int(n)]
        style = str(rng.choice([s for s in STYLES if not is_held_out(a, s) and not is_held_out(b, s)] or list(STYLES)))
        order: Arrangement = "beside" if rng.random() < 0.5 else "above"
        first, second = (article(spoken_names(label)[-1]) for label in (a, b))
        between = "and" if kind == "two things" else {"beside": "to the left of", "above": "above"}[order]

        def right(image: Image.Image, namer: Namer, a: str = a, b: str = b, order: Arrangement = order) -> bool:
            def stand(order: Arrangement) -> bool:
                some = crops(image, order)
                is_a, is_b = namer.knows(some, a), namer.knows(some, b)
                return (is_a[0] and is_b[1]) or (kind == "two things" and is_a[1] and is_b[0])

            # "and" leaves open how they stand.
            return stand(order) if kind == "positions" else stand("beside") or stand("above")

        scene = two(a, b, style, "white", np.random.default_rng(0), order, ("", ""))
        found.append(Question(kind, f"{first} {between} {second}, {style} style", scene, right))
    return found


def count_questions(count: int, rng: np.random.Generator) -> list[Question]:
    found = []
    pairs = [(k, label) for k in (2, 3, 4) for label in _sure(core_vocabulary()) if is_held_out_count(k, label)]
    for n in rng.permutation(len(pairs))[:count]:
        many, label = pairs[int(n)]
        style = str(rng.choice([s for s in STYLES if not is_held_out(label, s)] or list(STYLES)))

        def right(image: Image.Image, _: Namer, many: int = many) -> bool:
            return len(measures.things(np.asarray(image.convert("RGB")))) == many

        scene = several(label, many, style, "white", np.random.default_rng(0))
        prompt = f"{NUMBERS[many - 1]} {plural(spoken_names(label)[-1])}, {style} style"
        found.append(Question("counts", prompt, scene, right))
    return found


def questions(artwork: Artwork, count: int, seed: int = 0) -> dict[str, list[Question]]:
    """kind -> `count` questions of it, or all there are."""
    rng = np.random.default_rng(seed)
    return {
        "colours": colour_questions(artwork, count, rng),
        "two things": pair_questions("two things", count, rng),
        "positions": pair_questions("positions", count, rng),
        "counts": count_questions(count, rng),
    }


def share(asked: Sequence[Question], images: Sequence[Image.Image], namer: Namer) -> float:
    """The share of pictures that answer their question."""
    return float(np.mean([q.is_answered(image, namer) for q, image in zip(asked, images, strict=True)]))
