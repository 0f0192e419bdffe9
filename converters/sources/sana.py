"""SANA's components for an exporter: Gemma 2 as a text encoder, its transformer, and an encoder of latents alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from edge_sd.bundle.facts import Facts
from edge_sd.components.shapes import shapes_of_conditions
from edge_sd.components.transformer import Sana as Form


class LastState(nn.Module):
    """A language model without its head: the last state of every token, behind the last norm."""

    def __init__(self, model: Any, mask: Any) -> None:
        """`mask`: ids -> the booleans [1, 1, S, S] of what each token sees."""
        super().__init__()
        self.model, self.mask = getattr(model, "model", model), mask

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        seen = self.mask(input_ids) & attention_mask.bool()[:, None, None, :]
        states: Tensor = self.model(input_ids, attention_mask=seen, use_cache=False).last_hidden_state
        return states


class Sana(nn.Module):
    """SANA's transformer; SANA-Sprint's takes the guidance scale, too."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        output: Tensor = self.model(
            hidden_states, encoder_hidden_states, timestep, guidance, encoder_attention_mask, return_dict=False
        )[0]
        return output


def example(facts: Facts, side: int) -> tuple[dict[str, Tensor], dict[str, tuple[int, ...]]]:
    """Inputs of the transformer in the order and the types of optimum-intel, and which of their dimensions change."""
    sample = (1, facts.sample_channels, side, side)
    shapes = Form.shapes({"sample": sample, "timestep": (1,), **shapes_of_conditions(facts, 1)})
    names = ("hidden_states", "timestep", "encoder_hidden_states", "encoder_attention_mask", "guidance")
    inputs = {name: torch.zeros(shapes[name]) for name in names if name in shapes}
    inputs["encoder_attention_mask"] = torch.ones(shapes["encoder_attention_mask"], dtype=torch.int64)
    dynamic: dict[str, tuple[int, ...]] = {
        "hidden_states": (0, 2, 3), "timestep": (0,), "encoder_hidden_states": (0, 1), "encoder_attention_mask": (0, 1),
        "guidance": (0,),
    }  # fmt: skip
    return inputs, {name: dynamic[name] for name in inputs}
