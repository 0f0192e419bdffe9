"""A component in the names of a checkpoint -> a folder of diffusers' or transformers', held beside its module."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edge_sd.errors import InvalidModel

# Bytes of tensors in one file; the library copies what it writes.
SHARD = 2 << 30
# The key in a config that tells how most numbers were stored where they came from, as Q4_K. diffusers passes over such
# names; in a weight file the library would write keys in any order, and each file would have another hash.
QUANTIZED = "_quantized"


def write_component(
    title: str, folder: Path, config: dict[str, Any], given: dict[str, Any], convert: Callable[..., Any], kind: Any,
    *, takes: bool = False, quantized: str = "",
) -> None:  # fmt: skip
    """Translate a component and hold it beside the module of class `kind` that `config` describes, then write both.

    `convert(tensors, config)` translates the names of `given`; with `takes` it takes what it uses out of `tensors`.
    `quantized` goes into the config. Raises InvalidModel, which begins with `title`.
    """
    import torch

    rest = dict(given)
    made = _translated(title, folder.name, rest, config, convert)
    with torch.device("meta"):
        transformer = "architectures" in config
        module = kind(kind.config_class(**config)) if transformer else kind.from_config(config)
    wanted = {name: tuple(x.shape) for name, x in module.state_dict().items() if "position_ids" not in name}
    if transformer and "CLIP" in kind.__name__:
        # transformers renames as it loads; files keep the names of old.
        inner = "text_model." if not any(name.startswith("text_model.") for name in wanted) else ""
        wanted = {name if name.startswith("text_projection") else inner + name: x for name, x in wanted.items()}
    tied = set(getattr(module, "_tied_weights_keys", None) or ())
    missing = sorted(set(wanted) - set(made) - tied)
    if missing:
        _refuse(title, folder.name, "lacks", missing)
    extra = sorted(rest) if takes else _unused(given, made)
    extra += sorted(set(made) - set(wanted))
    if extra:
        _refuse(title, folder.name, "has what this family has not:", extra)
    wrong = [name for name, x in made.items() if tuple(x.shape) != wanted[name]]
    if wrong:
        found = f"{wrong[0]} ({list(made[wrong[0]].shape)} instead of {list(wanted[wrong[0]])})"
        _refuse(title, folder.name, "has a wrong shape for", [found, *wrong[1:]])
    write_json(folder / "config.json", {**config, **({QUANTIZED: quantized} if quantized else {})})
    _write_shards(folder, "model" if transformer else "diffusion_pytorch_model", made)


def _translated(
    title: str, part: str, rest: dict[str, Any], config: dict[str, Any], convert: Callable[..., Any]
) -> dict[str, Any]:
    names = list(rest)
    try:
        made: dict[str, Any] = convert(rest, config)
    except KeyError as error:
        # The translators look up the tensors that they need, and the ends of the names that they know.
        unknown = [name for name in names if str(error.args[0]) in name]
        _refuse(title, part, "has what this family has not:" if unknown else "lacks", unknown or [str(error.args[0])])
        raise
    except (ValueError, IndexError, RuntimeError, AttributeError, TypeError) as error:
        raise InvalidModel(f"{title}, {part}: its tensors are not those of its family ({error})") from error
    return made


def _unused(given: Mapping[str, Any], made: Mapping[str, Any]) -> list[str]:
    """The names of tensors that no made one is a view of."""
    used = {x.untyped_storage().data_ptr() for x in made.values()}
    fused = re.compile(r"\.attn\.in_proj_(weight|bias)$|\.text_projection$")
    return [name for name, x in given.items() if x.untyped_storage().data_ptr() not in used and not fused.search(name)]


def _refuse(title: str, part: str, what: str, names: list[str]) -> None:
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    raise InvalidModel(f"{title}, {part}: {what} {', '.join(names[:2])}{more}")


def _write_shards(folder: Path, stem: str, tensors: Mapping[str, Any]) -> None:
    """One file, or several with their index where they are large."""
    from safetensors.torch import save_file

    shards: list[dict[str, Any]] = [{}]
    size = 0
    for name, x in tensors.items():
        if size and size + x.nbytes > SHARD:
            shards.append({})
            size = 0
        shards[-1][name] = x
        size += x.nbytes
    if len(shards) == 1:
        names = [f"{stem}.safetensors"]
    else:
        names = [f"{stem}-{n + 1:05}-of-{len(shards):05}.safetensors" for n in range(len(shards))]
        places = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        total = sum(x.nbytes for x in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        write_json(folder / f"{stem}.safetensors.index.json", index)
    for file, shard in zip(names, shards, strict=True):
        save_file({name: x.contiguous() for name, x in shard.items()}, folder / file, {"format": "pt"})


def most_of(types: Mapping[str, str], sizes: Mapping[str, int]) -> str:
    """The type that most numbers of some tensors are stored in, as Q4_K; "" where none is quantized."""
    counts: Counter[str] = Counter()
    for name, kind in types.items():
        counts[kind] += sizes[name]
    return counts.most_common(1)[0][0] if counts else ""


def write_json(path: Path, document: dict[str, Any]) -> None:
    """`document` as JSON, in a folder that may have to be made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False), "utf-8")
