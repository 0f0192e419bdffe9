"""A diffusion transformer as the component that a UNet is: latents [B, C, h, w] and a timestep in, out_sample back.

Exports of transformers name and lay out their inputs in ways of their own. They end here, so that samplers, guidance,
tiles and batches know one form. What a backend runs has the names and shapes of optimum-intel's exports:

    sd3     hidden_states [B, C, h, w], timestep [1] in 0..1000, encoder_hidden_states, pooled_projections
    flux2   hidden_states [B, h w, C], timestep [1] in 0..1, encoder_hidden_states, and the positions of tokens, img_ids
            [1, h w, 4] of (0, y, x, 0) and txt_ids [1, S, 4] of (0, 0, 0, place); tokens of reference pictures follow
            those of the latents, at (10, y, x, 0), (20, y, x, 0), …, and the output's are cut off
    zimage  hidden_states [B, C, h, w], timestep [B] of 1 - s, encoder_hidden_states, encoder_attention_mask [B, S] of 0
            or the lowest number, txt_ids [B, S, 3] of (place, 0, 0) and img_ids [B, N, 3] of (end of the text, y, x)
    sana    hidden_states [B, C, h, w], timestep [B] in 0..1000 or, SANA-Sprint's, in 0..1, encoder_hidden_states,
            encoder_attention_mask [B, S] of 1 or 0, and SANA-Sprint's guidance [B]
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ..bundle.facts import Facts
from .base import Array, Changeable, Component, Resting, Shapes
from .edits import Edits


@dataclass
class Transformer:
    """`component`, which takes `hidden_states`, as one that takes `sample`."""

    component: Component
    facts: Facts
    # Where each row's text ends, as far as a form has to know.
    ends: list[int] = field(default_factory=list)

    @staticmethod
    def shapes(shapes: Shapes) -> Shapes:
        """Those of the component's own inputs for a `sample` and conditions of `shapes`."""
        return {"hidden_states" if name == "sample" else name: shape for name, shape in shapes.items()}

    def bind(self, **constants: Array) -> None:
        self.component.bind(**constants)

    def __call__(self, **inputs: Array) -> dict[str, Array]:
        return self.component(**{"hidden_states" if name == "sample" else name: each for name, each in inputs.items()})

    def change(self, edits: Edits) -> bool:
        return isinstance(self.component, Changeable) and self.component.change(edits)

    def rest(self) -> None:
        if isinstance(self.component, Resting):
            self.component.rest()

    def close(self) -> None:
        self.component.close()


# The latents of the pictures that a prompt refers to, bound all at once: reference_0, reference_1, … [1, C, h, w].
REFERENCE = "reference_"
# In time, how far reference pictures are from each other, and the first from what is drawn.
APART = 10


@dataclass
class Flux2(Transformer):
    """FLUX.2's, which takes latents, its own and those of reference pictures, as a row of tokens."""

    # Tokens of all reference pictures [1, R, C], and their places [1, R, 4].
    seen: tuple[Array, Array] | None = None

    @staticmethod
    def shapes(shapes: Shapes) -> Shapes:
        batch, channels, *_ = shapes["sample"]
        pictures = [shape for name, shape in shapes.items() if name == "sample" or name.startswith(REFERENCE)]
        tokens, text = sum(height * width for *_, height, width in pictures), shapes["encoder_hidden_states"]
        return {
            "hidden_states": (batch, tokens, channels),
            "encoder_hidden_states": text,
            "timestep": shapes["timestep"],
            "img_ids": (1, tokens, 4),
            "txt_ids": (1, text[1], 4),
        }

    def bind(self, **constants: Array) -> None:
        if (text := constants.get("encoder_hidden_states")) is not None:
            places = np.zeros((1, text.shape[1], 4), np.float32)
            places[0, :, 3] = np.arange(text.shape[1])
            constants = {**constants, "txt_ids": places}
        count = sum(name.startswith(REFERENCE) for name in constants)
        if references := [constants.pop(f"{REFERENCE}{n}") for n in range(count)]:
            where = [_places(each.shape[2:], APART * n) for n, each in enumerate(references, 1)]
            self.seen = np.concatenate([*map(_tokens, references)], axis=1), np.concatenate(where, axis=1)
        self.component.bind(**constants)

    def __call__(self, **inputs: Array) -> dict[str, Array]:
        batch, channels, height, width = inputs["sample"].shape
        tokens, places = _tokens(inputs["sample"]), _places((height, width))
        if self.seen is not None:
            seen, where = self.seen
            tokens = np.concatenate([tokens, seen.repeat(batch, axis=0)], axis=1)
            places = np.concatenate([places, where], axis=1)
        more = {name: value for name, value in inputs.items() if name not in ("sample", "timestep")}
        s = np.asarray(inputs["timestep"] / 1000, np.float32)
        found = self.component(hidden_states=np.ascontiguousarray(tokens), timestep=s, img_ids=places, **more)
        own = found["out_sample"][:, : height * width]
        return {"out_sample": np.ascontiguousarray(own.transpose(0, 2, 1).reshape(batch, channels, height, width))}


def _tokens(latents: Array) -> Array:
    """Latents [B, C, h, w] as a row of tokens [B, h w, C]."""
    row: Array = latents.reshape(*latents.shape[:2], -1).transpose(0, 2, 1)
    return row


def _places(sides: tuple[int, ...], time: int = 0) -> Array:
    """Those of the tokens of a picture of (h, w) latents, float32 [1, h w, 4] of (time, y, x, 0)."""
    rows, columns = np.indices(sides, np.float32)
    places = np.zeros((1, rows.size, 4), np.float32)
    places[0, :, 0], places[0, :, 1], places[0, :, 2] = time, rows.ravel(), columns.ravel()
    return places


class ZImage(Transformer):
    """Z-Image's, whose time runs from noise to picture and whose output is the negative of the others'."""

    @staticmethod
    def shapes(shapes: Shapes) -> Shapes:
        batch, _, height, width = shapes["sample"]
        tokens = _rounded(height * width // Z_PATCH**2)
        return {
            **Transformer.shapes(shapes),
            "timestep": (batch,),
            "txt_ids": (*shapes["encoder_attention_mask"], 3),
            "img_ids": (batch, tokens, 3),
        }

    def bind(self, **constants: Array) -> None:
        if (seen := constants.get("encoder_attention_mask")) is not None:
            # Each text is filled up to a multiple of tokens, which are attended to; places after those have no number.
            self.ends = [_rounded(int((row > 0).sum())) for row in seen]
            places = np.zeros((*seen.shape, 3), np.float32)
            for row, end in zip(places, self.ends, strict=True):
                row[:end, 0] = np.arange(1, end + 1)
            lowest = np.finfo(np.float32).min
            constants = {**constants, "encoder_attention_mask": np.where(seen > 0, np.float32(0), lowest)}
            constants["txt_ids"] = places
        self.component.bind(**constants)

    def __call__(self, **inputs: Array) -> dict[str, Array]:
        sample = inputs["sample"]
        batch, _, height, width = sample.shape
        rows, columns = np.indices((height // Z_PATCH, width // Z_PATCH), np.float32)
        places = np.zeros((batch, _rounded(rows.size), 3), np.float32)
        for each, end in zip(places, self.ends[-batch:], strict=True):
            each[: rows.size] = np.stack([np.full(rows.size, end + 1), rows.ravel(), columns.ravel()], axis=1)
        t = np.repeat(np.asarray(1 - inputs["timestep"] / 1000, np.float32), batch)
        found = self.component(hidden_states=sample, timestep=t, img_ids=places)
        # Its exports call the output by another name.
        (output,) = (found[name] for name in ("sample", "out_sample") if name in found)
        return {"out_sample": -output}


class Sana(Transformer):
    """SANA's, which takes a time for each row; a number of the model says in which unit."""

    @staticmethod
    def shapes(shapes: Shapes) -> Shapes:
        return {**Transformer.shapes(shapes), "timestep": shapes["sample"][:1]}

    def __call__(self, **inputs: Array) -> dict[str, Array]:
        t = np.full(len(inputs["sample"]), inputs["timestep"][0] * self.facts.time_factor, np.float32)
        return super().__call__(**{**inputs, "timestep": t})


# Latents a side of a token of Z-Image, and the number that counts of tokens are multiples of.
Z_PATCH, Z_TOKENS = 2, 32


def _rounded(tokens: int) -> int:
    return -(-tokens // Z_TOKENS) * Z_TOKENS


# Family -> its form.
FORMS: dict[str, type[Transformer]] = {"sd3": Transformer, "flux2": Flux2, "zimage": ZImage, "sana": Sana}


def form_of(facts: Facts, part: str) -> type[Transformer] | None:
    """The form that `part` of a model has; None where it takes what the pipeline gives as it is."""
    return FORMS.get(facts.family) if part == "transformer" else None
