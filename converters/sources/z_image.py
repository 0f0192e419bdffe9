"""Z-Image's transformer over whole batches: diffusers' own takes lists, whose lengths a trace would hold for ever.

Positions come as inputs, since where an image's begin depends on each text's length. The rotations of queries and keys
are looked up in tables that are computed in float64, as diffusers', and are of real numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Rotated:
    """Attention whose queries and keys are rotated by `freqs_cis`, cosines and sines [B, S, 1, D / 2, 2]."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None, freqs_cis: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        assert freqs_cis is not None
        queries, keys, values = (
            layer(hidden_states).unflatten(-1, (attn.heads, -1)) for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        q, k, v = (
            each.transpose(1, 2)
            for each in (_rotated(attn.norm_q(queries), freqs_cis), _rotated(attn.norm_k(keys), freqs_cis), values)
        )
        bias = None if attention_mask is None else attention_mask[:, None, None, :]
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        output: Tensor = attn.to_out[0](mixed.transpose(1, 2).flatten(2, 3))
        return output


def _rotated(x: Tensor, table: Tensor) -> Tensor:
    """Pairs of neighbouring numbers of each head [B, S, H, D], turned by their angles."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = table.unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


class ZImage(nn.Module):
    """The inputs and the output are those of optimum-intel's export (see edge_sd/components/transformer.py)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.patch = model, int(model.all_patch_size[0])
        self.key = f"{self.patch}-{model.config.all_f_patch_size[0]}"
        for module in model.modules():
            if hasattr(module, "set_processor"):
                module.set_processor(Rotated())
        config = model.config
        for n, (width, length) in enumerate(zip(config.axes_dims, config.axes_lens, strict=True)):
            powers = torch.arange(0, width, 2, dtype=torch.float64) / width
            # Rounded before the cosine, as diffusers' are.
            angles = torch.outer(torch.arange(length, dtype=torch.float64), config.rope_theta**-powers).float()
            self.register_buffer(f"axis_{n}", torch.stack([angles.cos(), angles.sin()], dim=-1), persistent=False)

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor,
        txt_ids: Tensor, img_ids: Tensor,
    ) -> Tensor:  # fmt: skip
        model = self.model
        time = model.t_embedder(timestep * model.t_scale)
        text_turns, image_turns = self._turns(txt_ids), self._turns(img_ids)
        text = model.cap_embedder(encoder_hidden_states)
        # A text is filled up with a learned token to a multiple of tokens; what has no place is padding of the batch.
        text = torch.where((encoder_attention_mask >= 0)[..., None], text, model.cap_pad_token)
        lowest = torch.finfo(text.dtype).min
        text_bias = (txt_ids[..., 0] <= 0).to(text.dtype) * lowest
        for layer in model.context_refiner:
            text = layer(text, text_bias, text_turns)
        image = self._tokens(hidden_states, img_ids)
        for layer in model.noise_refiner:
            image = layer(image, None, image_turns, time)
        both, turns = torch.cat([image, text], dim=1), torch.cat([image_turns, text_turns], dim=1)
        bias = torch.cat([torch.zeros_like(image[..., 0]), text_bias], dim=1)
        for layer in model.layers:
            both = layer(both, bias, turns, time)
        return self._latents(model.all_final_layer[self.key](both, c=time), hidden_states)

    def _turns(self, places: Tensor) -> Tensor:
        tables = [getattr(self, f"axis_{n}")[places[..., n].long()] for n in range(places.shape[-1])]
        return torch.cat(tables, dim=-2)[:, :, None]

    def _tokens(self, latents: Tensor, places: Tensor) -> Tensor:
        """Patches of the latents, embedded, and as many learned tokens as `places` has room for."""
        batch, channels, height, width = latents.shape
        p, rows, columns = self.patch, height // self.patch, width // self.patch
        patches = latents.reshape(batch, channels, rows, p, columns, p).permute(0, 2, 4, 3, 5, 1)
        patches = patches.reshape(batch, rows * columns, p * p * channels)
        index = torch.arange(places.shape[1], device=latents.device)
        last = torch.zeros_like(index) + (rows * columns - 1)
        tokens = self.model.all_x_embedder[self.key](patches.index_select(1, torch.minimum(index, last)))
        return torch.where((index > last)[None, :, None], self.model.x_pad_token, tokens)

    def _latents(self, tokens: Tensor, like: Tensor) -> Tensor:
        batch, channels, height, width = like.shape
        p, rows, columns = self.patch, height // self.patch, width // self.patch
        index = torch.arange(rows * columns, device=like.device)
        patches = tokens.index_select(1, index).reshape(batch, rows, columns, p, p, channels)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, height, width)
