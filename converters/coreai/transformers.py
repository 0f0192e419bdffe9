"""The parts of SD 3 and FLUX.2 as functions of Apple's layout, and what of them float16 does not hold.

Kept in float32 whatever the program's type is: what leads into the residuals of T5, whose outputs pass 65504
(transformers keeps the same layer so), timesteps, and the tables that turn queries and keys, as long as they are
angles. FLUX.2's own bounds of +-65504 come along, since its blocks are traced in their type.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..static import Sizes

# Layers by their name that stay float32: T5's from its wide feed-forward back into the residual.
WIDE = "wo"
# What a masked score is: softmax makes it 0 in float16 too, and the Neural Engine's softmax takes no -inf.
MASKED = -40000.0
# Apple's Swift pipeline puts the states of both CLIPs one after the other.
CLIPS = 2


def lowered(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """`module` in `dtype`, in place, but for what that does not hold."""
    for name, each in module.named_modules():
        if WIDE in name.split("."):
            continue
        for key, parameter in each.named_parameters(recurse=False):
            each._parameters[key] = nn.Parameter(parameter.data.to(dtype), requires_grad=False)
        for key, buffer in each.named_buffers(recurse=False):
            if buffer.is_floating_point():
                each._buffers[key] = buffer.to(dtype)
    return module


class Placed(nn.Module):
    """SD 3's embedding of patches with the part of its table of places that pictures of each of `sizes` have.

    The whole table is 0.9 GB in float32 for SD 3.5 medium, and would stand in the program.
    """

    def __init__(self, stock: Any, sizes: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.proj = stock.proj
        # No buffers: a program holds those that its function uses.
        self.tables = {size: stock.cropped_pos_embed(*size).detach().clone() for size in sizes}

    def forward(self, latent: Tensor) -> Tensor:
        patches = self.proj(latent).flatten(2).transpose(1, 2)
        placed: Tensor = patches + self.tables[latent.shape[-2], latent.shape[-1]].to(patches.dtype)
        return placed


class MMDiT(nn.Module):
    """sample [B, C, h, w], timestep [B] in 0..1000, encoder_hidden_states [B, S, W], pooled_projections [B, P]."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, pooled_projections: Tensor
    ) -> Tensor:
        found = self.model(sample, encoder_hidden_states, pooled_projections, timestep, return_dict=False)
        output: Tensor = found[0]
        return output


class AppleMMDiT(MMDiT):
    """The same for the text as Apple's Swift pipeline gives it: states of both CLIPs one after the other, [B, 2 S, W].

    SD 3 was trained with them side by side, and rows of T5 behind; without T5 those are zeros, as in diffusers.

    widths   of the states of both, which are filled up with zeros to W
    blank    rows in place of T5's
    """

    def __init__(self, model: Any, widths: tuple[int, int], blank: int) -> None:
        super().__init__(model)
        self.widths, self.blank = widths, blank

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, pooled_projections: Tensor
    ) -> Tensor:
        rows, wide = encoder_hidden_states.shape[1] // CLIPS, encoder_hidden_states.shape[2]
        first, second = self.widths
        states = torch.cat([encoder_hidden_states[:, :rows, :first], encoder_hidden_states[:, rows:, :second]], dim=2)
        text = functional.pad(states, (0, wide - first - second, 0, self.blank))
        return super().forward(sample, timestep, text, pooled_projections)


class Flux2(nn.Module):
    """hidden_states [B, N, C], encoder_hidden_states [B, S, W], tables of turns [S + N, D]; timestep [B] in 0..1.

    `guidance` [B] is there for Apple's pipeline, which gives its inputs by their order; klein has no use for it.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        guidance: Tensor,
        rotary_emb_cos: Tensor,
        rotary_emb_sin: Tensor,
    ) -> Tensor:
        model, turns, text = self.model, (rotary_emb_cos, rotary_emb_sin), encoder_hidden_states.shape[1]
        time = model.time_guidance_embed
        # Of float32: at 1000 float16 has steps of a half.
        known = time.timestep_embedder(time.time_proj(timestep * 1000).to(hidden_states.dtype))
        of_image, of_text = model.double_stream_modulation_img(known), model.double_stream_modulation_txt(known)
        image, words = model.x_embedder(hidden_states), model.context_embedder(encoder_hidden_states)
        for block in model.transformer_blocks:
            words, image = block(
                hidden_states=image, encoder_hidden_states=words, temb_mod_img=of_image, temb_mod_txt=of_text,
                image_rotary_emb=turns,
            )  # fmt: skip
        both, of_both = torch.cat([words, image], dim=1), model.single_stream_modulation(known)
        for block in model.single_transformer_blocks:
            both = block(hidden_states=both, encoder_hidden_states=None, temb_mod=of_both, image_rotary_emb=turns)
        output: Tensor = model.proj_out(model.norm_out(both[:, text:], known))
        return output


class T5(nn.Module):
    """input_ids [1, S] -> last_hidden_state [1, S, W]; its residual is float32 from the first layer on.

    So are the products of queries and keys, which T5 does not scale: Apple's runtime adds up float16 in float16, and
    such scores cost a miniature 16 dB.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        for name, each in model.named_modules():
            if name.endswith(("SelfAttention.q", "SelfAttention.k", "SelfAttention.v")):
                each.register_forward_hook(_widened)
            elif name.endswith("SelfAttention.o"):
                each.register_forward_pre_hook(_narrowed)

    def forward(self, input_ids: Tensor) -> Tensor:
        length = input_ids.shape[1]
        # Pads are attended to as well, as SD 3 was trained.
        seen = torch.zeros(1, 1, length, length)
        states: Tensor = self.model(inputs_embeds=self.model.shared(input_ids).float(), attention_mask=seen)[0]
        return states


def _widened(module: nn.Module, given: Any, found: Tensor) -> Tensor:
    return found.float()


def _narrowed(module: Any, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (given[0].to(module.weight.dtype),)


class Turns(nn.Module):
    """The cosines and sines of a language model's places, made of float64 angles in place of in the program."""

    def __init__(self, stock: Any, length: int) -> None:
        super().__init__()
        width = 2 * len(stock.inv_freq)
        base = stock.config.rope_parameters["rope_theta"]
        frequencies = base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies).repeat(1, 2)[None]
        self.cosines, self.sines = angles.cos().float(), angles.sin().float()

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.cosines.to(x.dtype), self.sines.to(x.dtype)


class LanguageModel(nn.Module):
    """input_ids, attention_mask [1, S] -> the states of some layers side by side [1, S, n W]."""

    def __init__(self, model: Any, layers: Sequence[int], length: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.layers, self.dtype = model, tuple(layers), dtype
        inner = getattr(model, "model", model)
        if not isinstance(inner.rotary_emb, Turns):
            inner.rotary_emb = Turns(inner.rotary_emb, length)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        length = input_ids.shape[1]
        later = torch.full((length, length), MASKED, dtype=self.dtype).triu(1)[None, None]
        padding = ((1 - attention_mask.to(self.dtype)) * MASKED)[:, None, None, :]
        # Their sum would be minus infinity in float16.
        out = self.model(
            input_ids, attention_mask=torch.minimum(later, padding), output_hidden_states=True, use_cache=False
        )
        return torch.cat([out.hidden_states[layer] for layer in self.layers], dim=2)


class MeanEncoder(nn.Module):
    """image [1, 3, H, W] -> the mean of its latents, as Apple's pipeline of FLUX.2 takes it."""

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.stock = stock

    def forward(self, sample: Tensor) -> Tensor:
        parameters: Tensor = self.stock(sample)
        return parameters.chunk(2, dim=1)[0]


def place(model: Any, sizes: Sequence[Sizes], factor: int) -> None:
    """Give SD 3's transformer the tables of places for pictures of `sizes`, in place of the whole one."""
    if not isinstance(model.pos_embed, Placed):
        model.pos_embed = Placed(model.pos_embed, [(size.height // factor, size.width // factor) for size in sizes])
