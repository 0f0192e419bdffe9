"""Differences of a model's weights, out of files that people share: LoRA and its kin.

    LoRA   (Hu et al. 2022, arXiv:2106.09685)       W + s B A                         A: down, B: up
    LoHa   (Hyeon-Woo et al. 2022, arXiv:2108.06098)  W + s (w1_a w1_b) * (w2_a w2_b)   * entry by entry
    LoKr   (Yeh et al. 2024, arXiv:2309.14859)      W + s kron(w1, w2)                either may be w_a w_b
    full                                            W + diff

s is alpha / rank, or 1 where a file has no alpha. Keys are kohya's (`lora_unet_….lora_down.weight`, LyCORIS' alike),
diffusers' old and new ones, and peft's. They are compared with a model's names after `.` has become `_`, since kohya's
do not tell the two apart; SDXL's original names are translated.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle.safetensors import read_tensors
from ..errors import InvalidModel, InvalidRequest, choices
from ..files import hash_file

Array = NDArray[np.float32]
# How a key ends -> which tensor of a difference it is. What is in neither form is unknown.
_ENDS = {
    r"\.lora_A(?:\.\w+)?\.weight|[._]lora[._]down\.weight|\.lora_linear_layer\.down\.weight": "down",
    r"\.lora_B(?:\.\w+)?\.weight|[._]lora[._]up\.weight|\.lora_linear_layer\.up\.weight": "up",
    r"\.lora_mid\.weight": "mid",
    r"\.alpha": "alpha",
    r"\.(hada_[wt][12](?:_[ab])?|lokr_[wt][12](?:_[ab])?|diff)": "",
}
_PREFIXES = {
    "lora_unet_": "unet", "lycoris_": "unet", "unet.": "unet", "base_model.model.": "unet",
    "model.diffusion_model.": "unet", "diffusion_model.": "unet",
    "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2", "lora_te_": "text_encoder",
    "text_encoder_2.": "text_encoder_2", "text_encoder.": "text_encoder",
}  # fmt: skip
# Parts that share their weights' names: a UNet that takes control is a UNet.
SAME = {"controlled_unet": "unet"}


@dataclass(frozen=True)
class Difference:
    """What is added to one weight: the tensors of its form by name, and the factor s."""

    tensors: Mapping[str, Array]
    scale: float

    def of(self, shape: tuple[int, ...], factor: float = 1.0) -> Array:
        """`factor` times the difference for a weight of `shape`, [out, in] or [out, in, k, k].

        Raises ValueError for another's.
        """
        t, thin = self.tensors, self.factors(factor)
        factor *= self.scale
        if "diff" in t:
            made = t["diff"]
        elif "mid" in t:
            made = np.einsum("or,rskl,si->oikl", t["up"][:, :, 0, 0], t["mid"], t["down"][:, :, 0, 0])
        elif thin is not None:
            made, factor = thin[1] @ thin[0], 1.0
        elif "hada_w1_a" in t:
            made = _hada(t, "1") * _hada(t, "2")
        else:
            made = _kron(t, shape)
        # As many numbers in another order would be another model's weight.
        if made.shape[0] != shape[0] or made.size != math.prod(shape):
            raise ValueError(f"{list(made.shape)} where the weight is {list(shape)}")
        made = made.reshape(shape)
        return np.asarray(made if factor == 1 else made * np.float32(factor), np.float32)

    def factors(self, factor: float = 1.0) -> tuple[Array, Array] | None:
        """down [r, in, or in k k of a kernel] and up [out, r], whose product up down it is, `factor` times.

        None where it is no product of two such matrices. The factor is in up, where few numbers are.
        """
        t = self.tensors
        if "up" not in t or "mid" in t:
            return None
        down, up = (t[name].reshape(len(t[name]), -1) for name in ("down", "up"))
        return np.asarray(down, np.float32), np.asarray(up * np.float32(self.scale * factor), np.float32)


def _hada(t: Mapping[str, Array], n: str) -> Array:
    a, b, core = t[f"hada_w{n}_a"], t[f"hada_w{n}_b"], t.get(f"hada_t{n}")
    return a @ b if core is None else np.einsum("ij...,jr,ip->pr...", core, b, a)


def _kron(t: Mapping[str, Array], shape: tuple[int, ...]) -> Array:
    w1 = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    if "lokr_w2" in t:
        w2 = t["lokr_w2"]
    elif "lokr_t2" in t:
        w2 = np.einsum("ij...,ip,jr->pr...", t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"])
    else:
        w2 = t["lokr_w2_a"] @ t["lokr_w2_b"].reshape(len(t["lokr_w2_b"]), -1)
    if len(shape) == 4:
        w2 = w2.reshape(len(w2), -1, *shape[2:])
        w1 = w1[:, :, None, None]
    return np.kron(w1, w2)


@dataclass(frozen=True)
class Lora:
    """A file of differences.

    modules   (part, name of a module with "_" for ".") -> its difference
    unknown   keys that are in none of the forms above
    unplaced  part -> modules that a component of that name did not have, once it was loaded
    """

    name: str
    sha256: str
    modules: Mapping[tuple[str, str], Difference] = field(compare=False, repr=False)
    unknown: tuple[str, ...] = field(default=(), compare=False)
    unplaced: dict[str, tuple[str, ...]] = field(default_factory=dict, compare=False)

    def check(self, text_width: int) -> None:
        """Raise InvalidRequest where it was made for a UNet that attends to text of another width."""
        for (part, module), difference in self.modules.items():
            if part == "unet" and module.endswith("attn2_to_k") and "down" in difference.tensors:
                found = difference.tensors["down"].shape[1]
                if found != text_width:
                    raise InvalidRequest(
                        f"the LoRA {self.name!r} is for another family: its cross attention reads text of {found} "
                        f"numbers, this model's {text_width}"
                    )

    def has(self, part: str) -> bool:
        """Whether it changes anything of that part."""
        return any(where == SAME.get(part, part) for where, _ in self.modules)

    def differences(self, part: str, names: Iterable[str]) -> dict[str, Difference]:
        """Those for the modules `names` of a component; what has no place is kept in `unplaced`."""
        part = SAME.get(part, part)
        known = {_flat(name): name for name in names}
        mine = {module: each for (where, module), each in self.modules.items() if where == part}
        self.unplaced[part] = tuple(sorted(set(mine) - set(known)))
        return {known[module]: each for module, each in mine.items() if module in known}

    def notes(self, parts: Iterable[str]) -> list[str]:
        """What of the file had no effect on a model of `parts`, by name."""
        absent = [f"{part} {module}" for part, module in self.modules if part not in parts]
        missing = [*self.unknown, *(module for modules in self.unplaced.values() for module in modules), *absent]
        if not missing:
            return []
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        return [f"the LoRA {self.name!r} has what this model has no place for: {', '.join(missing[:3])}{more}"]


def find_loras(given: Mapping[str | Path, float], named: Mapping[str, float], folder: Path | None) -> dict[Path, float]:
    """File -> weight of those that were given, and of those that a prompt names, which lie in `folder`.

    Raises InvalidRequest for a name that is not there, or is there twice.
    """
    found = {Path(path): weight for path, weight in given.items()}
    known = {path.stem: path for path in sorted(folder.rglob("*.safetensors"))} if folder else {}
    for name, weight in named.items():
        if name not in known:
            valid = choices(known) if folder else "none: give the folder that it lies in"
            raise InvalidRequest(f"the prompt names the LoRA {name!r}; valid: {valid}")
        found.setdefault(known[name], weight)
    stems = [path.stem for path in found]
    if twice := sorted({stem for stem in stems if stems.count(stem) > 1}):
        raise InvalidRequest(f"two LoRAs are called {twice[0]!r}; give one of them another name")
    return found


def read_lora(path: Path) -> Lora:
    """Raises InvalidRequest (no such file) or InvalidModel (damaged, or nothing of a LoRA in it)."""
    groups: dict[tuple[str, str], dict[str, NDArray[Any]]] = {}
    unknown = []
    for key, value in read_tensors(path).items():
        if (found := _split(key)) is None:
            unknown.append(key)
        else:
            part, module, kind = found
            groups.setdefault((part, module), {})[kind] = value
    modules = {}
    for (part, module), tensors in groups.items():
        if kinds := _incomplete(tensors):
            raise InvalidModel(f"{path.name}: {module} has {', '.join(sorted(tensors))}, but no {kinds}")
        if any(not np.isfinite(value).all() for value in tensors.values()):
            raise InvalidModel(f"{path.name} is damaged: {module} holds NaN or infinity")
        modules[part, module] = _difference(tensors)
    if not modules:
        raise InvalidModel(f"{path.name} is no LoRA: it holds {', '.join(sorted(unknown)[:3]) or 'nothing'}")
    if decomposed := [key for key in unknown if key.endswith((".dora_scale", ".lora_magnitude_vector"))]:
        raise InvalidModel(f"{path.name} is a DoRA ({decomposed[0]}), which is not offered; LoRA, LoHa and LoKr are")
    return Lora(path.stem, hash_file(path), modules, tuple(unknown))


def _difference(tensors: Mapping[str, NDArray[Any]]) -> Difference:
    single = {kind: np.asarray(value, np.float32) for kind, value in tensors.items()}
    alpha = single.pop("alpha", None)
    rank = next((len(single[kind]) for kind in ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b") if kind in single), 0)
    return Difference(single, float(alpha.ravel()[0]) / rank if alpha is not None and rank else 1.0)


def _incomplete(tensors: Mapping[str, Any]) -> str:
    """Which tensor a difference lacks, or ""."""
    kinds = set(tensors) - {"alpha"}
    if kinds & {"down", "up", "mid"}:
        wanted = {"down", "up"}
    elif any(kind.startswith("hada") for kind in kinds):
        wanted = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
    elif any(kind.startswith("lokr") for kind in kinds):
        wanted = set()
        for n in "12":
            wanted |= {f"lokr_w{n}"} if f"lokr_w{n}" in kinds else {f"lokr_w{n}_a", f"lokr_w{n}_b"}
    else:
        wanted = {"diff"}
    return ", ".join(sorted(wanted - kinds))


def _split(key: str) -> tuple[str, str, str] | None:
    """Part, module and tensor of a key; None where it is in no form that is known."""
    for pattern, kind in _ENDS.items():
        if end := re.search(f"(?:{pattern})$", key):
            body, kind = key[: end.start()], kind or str(end[1])
            prefix = next((each for each in _PREFIXES if body.startswith(each)), "")
            return _PREFIXES.get(prefix, "unet"), _module(body[len(prefix) :]), kind
    return None


def _flat(name: str) -> str:
    return name.replace(".", "_").removeprefix("text_model_")


def _module(name: str) -> str:
    """A module's name as a model has it, with "_" for ".": diffusers', whatever the file's are."""
    name = _flat(name.replace(".processor", ""))
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
