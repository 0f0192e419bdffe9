"""IP-Adapters (Ye et al. 2023, arXiv:2308.06721): weights with which a UNet attends to pictures beside the words.

A diffusers folder has one as `ip_adapter/NAME.safetensors`, as it is published, and the CLIP that looks at pictures as
`image_encoder/`. The tensors of the file:

    image_proj.…                      from what CLIP makes of a picture to tokens. base: one layer of its embedding,
                                      4 tokens; plus: a resampler of its states before the last layer, 16 tokens
    ip_adapter.N.to_k_ip.weight       keys of those tokens in the N-th attention of the UNet: 1, 3, 5, …
    ip_adapter.N.to_v_ip.weight       and values
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ..errors import InvalidModel
from ..files import read_json
from .parts import IMAGE_ENCODER
from .safetensors import check_readable, shapes_in

FOLDER = "ip_adapter"
# Tokens that diffusers takes a base adapter to have.
BASE_TOKENS = 4
Kind = Literal["base", "plus"]
Sizes = Mapping[str, tuple[int, ...]]
_BASE = {"proj.weight", "proj.bias", "norm.weight", "norm.bias"}
_PLUS = re.compile(
    r"latents|(proj_in|proj_out|norm_out)\.(weight|bias)|layers\.\d+\.0\.(norm[12]\.(weight|bias)|to_(q|kv|out)\.weight)"
    r"|layers\.\d+\.1\.(0\.(weight|bias)|[13]\.weight)"
)
_ATTENTION = re.compile(r"\d+\.to_[kv]_ip\.weight")
# What other adapters have in common: a name in their projection.
_OTHERS = {
    "proj.3.weight": "an adapter of the kind full",
    "perceiver_resampler.proj_in.weight": "a FaceID adapter",
    "proj.2.weight": "a FaceID adapter",
}
# What transformers takes a CLIP to have whose config does not say.
_CLIP = {"projection_dim": 512, "hidden_size": 768, "image_size": 224}


def adapter_file(root: Path) -> Path | None:
    """The adapter of a diffusers folder; None where it has none. Raises InvalidModel for a pickle, and for several."""
    folder = root / FOLDER
    if not folder.is_dir():
        return None
    found = sorted(each for each in folder.iterdir() if each.is_file() and not each.name.startswith("."))
    files = [each for each in found if each.suffix == ".safetensors"]
    if len(files) != 1:
        names = ", ".join(each.name for each in found) or "nothing"
        raise InvalidModel(f"{folder} holds {names}; an IP-Adapter is one .safetensors file")
    check_readable(files[0])
    return files[0]


def adapter_facts(root: Path, unet: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of a folder's adapter for a UNet of that config; none where it has no adapter.

    Raises InvalidModel for another kind of file, and for an adapter of another family or another CLIP.
    """
    config = root / IMAGE_ENCODER / "config.json"
    path = adapter_file(root)
    if path is None:
        # What we exported says it in its config.
        said = read_json(config).get(FOLDER) if config.is_file() else None
        if not isinstance(said, dict):
            return {}
        side = _clip(config, "image_size")
        return {"image_prompt": str(said["kind"]), "image_tokens": int(said["tokens"]), "image_side": side}
    kind, sizes = kind_of(path)
    try:
        if kind == "base":
            (width,), (rows, taken) = sizes["image_proj.norm.weight"], sizes["image_proj.proj.weight"]
            tokens = rows // width
        else:
            (_, tokens, _), (width, _) = sizes["image_proj.latents"], sizes["image_proj.proj_out.weight"]
            _, taken = sizes["image_proj.proj_in.weight"]
    except (KeyError, ValueError, ZeroDivisionError) as error:
        raise InvalidModel(f"{path.name} is no IP-Adapter: its image_proj has other shapes") from error
    if kind == "base" and rows != BASE_TOKENS * width:
        raise InvalidModel(
            f"{path.name} makes {rows / width:g} tokens of a picture; a base adapter makes {BASE_TOKENS}"
        )
    if width != unet.get("cross_attention_dim"):
        raise InvalidModel(
            f"{path.name} is for text of width {width}; this model has {unet.get('cross_attention_dim')}"
        )
    if not config.is_file():
        raise InvalidModel(f"{path.name} needs the CLIP that it was trained with, in {IMAGE_ENCODER}/ of the model")
    if taken != (gives := _clip(config, "projection_dim" if kind == "base" else "hidden_size")):
        raise InvalidModel(
            f"{path.name} is for a CLIP that makes {taken} numbers of a picture; that in {IMAGE_ENCODER}/ makes {gives}"
        )
    return {"image_prompt": kind, "image_tokens": tokens, "image_side": _clip(config, "image_size")}


def kind_of(path: Path) -> tuple[Kind, Sizes]:
    """The kind of an adapter, and the shapes of its tensors. Raises InvalidModel for what is none of these kinds."""
    sizes = shapes_in(path)
    projection = {name.removeprefix("image_proj.") for name in sizes if name.startswith("image_proj.")}
    others = sorted(
        name
        for name in sizes
        if not name.startswith("image_proj.") and not _ATTENTION.fullmatch(name.removeprefix("ip_adapter."))
    )
    if projection and (known := next((what for name, what in _OTHERS.items() if name in projection), None)):
        raise InvalidModel(f"{path.name} is {known}; supported are IP-Adapters of the kinds base and plus")
    plus = sorted(name for name in projection if not _PLUS.fullmatch(name))
    strange = others or ([] if projection == _BASE else [f"image_proj.{name}" for name in plus])
    if strange or not projection:
        few = ", ".join((strange or sorted(sizes))[:2]) or "nothing"
        raise InvalidModel(f"{path.name} is no IP-Adapter (base or plus): it holds {few}")
    return ("base" if projection == _BASE else "plus"), sizes


def _clip(config: Path, name: str) -> int:
    """A number in the config of a CLIP that looks at pictures. Raises InvalidModel."""
    value = read_json(config).get(name, _CLIP[name])
    if type(value) is not int or value < 1:
        raise InvalidModel(f"{config.parent}/config.json: {name} is {value!r}, no positive number")
    return value


def attach(unet: Any, path: Path) -> None:
    """Give a torch UNet of diffusers the adapter's attention, in the UNet's own type.

    Its `encoder_hidden_states` are then words and a list of tokens, ([B, S, C], [[B, N, C]]). Raises InvalidModel for
    an adapter of another UNet.
    """
    tensors = _tensors(path)
    names = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    wanted: dict[str, tuple[int, ...]] = {}
    for n, name in enumerate(names):
        keys = unet.get_submodule(name.removesuffix(".processor")).to_k.weight
        wanted |= {f"{2 * n + 1}.to_{each}_ip.weight": tuple(keys.shape) for each in "kv"}
    found = {name: tuple(value.shape) for name, value in tensors["ip_adapter"].items()}
    if found != wanted:
        wrong = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))[0]
        raise InvalidModel(
            f"{path.name} is for another UNet, of {len(found) // 2} cross-attentions; this one has {len(names)} "
            f"(ip_adapter.{wrong} is {list(found.get(wrong, ()))}, not {list(wanted.get(wrong, ()))})"
        )
    processors = unet._convert_ip_adapter_attn_to_diffusers([tensors], low_cpu_mem_usage=False)
    for name in names:
        processors[name].to(unet.dtype).requires_grad_(False)
    unet.set_attn_processor(processors)


def projection(path: Path) -> Any:
    """The torch module that makes tokens [B, N, C] of what CLIP makes of a picture. Raises InvalidModel."""
    from diffusers.loaders.unet import UNet2DConditionLoadersMixin as Loader

    tensors = _tensors(path)["image_proj"]
    try:
        made = Loader()._convert_ip_adapter_image_proj_to_diffusers(tensors, low_cpu_mem_usage=False)
    except (RuntimeError, KeyError) as error:
        detail = " ".join(str(error).split())[:200]
        raise InvalidModel(f"{path.name} has an image_proj that is no base's and no plus's: {detail}") from error
    return made.eval().requires_grad_(False)


def image_encoder(clip: Any, made: Any, kind: str) -> Any:
    """CLIP and the adapter's projection as one torch module: pixel_values [B, 3, S, S] -> tokens [1 + B, N, C].

    The first row stands for no picture, as in diffusers: tokens of an embedding of zeros, or of the states of a picture
    of zeros. It is the same for all pictures, so it is computed here.
    """
    import torch

    class ImageEncoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.clip, self.projection = clip, made
            with torch.no_grad():
                nothing = torch.zeros(1, 3, clip.config.image_size, clip.config.image_size)
                seen = self.states(nothing) if kind == "plus" else torch.zeros(1, clip.config.projection_dim)
                self.register_buffer("blank", made(seen))

        def states(self, pixel_values: Any) -> Any:
            if kind == "plus":
                return self.clip(pixel_values, output_hidden_states=True).hidden_states[-2]
            return self.clip(pixel_values).image_embeds

        def forward(self, pixel_values: Any) -> Any:
            blank: Any = self.blank
            return torch.cat([blank, self.projection(self.states(pixel_values))])

    return ImageEncoder().eval()


def _tensors(path: Path) -> dict[str, dict[str, Any]]:
    """The tensors of a file, by their first names. Raises InvalidModel."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InvalidModel(f"{path.name} is damaged or no safetensors file: {error}") from error
    found: dict[str, dict[str, Any]] = {"image_proj": {}, "ip_adapter": {}}
    for name, value in tensors.items():
        if not torch.isfinite(value).all():
            raise InvalidModel(f"{path.name} is damaged: {name} holds NaN or infinity")
        first, _, rest = name.partition(".")
        found[first][rest] = value
    return found
