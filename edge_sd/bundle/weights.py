"""Torch weights on disk: the weight files of a diffusers folder, and its components as torch modules.

Only safetensors are read; a pickle can run code when it is opened. A tensor that is missing would be made up at random
by the libraries' loaders, so it is an error here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import InvalidModel
from ..files import inside, refuse_pointer

PICKLES = ("*.bin", "*.ckpt", "*.pt", "*.pth", "*.pkl")
# A diffusers folder may hold its weights in float16 beside the others, or alone.
VARIANTS = (None, "fp16")
# Of a weight file, what `sample` looks at: its header, and so many blocks of so many bytes.
HEAD, BLOCKS, BLOCK = 1 << 20, 64, 1 << 14


def weight_files(folder: Path, stem: str) -> tuple[list[Path], str | None]:
    """The weight files of a component, several if it is sharded, and their names' variant.

    Raises InvalidModel, also for what a clone without LFS has in place of weights.
    """
    paths, variant = _weight_files(folder, stem)
    for path in paths:
        refuse_pointer(path)
    return paths, variant


def _weight_files(folder: Path, stem: str) -> tuple[list[Path], str | None]:
    for variant in VARIANTS:
        path = folder / (f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors")
        if path.is_file():
            return [path], variant
        index = folder / f"{stem}.safetensors.index{f'.{variant}' if variant else ''}.json"
        if index.is_file():
            return _shards(index), variant
    pickles = [path.name for pattern in PICKLES for path in folder.glob(pattern) if path.name != "openvino_model.bin"]
    if pickles:
        raise InvalidModel(
            f"{folder} holds {pickles[0]}, a pickle, which can run code when opened; "
            f"only safetensors are read ({stem}.safetensors)"
        )
    raise InvalidModel(f"{folder} has no {stem}.safetensors")


def load_module(
    kind: Any, folder: Path, stem: str, dtype: Any = None, mapped: bool = False, layers: int | None = None
) -> Any:
    """The torch module of class `kind` in `folder`, in evaluation mode; `dtype` is float32 by default.

    With `mapped` weights that have that type are read where their files are. With `layers` it is the first so many of a
    language model, without the last norm and the head: what it returns are states as layers leave them.
    Raises InvalidModel for anything that is missing, of another shape, or not finite.
    """
    import torch

    paths, variant = weight_files(folder, stem)
    path, wanted = paths[0], dtype or torch.float32
    _refuse_quantized(folder)
    always = kind.__module__.startswith("transformers")
    extra: dict[str, Any] = {} if always else {"low_cpu_mem_usage": mapped}
    if layers is not None:
        extra["num_hidden_layers"] = layers
    try:
        module, info = kind.from_pretrained(
            folder,
            variant=variant,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            torch_dtype=wanted,
            **extra,
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise InvalidModel(f"{folder} cannot be loaded: {str(error).splitlines()[0]}") from error
    missing = sorted(key for key in info["missing_keys"] if "position_ids" not in key)
    wrong = sorted(str(row[0]) for row in info["mismatched_keys"])
    if missing or wrong:
        names = missing or wrong
        what = "lacks" if missing else "has a wrong shape for"
        raise InvalidModel(f"{path} {what} {names[0]}" + (f" and {len(names) - 1} more" if names[1:] else ""))
    if wanted == torch.float32 or not getattr(kind, "_keep_in_fp32_modules", None):
        # Of a file with several types, diffusers keeps them if the first is the wanted one.
        module.to(wanted)
    for key, tensor in module.state_dict().items():
        # The maximum is NaN if any number is.
        if tensor.is_floating_point() and not all(map(torch.isfinite, torch.aminmax(tensor))):
            raise InvalidModel(f"{path} is damaged: {key} holds NaN or infinity")
    if layers is not None:
        module = getattr(module, "model", module)
        module.norm = torch.nn.Identity()
    return module.eval().requires_grad_(False)


def _refuse_quantized(folder: Path) -> None:
    """Raise InvalidModel for a component that a library quantized: its weights are no numbers by themselves."""
    from ..files import read_json

    config = folder / "config.json"
    how = read_json(config).get("quantization_config") if config.is_file() else None
    if isinstance(how, dict):
        raise InvalidModel(
            f"{folder} is quantized by {how.get('quant_method', 'an unknown method')}, and can't be used as it is; "
            "edge-sd convert reads what sdnq quantized"
        )


def sample(paths: Iterable[Path]) -> str:
    """A hash of each file's size, header and some blocks: tells fine-tunes of one model apart without reading it all.

    Raises OSError.
    """
    digest = hashlib.sha256()
    for path in sorted(paths):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(HEAD))
            for n in range(BLOCKS):
                file.seek(size * n // BLOCKS)
                digest.update(file.read(BLOCK))
    return digest.hexdigest()


def _shards(index: Path) -> list[Path]:
    """The files that an index of shards names, in order. Raises InvalidModel."""
    from ..files import read_json

    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise InvalidModel(f"{index} is damaged: it has no weight_map")
    paths = [inside(index.parent, name) for name in sorted(set(names.values()))]
    for path in paths:
        if not path.is_file():
            raise InvalidModel(f"{index.parent} lacks {path.name}, which {index.name} names")
    return paths
