"""The shapes of components' inputs, as facts of a model and a picture's size say them."""

from __future__ import annotations

from ..bundle.facts import LANGUAGE_MODELS, Facts, TextPart
from .base import Shapes
from .image_prompt import shapes_of_pictures


def shapes_of_conditions(facts: Facts, batch: int, chunks: int = 1) -> dict[str, tuple[int, ...]]:
    """The shapes of what `conditions` returns, for prompts of so many chunks."""
    rows = facts.text_rows(chunks)
    shapes: dict[str, tuple[int, ...]] = {"encoder_hidden_states": (batch, rows, facts.text_width)}
    if facts.text_mask:
        shapes["encoder_attention_mask"] = (batch, rows)
    if facts.conditioning == "joint":
        return {**shapes, "pooled_projections": (batch, facts.pooled_width)}
    if facts.conditioning:
        shapes |= {"text_embeds": (batch, facts.pooled_width), "time_ids": (batch, facts.time_ids)}
    if facts.guidance_width:
        shapes["timestep_cond"] = (batch, facts.guidance_width)
    if facts.guidance_factor:
        shapes["guidance"] = (batch,)
    return shapes


def _text_inputs(text: TextPart, shape: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    masked = {"attention_mask": shape} if text.kind in LANGUAGE_MODELS else {}
    return {"input_ids": shape, **masked}


def chunks_of(facts: Facts, shapes: Shapes) -> int:
    """The chunks of prompts that a denoiser's inputs of these shapes are for."""
    return (shapes["encoder_hidden_states"][1] - facts.single_rows) // facts.max_tokens if facts.chunked else 1


def rows_of_batch(facts: Facts, batch: int) -> int:
    """Rows of the denoiser for `batch` prompts, the negative one among them: one that edits a picture has one more."""
    return batch + 1 if facts.instructed and batch > 1 else batch


def shapes_of(facts: Facts, width: int, height: int, batch: int, chunks: int = 1) -> dict[str, Shapes]:
    """The inputs of each component for a picture of width x height pixels; `batch` is 2 with guidance.

    A UNet that edits a picture then has a third row, of the picture without words.
    """
    space = facts.latents
    h, w = height // space.factor, width // space.factor
    rows = rows_of_batch(facts, batch)
    return {
        **{text.part: _text_inputs(text, (batch, text.tokens or facts.max_tokens)) for text in facts.encoders},
        facts.denoiser: {
            "sample": (rows, facts.sample_channels, h, w),
            "timestep": (1,),
            **shapes_of_conditions(facts, rows, chunks),
            **shapes_of_pictures(facts, rows),
        },
        "vae_decoder": {"latent_sample": space.own_shape((1, space.channels, h, w))},
    }
