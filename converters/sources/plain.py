"""Checkpoints whose weights were quantized already -> one file of safetensors with the same names, in float16.

They are sources like others: what they lost stays lost, and what is made of them is measured against them. The type
that each tensor had goes into the file's metadata.

    GGUF                        blocks of 2 to 8 bits, as llama.cpp's (gguf_file.py)
    safetensors, float8         each tensor with a scale, or none, as ComfyUI and FLUX's makers write them
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_sd.bundle.safetensors import check_readable
from edge_sd.errors import ConversionError, InvalidModel
from edge_sd.files import scratch

from .components import QUANTIZED
from .gguf_file import Gguf, is_gguf, open_gguf

Array = NDArray[Any]
# Types as they are stored -> as numpy holds them, bfloat16 by its bits.
TAGS: dict[str, Any] = {"F16": np.float16, "F32": np.float32, "BF16": np.uint16}
PLAIN = ("F32", "F16", "BF16")
FLOAT8 = ("F8_E4M3", "F8_E5M2")
# Ends of the names of what a weight is multiplied by, and of what belongs to activations or tells the form.
SCALES = (".scale_weight", ".weight_scale")
TOLD = ("scaled_fp8", ".input_scale", ".scale_input", ".comfy_quant")
# Forms with more than a scale, by tensors that only they have; and types that are of such forms.
BLOCKED = (".weight_scale_2", ".absmax", ".quant_map", ".weight_zero_point", ".qweight", ".nested_absmax")
INTEGERS = ("I8", "U8", "I32", "U32")


@dataclass(frozen=True)
class Weights:
    """A checkpoint whose header was read: name -> shape, the metadata, and where its numbers are in safetensors.

    A quantized one is written as such a file when `file` is called first.
    """

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]
    file: Callable[[], Path]


@contextmanager
def opened(path: Path, beside: Path) -> Iterator[Weights]:
    """The checkpoint in `path`; what must be written of a quantized one is beside `beside`, and goes at the end.

    Raises InvalidModel (a pickle, a damaged file, a form that is not read), MissingExtra or InvalidRequest; `file`
    ConversionError (no space) or OSError, too.
    """
    check_readable(path)
    if path.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        raise InvalidModel(f"{path.name} is a pickle, which can run code when opened; only safetensors are read")
    with ExitStack() as stack:

        @cache
        def folder() -> Path:
            return stack.enter_context(scratch(beside.with_name(f"{beside.name}.plain")))

        yield _of_gguf(open_gguf(path), folder) if is_gguf(path) else _of_safetensors(path, folder)


def _of_gguf(gguf: Gguf, folder: Callable[[], Path]) -> Weights:
    def read(name: str) -> tuple[str, Array]:
        row = gguf.tensors[name]
        return narrowed(np.concatenate(list(gguf.read(name))).reshape(row.shape), row.kind in PLAIN)

    shapes = {name: row.shape for name, row in gguf.tensors.items()}
    types = {name: row.kind for name, row in gguf.tensors.items() if row.kind not in PLAIN}
    return _quantized(gguf.path, shapes, types, read, folder)


def _of_safetensors(path: Path, folder: Callable[[], Path]) -> Weights:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            types = {name: str(each.get_dtype()) for name, each in slices.items()}
            shapes = {name: tuple(each.get_shape()) for name, each in slices.items()}
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InvalidModel(f"{path} is damaged or no safetensors file: {error}") from error
    _refuse_blocked(path.name, types)
    if not any(kind in FLOAT8 for kind in types.values()) and not any(map(_is_scale, types)):
        # What this program writes of quantized files has this key, and what others write is none of its business.
        return Weights(path, shapes, {key: x for key, x in metadata.items() if key != QUANTIZED}, lambda: path)
    return _of_float8(path, types, shapes, folder)


def _of_float8(
    path: Path, types: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], folder: Callable[[], Path]
) -> Weights:
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        for name in types:
            if name.endswith(".comfy_quant"):
                _check_form(path.name, name, file.get_tensor(name).tobytes())
    scales = {_scaled(name): name for name in types if _is_scale(name)}
    kept = {name: shape for name, shape in shapes.items() if not _is_scale(name) and not name.endswith(TOLD)}
    if lost := sorted(set(scales) - set(kept)):
        raise InvalidModel(f"{path.name} has a scale for {lost[0]}, which it has not")
    for name, scale in scales.items():
        count, rows = math.prod(shapes[scale]), (shapes[name] or (1,))[0]
        if count not in (1, rows):
            raise InvalidModel(
                f"{path.name}: {scale} has the shape {list(shapes[scale])}, for weights {list(shapes[name])}; "
                "supported: one scale, or one for each row"
            )

    def read(name: str) -> tuple[str, Array]:
        with safe_open(path, "pt") as file:
            found = file.get_tensor(name).float()
            if name in scales:
                found = found * file.get_tensor(scales[name]).float().reshape(-1, *[1] * max(0, found.ndim - 1))
        return narrowed(found.reshape(shapes[name]).numpy(), exact=types[name] not in FLOAT8)

    lower = {name: types[name] for name in kept if types[name] in FLOAT8}
    return _quantized(path, kept, lower, read, folder)


def _quantized(
    path: Path, shapes: Mapping[str, tuple[int, ...]], types: Mapping[str, str],
    read: Callable[[str], tuple[str, Array]], folder: Callable[[], Path],
) -> Weights:  # fmt: skip
    metadata = {"format": "pt", QUANTIZED: json.dumps(dict(types))}
    return Weights(path, shapes, metadata, cache(lambda: write(folder() / path.name, shapes, read, metadata)))


def _is_scale(name: str) -> bool:
    return name.endswith(SCALES)


def _scaled(name: str) -> str:
    """The weight that a scale is for."""
    return f"{name.rpartition('.')[0]}.weight"


def _refuse_blocked(title: str, types: Mapping[str, str]) -> None:
    """Raise InvalidModel for weights in a form that more than a scale belongs to."""
    found = next((name for name in types if name.endswith(BLOCKED)), None)
    if found is None:
        packed = (name for name, kind in types.items() if kind in INTEGERS and name.endswith(".weight"))
        found = next(packed, None)
    if found is not None:
        raise InvalidModel(
            f"{title} is quantized in a form that is not read ({found}); read are GGUF, and float8 with a scale"
        )


def _check_form(title: str, name: str, data: bytes) -> None:
    """What ComfyUI wrote of how a layer is quantized. Raises InvalidModel for anything but float8 with a scale."""
    try:
        form = json.loads(data).get("format")
    except (ValueError, AttributeError):
        form = None
    if form not in ("float8_e4m3fn", "float8_e5m2"):
        raise InvalidModel(f"{title}: {name} says {form}; supported: float8_e4m3fn and float8_e5m2 with a scale")


def narrowed(x: NDArray[np.float32], exact: bool) -> tuple[str, Array]:
    """Numbers in float16 where they fit, and with `exact` only where they are the same then."""
    with np.errstate(over="ignore", invalid="ignore"):
        half = x.astype(np.float16)
    wide = half.astype(np.float32)
    same = np.array_equal(wide, x, equal_nan=True) if exact else not np.any(np.isinf(half) & np.isfinite(x))
    return ("F16", half) if same else ("F32", x)


def write(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], tuple[str, Array]],
    metadata: Mapping[str, str],
) -> Path:
    """A safetensors file, one tensor at a time in memory; `read` gives each one's type and numbers.

    Which type that is shows only then, so the header has room for the longest, and spaces at its end.
    """
    longest = {name: _row("BF16", shape, 10**16, 10**16) for name, shape in shapes.items()}
    room = len(json.dumps({"__metadata__": dict(metadata), **longest}).encode())
    room += -room % 8
    need = room + 2 * sum(map(math.prod, shapes.values()))
    if (free := shutil.disk_usage(path.parent).free) < need:
        raise ConversionError(
            f"{path.parent} has {free >> 20} MB free, {path.name} needs {need >> 20} MB unpacked; nothing was made"
        )
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    reached = 0
    with path.open("wb") as file:
        file.seek(8 + room)
        for name, shape in shapes.items():
            tag, x = read(name)
            header[name] = _row(tag, shape, reached, reached + x.nbytes)
            file.write(np.ascontiguousarray(x, TAGS[tag]).data)
            reached += x.nbytes
        file.seek(0)
        file.write(room.to_bytes(8, "little"))
        file.write(json.dumps(header).encode().ljust(room))
    return path


def _row(tag: str, shape: tuple[int, ...], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": tag, "shape": list(shape), "data_offsets": [start, stop]}
