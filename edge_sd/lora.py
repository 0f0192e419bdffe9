"""Low-rank differences of a model's weights (LoRA, Hu et al. 2022), added where the weights are read.

    W <- W + B A        A: [rank, in * k * k], B: [out, rank]

A few-step model that is a LoRA of a few MB shares the big file with the model it was distilled from. The keys are those
that diffusers saves: `unet.NAME.lora_A.weight`, `unet.NAME.lora_B.weight`, and `unet.NAME.alpha` where B A is to be
scaled by alpha / rank.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import InvalidModel

DTYPES = {"F16": np.float16, "F32": np.float32}
Bytes = NDArray[np.uint8]


def tensors(data: Bytes, name: str) -> dict[str, NDArray[Any]]:
    """The tensors of a safetensors file's bytes, as views into them. Raises InvalidModel."""
    try:
        (length,) = struct.unpack("<Q", data[:8].tobytes())
        header: dict[str, Any] = json.loads(data[8 : 8 + length].tobytes())
        found = {}
        for key, row in header.items():
            if key != "__metadata__":
                start, stop = row["data_offsets"]
                body = data[8 + length + start : 8 + length + stop]
                found[key] = body.view(DTYPES[row["dtype"]]).reshape(row["shape"])
        return found
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise InvalidModel(f"{name} is damaged or no safetensors file of float16 or float32") from error


def add_lora(weights: list[tuple[str, Bytes]], lora: Path, prefix: str = "unet.") -> None:
    """Add the differences in `lora` to the tensors of safetensors files in memory, in place.

    `weights`: each file's name and bytes. Raises InvalidModel where a difference has no tensor, or another shape.
    """
    targets: dict[str, NDArray[Any]] = {}
    for name, data in weights:
        targets |= tensors(data, name)
    for module, difference in _differences(tensors(np.fromfile(lora, np.uint8), lora.name), prefix, lora.name):
        weight = targets.get(f"{module}.weight")
        if weight is None or weight.size != difference.size or weight.shape[0] != difference.shape[0]:
            what = "has no place" if weight is None else "has another shape"
            raise InvalidModel(f"{lora.name}: the difference for {module} {what} in this model")
        weight += difference.reshape(weight.shape).astype(weight.dtype)


def _differences(found: dict[str, NDArray[Any]], prefix: str, name: str) -> Iterator[tuple[str, NDArray[np.float32]]]:
    for key, a in found.items():
        module = key.removeprefix(prefix).removesuffix(".lora_A.weight")
        if key != f"{prefix}{module}.lora_A.weight":
            continue
        b = found.get(f"{prefix}{module}.lora_B.weight")
        if b is None or b.shape[1] != a.shape[0]:
            raise InvalidModel(f"{name}: {module} has one half of a low-rank difference")
        rank = a.shape[0]
        alpha = found.get(f"{prefix}{module}.alpha")
        scale = 1.0 if alpha is None else float(alpha) / rank
        # A convolution's A is [rank, in, k, k] and its B [out, rank, 1, 1].
        yield module, scale * (b.reshape(-1, rank).astype(np.float32) @ a.reshape(rank, -1).astype(np.float32))
