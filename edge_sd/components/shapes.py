"""The shapes of components' inputs, as facts of a model and a picture's size say them."""

from __future__ import annotations

from ..bundle.facts import Facts
from .base import Shapes


def shapes_of_conditions(facts: Facts, batch: int) -> dict[str, tuple[int, ...]]:
    """The shapes of what `conditions` returns, for prompts of one chunk."""
    shapes: dict[str, tuple[int, ...]] = {"encoder_hidden_states": (batch, facts.max_tokens, facts.text_width)}
    if facts.conditioning:
        shapes |= {"text_embeds": (batch, facts.pooled_width), "time_ids": (batch, facts.time_ids)}
    if facts.guidance_width:
        shapes["timestep_cond"] = (batch, facts.guidance_width)
    return shapes


def shapes_of(facts: Facts, width: int, height: int, batch: int) -> dict[str, Shapes]:
    """The inputs of each component for a picture of width x height pixels; `batch` is 2 with guidance."""
    space, tokens = facts.latents, facts.max_tokens
    h, w = height // space.factor, width // space.factor
    return {
        **{text.part: {"input_ids": (batch, tokens)} for text in facts.encoders},
        "unet": {
            "sample": (batch, facts.sample_channels, h, w),
            "timestep": (1,),
            **shapes_of_conditions(facts, batch),
        },
        "vae_decoder": {"latent_sample": (1, space.channels, h, w)},
    }
