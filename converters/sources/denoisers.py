"""The denoisers that are published in one file: how each family's is told by its tensors, and its config by shapes.

Names are those of the models' makers, without a prefix. Translated by diffusers' own functions, whose configs of such
files come from the hub, or, for FLUX.2, are always those of its largest model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]
Config = Mapping[str, Any]


@dataclass(frozen=True)
class Denoiser:
    """A family's denoiser in one file.

    part, kind   its folder and class in diffusers
    mark, own    tensors that only it has, in its makers' names and in diffusers'
    translate    diffusers' function for its makers' names
    told         the config by the shapes, and by another one of its class where they fit that
    published    what no shape tells, as its makers published it
    """

    title: str
    part: str
    kind: str
    mark: tuple[str, ...]
    own: tuple[str, ...]
    translate: str
    told: Callable[[Shapes, Config], dict[str, Any]]
    published: Mapping[str, Any] = field(default_factory=dict)
    # Tensors that the makers' code has and diffusers' has no use for.
    unused: tuple[str, ...] = ()


def count(shapes: Shapes, blocks: str) -> int:
    """How many `blocks` there are: one more than the highest number behind that name."""
    found = [re.match(rf"{re.escape(blocks)}\.(\d+)\.", name) for name in shapes]
    return max((int(match[1]) + 1 for match in found if match), default=0)


def _heads(width: int, given: Config, usual: int, of: str = "") -> dict[str, int]:
    """Heads and their width, which no shape tells without a norm of queries: those of a config that fits, or usual."""
    number, size = f"num_{of}attention_heads", f"{of}attention_head_dim"
    if given.get(number, 0) * given.get(size, 0) == width:
        return {number: given[number], size: given[size]}
    return {number: width // usual, size: usual}


def _sd3(shapes: Shapes, given: Config) -> dict[str, Any]:
    width, channels, patch, _ = shapes["x_embedder.proj.weight"]
    norm = shapes.get("joint_blocks.0.x_block.attn.ln_q.weight")
    dual = [n for n in range(count(shapes, "joint_blocks")) if f"joint_blocks.{n}.x_block.attn2.qkv.weight" in shapes]
    return {
        "in_channels": channels,
        "out_channels": shapes["final_layer.linear.weight"][0] // patch**2,
        "patch_size": patch,
        "num_layers": count(shapes, "joint_blocks"),
        "caption_projection_dim": shapes["context_embedder.weight"][0],
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "pooled_projection_dim": shapes["y_embedder.mlp.0.weight"][1],
        "pos_embed_max_size": math.isqrt(math.prod(shapes["pos_embed"]) // width),
        "dual_attention_layers": dual,
        "qk_norm": "rms_norm" if norm else None,
        **(_heads(width, {}, norm[0]) if norm else _heads(width, given, 64)),
    }


def _flux2(shapes: Shapes, given: Config) -> dict[str, Any]:
    width, channels = shapes["img_in.weight"]
    (head,) = shapes["double_blocks.0.img_attn.norm.query_norm.scale"]
    return {
        "in_channels": channels,
        "num_layers": count(shapes, "double_blocks"),
        "num_single_layers": count(shapes, "single_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": shapes["txt_in.weight"][1],
        "mlp_ratio": shapes["double_blocks.0.img_mlp.2.weight"][1] / width,
        "timestep_guidance_channels": shapes["time_in.in_layer.weight"][1],
        "guidance_embeds": "guidance_in.in_layer.weight" in shapes,
    }


def _z_image(shapes: Shapes, given: Config) -> dict[str, Any]:
    width, numbers = shapes["x_embedder.weight"]
    (head,) = shapes["layers.0.attention.q_norm.weight"]
    patch = 2
    return {
        "all_patch_size": [patch],
        "all_f_patch_size": [1],
        "in_channels": numbers // patch**2,
        "dim": width,
        "n_heads": width // head,
        "n_kv_heads": width // head,
        "n_layers": count(shapes, "layers"),
        "n_refiner_layers": count(shapes, "noise_refiner"),
        "cap_feat_dim": shapes["cap_embedder.1.weight"][1],
    }


def _sana(shapes: Shapes, given: Config) -> dict[str, Any]:
    width, channels, patch, _ = shapes["x_embedder.proj.weight"]
    return {
        "in_channels": channels,
        "out_channels": shapes["final_layer.linear.weight"][0] // patch**2,
        "patch_size": patch,
        "num_layers": count(shapes, "blocks"),
        "cross_attention_dim": width,
        "caption_channels": shapes["y_embedder.y_proj.fc1.weight"][1],
        "mlp_ratio": shapes["blocks.0.mlp.inverted_conv.conv.weight"][0] / (2 * width),
        **_heads(width, given, 32),
        # Published are 2240 and 1152.
        **_heads(width, given, 112 if width % 112 == 0 else 72, "cross_"),
    }


def _unet(shapes: Shapes, given: Config) -> dict[str, Any]:
    # Read off its levels by single_file_configs.unet_config.
    return {}


SD3 = Denoiser(
    "Stable Diffusion 3", "transformer", "SD3Transformer2DModel",
    ("joint_blocks.0.x_block.attn.qkv.weight",), ("pos_embed.proj.weight", "context_embedder.weight"),
    "convert_sd3_transformer_checkpoint_to_diffusers", _sd3, {"sample_size": 128},
)  # fmt: skip
FLUX2 = Denoiser(
    "FLUX.2", "transformer", "Flux2Transformer2DModel",
    ("double_stream_modulation_img.lin.weight",), ("double_stream_modulation_img.linear.weight",),
    "convert_flux2_transformer_checkpoint_to_diffusers", _flux2,
    {"axes_dims_rope": [32, 32, 32, 32], "rope_theta": 2000, "eps": 1e-6, "patch_size": 1},
)  # fmt: skip
Z_IMAGE = Denoiser(
    "Z-Image", "transformer", "ZImageTransformer2DModel",
    ("cap_pad_token", "x_embedder.weight"), ("cap_pad_token", "all_x_embedder.2-1.weight"),
    "convert_z_image_transformer_checkpoint_to_diffusers", _z_image,
    {"axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512], "rope_theta": 256.0, "t_scale": 1000.0,
     "norm_eps": 1e-5, "qk_norm": True},
    ("norm_final.weight",),
)  # fmt: skip
SANA = Denoiser(
    "SANA", "transformer", "SanaTransformer2DModel",
    ("attention_y_norm.weight", "blocks.0.cross_attn.kv_linear.weight"),
    ("patch_embed.proj.weight", "caption_norm.weight"),
    "convert_sana_transformer_to_diffusers", _sana,
    {"sample_size": 32},
    ("pos_embed", "y_embedder.y_embedding"),
)  # fmt: skip
UNET = Denoiser(
    "Stable Diffusion's UNet", "unet", "UNet2DConditionModel",
    ("input_blocks.0.0.weight",), ("down_blocks.0.resnets.0.conv1.weight", "conv_in.weight"),
    "convert_ldm_unet_checkpoint", _unet,
)  # fmt: skip
DENOISERS = (SD3, FLUX2, Z_IMAGE, SANA, UNET)
# What files before the first dot of a denoiser's names begin with; "" for files that hold nothing else.
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "")
# Families that are known by their tensors, and not offered.
OTHERS = {
    "FLUX.1": "double_blocks.0.img_attn.qkv.weight",
    "FLUX.1 (diffusers)": "single_transformer_blocks.0.proj_mlp.weight",
    "PixArt": "blocks.0.cross_attn.kv_linear.weight", "Qwen-Image": "transformer_blocks.0.img_mod.1.weight",
    "Wan": "blocks.0.cross_attn.norm_k.weight", "Lumina 2": "noise_refiner.0.attention.qkv.weight",
    "Stable Cascade": "clip_txt_pooled_mapper.weight",
}  # fmt: skip


def find(names: Mapping[str, Any]) -> tuple[Denoiser, str, bool] | None:
    """Which denoiser is among some tensors, behind which prefix, and whether in its makers' names."""
    for prefix in PREFIXES:
        for each in DENOISERS:
            for marks, original in ((each.mark, True), (each.own, False)):
                if all(prefix + mark in names for mark in marks):
                    return each, prefix, original
    return None


def other(names: Mapping[str, Any]) -> str:
    """The family of a denoiser that is not offered; "" where none is known."""
    for prefix in PREFIXES:
        for title, mark in OTHERS.items():
            if prefix + mark in names:
                return title.partition(" (")[0]
    return ""
