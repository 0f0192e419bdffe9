"""One torch module per component in Apple's layout: names, shapes and dtypes as Swift programs expect them.

`wrap` takes the wrappers that every backend starts from; the form of attention is the caller's business
(`ane.rewrite`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from edge_sd.bundle import Facts


@dataclass(frozen=True)
class Sizes:
    """The static sizes of a package: pixels, and the batch of the UNet (2 with guidance in one call)."""

    height: int
    width: int
    batch: int = 2


@dataclass(frozen=True)
class AppleComponent:
    """A component ready for coremltools.

    example   input name -> float32 tensor of the static shape
    outputs   the names of what forward returns, in order; all are float32
    float32   names of inputs that are float32 in the package; the others are float16
    """

    name: str
    module: nn.Module
    example: dict[str, Tensor]
    outputs: tuple[str, ...]
    float32: frozenset[str] = field(default_factory=frozenset)


class TextEncoder(nn.Module):
    """input_ids [1, S] float32 -> last_hidden_state [1, S, C], pooled_outputs [1, C]."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        out = self.inner(input_ids.to(torch.int32))
        return out[0], out[1]


class Unet(nn.Module):
    """sample [B, 4, h, w], timestep [B], encoder_hidden_states [B, C, 1, S] -> noise_pred [B, 4, h, w].

    With `residuals`, those of a ControlNet follow as further inputs, the middle block's last.
    """

    def __init__(self, model: Any, channel_first: bool) -> None:
        super().__init__()
        self.model, self.channel_first = model, channel_first

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, *residuals: Tensor) -> Tensor:
        context = _context(encoder_hidden_states, self.channel_first)
        extra: dict[str, Any] = {}
        if residuals:
            extra = {"down_block_additional_residuals": residuals[:-1], "mid_block_additional_residual": residuals[-1]}
        out: Tensor = self.model(sample, timestep, context, return_dict=False, **extra)[0]
        return out


class ControlNet(nn.Module):
    """A UNet's inputs and controlnet_cond [B, 3, 8h, 8w] -> additional_residual_0 … N, the middle block's last."""

    def __init__(self, model: Any, channel_first: bool) -> None:
        super().__init__()
        self.model, self.channel_first = model, channel_first

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, controlnet_cond: Tensor
    ) -> tuple[Tensor, ...]:
        context = _context(encoder_hidden_states, self.channel_first)
        down, middle = self.model(sample, timestep, context, controlnet_cond, return_dict=False)
        return *down, middle


class TinyDecoder(nn.Module):
    """z [1, 4, h, w] -> image [1, 3, 8h, 8w] in [-1, 1], by AutoencoderTiny's decoder."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.decoder = model.decoder

    def forward(self, z: Tensor) -> Tensor:
        out: Tensor = self.decoder(z)
        return out


class _Renamed(nn.Module):
    """A stock wrapper under Apple's name of its one input."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, value: Tensor) -> Tensor:
        out: Tensor = self.inner(value)
        return out


def _context(encoder_hidden_states: Tensor, channel_first: bool) -> Tensor:
    return encoder_hidden_states if channel_first else encoder_hidden_states.squeeze(2).transpose(1, 2)


def wrap(part: str, stock: Any, facts: Facts, sizes: Sizes, channel_first: bool = False) -> AppleComponent:
    """A component of Apple's layout.

    part            text_encoder, unet, controlled_unet, controlnet, vae_decoder, vae_encoder or tiny_decoder
    stock           the part's wrapper (converters.wrappers); for a ControlNet or a tiny decoder diffusers' own model
    channel_first   its attention takes the text as (B, C, 1, S): `ane.rewrite` was there
    """
    model = getattr(stock, "model", stock)
    space = facts.latents
    h, w = sizes.height // space.factor, sizes.width // space.factor
    if part == "text_encoder":
        ids = torch.ones(1, facts.max_tokens)
        names = ("last_hidden_state", "pooled_outputs")
        return AppleComponent("TextEncoder", TextEncoder(stock), {"input_ids": ids}, names, frozenset({"input_ids"}))
    if part == "vae_decoder":
        z = {"z": torch.zeros(1, space.channels, h, w)}
        return AppleComponent("VAEDecoder", _Renamed(stock), z, ("image",))
    if part == "tiny_decoder":
        z = {"z": torch.zeros(1, space.channels, h, w)}
        return AppleComponent("TinyDecoder", TinyDecoder(stock), z, ("image",))
    if part == "vae_encoder":
        x = {"x": torch.zeros(1, 3, sizes.height, sizes.width)}
        return AppleComponent("VAEEncoder", _Renamed(stock), x, ("latent",))
    example = {
        "sample": torch.zeros(sizes.batch, space.channels, h, w),
        "timestep": torch.ones(sizes.batch),
        "encoder_hidden_states": torch.zeros(sizes.batch, model.config.cross_attention_dim, 1, facts.max_tokens),
    }
    if part == "unet":
        return AppleComponent("Unet", Unet(model, channel_first), example, ("noise_pred",))
    if part == "controlled_unet":
        residuals = {
            f"additional_residual_{n}": torch.zeros(shape)
            for n, shape in enumerate(residual_shapes(model, sizes, h, w))
        }
        return AppleComponent("ControlledUnet", Unet(model, channel_first), example | residuals, ("noise_pred",))
    assert part == "controlnet", part
    example["controlnet_cond"] = torch.zeros(sizes.batch, 3, sizes.height, sizes.width)
    count = len(residual_shapes(model, sizes, h, w))
    outputs = tuple(f"additional_residual_{n}" for n in range(count))
    return AppleComponent("ControlNet", ControlNet(model, channel_first), example, outputs)


def residual_shapes(model: Any, sizes: Sizes, h: int, w: int) -> list[tuple[int, ...]]:
    """The shapes of a ControlNet's residuals for a model of this config: after conv_in, each layer, the middle."""
    config = model.config
    widths = config.block_out_channels
    layers = config.layers_per_block
    shapes = [(sizes.batch, widths[0], h, w)]
    for n, width in enumerate(widths):
        count = layers if isinstance(layers, int) else layers[n]
        shapes += [(sizes.batch, width, h, w)] * count
        if n < len(widths) - 1:
            h, w = -(-h // 2), -(-w // 2)
            shapes.append((sizes.batch, width, h, w))
    return [*shapes, (sizes.batch, widths[-1], h, w)]
