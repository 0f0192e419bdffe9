"""Folders whose components SDNQ quantized (https://github.com/Disty0/sdnq) -> the same with their numbers in float16.

A quantized layer has `weight`, integers of 2 to 8 bits, packed where they are no bytes; `scale`, one for each row or
each group of a row; `zero_point` where they are unsigned; and perhaps `svd_up` and `svd_down`, two thin matrices whose
product is added (Li et al. 2024, arXiv:2411.05007). How many bits a layer has shows in how many bytes it has.
Its library is under the GPL and is not used.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_sd.bundle.diffusers import class_of
from edge_sd.bundle.library import MANIFEST
from edge_sd.bundle.weights import weight_files
from edge_sd.errors import InvalidModel, choices
from edge_sd.files import read_json, scratch

from .components import QUANTIZED, most_of, write_json
from .parts import link
from .plain import narrowed, write

Pieces = tuple[tuple[int, int, int, int], ...]
# Bits -> bytes of a group, and the pieces of each of its numbers: byte, first bit there, bits, first bit of the number.
LAYOUTS: dict[int, tuple[int, tuple[Pieces, ...]]] = {
    2: (1, tuple(((0, 2 * k, 2, 0),) for k in range(4))),
    3: (3, (*(((k, 0, 3, 0),) for k in range(3)), *(((k, 3, 3, 0),) for k in range(3)),
            ((0, 6, 2, 0), (2, 6, 1, 2)), ((1, 6, 2, 0), (2, 7, 1, 2)))),
    4: (1, (((0, 0, 4, 0),), ((0, 4, 4, 0),))),
    5: (5, (*(((k, 0, 5, 0),) for k in range(5)), ((0, 5, 3, 0), (3, 5, 2, 3)), ((1, 5, 3, 0), (4, 5, 2, 3)),
            ((2, 5, 3, 0), (4, 7, 1, 3), (3, 7, 1, 4)))),
    6: (3, (*(((k, 0, 6, 0),) for k in range(3)), ((0, 6, 2, 4), (1, 6, 2, 2), (2, 6, 2, 0)))),
    7: (7, (*(((k, 0, 7, 0),) for k in range(7)), tuple((k, 7, 1, 6 - k) for k in range(7)))),
}  # fmt: skip
TYPES = ("int8", "uint8", *(f"{sign}int{bits}" for bits in reversed(LAYOUTS) for sign in ("", "u")))
# What a quantized layer has beside its weight, and what is not read.
BESIDE = ("scale", "zero_point", "svd_up", "svd_down")
REFUSED = {"use_hadamard": "Hadamard rotations", "use_codebook": "codebooks", "scale_dtype": "quantized scales",
           "zero_point_dtype": "quantized zero points"}  # fmt: skip


@contextmanager
def decoded(folder: Path, beside: Path) -> Iterator[Path]:
    """`folder`, or, where SDNQ quantized a component, a folder beside `beside` with its numbers, gone at the end.

    Raises InvalidModel for a component that was quantized otherwise, or is damaged; ConversionError or OSError.
    """
    components = {
        each.parent.name: config
        for each in sorted(folder.glob("*/config.json"))
        if (config := _quantization(each.parent)) is not None
    }
    if not components:
        yield folder
        return
    for part, config in components.items():
        _check(folder / part, config)
    with scratch(beside.with_name(f"{beside.name}.decoded")) as place:
        made = place / folder.name
        made.mkdir()
        for each in folder.iterdir():
            if each.name not in components and each.name != MANIFEST:
                link(each, made / each.name)
        for part in components:
            _decode(folder / part, made / part)
        yield made


def _quantization(component: Path) -> dict[str, Any] | None:
    """How a component was quantized; None where it was not."""
    own, config = component / "quantization_config.json", component / "config.json"
    found = read_json(config).get("quantization_config") if config.is_file() else None
    if found is None and own.is_file():
        found = read_json(own)
    return found if isinstance(found, dict) else None


def _check(component: Path, config: Mapping[str, Any]) -> None:
    """Raise InvalidModel for what is not read."""
    method = config.get("quant_method", "nothing that is known")
    if method != "sdnq":
        raise InvalidModel(f"{component} is quantized by {method}, which is not read; read are sdnq, and files of GGUF")
    rows = [config, *(row for row in (config.get("modules_quant_config") or {}).values() if isinstance(row, dict))]
    for key, what in REFUSED.items():
        if any(row.get(key) not in (None, False, "none") for row in rows):
            raise InvalidModel(f"{component} is quantized by sdnq with {what}, which are not read")
    named = [row["weights_dtype"] for row in rows if "weights_dtype" in row]
    # Keys that begin or end otherwise ask for so many bits at the least, of integers.
    named += [key for key in (config.get("modules_dtype_dict") or {}) if not key.startswith("minimum")]
    for name in named:
        if str(name) not in TYPES and not str(name).endswith(("bit", "bits")):
            raise InvalidModel(f"{component} is quantized by sdnq to {name}, which is not read; read: {choices(TYPES)}")


@dataclass(frozen=True)
class _Component:
    """The tensors of a component's files, opened: name -> file; and the shapes that its class has."""

    where: Path
    files: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]

    def numbers(self, name: str) -> NDArray[np.float32]:
        return np.asarray(self.files[name].get_tensor(name).float().numpy(), np.float32)

    def beside(self, layer: str, what: str) -> NDArray[np.float32] | None:
        name = f"{layer}.{what}" if layer else what
        return self.numbers(name) if name in self.files else None

    def shape(self, name: str) -> tuple[int, ...]:
        """That of a weight before it was quantized. Raises InvalidModel."""
        # transformers' files may have a name before its own names.
        ends = [name, name.partition(".")[2], f"model.{name}"]
        found = next((self.shapes[each] for each in ends if each in self.shapes), None)
        if found is None:
            raise InvalidModel(f"{self.where} has {name}, which its class has not")
        return found

    def read(self, name: str) -> tuple[NDArray[np.float32], str]:
        """The numbers of a tensor, and their type where it is a quantized layer's; else "". Raises InvalidModel."""
        layer = name.rpartition(".")[0]
        scale = self.beside(layer, "scale") if name.endswith("weight") else None
        if scale is None:
            return self.numbers(name), ""
        stored = self.files[name].get_tensor(name).numpy()
        shape, zero = self.shape(name), self.beside(layer, "zero_point")
        # Kept the other way round where it was to be multiplied as integers.
        turned = stored.ndim == 2 and scale.shape[:1] == (1,) and scale.shape[1:] == shape[:1] and shape[0] > 1
        values, kind = _integers(f"{self.where}: {name}", stored.T if turned else stored, shape, zero is not None)
        try:
            if turned:
                scale, zero = scale.T, None if zero is None else zero.T
            # [out, groups, 1] has a scale for each group of a row's numbers.
            grouped = values.reshape(*scale.shape[:2], -1, *values.shape[2:]) if scale.ndim > len(shape) else values
            made = grouped * scale if zero is None else grouped * scale + zero
            made = made.reshape(shape)
            up, down = self.beside(layer, "svd_up"), self.beside(layer, "svd_down")
            if up is not None and down is not None:
                if up.shape[0] != shape[0] or down.shape[0] != up.shape[1]:
                    up, down = up.T, down.T
                made = made + (up @ down).reshape(shape)
        except ValueError as error:
            raise InvalidModel(f"{self.where}: {name} and what is beside it do not fit ({error})") from error
        return made, kind


def _integers(title: str, stored: NDArray[Any], shape: tuple[int, ...], unsigned: bool) -> tuple[NDArray[Any], str]:
    """Numbers of a shape as float32 out of packed ones, and their type. Raises InvalidModel."""
    count = math.prod(shape)
    if stored.dtype not in (np.uint8, np.int8) or 8 * stored.size % count:
        raise InvalidModel(f"{title} has {stored.size} numbers of {stored.dtype} for the shape {list(shape)}")
    bits = 8 * stored.size // count
    kind = f"{'u' * unsigned}int{bits}"
    if bits == 8:
        return stored.astype(np.float32).reshape(shape), kind
    if bits not in LAYOUTS or stored.dtype != np.uint8:
        raise InvalidModel(f"{title} has {bits} bits a number; read: {choices(TYPES)}")
    width, numbers = LAYOUTS[bits]
    if count % len(numbers):
        raise InvalidModel(f"{title} has the shape {list(shape)}, which is no whole number of groups")
    packed = stored.reshape(-1, width)
    made = np.zeros((len(packed), len(numbers)), np.uint8)
    for n, pieces in enumerate(numbers):
        for byte, first, size, to in pieces:
            made[:, n] |= (packed[:, byte] >> first & (1 << size) - 1) << to
    values = made.reshape(shape).astype(np.float32)
    return values if unsigned else values - (1 << bits - 1), kind


def _decode(component: Path, target: Path) -> None:
    """Write a component with its numbers in float16. Raises InvalidModel, ConversionError or OSError."""
    import torch
    from safetensors import SafetensorError, safe_open

    config = {key: x for key, x in read_json(component / "config.json").items() if key != "quantization_config"}
    library, name, stem = class_of(config, component.name)
    kind = getattr(importlib.import_module(library), name)
    with torch.device("meta"):
        module = kind.from_config(config) if library == "diffusers" else kind(kind.config_class(**config))
    shapes = {name: tuple(x.shape) for name, x in module.state_dict().items()}
    with ExitStack() as stack:
        try:
            opened = [stack.enter_context(safe_open(path, "pt")) for path in weight_files(component, stem)[0]]
        except SafetensorError as error:
            raise InvalidModel(f"{component} is damaged: {error}") from error
        files = {name: file for file in opened for name in file.keys()}  # noqa: SIM118 - not a mapping
        layers = {name.rpartition(".")[0] for name in files if name.rpartition(".")[2] == "scale"}
        kept = [name for name in files if not (name.rpartition(".")[0] in layers and name.rpartition(".")[2] in BESIDE)]
        found = _Component(component, files, shapes)
        types: dict[str, str] = {}

        def read(name: str) -> tuple[str, NDArray[Any]]:
            values, kind = found.read(name)
            if kind:
                types[name] = kind
            return narrowed(values, exact=not kind)

        sizes = {
            name: found.shape(name) if name.rpartition(".")[0] in layers and name.endswith("weight")
            else tuple(files[name].get_slice(name).get_shape())
            for name in kept
        }  # fmt: skip
        target.mkdir()
        write(target / f"{stem}.safetensors", sizes, read, {"format": "pt"})
    main = most_of(types, {name: math.prod(sizes[name]) for name in types})
    write_json(target / "config.json", {**config, **({QUANTIZED: main} if main else {})})
