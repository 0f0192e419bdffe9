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

from edge_sd.bundle.apple_layout import TABLES
from edge_sd.bundle.coreai_layout import LAYERS, MAIN, layout_of
from edge_sd.bundle.facts import Facts
from edge_sd.bundle.parts import LATENTS, SAFETY_CHECKER, TINY, UPSCALER
from edge_sd.components.upscaler import FIXED

from ..sources.wrappers import residual_shapes
from ..static import Sizes
from . import transformers
from .transformers import CLIPS, MASKED

# Inputs whose numbers float16 does not hold.
FLOAT32 = ("timestep", "time_ids", *TABLES)


# The token that ends a text, and the one that fills it up.
Marks = tuple[int, int]


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
    """input_ids [1, S] int32 -> last_hidden_state [1, S, C].

    marks   what ends a text and what fills it up, where these are two tokens: Apple's pipelines fill up with the end,
            and SD 2 and the second encoder of SDXL and SD 3 were trained with another
    """

    def __init__(self, model: Any, dtype: torch.dtype, marks: Marks | None = None) -> None:
        super().__init__()
        self.model, self.dtype, self.marks = model, dtype, marks

    def encode(self, input_ids: Tensor) -> Any:
        """The library's output for a batch of token ids."""
        length = input_ids.shape[1]
        if self.marks is not None:
            end, pad = self.marks
            ends = (input_ids == end).to(torch.float32)
            # How many ends stand before each token.
            before = ends @ torch.ones(length, length).triu(1)
            input_ids = torch.where(before > 0, torch.full_like(input_ids, pad), input_ids)
        mask = torch.full((length, length), MASKED, dtype=self.dtype).triu(1)[None, None]
        return self.model(input_ids, attention_mask=mask, output_hidden_states=True)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        return (self.encode(input_ids).last_hidden_state,)


class TextEncoderXL(TextEncoder):
    """input_ids [1, S] -> hidden_embeds [1, S, C], the states before the last layer, pooled_outputs [1, P]."""

    def __init__(self, model: Any, dtype: torch.dtype, pooled: str, marks: Marks | None = None) -> None:
        super().__init__(model, dtype, marks)
        self.pooled = pooled

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        out = self.encode(input_ids)
        return out.hidden_states[-2], out[self.pooled]


class Layers(TextEncoder):
    """input_ids [1, S] -> the states of every layer that CLIP skip can ask for.

    Those of SD 1 and 2 go through the final norm and are named clip_skip.2, …; SDXL's do not, and come with the pooled
    text.
    """

    def __init__(self, model: Any, dtype: torch.dtype, pooled: str = "", marks: Marks | None = None) -> None:
        super().__init__(model, dtype, marks)
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
    part: str,
    stock: Any,
    facts: Facts,
    sizes: Sequence[Sizes],
    dtype: torch.dtype,
    channel_first: bool = False,
    marks: Marks | None = None,
) -> AppleComponent:
    """A component of Apple's layout, a function for each of `sizes`.

    part            one of sources.source.PARTS
    stock           the part's wrapper (sources.wrappers), its module in `dtype`
    channel_first   its attention takes the text as (B, C, 1, S): `ane.rewrite` was there
    marks           see TextEncoder
    """
    if part.startswith("text_encoder"):
        return _text_encoder(part, stock.model, facts, dtype, marks)
    if part == "transformer":
        return _transformer(stock.model, facts, sizes, dtype)
    if part == "vae_encoder" and facts.family == "flux2":
        stock = transformers.MeanEncoder(stock)
    module = Denoising(stock, channel_first) if part in ("unet", "controlnet", "controlled_unet") else stock
    made = []
    for n, size in enumerate(sizes):
        example, outputs = _example(part, stock, facts, size)
        layout = layout_of(part, (*example, *outputs), facts)
        given = {
            layout.inputs[name]: value.to(torch.float32 if name in FLOAT32 else dtype)
            for name, value in example.items()
        }
        name = MAIN if n == 0 else f"size_{size.width}x{size.height}"
        made.append(Function(name, module, given, tuple(layout.outputs[each] for each in outputs)))
    return AppleComponent(layout.package, tuple(made))


def _text_encoder(part: str, model: Any, facts: Facts, dtype: torch.dtype, marks: Marks | None) -> AppleComponent:
    (text,) = [each for each in facts.encoders if each.part == part]
    ids = {"input_ids": torch.ones(1, text.tokens or facts.max_tokens, dtype=torch.int32)}
    if text.kind == "t5":
        return AppleComponent("T5Encoder", (Function(MAIN, transformers.T5(model), ids, ("last_hidden_state",)),))
    if text.kind == "qwen3":
        layers = [int(each.rpartition(".")[2]) for each in text.states.split(",")]
        read = transformers.LanguageModel(model, layers, text.tokens, dtype)
        told = {**ids, "attention_mask": torch.ones(1, text.tokens, dtype=torch.int32)}
        return AppleComponent("TextEncoder", (Function(MAIN, read, told, ("hidden_states",)),))
    if facts.family in ("sdxl", "sd3"):
        name = "TextEncoder2" if part == "text_encoder_2" else "TextEncoder"
        pooled = "text_embeds" if part == "text_encoder_2" or facts.family == "sd3" else "pooler_output"
        main = Function(MAIN, TextEncoderXL(model, dtype, pooled, marks), ids, ("hidden_embeds", "pooled_outputs"))
        states = Layers(model, dtype, pooled, marks)
        return AppleComponent(name, (main, Function(LAYERS, states, ids, states.outputs)))
    main = Function(MAIN, TextEncoder(model, dtype, marks), ids, ("last_hidden_state",))
    states = Layers(model, dtype, marks=marks)
    more = (Function(LAYERS, states, ids, states.outputs),) if states.outputs else ()
    return AppleComponent("TextEncoder", (main, *more))


def _transformer(model: Any, facts: Facts, sizes: Sequence[Sizes], dtype: torch.dtype) -> AppleComponent:
    """SD 3's: `main` for the text as Apple's pipeline gives it, a function for each size as ours does; or FLUX.2's."""
    made = []
    factor, text, wide = facts.latents.factor, facts.text_rows(1), facts.text_width
    if facts.family == "sd3":
        transformers.place(model, sizes, factor)
    for n, size in enumerate(sizes):
        h, w, own = size.height // factor, size.width // factor, f"size_{size.width}x{size.height}"
        told: dict[str, Any] = {"timestep": torch.ones(size.batch)}
        if facts.family == "flux2":
            width = int(model.config.attention_head_dim)
            shapes = {"hidden_states": (size.batch, h * w, facts.sample_channels),
                      "encoder_hidden_states": (size.batch, text, wide)}  # fmt: skip
            inputs = {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}
            tables = {name: torch.zeros(text + h * w, width) for name in TABLES}
            inputs |= {**told, "guidance": torch.ones(size.batch, dtype=dtype), **tables}
            made.append(Function(own if n else MAIN, transformers.Flux2(model), inputs, ("output",)))
            continue
        sample = {"sample": torch.zeros(size.batch, facts.sample_channels, h, w, dtype=dtype), **told}
        pooled = torch.zeros(size.batch, facts.pooled_width, dtype=dtype)
        first, second = (each.width for each in facts.encoders if each.kind == "clip")
        apples = transformers.AppleMMDiT(model, (first, second), facts.single_rows)
        for name, module, rows in ((MAIN, apples, CLIPS * facts.max_tokens), (own, transformers.MMDiT(model), text)):
            if name != MAIN or n == 0:
                words = torch.zeros(size.batch, rows, wide, dtype=dtype)
                inputs = {**sample, "encoder_hidden_states": words, "pooled_projections": pooled}
                made.append(Function(name, module, inputs, ("noise_pred",)))
    return AppleComponent({"sd3": "MMDiT", "flux2": "Transformer"}[facts.family], tuple(made))


def _example(part: str, stock: Any, facts: Facts, size: Sizes) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Inputs of a part by our names, in order, and its outputs' names."""
    space = facts.latents
    h, w = size.height // space.factor, size.width // space.factor
    if part in ("vae_decoder", TINY):
        # A tiny decoder takes latents as the denoiser has them.
        shape = (1, space.channels, h, w)
        return {"latent_sample": torch.zeros(shape if part == TINY else space.own_shape(shape))}, ("sample",)
    if part == "vae_encoder":
        found = LATENTS if facts.family == "flux2" else "latent_parameters"
        return {"sample": torch.zeros(1, 3, size.height, size.width)}, (found,)
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
