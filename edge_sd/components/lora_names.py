"""The keys of LoRA files, as the programs that write them spell parts, modules and tensors.

    kohya, LyCORIS   lora_unet_down_blocks_0_….lora_down.weight, lora_te_…, lora_te1_…, lora_te2_…, lycoris_…
    diffusers        unet.….lora_A.weight, ….lora_linear_layer.down.weight, ….processor.to_q_lora.down.weight,
                     transformer.….lora_A.weight
    peft             base_model.model.….lora_A.weight, ….hada_w1_a, ….lokr_w1
    ComfyUI          diffusion_model.…, text_encoders.clip_l.transformer.…
    OMI              unet.…, clip_l.…, clip_g.… (Open Model Initiative; OneTrainer writes it)

Kohya's keys have "_" for "." and do not tell the two apart, so modules are compared with "_" for ".". SDXL's original
names are translated to diffusers', SD 3's in lora_original.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

# How a key ends -> which tensor of a difference it is; "" is what the group says.
_ENDS = {
    r"\.lora_A(?:\.\w+)?\.weight|[._]lora[._]down\.weight|\.lora_linear_layer\.down\.weight": "down",
    r"\.lora_B(?:\.\w+)?\.weight|[._]lora[._]up\.weight|\.lora_linear_layer\.up\.weight": "up",
    r"\.lora_mid\.weight": "mid",
    r"\.alpha": "alpha",
    r"\.(hada_[wt][12](?:_[ab])?|lokr_[wt][12](?:_[ab])?|diff)(?:\.default)?": "",
}
_END = re.compile("|".join(f"(?P<g{n}>{pattern})$" for n, pattern in enumerate(_ENDS)))
_KINDS = tuple(_ENDS.values())
# No end is longer, so no more of a key is searched.
_LONGEST_END = 64
_PREFIXES = {
    "lora_unet_": "unet", "lycoris_": "unet", "unet.": "unet", "base_model.model.": "unet",
    "model.diffusion_model.": "unet", "diffusion_model.": "unet",
    "transformer.": "transformer", "lora_transformer_": "transformer",
    "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2", "lora_te_": "text_encoder",
    "lora_te3_": "text_encoder_3",
    "text_encoder_2.": "text_encoder_2", "text_encoder.": "text_encoder",
    "text_encoders.clip_l.transformer.": "text_encoder", "text_encoders.clip_h.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
    "clip_l.transformer.": "text_encoder", "clip_g.transformer.": "text_encoder_2",
    "clip_l.": "text_encoder", "clip_g.": "text_encoder_2",
}  # fmt: skip
# Prefixes that do not say which model it is, and how names of a text encoder's modules begin.
_UNSAID = ("", "base_model.model.", "lycoris_")
_TEXT = ("text_model.", "text_model_", "encoder.layers.", "text_projection")
# What is in a key -> the form that is not offered. The first that fits is named.
_REFUSED = {
    r"\.dora_scale$|\.lora_magnitude_vector": "DoRA",
    r"\.boft_[Rs]|\.boft_": "BOFT",
    r"\.oft_|\.oft_blocks$|\.rescale$": "OFT",
    r"\.[ab][12]\.weight$|\.glora_": "GLoRA",
    r"\.on_input$|\.ia3_l": "(IA)³",
    r"\.vera_lambda": "VeRA",
    r"\.hra_u": "HRA",
    r"\.lora_E|\.lora_ranknum": "AdaLoRA",
    r"^(?:unet|text_encoder):\d+:": "LoRA in the form of cloneofsimo/lora, whose keys have no names of modules",
    r"^lora_controlnet$": "control-LoRA",
    r"\.(?:scale_weight|weight_scale|scale_input)$": "LoRA in scaled float8",
}
_REFUSED_KEY = re.compile("|".join(f"({pattern})" for pattern in _REFUSED))


class Key(NamedTuple):
    """Where a tensor belongs.

    part     the component
    module   the module's name with "_" for ".", as diffusers has it
    kind     which tensor of the difference it is
    dotted   the module's name as the file has it, without what names the part
    """

    part: str
    module: str
    kind: str
    dotted: str


def split(key: str, part: str = "unet") -> Key | None:
    """Where a key belongs; None where it is in no form that is known.

    `part` is the component where the key does not say it, as peft's do not; text encoders' modules are no UNet's.
    """
    end = _END.search(key, max(0, len(key) - _LONGEST_END))
    if end is None:
        return None
    where, module, dotted = _place(key[: end.start()], part)
    n = next(n for n in range(len(_KINDS)) if end[f"g{n}"] is not None)
    kind = _KINDS[n] or end[0].removeprefix(".").removesuffix(".default")
    return Key(where, module, kind, dotted)


def refused_form(keys: Iterable[str]) -> tuple[str, str] | None:
    """The form of a file that is not offered, and the key that shows it; None where none does."""
    for key in keys:
        if found := _REFUSED_KEY.search(key):
            return list(_REFUSED.values())[int(found.lastindex or 1) - 1], key
    return None


def flat(name: str) -> str:
    """A module's name as names are compared: "_" for ".", and text encoders' without "text_model"."""
    return name.replace(".", "_").removeprefix("text_model_")


@lru_cache(maxsize=4096)
def _place(body: str, part: str) -> tuple[str, str, str]:
    """Part, module and dotted name of a key without its end."""
    prefix = next((each for each in _PREFIXES if body.startswith(each)), "")
    dotted = body[len(prefix) :]
    while prefix and dotted.startswith(prefix):  # Some merged files have it twice.
        dotted = dotted[len(prefix) :]
    where = _PREFIXES.get(prefix, part)
    if prefix in _UNSAID:
        where = part if where == "unet" else where
        if where == "unet" and dotted.startswith(_TEXT):
            where = "text_encoder"
    return where, _module(dotted), dotted


def _module(name: str) -> str:
    """A module's name as a model has it, with "_" for ".": diffusers', whatever the file's are."""
    name = flat(name.replace(".processor", ""))
    name = re.sub(r"self_attn_to_(q|k|v)$", r"self_attn_\1_proj", name)
    name = re.sub(r"self_attn_to_out$", "self_attn_out_proj", name)
    name = re.sub(r"(attn[12]_to_out)$", r"\1_0", name)
    return _original(name) if re.match(r"(input|middle|output)_block|time_embed_|label_emb|out_", name) else name


_RESNET = {
    "in_layers_0": "norm1", "in_layers_2": "conv1", "emb_layers_1": "time_emb_proj",
    "out_layers_0": "norm2", "out_layers_3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip
_OUTSIDE = {
    "time_embed_0": "time_embedding_linear_1", "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1", "label_emb_0_2": "add_embedding_linear_2",
    "input_blocks_0_0": "conv_in", "out_0": "conv_norm_out", "out_2": "conv_out",
}  # fmt: skip


def _original(name: str, layers: int = 2) -> str:
    """Stability's name of a module -> diffusers', for UNets of `layers` layers in a block, which all of theirs have."""
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    if middle := re.fullmatch(r"middle_block_(\d)_(.+)", name):
        n, rest = int(middle[1]), middle[2]
        return f"mid_block_attentions_0_{rest}" if n == 1 else f"mid_block_resnets_{n // 2}_{_RESNET.get(rest, rest)}"
    found = re.fullmatch(r"(input|output)_blocks_(\d+)_(\d)_(.+)", name)
    if found is None:
        return name
    down, n, place, rest = found[1] == "input", int(found[2]), int(found[3]), found[4]
    # Input blocks begin with conv_in, and each of their downsamplers counts as a layer; an output block has one more.
    block, layer = divmod(n - 1 if down else n, layers + 1)
    side = "down" if down else "up"
    if rest in ("op", "conv"):
        return f"{side}_blocks_{block}_{side}samplers_0_conv"
    if place == 0:
        return f"{side}_blocks_{block}_resnets_{layer}_{_RESNET.get(rest, rest)}"
    return f"{side}_blocks_{block}_attentions_{layer}_{rest}"
