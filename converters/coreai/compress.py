"""Smaller weights: integers with a scale for each block, or palettes made by k-means.

A weight becomes what computes it from its stored form, by the two operations that coreai-torch has for that
(`coreai::constexpr_blockwise_shift_scale`, `coreai::lut_to_dense`); the converter packs 4-bit and smaller numbers.
coreai-opt makes the same operations, but leaves out, with a log line, every weight whose width is no multiple of the
block, and makes its own palettes, which are not those that a sensitivity analysis measured. Its quantizer is the oracle
of the tests.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from edge_sd.errors import ConversionError

from ..coreml.mixed import palette
from ..recipes import QuantRecipe
from ..rounding import Table, inputs, integers, limits, rounded
from .convert import quiet

# Smaller weights stay as they are: they are few bytes and need their digits.
SMALLEST = 2048
KINDS = (nn.Linear, nn.Conv2d, nn.Embedding)
# Of transformers, what embeds inputs, steers all of a block, or makes the output: errors there are in every token.
# Where others have fewer bits, these have 8.
STEERING = re.compile(
    r"^model\.(pos_embed|time_\w+|\w+_embedder|\w+_modulation\w*|norm_out|proj_out)(\.|$)"
    r"|\.norm1(_context)?\.linear$"
)
Bits = Mapping[str, int]


def weights(module: nn.Module) -> dict[str, Tensor]:
    """Layer -> its weight, of those that can be made smaller; a weight that two layers share comes once."""
    found = {
        name: each.weight.data
        for name, each in module.named_modules()
        if isinstance(each, KINDS) and each.weight.numel() > SMALLEST
    }
    return {name: value for name, value in found.items() if bool(torch.isfinite(value).all())}


def compress(
    module: nn.Module, recipe: QuantRecipe, bits: Bits | None = None, run: Callable[[], object] | None = None
) -> nn.Module:
    """Store the weights of `module` as `recipe` says, in place; `bits` are each layer's own, for palettes.

    `run` calls the module on what it is made for: weights are then rounded so that outputs change least there, in place
    of each to the nearest number.
    """
    if recipe.bits >= 16 and bits is None:
        return module
    with quiet():
        import coreai_torch._compression.custom_layers  # noqa: F401 - registers the operations
    values = weights(module)
    widths = {name: recipe.bits if bits is None else bits[name] for name in values}
    names = [name for name, width in widths.items() if width < 16]
    learned = dict.fromkeys(names).items() if run is None else inputs(module, names, run)
    stored: dict[str, nn.Module] = {}
    # Nothing is changed before all is known: a large module is called several times.
    shifts: dict[str, Tensor] = {}
    for name, given in learned:
        if recipe.palette and ("lut" in name or "indices" in name):
            # The converter tells tables from indices by these words in the names of tensors.
            raise ConversionError(f"{name} cannot be a palette: coreai-torch takes its name for a table's")
        layer: Any = module.get_submodule(name)
        biased = getattr(layer, "bias", None) is not None
        seen = None if given is None else given.damped(biased)
        if recipe.palette:
            stored[name] = Palette(values[name], widths[name], seen)
        elif isinstance(layer, nn.Embedding) or STEERING.search(name):
            # Of a row that is looked up no other number makes an error good.
            stored[name] = Blocks(values[name], 8, None)
        else:
            stored[name] = Blocks(values[name], widths[name], recipe.group_size, seen)
        if given is not None and biased:
            lost = values[name].float() - stored[name]().float()
            shifts[name] = lost.flatten(1) @ given.mean
    for name, shift in shifts.items():
        bias: Any = module.get_submodule(name).bias
        bias.data += shift.to(bias.dtype)
    for name, each in stored.items():
        parent, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(parent), leaf, Stored(module.get_submodule(name), each))
    return module


class Stored(nn.Module):
    """A linear layer, a convolution or an embedding whose weight is computed of what is stored."""

    def __init__(self, layer: Any, stored: nn.Module) -> None:
        super().__init__()
        self.stored, self.bias = stored, getattr(layer, "bias", None)
        self.call: Any = functional.linear
        if isinstance(layer, nn.Embedding):
            self.call = _embed
        elif isinstance(layer, nn.Conv2d):
            if layer.padding_mode != "zeros":
                raise ConversionError(f"a convolution with {layer.padding_mode} around it cannot be made smaller")
            self.call = partial(
                functional.conv2d, stride=layer.stride, padding=layer.padding, dilation=layer.dilation,
                groups=layer.groups,
            )  # fmt: skip

    @property
    def weight(self) -> Tensor:
        """What the layer computes with, in the type of its scales or its table."""
        out: Tensor = self.stored()
        return out

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.call(x, self.weight, bias=self.bias)
        return out


def _embed(ids: Tensor, weight: Tensor, bias: None) -> Tensor:
    return functional.embedding(ids, weight)


class Palette(nn.Module):
    """A weight as indices of a table of 2**bits numbers; `seen` is H of its inputs (rounding.py)."""

    indices: Tensor
    lut: Tensor

    def __init__(self, weight: Tensor, bits: int, seen: Tensor | None = None) -> None:
        super().__init__()
        table, indices = palette(weight.half().numpy(), bits)
        numbers, found = torch.from_numpy(table), torch.from_numpy(indices.reshape(weight.shape))
        if seen is not None:
            codes = rounded(weight.reshape(len(weight), -1), Table(numbers.float()), seen)
            found = codes.to(torch.uint8).reshape(weight.shape)
        self.register_buffer("indices", found)
        # The converter looks for this name. A dimension of 1 for each of the weight's, then the numbers, each a scalar.
        self.register_buffer("lut", numbers.reshape(*[1] * weight.dim(), -1, 1))

    def stored_bits(self) -> int:
        """Of indices and table."""
        width = int(self.lut.numel() - 1).bit_length()
        return self.indices.numel() * width + self.lut.numel() * 16

    def forward(self) -> Tensor:
        out: Tensor = torch.ops.coreai.lut_to_dense(self.indices, self.lut, 0)
        return out


class Blocks(nn.Module):
    """A weight as integers: (q - zero) * scale, for each output channel and block of its inputs.

    8 bits have a scale for each output channel and no zero. Fewer have both, for blocks of `group` inputs, a quarter as
    many where each has several numbers, or, where a width is no multiple of that, of the largest divisor below.
    `seen` is H of the weight's inputs (rounding.py).
    """

    numbers: Tensor
    scale: Tensor
    zero: Tensor | None

    def __init__(self, weight: Tensor, bits: int, group: int | None, seen: Tensor | None = None) -> None:
        super().__init__()
        rows, columns = weight.shape[:2]
        block = columns if group is None else _divisor(columns, group if weight[0, 0].numel() == 1 else group // 4)
        flat = weight.float().reshape(rows, -1)
        zero = None
        if group is None:
            least, most = limits(bits)
            # The stored scale is float16: integers are those of the scale as it is stored.
            scale = (flat.abs().amax(-1, keepdim=True) / most).half().clamp_min(torch.finfo(torch.float16).tiny)
            numbers = (flat / scale.float()).round().clamp(least, most)
        else:
            width = flat.shape[1] // (columns // block)
            grid = integers(flat, bits, width, None if seen is None else seen.diagonal())
            scale, zero, numbers = grid.scale.half(), grid.zero, rounded(flat, grid, seen)
        self.dtype = torch.int8 if bits == 8 else torch.int4  # type: ignore[attr-defined]
        places = (rows, columns // block, *[1] * (weight.dim() - 2))
        self.register_buffer("numbers", numbers.to(torch.int8).reshape(weight.shape))
        self.register_buffer("scale", scale.reshape(places))
        self.register_buffer("zero", None if zero is None else zero.to(torch.int8).reshape(places))

    def stored_bits(self) -> int:
        """Of integers, scales and zeros."""
        width = 8 if self.dtype == torch.int8 else 4
        zeros = 0 if self.zero is None else self.zero.numel() * width
        return self.numbers.numel() * width + self.scale.numel() * 16 + zeros

    def forward(self) -> Tensor:
        out: Tensor = torch.ops.coreai.constexpr_blockwise_shift_scale(
            self.numbers, self.scale, self.zero, None, self.dtype
        )
        return out


def _divisor(columns: int, group: int) -> int:
    return next(size for size in range(min(columns, group), 0, -1) if columns % size == 0)


class Weights:
    """A torch module as the sensitivity analysis sees a program: constants by name, to be looked at and replaced."""

    def __init__(self, module: nn.Module) -> None:
        self.layers: dict[str, Any] = dict(module.named_modules())

    def constant(self, name: str) -> Any:
        """A layer's weight in float16, as it is stored."""
        return self.layers[name].weight.data.half().numpy()

    def substitute(self, name: str, value: Any) -> None:
        """Compute with another weight."""
        weight = self.layers[name].weight
        weight.data = torch.from_numpy(value).to(weight.dtype)
