"""How strong a LoRA is: the alpha and the rank that a file's header, or the adapter_config.json beside it, gives.

    lora_adapter_metadata   in the header, JSON: peft's LoraConfig, each field behind its part ("unet.r"); diffusers
    adapter_config.json     beside the file: the config of peft's save_pretrained, for LoRA, LoHa or LoKr

The factor of a module is alpha / r, or alpha / sqrt(r) with use_rslora (Kalajdzievski 2023, arXiv:2312.03732);
alpha_pattern and rank_pattern give some modules others.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InvalidModel
from ..files import parse_json

HEADER_KEY = "lora_adapter_metadata"
CONFIG_FILE = "adapter_config.json"
CONFIG_LIMIT = 8 << 20
# Kinds of adapters -> the field that holds their alpha.
_ALPHA = {"LORA": "lora_alpha", "LOHA": "alpha", "LOKR": "alpha"}
# Fields that, when they are set, make something else than a product of two matrices.
_VARIANTS = {
    "use_dora": "DoRA", "use_qalora": "QALoRA", "use_bdlora": "BD-LoRA", "alora_invocation_tokens": "aLoRA",
    "arrow_config": "Arrow", "kasa_config": "KaSA", "velora_config": "VeLoRA", "monteclora_config": "MonteCLoRA",
    "layer_replication": "LoRA with layer_replication",
}  # fmt: skip
# Values of init_lora_weights that take a part of the base's weights away, which the difference then replaces.
_FROM_BASE = ("pissa", "corda", "olora", "lora_ga", "loftq", "mica")


@dataclass(frozen=True)
class Strength:
    """Alpha and rank of one part's modules.

    origin          where they were read, for messages
    alpha, rank     of modules that no pattern names
    alphas, ranks   name of a module, or its end -> another one
    stabilized      divide by the root of the rank (rsLoRA)
    stated_rank     the tensors must have this rank; LoKr's need not
    """

    origin: str
    alpha: float
    rank: int
    alphas: Mapping[str, float] = field(default_factory=dict)
    ranks: Mapping[str, float] = field(default_factory=dict)
    stabilized: bool = False
    stated_rank: bool = True

    def factor(self, module: str, rank: int) -> float:
        """The factor of `module` (its name with dots), whose tensors have the rank `rank`.

        Raises InvalidModel where the tensors have another rank than the config says.
        """
        stated = _of(self.ranks, module, self.rank)
        if self.stated_rank and rank != stated:
            raise InvalidModel(f"{self.origin} says rank {stated:g} of {module}, whose tensors have {rank}")
        return _of(self.alphas, module, self.alpha) / (math.sqrt(stated) if self.stabilized else stated)


def header_strengths(metadata: Mapping[str, str], name: str) -> dict[str, Strength]:
    """Part -> its strength, of a file's header; "" stands for every part. Raises InvalidModel."""
    if HEADER_KEY not in metadata:
        return {}
    origin = f"the {HEADER_KEY} of {name}"
    document = _json(metadata[HEADER_KEY], origin)
    parts: dict[str, dict[str, Any]] = {}
    for key, value in document.items():
        part, _, own = key.rpartition(".")
        parts.setdefault(part, {})[own] = value
    return {part: _strength(config, origin) for part, config in parts.items()}


def config_strength(path: Path) -> tuple[Strength, str] | None:
    """The strength in the adapter_config.json beside `path`, and the part that it is of; None where there is none.

    Peft names the class of the model and not its part, so two text encoders are told apart by that or by the folder.
    Raises InvalidModel.
    """
    beside = path.with_name(CONFIG_FILE)
    if not beside.is_file():
        return None
    origin = f"{CONFIG_FILE} beside {path.name}"
    try:
        if beside.stat().st_size > CONFIG_LIMIT:
            raise InvalidModel(f"{origin} is larger than {CONFIG_LIMIT >> 20} MB, which is no config")
        config = _json(beside.read_text("utf-8"), origin)
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidModel(f"{origin} cannot be read: {error}") from error
    mapping = config.get("auto_mapping")
    kind = str(mapping.get("base_model_class")) if isinstance(mapping, dict) else ""
    second = kind == "CLIPTextModelWithProjection" or path.parent.name == "text_encoder_2"
    first = kind == "CLIPTextModel" or path.parent.name == "text_encoder"
    return _strength(config, origin), "text_encoder_2" if second else "text_encoder" if first else "unet"


def _strength(config: Mapping[str, Any], origin: str) -> Strength:
    kind = str(config.get("peft_type") or "LORA").upper()
    if kind not in _ALPHA:
        raise InvalidModel(f"{origin} is of a {kind} adapter, which is not offered; LoRA, LoHa and LoKr are")
    for variant, name in _VARIANTS.items():
        if config.get(variant):
            raise InvalidModel(f"{origin} says {name} ({variant}), which is not offered; LoRA, LoHa and LoKr are")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_FROM_BASE):
        raise InvalidModel(
            f"{origin} says init_lora_weights {start!r}: its base model's weights were changed too, so it fits no "
            "other; peft's save_pretrained converts it (path_initial_model_for_weight_conversion)"
        )
    # Peft's own defaults where a config leaves a field out.
    return Strength(
        origin,
        alpha=_number(config, _ALPHA[kind], 8, origin),
        rank=_rank(config.get("r", 8), "r", origin),
        alphas={name: _number({name: each}, name, 0, origin) for name, each in _patterns(config, "alpha", origin)},
        ranks={name: _rank(each, name, origin) for name, each in _patterns(config, "rank", origin)},
        stabilized=bool(config.get("use_rslora")),
        stated_rank=kind != "LOKR",
    )


def _patterns(config: Mapping[str, Any], which: str, origin: str) -> list[tuple[str, Any]]:
    """The rows of `alpha_pattern` or `rank_pattern`. Raises InvalidModel for regular expressions beyond names.

    Peft searches with whatever expression stands there; one out of a stranger's file could take for ever.
    """
    found = config.get(f"{which}_pattern") or {}
    if not isinstance(found, dict):
        raise InvalidModel(f"{origin}: {which}_pattern is no object")
    for name in found:
        if not re.fullmatch(r"\^?(?:\w|-|\\?\.|\.\*)+\$?", name):
            raise InvalidModel(f"{origin}: {which}_pattern names {name[:80]!r}; names of modules are read, and '.*'")
    return list(found.items())


def _of(patterns: Mapping[str, float], module: str, otherwise: float) -> float:
    """The number of the first pattern that is the name of `module` or, from a dot on, its end."""
    return next((value for pattern, value in patterns.items() if _fits(pattern, module)), otherwise)


def _fits(pattern: str, module: str) -> bool:
    whole = pattern.startswith("^")
    pieces = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".").split(".*")
    starts = [0, *(match.end() for match in re.finditer(r"\.", module) if not whole)]
    return any(_is_made_of(pieces, module[start:]) for start in starts)


def _is_made_of(pieces: list[str], text: str) -> bool:
    """Whether `text` is these pieces in order, with anything between two of them."""
    first, *others = pieces
    if not others:
        return text == first
    if not text.startswith(first):
        return False
    reached = len(first)
    for piece in others[:-1]:
        found = text.find(piece, reached)
        if found < 0:
            return False
        reached = found + len(piece)
    return text.endswith(others[-1]) and len(text) - len(others[-1]) >= reached


def _json(text: str, origin: str) -> dict[str, Any]:
    try:
        document = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise InvalidModel(f"{origin} is not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise InvalidModel(f"{origin} is a {type(document).__name__}, not a JSON object")
    return document


def _number(config: Mapping[str, Any], key: str, otherwise: float, origin: str) -> float:
    value = config.get(key, otherwise)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InvalidModel(f"{origin}: {key} is {value!r}, not a number")
    return float(value)


def _rank(value: Any, key: str, origin: str) -> int:
    if type(value) is not int or not 1 <= value < 1 << 31:
        raise InvalidModel(f"{origin}: the rank {key} is {value!r}, not a whole number from 1")
    return value
