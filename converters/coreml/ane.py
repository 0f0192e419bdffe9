"""The Neural Engine form of a UNet or ControlNet, made by replacing modules of the stock diffusers model in place.

The Neural Engine wants tensors of shape (B, C, 1, S) whose last axis is the longest, convolutions in place of linear
layers, and attention one head at a time, so that a head's (S, S) weights stay in its cache (Apple, "Deploying
Transformers on the Apple Neural Engine", 2022). The arithmetic is that of the stock modules; tests compare the
two. Text context comes in as (B, C, 1, S) too, as Apple's layout has it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from edge_sd.errors import ConversionError

# More queries than this are taken in turns: the weights of all of them at once would not fit the engine's cache.
QUERIES = 512


def rewrite(model: nn.Module) -> nn.Module:
    """Replace every transformer and time embedding of `model` in place, and return it. Raises ConversionError."""
    from diffusers.models.embeddings import TimestepEmbedding
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    for name, module in list(model.named_modules()):
        if isinstance(module, Transformer2DModel):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, Transformer(module))
        elif isinstance(module, TimestepEmbedding):
            module.linear_1, module.linear_2 = VectorConv(module.linear_1), VectorConv(module.linear_2)
        elif isinstance(module, ResnetBlock2D) and isinstance(module.time_emb_proj, nn.Linear):
            module.time_emb_proj = VectorConv(module.time_emb_proj)
    return model


class Transformer(nn.Module):
    """A Transformer2DModel on (B, C, H, W) whose inside is (B, C, 1, H W)."""

    def __init__(self, stock: Any) -> None:
        super().__init__()
        if not getattr(stock, "is_input_continuous", False):
            raise ConversionError("the Neural Engine form knows transformers over images only")
        self.norm = stock.norm
        self.proj_in, self.proj_out = pointwise(stock.proj_in), pointwise(stock.proj_out)
        self.blocks = nn.ModuleList(Block(block) for block in stock.transformer_blocks)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any) -> tuple[Tensor]:
        """Called as the stock module is: (B, C, H, W) and the context (B, C', 1, S), a tuple of one in return."""
        b, h, w = hidden_states.shape[0], *hidden_states.shape[2:]
        x = self.proj_in(self.norm(hidden_states).reshape(b, -1, 1, h * w))
        for block in self.blocks:
            x = block(x, encoder_hidden_states)
        return (self.proj_out(x).reshape(b, -1, h, w) + hidden_states,)


class Block(nn.Module):
    """A BasicTransformerBlock: self attention, attention to the text, feed forward, each on its normed input."""

    def __init__(self, stock: Any) -> None:
        super().__init__()
        if stock.norm_type != "layer_norm" or stock.pos_embed is not None:
            raise ConversionError(f"the Neural Engine form knows no transformer block with {stock.norm_type}")
        self.cross_only = stock.only_cross_attention
        self.norm1, self.attn1 = ChannelNorm(stock.norm1), SplitAttention(stock.attn1)
        self.norm2 = ChannelNorm(stock.norm2) if stock.attn2 is not None else None
        self.attn2 = SplitAttention(stock.attn2) if stock.attn2 is not None else None
        self.norm3, self.ff = ChannelNorm(stock.norm3), FeedForward(stock.ff)

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        normed = self.norm1(x)
        x = x + self.attn1(normed, context if self.cross_only else normed)
        if self.attn2 is not None and self.norm2 is not None:
            normed = self.norm2(x)
            x = x + self.attn2(normed, normed if context is None else context)
        out: Tensor = x + self.ff(self.norm3(x))
        return out


class SplitAttention(nn.Module):
    """softmax(q k^T / sqrt(d)) v, one head at a time, on (B, C, 1, S)."""

    def __init__(self, stock: Any) -> None:
        super().__init__()
        strange = [
            name
            for name in ("group_norm", "norm_q", "norm_k", "norm_cross", "spatial_norm", "add_k_proj", "bias_k")
            if getattr(stock, name, None) is not None
        ]
        if strange or stock.residual_connection or stock.rescale_output_factor != 1:
            raise ConversionError(
                f"the Neural Engine form knows no attention with {', '.join(strange) or 'a residual'}"
            )
        self.heads = stock.heads
        self.to_q, self.to_k, self.to_v = (pointwise(each) for each in (stock.to_q, stock.to_k, stock.to_v))
        self.to_out = pointwise(stock.to_out[0])
        # The scale is a constant: it goes into the weights, which also keeps q k^T small in float16.
        self.to_q.weight.data *= stock.scale
        if self.to_q.bias is not None:
            self.to_q.bias.data *= stock.scale

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        d = q.shape[1] // self.heads
        keys = k.transpose(1, 3)
        heads = [
            self._attend(*each)
            for each in zip(parts(q, d, 1), parts(keys, d, 3), parts(v, v.shape[1] // self.heads, 1), strict=True)
        ]
        out: Tensor = self.to_out(torch.cat(heads, dim=1))
        return out

    @staticmethod
    def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One head: q (B, d, 1, Q), k (B, K, 1, d), v (B, d, 1, K) -> (B, d, 1, Q)."""
        found = []
        for some in parts(q, QUERIES, 3):
            weights = torch.einsum("bchq,bkhc->bkhq", some, k).softmax(dim=1)
            found.append(torch.einsum("bkhq,bchk->bchq", weights, v))
        return found[0] if len(found) == 1 else torch.cat(found, dim=3)


class FeedForward(nn.Module):
    """GEGLU: (a * gelu(b)) W, where a and b are the halves of one projection."""

    def __init__(self, stock: Any) -> None:
        super().__init__()
        gate = stock.net[0]
        if type(gate).__name__ != "GEGLU":
            raise ConversionError(f"the Neural Engine form knows no {type(gate).__name__} in a transformer")
        self.proj_in, self.proj_out = pointwise(gate.proj), pointwise(stock.net[2])

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj_in(x).chunk(2, dim=1)
        out: Tensor = self.proj_out(value * functional.gelu(gate))
        return out


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of (B, C, 1, S)."""

    def __init__(self, stock: nn.LayerNorm) -> None:
        super().__init__()
        shape = (1, -1, 1, 1)
        self.eps = stock.eps
        self.weight = nn.Parameter(stock.weight.detach().reshape(shape).clone(), requires_grad=False)
        self.bias = nn.Parameter(stock.bias.detach().reshape(shape).clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(dim=1, keepdim=True)
        scale = torch.rsqrt((centred * centred).mean(dim=1, keepdim=True) + self.eps)
        return centred * scale * self.weight + self.bias


class VectorConv(nn.Module):
    """A Linear on (B, C) as a 1x1 convolution."""

    def __init__(self, stock: nn.Linear) -> None:
        super().__init__()
        self.conv = pointwise(stock)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x[:, :, None, None]).flatten(1)
        return out


def parts(x: Tensor, size: int, dim: int) -> tuple[Tensor, ...]:
    """`x` cut into parts of `size` along `dim`; coremltools does not know a split into one."""
    return x.split(size, dim=dim) if x.shape[dim] > size else (x,)


def pointwise(layer: nn.Module) -> nn.Conv2d:
    """A Linear as the 1x1 convolution with its weights; a 1x1 convolution as it is."""
    if isinstance(layer, nn.Conv2d):
        return layer
    if type(layer) is not nn.Linear:
        raise ConversionError(f"the Neural Engine form knows no {type(layer).__name__} where a linear layer stands")
    conv = nn.Conv2d(layer.in_features, layer.out_features, 1, bias=layer.bias is not None)
    conv.weight = nn.Parameter(layer.weight.detach()[:, :, None, None].clone(), requires_grad=False)
    if layer.bias is not None:
        conv.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
    return conv
