"""One torch module per component in Apple's layout: names, shapes and dtypes as Swift programs expect them.

`wrap` takes the wrappers that every backend starts from; the caller chooses the form of attention (`ane.rewrite`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from edge_sd.bundle.apple_layout import UPSCALING
from edge_sd.bundle.facts import Facts
from edge_sd.bundle.parts import UPSCALER
from edge_sd.components.upscaler import FIXED

from ..sources.wrappers import residual_shapes
from ..static import Sizes


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


class TextEncoderXL(nn.Module):
    """input_ids [1, S] float32 -> hidden_embeds [1, S, C], the states before the last layer, pooled_outputs [1, P]."""

    def __init__(self, inner: nn.Module, pooled: int) -> None:
        super().__init__()
        self.inner, self.pooled = inner, pooled

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        out = self.inner(input_ids.to(torch.int32))
        return out[-2], out[self.pooled]


class Unet(nn.Module):
    """sample [B, 4, h, w], timestep [B], encoder_hidden_states [B, C, 1, S] -> noise_pred [B, 4, h, w].

    SDXL's has two more inputs, time_ids [B, 6] and text_embeds [B, P]. The residuals of a ControlNet, if it takes one,
    come after these, the middle block's last.
    """

    def __init__(self, model: Any, channel_first: bool) -> None:
        super().__init__()
        self.model, self.channel_first = model, channel_first
        self.conditioned = model.config.addition_embed_type == "text_time"

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, *rest: Tensor) -> Tensor:
        context = _context(encoder_hidden_states, self.channel_first)
        extra: dict[str, Any] = {}
        residuals = rest
        if self.conditioned:
            extra["added_cond_kwargs"] = {"time_ids": rest[0], "text_embeds": rest[1]}
            residuals = rest[2:]
        if residuals:
            extra["down_block_additional_residuals"] = residuals[:-1]
            extra["mid_block_additional_residual"] = residuals[-1]
        out: Tensor = self.model(sample, timestep, context, return_dict=False, **extra)[0]
        return out


class ControlNet(nn.Module):
    """A UNet's inputs and controlnet_cond [B, 3, 8h, 8w] -> additional_residual_0 … N, the middle block's last."""

    def __init__(self, model: Any, channel_first: bool) -> None:
        super().__init__()
        self.model, self.channel_first = model, channel_first

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, *rest: Tensor
    ) -> tuple[Tensor, ...]:
        context = _context(encoder_hidden_states, self.channel_first)
        # SDXL's two come before the picture that is followed.
        extra = {"added_cond_kwargs": {"time_ids": rest[0], "text_embeds": rest[1]}} if len(rest) == 3 else {}
        down, middle = self.model(sample, timestep, context, rest[-1], return_dict=False, **extra)
        return *down, middle


class SafetyChecker(nn.Module):
    """Blackens pictures whose CLIP embedding is near a concept's (StableDiffusionSafetyChecker, as Apple cuts it).

    clip_input [1, 3, 224, 224], images [1, H, W, 3], adjustment [1] (added to the scores of special care)
    -> filtered_images, has_nsfw_concepts [1], concept_scores [1, concepts]
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, clip_input: Tensor, images: Tensor, adjustment: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        checker = self.model
        embeds = checker.visual_projection(checker.vision_model(clip_input)[1])
        special = _cosine(embeds, checker.special_care_embeds) - checker.special_care_embeds_weights + adjustment
        concerned = (special > 0).float().amax(dim=1, keepdim=True)
        scores = _cosine(embeds, checker.concept_embeds) - checker.concept_embeds_weights + 0.01 * concerned
        found = (scores > 0).float().amax(dim=1)
        return images * (1 - found)[:, None, None, None], found, scores


def _cosine(one: Tensor, other: Tensor) -> Tensor:
    def unit(x: Tensor) -> Tensor:
        return x * torch.rsqrt((x * x).sum(dim=1, keepdim=True))

    return unit(one) @ unit(other).T


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

    part            text_encoder, text_encoder_2, unet, controlled_unet, controlnet, vae_decoder, vae_encoder,
                    tiny_decoder, upscaler or safety_checker
    stock           the part's wrapper (converters.wrappers); diffusers' own model of the parts that have none there
    channel_first   its attention takes the text as (B, C, 1, S): `ane.rewrite` was there
    """
    model = getattr(stock, "model", stock)
    space = facts.latents
    h, w = sizes.height // space.factor, sizes.width // space.factor
    ids = torch.ones(1, facts.max_tokens)
    if part == "text_encoder_2" or (part == "text_encoder" and facts.family == "sdxl"):
        name, pooled = ("TextEncoder", 1) if part == "text_encoder" else ("TextEncoder2", 0)
        states = ("hidden_embeds", "pooled_outputs")
        return AppleComponent(name, TextEncoderXL(stock, pooled), {"input_ids": ids}, states, frozenset({"input_ids"}))
    if part == "safety_checker":
        side = model.config.vision_config.image_size
        example = {
            "clip_input": torch.zeros(1, 3, side, side),
            "images": torch.zeros(1, sizes.height, sizes.width, 3),
            "adjustment": torch.zeros(1),
        }
        found = ("filtered_images", "has_nsfw_concepts", "concept_scores")
        return AppleComponent("SafetyChecker", SafetyChecker(model), example, found, frozenset(example))
    if part == "text_encoder":
        names = ("last_hidden_state", "pooled_outputs")
        return AppleComponent("TextEncoder", TextEncoder(stock), {"input_ids": ids}, names, frozenset({"input_ids"}))
    if part == "vae_decoder":
        z = {"z": torch.zeros(1, space.channels, h, w)}
        return AppleComponent("VAEDecoder", _Renamed(stock), z, ("image",))
    if part == "tiny_decoder":
        z = {"z": torch.zeros(1, space.channels, h, w)}
        return AppleComponent("TinyDecoder", _Renamed(stock), z, ("image",))
    if part == UPSCALER:
        image = {"image": torch.zeros(1, 3, FIXED, FIXED)}
        return AppleComponent(UPSCALING.package, _Renamed(stock), image, tuple(UPSCALING.outputs.values()))
    if part == "vae_encoder":
        x = {"x": torch.zeros(1, 3, sizes.height, sizes.width)}
        return AppleComponent("VAEEncoder", _Renamed(stock), x, ("latent",))
    example = {
        "sample": torch.zeros(sizes.batch, model.config.in_channels, h, w),
        "timestep": torch.ones(sizes.batch),
        "encoder_hidden_states": torch.zeros(sizes.batch, model.config.cross_attention_dim, 1, facts.max_tokens),
    }
    if model.config.get("addition_embed_type") == "text_time":
        # The projection takes the pooled text and six embedded numbers side by side; a refiner's, five.
        count = facts.time_ids or 6
        pooled_width = model.config.projection_class_embeddings_input_dim - count * model.config.addition_time_embed_dim
        example["time_ids"] = torch.zeros(sizes.batch, count)
        example["text_embeds"] = torch.zeros(sizes.batch, pooled_width)
    shapes = residual_shapes(model.config, (sizes.batch, h, w))
    if part == "unet":
        return AppleComponent("Unet", Unet(model, channel_first), example, ("noise_pred",))
    if part == "controlled_unet":
        residuals = {name: torch.zeros(shape) for name, shape in shapes.items()}
        return AppleComponent("ControlledUnet", Unet(model, channel_first), example | residuals, ("noise_pred",))
    assert part == "controlnet", part
    example["controlnet_cond"] = torch.zeros(sizes.batch, 3, sizes.height, sizes.width)
    return AppleComponent("ControlNet", ControlNet(model, channel_first), example, tuple(shapes))
