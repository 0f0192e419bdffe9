"""One torch module per function of an asset, in Apple's layout: names, shapes and dtypes as its Swift package reads.

`wrap` takes the wrappers that every form starts from; the caller chooses the form of attention (`ane.rewrite`).
Timesteps and SDXL's sizes stay float32 in a float16 program: float16 has steps of 0.5 at 999.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edge_sd.bundle.coreai_layout import LAYERS, MAIN, layout_of
from edge_sd.bundle.facts import Facts
from edge_sd.bundle.parts import SAFETY_CHECKER, TINY, UPSCALER
from edge_sd.components.upscaler import FIXED

from ..sources.wrappers import residual_shapes
from ..static import Sizes

# Inputs whose numbers float16 does not hold.
FLOAT32 = ("timestep", "time_ids")
# What a masked score is: softmax makes it 0 in float16 too, and the Neural Engine's softmax takes no -inf.
MASKED = -40000.0


@dataclass(frozen=True)
class Function:
    """A function ready for export: `example` holds its inputs, in order; `outputs` names what forward returns."""

    name: str
    module: nn.Module
    example: dict[str, Tensor]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class AppleComponent:
    """One asset: its file's name without the suffix, and its functions, `main` first."""

    name: str
    functions: tuple[Function, ...]


class TextEncoder(nn.Module):
    """input_ids [1, S] int32 -> last_hidden_state [1, S, C]."""

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def encode(self, input_ids: Tensor) -> Any:
        """The library's output for a batch of token ids."""
        length = input_ids.shape[1]
        mask = torch.full((length, length), MASKED, dtype=self.dtype).triu(1)[None, None]
        return self.model(input_ids, attention_mask=mask, output_hidden_states=True)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        return (self.encode(input_ids).last_hidden_state,)


class TextEncoderXL(TextEncoder):
    """input_ids [1, S] -> hidden_embeds [1, S, C], the states before the last layer, pooled_outputs [1, P]."""

    def __init__(self, model: Any, dtype: torch.dtype, pooled: str) -> None:
        super().__init__(model, dtype)
        self.pooled = pooled

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        out = self.encode(input_ids)
        return out.hidden_states[-2], out[self.pooled]


class Layers(TextEncoder):
    """input_ids [1, S] -> the states of every layer that CLIP skip can ask for.

    Those of SD 1 and 2 go through the final norm and are named clip_skip.2, …; SDXL's do not, and come with the pooled
    text.
    """

    def __init__(self, model: Any, dtype: torch.dtype, pooled: str = "") -> None:
        super().__init__(model, dtype)
        self.pooled, self.count = pooled, int(model.config.num_hidden_layers)
        (self.norm,) = (each for name, each in model.named_modules() if name.endswith("final_layer_norm"))

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of what forward returns."""
        if self.pooled:
            return (*(f"hidden_states.{n}" for n in range(self.count)), "pooled_outputs")
        return tuple(f"clip_skip.{n}" for n in range(2, self.count + 1))

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        out = self.encode(input_ids)
        if self.pooled:
            # An output may not be an input's own view twice: clone tells them apart where a layer's states are reused.
            return (*(state.clone() for state in out.hidden_states[: self.count]), out[self.pooled])
        return tuple(self.norm(out.hidden_states[-n]) for n in range(2, self.count + 1))


class Denoising(nn.Module):
    """A stock UNet or ControlNet whose attention takes the text as (B, C, 1, S), called with (B, S, C) as Apple's."""

    def __init__(self, stock: nn.Module, channel_first: bool) -> None:
        super().__init__()
        self.stock, self.channel_first = stock, channel_first

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, *rest: Tensor) -> Any:
        context = encoder_hidden_states
        if self.channel_first:
            context = context.transpose(1, 2).unsqueeze(2)
        return self.stock(sample, timestep, context, *rest)


def wrap(
    part: str, stock: Any, facts: Facts, sizes: Sequence[Sizes], dtype: torch.dtype, channel_first: bool = False
) -> AppleComponent:
    """A component of Apple's layout, a function for each of `sizes`.

    part            one of sources.source.PARTS
    stock           the part's wrapper (sources.wrappers), its module in `dtype`
    channel_first   its attention takes the text as (B, C, 1, S): `ane.rewrite` was there
    """
    if part.startswith("text_encoder"):
        return _text_encoder(part, stock.model, facts, dtype)
    module = Denoising(stock, channel_first) if part in ("unet", "controlnet", "controlled_unet") else stock
    made = []
    for n, size in enumerate(sizes):
        example, outputs = _example(part, stock, facts, size)
        layout = layout_of(part, (*example, *outputs))
        given = {
            layout.inputs[name]: value.to(torch.float32 if name in FLOAT32 else dtype)
            for name, value in example.items()
        }
        name = MAIN if n == 0 else f"size_{size.width}x{size.height}"
        made.append(Function(name, module, given, tuple(layout.outputs[each] for each in outputs)))
    return AppleComponent(layout.package, tuple(made))


def _text_encoder(part: str, model: Any, facts: Facts, dtype: torch.dtype) -> AppleComponent:
    ids = {"input_ids": torch.ones(1, facts.max_tokens, dtype=torch.int32)}
    if facts.family == "sdxl":
        name, pooled = ("TextEncoder2", "text_embeds") if part == "text_encoder_2" else ("TextEncoder", "pooler_output")
        main = Function(MAIN, TextEncoderXL(model, dtype, pooled), ids, ("hidden_embeds", "pooled_outputs"))
        layers = Layers(model, dtype, pooled)
        return AppleComponent(name, (main, Function(LAYERS, layers, ids, layers.outputs)))
    main = Function(MAIN, TextEncoder(model, dtype), ids, ("last_hidden_state",))
    layers = Layers(model, dtype)
    more = (Function(LAYERS, layers, ids, layers.outputs),) if layers.outputs else ()
    return AppleComponent("TextEncoder", (main, *more))


def _example(part: str, stock: Any, facts: Facts, size: Sizes) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Inputs of a part by our names, in order, and its outputs' names."""
    space = facts.latents
    h, w = size.height // space.factor, size.width // space.factor
    if part in ("vae_decoder", TINY):
        return {"latent_sample": torch.zeros(1, space.channels, h, w)}, ("sample",)
    if part == "vae_encoder":
        return {"sample": torch.zeros(1, 3, size.height, size.width)}, ("latent_parameters",)
    if part == UPSCALER:
        return {"image": torch.zeros(1, 3, FIXED, FIXED)}, ("sample",)
    if part == SAFETY_CHECKER:
        return {"clip_input": torch.zeros(1, 3, stock.side, stock.side)}, ("special_scores", "concept_scores")
    config, batch = stock.model.config, size.batch
    example = {
        "sample": torch.zeros(batch, config.in_channels, h, w),
        "timestep": torch.ones(batch),
        "encoder_hidden_states": torch.zeros(batch, facts.max_tokens, config.cross_attention_dim),
    }
    for name in stock.names:
        example[name] = torch.zeros(batch, _widths(config, facts)[name])
    shapes = residual_shapes(config, (batch, h, w))
    if part == "controlnet":
        example["controlnet_cond"] = torch.zeros(batch, 3, size.height, size.width)
        return example, tuple(shapes)
    if part == "controlled_unet":
        example |= {name: torch.zeros(shape) for name, shape in shapes.items()}
    return example, ("out_sample",)


def _widths(config: Any, facts: Facts) -> dict[str, int]:
    return {"time_ids": facts.time_ids, "text_embeds": facts.pooled_width, "timestep_cond": facts.guidance_width}
