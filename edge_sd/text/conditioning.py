"""Conditions of a denoiser beside the sample and the timestep: text, and in some families sizes or a guidance scale.

encoder_hidden_states   the text encoders' states side by side, [B, S, C]; in SD 3 those of T5 follow those of CLIP
encoder_attention_mask  1 for rows of the states that are no padding [B, S], where a denoiser tells them apart
pooled_projections      SD 3 (Esser et al. 2024, arXiv:2403.03206): the pooled texts of both CLIPs side by side
text_embeds, time_ids   SDXL (Podell et al. 2023, arXiv:2307.01952): the pooled text, and sizes in pixels
timestep_cond           latent consistency models (Luo et al. 2023, arXiv:2310.04378): the guidance scale, embedded
guidance                SANA-Sprint (Chen et al. 2025, arXiv:2503.09641): the guidance scale times a number of the model
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..bundle.facts import Facts, TextPart
from ..components.base import Array
from ..errors import InvalidModel, InvalidRequest
from .tokenizer import MASK

HIDDEN = "hidden_states."
# Aesthetic scores that SDXL's refiner takes for the prompt and the negative prompt (diffusers' defaults).
AESTHETIC, NEGATIVE_AESTHETIC = 6.0, 2.5


def states_of(text: TextPart, clip_skip: int = 1) -> str:
    """The output of a text encoder that the denoiser attends to, `clip_skip` - 1 layers before the one of its training.

    Encoders whose last state is taken stop earlier by an edit (components/edits.py); of others another output is read.
    Others than CLIP have nothing to skip.
    """
    if not text.states.startswith(HIDDEN) or text.kind != "clip":
        return text.states
    layer = int(text.states.removeprefix(HIDDEN)) - (clip_skip - 1)
    if layer < 0:
        raise InvalidRequest(f"CLIP skip {clip_skip} is beyond the layers of this model's text encoder")
    return f"{HIDDEN}{layer}"


def conditions(
    facts: Facts, encoded: Mapping[str, Mapping[str, Array]], width: int, height: int, guidance: float,
    clip_skip: int = 1,
) -> dict[str, Array]:  # fmt: skip
    """What to bind to a denoiser; `encoded`: text encoder -> its outputs for B prompts, the negative one first of two.

    A UNet that edits a picture has the negative prompt in two rows: without the picture, and with it.

    Raises InvalidModel where an export lacks an output, InvalidRequest where the CLIP skip is too large.
    """
    try:
        if facts.conditioning == "joint":
            return _joint(facts, encoded, clip_skip)
        states = [encoded[text.part][states_of(text, clip_skip)] for text in facts.encoders]
        told = {"encoder_hidden_states": np.concatenate(states, axis=2)}
        rows = len(states[0])
        if facts.conditioning:
            told["text_embeds"] = encoded["text_encoder_2"]["text_embeds"]
            told["time_ids"] = time_ids(facts, width, height, rows)
    except KeyError as error:
        raise InvalidModel(
            f"{facts.name}: a text encoder has no output {error}, which its {facts.denoiser} needs"
        ) from error
    if facts.text_mask:
        told["encoder_attention_mask"] = encoded[facts.encoders[0].part][MASK]
    if facts.guidance_width:
        told["timestep_cond"] = np.repeat(guidance_embedding(guidance, facts.guidance_width), rows, axis=0)
    if facts.guidance_factor:
        told["guidance"] = np.full(rows, guidance * facts.guidance_factor, np.float32)
    if facts.instructed and rows > 1:
        told = {name: np.concatenate([value[:1], value]) for name, value in told.items()}
    return told


def _joint(facts: Facts, encoded: Mapping[str, Mapping[str, Array]], clip_skip: int) -> dict[str, Array]:
    """SD 3's: both CLIPs side by side, widened with zeros, then T5 or the rows that stand for it."""
    clips = [text for text in facts.encoders if text.kind == "clip"]
    states = np.concatenate([encoded[text.part][states_of(text, clip_skip)] for text in clips], axis=2)
    rows = len(states)
    follow = [encoded[text.part][text.states] for text in facts.encoders if text.kind != "clip"]
    if facts.blank_rows:
        follow.append(np.zeros((rows, facts.blank_rows, facts.text_width), np.float32))
    wide = np.pad(states, ((0, 0), (0, 0), (0, facts.text_width - states.shape[2])))
    return {
        "encoder_hidden_states": np.concatenate([wide, *follow], axis=1),
        "pooled_projections": np.concatenate([encoded[text.part]["text_embeds"] for text in clips], axis=1),
    }


def time_ids(facts: Facts, width: int, height: int, rows: int) -> Array:
    """SDXL's size conditioning, float32 [rows, 6]; its refiner's, [rows, 5]. The negative prompt's row is the first.

    A picture of width x height that was not scaled and not cropped: its height and width, top and left of the crop,
    and the height and width that are wanted; a refiner has an aesthetic score in place of the last two.
    """
    start = [height, width, 0, 0]
    if facts.conditioning == "size":
        ends: list[list[float]] = [[height, width]] * rows
    else:
        ends = [[NEGATIVE_AESTHETIC] if row == 0 and rows > 1 else [AESTHETIC] for row in range(rows)]
    return np.array([[*start, *end] for end in ends], np.float32)


def guidance_embedding(guidance: float, width: int) -> Array:
    """The guidance scale as sines and cosines, float32 [1, width]; w = guidance - 1 as diffusers counts it."""
    half = width // 2
    frequencies = np.exp(np.arange(half) * (-np.log(10000.0) / (half - 1)))
    angles = (guidance - 1) * 1000.0 * frequencies
    return np.pad(np.concatenate([np.sin(angles), np.cos(angles)]), (0, width % 2))[None].astype(np.float32)
