"""IP-Adapters as they are published, in miniature, with random weights, beside the CLIP that looks at pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Of the miniature CLIP: width of its states and of its embedding, pixels a side, and tokens of a plus adapter.
WIDTH, EMBEDDED, SIDE, PLUS_TOKENS = 32, 24, 42, 6


def save_adapter(source: Path, folder: Path, kind: str) -> Path:
    """`folder`/ip-adapter-KIND.safetensors for the UNet of `source`, and `folder`/image_encoder."""
    import torch
    from diffusers import UNet2DConditionModel
    from safetensors.torch import save_file

    torch.manual_seed(1)
    folder.mkdir(exist_ok=True)
    if not (folder / "image_encoder").is_dir():
        _save_clip(folder / "image_encoder")
    unet = UNet2DConditionModel.from_pretrained(source / "unet")
    width = unet.config.cross_attention_dim
    shapes = _base(width) if kind == "base" else _plus(width)
    tensors = {f"image_proj.{name}": _drawn(name, shape) for name, shape in shapes.items()}
    names = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    for n, name in enumerate(names):
        keys = unet.get_submodule(name.removesuffix(".processor")).to_k.weight
        for each in "kv":
            tensors[f"ip_adapter.{2 * n + 1}.to_{each}_ip.weight"] = torch.randn(keys.shape) * 0.4
    path = folder / f"ip-adapter-{kind}.safetensors"
    save_file(tensors, path)
    return path


def _drawn(name: str, shape: tuple[int, ...]) -> Any:
    import torch

    if "norm" in name or ".1.0." in name:
        return torch.randn(shape) * 0.3 + (1 if name.endswith("weight") else 0)
    return torch.randn(shape) * shape[-1] ** -0.5


def _base(width: int) -> dict[str, tuple[int, ...]]:
    return {
        "proj.weight": (4 * width, EMBEDDED), "proj.bias": (4 * width,), "norm.weight": (width,), "norm.bias": (width,),
    }  # fmt: skip


def _plus(width: int, inner: int = 48) -> dict[str, tuple[int, ...]]:
    """A resampler of four layers, each of one head of 64."""
    shapes: dict[str, tuple[int, ...]] = {"latents": (1, PLUS_TOKENS, inner)}
    for name, out, into in (("proj_in", inner, WIDTH), ("proj_out", width, inner)):
        shapes |= {f"{name}.weight": (out, into), f"{name}.bias": (out,)}
    shapes |= {"norm_out.weight": (width,), "norm_out.bias": (width,)}
    for n in range(4):
        for norm in ("0.norm1", "0.norm2", "1.0"):
            shapes |= {f"layers.{n}.{norm}.weight": (inner,), f"layers.{n}.{norm}.bias": (inner,)}
        shapes |= {
            f"layers.{n}.0.to_q.weight": (64, inner), f"layers.{n}.0.to_kv.weight": (128, inner),
            f"layers.{n}.0.to_out.weight": (inner, 64), f"layers.{n}.1.1.weight": (4 * inner, inner),
            f"layers.{n}.1.3.weight": (inner, 4 * inner),
        }  # fmt: skip
    return shapes


def _save_clip(folder: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=SIDE,
        patch_size=14, projection_dim=EMBEDDED,
    )  # fmt: skip
    model = CLIPVisionModelWithProjection(config)
    for parameter in model.parameters():
        # As they are made, everything is much like everything.
        parameter.data *= 3
    model.save_pretrained(folder)
