"""One small torch module per component: named inputs, named outputs, and an example of each input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edge_sd.bundle.diffusers import DETERMINISTIC
from edge_sd.bundle.facts import Facts
from edge_sd.bundle.parts import IMAGE_ENCODER, LATENTS, SAFETY_CHECKER, TEXT_ENCODERS, TINY, UPSCALER, kind_of
from edge_sd.components.image_prompt import PIXELS, SCALE, TOKENS, shapes_of_pictures
from edge_sd.components.shapes import shapes_of_conditions
from edge_sd.components.transformer import Flux2 as Form
from edge_sd.components.transformer import ZImage as ZImageForm

from .sana import LastState, Sana
from .sana import example as sana_example


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


def causal_mask(input_ids: Tensor) -> Tensor:
    """The mask of a text encoder, booleans [1, 1, S, S].

    The library's mask code cannot be traced, and takes a mask of four dimensions as it is. Of booleans, because a -inf
    in it would not survive every quantizer.
    """
    length = input_ids.shape[1]
    return torch.ones(length, length, dtype=torch.bool, device=input_ids.device).tril()[None, None]


class TextEncoder(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        out = self.model(input_ids, attention_mask=causal_mask(input_ids), output_hidden_states=True)
        return out.last_hidden_state, out.pooler_output, *out.hidden_states


class TextEncoder2(nn.Module):
    """SDXL's second encoder: the projected end-of-text state, and the hidden states that the UNet attends to."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        out = self.model(input_ids, attention_mask=causal_mask(input_ids), output_hidden_states=True)
        return out.text_embeds, out.last_hidden_state, *out.hidden_states


class T5Encoder(nn.Module):
    """The last state of every token; pads are attended to as well, as SD 3 was trained."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        seen = torch.ones(1, 1, input_ids.shape[1], input_ids.shape[1], dtype=torch.bool, device=input_ids.device)
        states: Tensor = self.model(input_ids, attention_mask=seen)[0]
        return states


class LanguageModel(nn.Module):
    """States of a language model that was cut behind the last layer that is needed: of all its layers, or of that.

    optimum-intel finds one of several by its place among them.
    """

    def __init__(self, model: Any, several: bool) -> None:
        super().__init__()
        self.model, self.several = model, several

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        seen = causal_mask(input_ids) & attention_mask.bool()[:, None, None, :]
        out = self.model(input_ids, attention_mask=seen, output_hidden_states=True, use_cache=False)
        return tuple(out.hidden_states) if self.several else (out.hidden_states[-1],)


class Flux2(nn.Module):
    """FLUX.2's transformer; positions and latents are rows of tokens."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor, img_ids: Tensor, txt_ids: Tensor
    ) -> Tensor:
        output: Tensor = self.model(
            hidden_states, encoder_hidden_states, timestep, img_ids, txt_ids, return_dict=False
        )[0]
        return output


class MMDiT(nn.Module):
    """SD 3's transformer of two streams (Esser et al. 2024, arXiv:2403.03206)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, pooled_projections: Tensor, timestep: Tensor
    ) -> Tensor:
        output: Tensor = self.model(
            hidden_states, encoder_hidden_states, pooled_projections, timestep, return_dict=False
        )[0]
        return output


def conditioned(names: tuple[str, ...], values: tuple[Tensor, ...]) -> dict[str, Any]:
    """Further inputs of a UNet or a ControlNet as diffusers' keywords."""
    given = {name: value for name, value in zip(names, values, strict=True) if name not in (TOKENS, SCALE)}
    keywords: dict[str, Any] = {"timestep_cond": given.pop("timestep_cond")} if "timestep_cond" in given else {}
    return {**keywords, "added_cond_kwargs": given} if given else keywords


def attended(names: tuple[str, ...], values: tuple[Tensor, ...], words: Tensor) -> Any:
    """What a UNet attends to: the words; with an IP-Adapter also the tokens of pictures and their weight."""
    given = dict(zip(names, values, strict=True))
    return (words, given[TOKENS], given[SCALE]) if TOKENS in given else words


class UNet(nn.Module):
    """`names`: further inputs, of SDXL, of a latent consistency model (text/conditioning.py) or of an IP-Adapter."""

    def __init__(self, model: Any, names: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, *further: Tensor) -> Tensor:
        more, told = conditioned(self.names, further), attended(self.names, further, encoder_hidden_states)
        output: Tensor = self.model(sample, timestep, told, return_dict=False, **more)[0]
        return output


class ControlNet(nn.Module):
    """The residuals of a condition, white lines on black [B, 3, H, W] in [0, 1]: one for each skip, the middle last.

    Those of a net that returns means over the picture are spread over it, so that all nets' have the same shapes.
    """

    def __init__(self, model: Any, names: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.model, self.names = model, names
        self.pooled = bool(model.config.global_pool_conditions)
        if self.pooled:
            model.register_to_config(global_pool_conditions=False)

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, *further: Tensor
    ) -> tuple[Tensor, ...]:
        more = conditioned(self.names, further[:-1])
        down, middle = self.model(sample, timestep, encoder_hidden_states, further[-1], return_dict=False, **more)
        if self.pooled:
            return tuple(each.mean((2, 3), keepdim=True).expand_as(each) for each in (*down, middle))
        return *down, middle


class ControlledUNet(nn.Module):
    def __init__(self, model: Any, names: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, *further: Tensor) -> Tensor:
        own, residuals = further[: len(self.names)], further[len(self.names) :]
        more, told = conditioned(self.names, own), attended(self.names, own, encoder_hidden_states)
        output: Tensor = self.model(
            sample, timestep, told, return_dict=False,
            down_block_additional_residuals=residuals[:-1], mid_block_additional_residual=residuals[-1], **more,
        )[0]  # fmt: skip
        return output


class VAEDecoder(nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.post_quant_conv = getattr(vae, "post_quant_conv", None) or nn.Identity()
        self.decoder = vae.decoder

    def forward(self, latent_sample: Tensor) -> Tensor:
        pixels: Tensor = self.decoder(self.post_quant_conv(latent_sample))
        return pixels


class VAEEncoder(nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.encoder = vae.encoder
        self.quant_conv = getattr(vae, "quant_conv", None) or nn.Identity()

    def forward(self, sample: Tensor) -> Tensor:
        parameters: Tensor = self.quant_conv(self.encoder(sample))
        return parameters


class TinyDecoder(nn.Module):
    """Latents as the UNet has them [B, 4, h, w] -> pixels [B, 3, 8h, 8w] in [-1, 1], by AutoencoderTiny's decoder."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.decoder = vae.decoder

    def forward(self, latent_sample: Tensor) -> Tensor:
        pixels: Tensor = self.decoder(latent_sample)
        return pixels


class SafetyChecker(nn.Module):
    """A picture as CLIP sees it -> its similarity to each concept less the threshold; the verdict is the runtime's."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.side = model, int(model.config.vision_config.image_size)

    def forward(self, clip_input: Tensor) -> tuple[Tensor, Tensor]:
        seen = nn.functional.normalize(self.model.visual_projection(self.model.vision_model(clip_input).pooler_output))
        special, concepts = map(nn.functional.normalize, (self.model.special_care_embeds, self.model.concept_embeds))
        thresholds = self.model.special_care_embeds_weights, self.model.concept_embeds_weights
        return seen @ special.T - thresholds[0], seen @ concepts.T - thresholds[1]


# Latents a side of the example inputs: small, and of a shape that every network takes. And tokens, where any number is.
SIDE, TOKENS_TRACED = 16, 32


def wrap(part: str, model: Any, facts: Facts) -> Wrapped:
    """Wrap a loaded component; the example inputs are small but of real shape."""
    if part in TEXT_ENCODERS:
        return _text(part, model, facts)
    if part == "transformer":
        return _transformer(model, facts)
    if kind_of(part) in ("unet", "controlnet", "controlled_unet"):
        return _denoising(part, model, facts)
    if part == IMAGE_ENCODER:
        pixels = torch.zeros(1, 3, facts.image_side, facts.image_side)
        return Wrapped(part, model, {PIXELS: pixels}, {PIXELS: (0,)}, (TOKENS,))
    if part == SAFETY_CHECKER:
        checker = SafetyChecker(model)
        seen = torch.zeros(1, 3, checker.side, checker.side)
        return Wrapped(part, checker, {"clip_input": seen}, {"clip_input": (0,)}, ("special_scores", "concept_scores"))
    if part == "vae_encoder":
        found = LATENTS if type(model).__name__ in DETERMINISTIC else "latent_parameters"
        return Wrapped(part, VAEEncoder(model), {"sample": _pixels(facts)}, {"sample": (0, 2, 3)}, (found,))
    if part == UPSCALER:
        return Wrapped(part, model, {"image": torch.zeros(1, 3, 32, 32)}, {"image": (0, 2, 3)}, ("sample",))
    decoder = {"vae_decoder": VAEDecoder, TINY: TinyDecoder}[part](model)
    latents = torch.zeros(1, facts.latents.channels // facts.latents.fold**2, SIDE, SIDE)
    return Wrapped(part, decoder, {"latent_sample": latents}, {"latent_sample": (0, 2, 3)}, ("sample",))


def _pixels(facts: Facts) -> Tensor:
    side = SIDE * facts.latents.factor
    return torch.zeros(1, 3, side, side)


def _text(part: str, model: Any, facts: Facts) -> Wrapped:
    (text,) = [each for each in facts.encoders if each.part == part]
    # Large models take any number of tokens, and a trace runs them all.
    few = text.tokens if text.kind == "clip" else TOKENS_TRACED
    ids = torch.ones(1, few or facts.max_tokens, dtype=torch.int64)
    if text.kind == "t5":
        return Wrapped(part, T5Encoder(model), {"input_ids": ids}, {"input_ids": (0, 1)}, ("last_hidden_state",))
    if text.kind == "gemma2":
        dynamic: dict[str, tuple[int, ...]] = {"input_ids": (0, 1), "attention_mask": (0, 1)}
        example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return Wrapped(part, LastState(model, causal_mask), example, dynamic, ("last_hidden_state",))
    if text.kind == "qwen3":
        several, last = "," in text.states, int(model.config.num_hidden_layers)
        states = tuple(f"hidden_states.{n}" for n in range(0 if several else last, last + 1))
        dynamic = {"input_ids": (0, 1), "attention_mask": (0, 1)}
        example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return Wrapped(part, LanguageModel(model, several), example, dynamic, states)
    module, first = (
        (TextEncoder2(model), ("text_embeds", "last_hidden_state"))
        if part == "text_encoder_2" or facts.conditioning == "joint"
        else (TextEncoder(model), ("last_hidden_state", "pooler_output"))
    )
    states = tuple(f"hidden_states.{n}" for n in range(model.config.num_hidden_layers + 1))
    return Wrapped(part, module, {"input_ids": ids}, {"input_ids": (0, 1)}, (*first, *states))


def _transformer(model: Any, facts: Facts) -> Wrapped:
    """A transformer, with its inputs in the order of optimum-intel."""
    conditions = shapes_of_conditions(facts, 1)
    if facts.family == "flux2":
        return _flux2(model, facts)
    if facts.family == "zimage":
        return _z_image(model, facts)
    if facts.family == "sana":
        inputs, changing = sana_example(facts, SIDE)
        return Wrapped("transformer", Sana(model), inputs, changing, ("out_sample",))
    example = {
        "hidden_states": torch.zeros(1, facts.sample_channels, SIDE, SIDE),
        **{name: torch.zeros(shape) for name, shape in conditions.items()},
        "timestep": torch.ones(1),
    }
    dynamic: dict[str, tuple[int, ...]] = {
        "hidden_states": (0, 2, 3), "encoder_hidden_states": (0, 1), "pooled_projections": (0,), "timestep": (0,),
    }  # fmt: skip
    return Wrapped("transformer", MMDiT(model), example, dynamic, ("out_sample",))


def _flux2(model: Any, facts: Facts) -> Wrapped:
    sample, text = (1, facts.sample_channels, SIDE // 2, SIDE // 2), (1, TOKENS_TRACED, facts.text_width)
    shapes = Form.shapes({"sample": sample, "timestep": (1,), "encoder_hidden_states": text})
    names = ("hidden_states", "encoder_hidden_states", "timestep", "img_ids", "txt_ids")
    dynamic: dict[str, tuple[int, ...]] = {**dict.fromkeys(names, (0, 1)), "timestep": (0,)}
    example = {name: torch.zeros(shapes[name]) for name in names}
    return Wrapped("transformer", Flux2(model), example, dynamic, ("out_sample",))


def _z_image(model: Any, facts: Facts) -> Wrapped:
    from .z_image import ZImage

    sample = (1, facts.sample_channels, SIDE, SIDE)
    shapes = ZImageForm.shapes({"sample": sample, "timestep": (1,), **shapes_of_conditions(facts, 1)})
    names = ("hidden_states", "timestep", "encoder_hidden_states", "encoder_attention_mask", "txt_ids", "img_ids")
    dynamic: dict[str, tuple[int, ...]] = {**dict.fromkeys(names, (0, 1)), "timestep": (0,), "hidden_states": (0, 2, 3)}
    example = {name: torch.zeros(shapes[name]) for name in names}
    return Wrapped("transformer", ZImage(model), example, dynamic, ("sample",))


def _denoising(part: str, model: Any, facts: Facts) -> Wrapped:
    """A UNet, a ControlNet, or the UNet that takes its residuals."""
    conditions = shapes_of_conditions(facts, 1)
    # A ControlNet sees no pictures.
    shown = {} if kind_of(part) == "controlnet" else shapes_of_pictures(facts, 1)
    told = {name: shape for name, shape in conditions.items() if name != "encoder_hidden_states"}
    more = {name: torch.zeros(shape) for name, shape in {**told, **shown}.items()}
    example = {
        "sample": torch.zeros(1, facts.sample_channels, SIDE, SIDE),
        "timestep": torch.tensor([1]),
        "encoder_hidden_states": torch.zeros(1, facts.max_tokens, model.config.cross_attention_dim),
        **more,
    }
    dynamic: dict[str, tuple[int, ...]] = {
        "sample": (0, 2, 3), "timestep": (0,), "encoder_hidden_states": (0, 1), **dict.fromkeys(more, (0,)),
        **({TOKENS: (0, 1), SCALE: ()} if shown else {}),
    }  # fmt: skip
    names = tuple(more)
    if part == "unet":
        return Wrapped(part, UNet(model, names), example, dynamic, ("out_sample",))
    residuals = residual_shapes(model.config, (1, SIDE, SIDE))
    if kind_of(part) == "controlnet":
        lines = {"controlnet_cond": _pixels(facts), "sample": torch.zeros(1, facts.latents.channels, SIDE, SIDE)}
        return Wrapped(
            part, ControlNet(model, names), example | lines, dynamic | {"controlnet_cond": (0, 2, 3)}, tuple(residuals)
        )
    taken = {name: torch.zeros(shape) for name, shape in residuals.items()}
    return Wrapped(
        part, ControlledUNet(model, names), example | taken, dynamic | dict.fromkeys(taken, (0, 2, 3)), ("out_sample",)
    )


def residual_shapes(config: Any, sample: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a ControlNet's residuals: after conv_in, each layer, each downsampler; the middle.

    config   of the UNet or the ControlNet; `sample` is (batch, height, width) of the latents
    """
    batch, h, w = sample
    widths, layers = config.block_out_channels, config.layers_per_block
    shapes = [(batch, widths[0], h, w)]
    for n, width in enumerate(widths):
        shapes += [(batch, width, h, w)] * (layers if isinstance(layers, int) else layers[n])
        if n < len(widths) - 1:
            h, w = -(-h // 2), -(-w // 2)
            shapes.append((batch, width, h, w))
    shapes.append((batch, widths[-1], h, w))
    return {f"additional_residual_{n}": shape for n, shape in enumerate(shapes)}
