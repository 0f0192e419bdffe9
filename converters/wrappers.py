"""One small torch module per component: named inputs, named outputs, and an example of each input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edge_sd.bundle import Facts


@dataclass(frozen=True)
class Wrapped:
    """A component ready for any exporter.

    example   input name -> tensor; batch 1
    dynamic   input name -> the dimensions that may change
    outputs   the names of what forward returns, in order
    """

    part: str
    module: nn.Module
    example: dict[str, Tensor]
    dynamic: dict[str, tuple[int, ...]]
    outputs: tuple[str, ...]


class TextEncoder(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        # A mask of our own: the library's mask code cannot be traced, and takes one of four dimensions as it is.
        # Of booleans, because a -inf in it would not survive every quantizer.
        length = input_ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).tril()[None, None]
        out = self.model(input_ids, attention_mask=causal, output_hidden_states=True)
        return out.last_hidden_state, out.pooler_output, *out.hidden_states


class UNet(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        output: Tensor = self.model(sample, timestep, encoder_hidden_states, return_dict=False)[0]
        return output


class VAEDecoder(nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.post_quant_conv = vae.post_quant_conv or nn.Identity()
        self.decoder = vae.decoder

    def forward(self, latent_sample: Tensor) -> Tensor:
        pixels: Tensor = self.decoder(self.post_quant_conv(latent_sample))
        return pixels


class VAEEncoder(nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.encoder = vae.encoder
        self.quant_conv = vae.quant_conv or nn.Identity()

    def forward(self, sample: Tensor) -> Tensor:
        parameters: Tensor = self.quant_conv(self.encoder(sample))
        return parameters


def wrap(part: str, model: Any, facts: Facts) -> Wrapped:
    """Wrap a loaded component; the example inputs are small but of real shape."""
    side = 16
    latents = torch.zeros(1, facts.latents.channels, side, side)
    makers: dict[str, Callable[[], Wrapped]] = {
        "text_encoder": lambda: Wrapped(
            part,
            TextEncoder(model),
            {"input_ids": torch.ones(1, facts.max_tokens, dtype=torch.int64)},
            {"input_ids": (0, 1)},
            (
                "last_hidden_state",
                "pooler_output",
                *(f"hidden_states.{n}" for n in range(model.config.num_hidden_layers + 1)),
            ),
        ),
        "unet": lambda: Wrapped(
            part,
            UNet(model),
            {
                "sample": latents,
                "timestep": torch.tensor([1]),
                "encoder_hidden_states": torch.zeros(1, facts.max_tokens, model.config.cross_attention_dim),
            },
            {"sample": (0, 2, 3), "timestep": (0,), "encoder_hidden_states": (0, 1)},
            ("out_sample",),
        ),
        "vae_decoder": lambda: Wrapped(
            part, VAEDecoder(model), {"latent_sample": latents}, {"latent_sample": (0, 2, 3)}, ("sample",)
        ),
        "vae_encoder": lambda: Wrapped(
            part,
            VAEEncoder(model),
            {"sample": torch.zeros(1, 3, side * facts.latents.factor, side * facts.latents.factor)},
            {"sample": (0, 2, 3)},
            ("latent_parameters",),
        ),
    }
    return makers[part]()
