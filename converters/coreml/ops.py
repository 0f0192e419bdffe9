"""What each operation of an ML Program computes, in torch: op name -> function of its inputs by their MIL names.

Floats come as float32 tensors whatever their declared type (the executor rounds results), numbers and lists of
numbers as tensors too. Semantics: coremltools' MIL operation reference (mil/ops/defs). A new operation is a function
here with the names of its MIL inputs, and a row in the tests' table. The file is long because it is one table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

Result = Tensor | tuple[Tensor, ...]
OPS: dict[str, Callable[..., Result]] = {}


def op(function: Callable[..., Result]) -> Callable[..., Result]:
    OPS[function.__name__.rstrip("_")] = function
    return function


def numbers(x: Tensor) -> list[int]:
    return [int(each) for each in x.reshape(-1).tolist()]


def number(x: Tensor | float) -> float:
    return float(x)


OPS |= {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "real_div": lambda x, y: x / y if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc"),
    "floor_div": lambda x, y: torch.div(x, y, rounding_mode="floor"),
    "mod": lambda x, y: torch.remainder(x, y),
    "pow": lambda x, y: torch.pow(x, y),
    "maximum": lambda x, y: torch.maximum(*torch.broadcast_tensors(x, y)),
    "minimum": lambda x, y: torch.minimum(*torch.broadcast_tensors(x, y)),
    "equal": lambda x, y: x == y,
    "not_equal": lambda x, y: x != y,
    "greater": lambda x, y: x > y,
    "greater_equal": lambda x, y: x >= y,
    "less": lambda x, y: x < y,
    "less_equal": lambda x, y: x <= y,
    "logical_and": lambda x, y: x & y,
    "logical_or": lambda x, y: x | y,
    "logical_xor": lambda x, y: x ^ y,
    "logical_not": lambda x: ~x,
    "abs": torch.abs,
    "ceil": torch.ceil,
    "cos": torch.cos,
    "erf": torch.erf,
    "exp": torch.exp,
    "floor": torch.floor,
    "identity": lambda x: x,
    "relu": torch.relu,
    "round": torch.round,
    "sigmoid": torch.sigmoid,
    "sign": torch.sign,
    "silu": F.silu,
    "sin": torch.sin,
    "softplus": F.softplus,
    "sqrt": torch.sqrt,
    "square": torch.square,
    "tanh": torch.tanh,
}
for _name in ("abs", "ceil", "cos", "erf", "exp", "floor", "relu", "round", "sigmoid", "sign", "silu", "sin",
              "softplus", "sqrt", "square", "tanh"):  # fmt: skip
    OPS[_name] = lambda x, _function=OPS[_name]: _function(x)


@op
def clip(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return x.clamp(number(alpha), number(beta))


@op
def rsqrt(x: Tensor, epsilon: Tensor | float = 1e-12) -> Tensor:
    return torch.rsqrt(x + number(epsilon))


@op
def inverse(x: Tensor, epsilon: Tensor | float = 1e-4) -> Tensor:
    return 1 / (x + number(epsilon))


@op
def log(x: Tensor, epsilon: Tensor | float = 1e-45) -> Tensor:
    return torch.log(x + number(epsilon))


@op
def leaky_relu(x: Tensor, alpha: Tensor | float = 0.01) -> Tensor:
    return F.leaky_relu(x, number(alpha))


@op
def gelu(x: Tensor, mode: str = "EXACT") -> Tensor:
    if mode == "EXACT":
        return F.gelu(x)
    if mode == "TANH_APPROXIMATION":
        return F.gelu(x, approximate="tanh")
    return x * torch.sigmoid(1.702 * x)


@op
def softmax(x: Tensor, axis: Tensor | int = -1) -> Tensor:
    return x.softmax(int(axis))


@op
def cast(x: Tensor, dtype: str) -> Tensor:
    # Float results are rounded by the executor, to the type that is declared.
    kinds = {"bool": torch.bool, "int8": torch.int8, "uint8": torch.uint8, "int16": torch.int16, "int32": torch.int32}
    kind = torch.float32 if dtype.startswith("fp") else kinds.get(dtype, torch.int32)
    return x.to(kind)


@op
def quantize(
    input: Tensor, scale: Tensor, output_dtype: str, zero_point: Tensor | None = None, axis: Tensor | None = None
) -> Tensor:
    """round(x / scale) + zero point, cut to the integers that there are; one scale, or one for each place on `axis`."""
    low, high = (0, 255) if output_dtype == "uint8" else (-128, 127)
    steps = torch.round(input / _along(scale, input, axis))
    return (steps if zero_point is None else steps + _along(zero_point, input, axis)).clamp(low, high)


@op
def dequantize(input: Tensor, scale: Tensor, zero_point: Tensor | None = None, axis: Tensor | None = None) -> Tensor:
    steps = input.float() if zero_point is None else input.float() - _along(zero_point, input, axis)
    return steps * _along(scale, input, axis)


def _along(each: Tensor, x: Tensor, axis: Tensor | None) -> Tensor:
    if axis is None or each.ndim == 0:
        return each.float()
    return each.float().reshape([-1 if n == int(axis) % x.ndim else 1 for n in range(x.ndim)])


# --- products


@op
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias)


@op
def matmul(x: Tensor, y: Tensor, transpose_x: Tensor | bool = False, transpose_y: Tensor | bool = False) -> Tensor:
    return (x.mT if bool(transpose_x) else x) @ (y.mT if bool(transpose_y) else y)


@op
def einsum(values: Sequence[Tensor], equation: str) -> Tensor:
    return torch.einsum(equation, *values)


@op
def scaled_dot_product_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask)


@op
def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    strides: Tensor | None = None,
    pad_type: str = "valid",
    pad: Tensor | None = None,
    dilations: Tensor | None = None,
    groups: Tensor | int = 1,
) -> Tensor:
    spatial = x.ndim - 2
    stride = numbers(strides) if strides is not None else [1] * spatial
    dilation = numbers(dilations) if dilations is not None else [1] * spatial
    x = F.pad(x, _padding(x, weight.shape[2:], stride, dilation, pad_type, pad))
    function = (F.conv1d, F.conv2d, F.conv3d)[spatial - 1]
    out: Tensor = function(x, weight, bias, stride, 0, dilation, int(groups))
    return out


def _padding(
    x: Tensor, kernel: Sequence[int], stride: list[int], dilation: list[int], pad_type: str, pad: Tensor | None
) -> list[int]:
    """Zeros before and after each spatial axis, in torch's order (last axis first)."""
    if pad_type == "custom":
        assert pad is not None
        pairs = [tuple(numbers(pad)[2 * n : 2 * n + 2]) for n in range(len(kernel))]
    elif pad_type in ("same", "same_lower"):
        pairs = []
        for size, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True):
            total = max(0, (math.ceil(size / s) - 1) * s + d * (k - 1) + 1 - size)
            less, more = total // 2, total - total // 2
            pairs.append((less, more) if pad_type == "same" else (more, less))
    else:
        pairs = [(0, 0)] * len(kernel)
    return [each for pair in reversed(pairs) for each in pair]


# --- norms and reductions


@op
def layer_norm(
    x: Tensor,
    axes: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: Tensor | float = 1e-5,
) -> Tensor:
    dims = [n % x.ndim for n in numbers(axes)] if axes is not None else list(range(x.ndim))
    centred = x - x.mean(dims, keepdim=True)
    out = centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + number(epsilon))
    shape = [size if n in dims else 1 for n, size in enumerate(x.shape)]
    if gamma is not None:
        out = out * gamma.reshape(shape)
    return out if beta is None else out + beta.reshape(shape)


@op
def batch_norm(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: Tensor | float = 1e-5,
) -> Tensor:
    return F.batch_norm(x, mean, variance, gamma, beta, eps=number(epsilon))


@op
def instance_norm(
    x: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, epsilon: Tensor | float = 1e-5
) -> Tensor:
    return F.instance_norm(x, weight=gamma, bias=beta, eps=number(epsilon))


def _reduction(function: Callable[[Tensor, list[int], bool], Tensor]) -> Callable[..., Tensor]:
    def reduce(x: Tensor, axes: Tensor | None = None, keep_dims: Tensor | bool = False) -> Tensor:
        return function(x, numbers(axes) if axes is not None else list(range(x.ndim)), bool(keep_dims))

    return reduce


OPS |= {
    "reduce_mean": _reduction(lambda x, dims, keep: x.mean(dims, keep)),
    "reduce_sum": _reduction(lambda x, dims, keep: x.sum(dims, keep)),
    "reduce_max": _reduction(lambda x, dims, keep: x.amax(dims, keep)),
    "reduce_min": _reduction(lambda x, dims, keep: x.amin(dims, keep)),
    "reduce_l2_norm": _reduction(lambda x, dims, keep: x.square().sum(dims, keep).sqrt()),
    "reduce_sum_square": _reduction(lambda x, dims, keep: x.square().sum(dims, keep)),
}


@op
def reduce_argmax(
    x: Tensor, axis: Tensor | int = -1, keep_dims: Tensor | bool = False, output_dtype: str = "int32"
) -> Tensor:
    """The first of equal maxima, as Core ML and numpy have it; torch promises none."""
    dim = int(axis) % x.ndim
    best = x == x.amax(dim, keepdim=True)
    places = torch.arange(x.shape[dim]).reshape([-1 if n == dim else 1 for n in range(x.ndim)])
    return torch.where(best, places, x.shape[dim]).amin(dim, keepdim=bool(keep_dims)).int()


# --- shapes


@op
def reshape(x: Tensor, shape: Tensor) -> Tensor:
    # 0 keeps a dimension, -1 is what is left.
    return x.reshape([x.shape[n] if size == 0 else size for n, size in enumerate(numbers(shape))])


@op
def transpose(x: Tensor, perm: Tensor) -> Tensor:
    return x.permute(numbers(perm))


@op
def expand_dims(x: Tensor, axes: Tensor) -> Tensor:
    rank = x.ndim + axes.numel()
    for axis in sorted(n % rank for n in numbers(axes)):
        x = x.unsqueeze(axis)
    return x


@op
def squeeze(x: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(numbers(axes))


@op
def concat(values: Sequence[Tensor], axis: Tensor, interleave: Tensor | bool = False) -> Tensor:
    if not bool(interleave):
        return torch.cat(list(values), int(axis))
    dim = int(axis) % values[0].ndim
    return torch.stack(list(values), dim + 1).flatten(dim, dim + 1)


@op
def stack(values: Sequence[Tensor], axis: Tensor) -> Tensor:
    return torch.stack(list(values), int(axis))


@op
def split(
    x: Tensor, axis: Tensor, num_splits: Tensor | None = None, split_sizes: Tensor | None = None
) -> tuple[Tensor, ...]:
    if split_sizes is not None:
        return tuple(x.split(numbers(split_sizes), int(axis)))
    assert num_splits is not None
    return tuple(x.split(x.shape[int(axis)] // int(num_splits), int(axis)))


@op
def tile(x: Tensor, reps: Tensor) -> Tensor:
    return x.repeat(numbers(reps))


@op
def fill(shape: Tensor, value: Tensor | float = 0.0) -> Tensor:
    filled = value if isinstance(value, Tensor) else torch.tensor(value)
    return filled.expand(numbers(shape)).clone()


@op
def shape(x: Tensor) -> Tensor:
    return torch.tensor(x.shape, dtype=torch.int32)


@op
def slice_by_index(
    x: Tensor,
    begin: Tensor,
    end: Tensor,
    stride: Tensor | None = None,
    begin_mask: Tensor | None = None,
    end_mask: Tensor | None = None,
    squeeze_mask: Tensor | None = None,
) -> Tensor:
    """numpy's x[begin:end:stride]; a masked begin or end is left out, a squeezed axis is the one index `begin`."""
    no = [False] * x.ndim
    strides = numbers(stride) if stride is not None else [1] * x.ndim
    from_start = begin_mask.tolist() if begin_mask is not None else no
    to_end = end_mask.tolist() if end_mask is not None else no
    squeezed = squeeze_mask.tolist() if squeeze_mask is not None else no
    where: list[Any] = []
    for n, (first, last, step) in enumerate(zip(numbers(begin), numbers(end), strides, strict=True)):
        if squeezed[n]:
            where.append(first)
        else:
            where.append(slice(None if from_start[n] else first, None if to_end[n] else last, step))
    # torch knows no negative steps; numpy does.
    return torch.from_numpy(np.array(x.numpy()[tuple(where)]))


@op
def slice_by_size(x: Tensor, begin: Tensor, size: Tensor) -> Tensor:
    for axis, (first, length) in enumerate(zip(numbers(begin), numbers(size), strict=True)):
        x = x.narrow(axis, first, x.shape[axis] - first if length == -1 else length)
    return x


@op
def pad(x: Tensor, pad: Tensor, mode: str = "constant", constant_val: Tensor | float = 0.0) -> Tensor:
    """`pad` holds before and after for the last axes, in their order."""
    amounts = numbers(pad)
    pairs = [(amounts[n], amounts[n + 1]) for n in range(0, len(amounts), 2)]
    if mode == "constant":
        return F.pad(x, [each for pair in reversed(pairs) for each in pair], value=number(constant_val))
    widths = [(0, 0)] * (x.ndim - len(pairs)) + pairs
    kind = "edge" if mode == "replicate" else "reflect"
    return torch.from_numpy(np.pad(x.numpy(), widths, mode=kind))  # type: ignore[call-overload]


@op
def band_part(x: Tensor, lower: Tensor | int = -1, upper: Tensor | int = -1) -> Tensor:
    rows, columns = torch.arange(x.shape[-2])[:, None], torch.arange(x.shape[-1])[None]
    low, high = int(lower), int(upper)
    kept = ((low < 0) | (rows - columns <= low)) & ((high < 0) | (columns - rows <= high))
    return torch.where(kept, x, torch.zeros((), dtype=x.dtype))


# --- choosing


@op
def gather(
    x: Tensor, indices: Tensor, axis: Tensor | int = 0, batch_dims: Tensor | int = 0, validate_indices: Any = None
) -> Tensor:
    assert int(batch_dims) == 0, "gather with batch_dims"
    dim = int(axis) % x.ndim
    chosen = indices.long()
    picked = x.index_select(dim, torch.where(chosen < 0, chosen + x.shape[dim], chosen).reshape(-1))
    return picked.reshape([*x.shape[:dim], *indices.shape, *x.shape[dim + 1 :]])


@op
def gather_nd(x: Tensor, indices: Tensor, batch_dims: Tensor | int = 0, validate_indices: Any = None) -> Tensor:
    assert int(batch_dims) == 0, "gather_nd with batch_dims"
    return x[tuple(indices.long().unbind(-1))]


@op
def gather_along_axis(x: Tensor, indices: Tensor, axis: Tensor | int = 0, validate_indices: Any = None) -> Tensor:
    dim = int(axis)
    chosen = indices.long()
    return x.take_along_dim(torch.where(chosen < 0, chosen + x.shape[dim], chosen), dim)


@op
def select(cond: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(cond.bool(), a, b)


# --- images


@op
def upsample_nearest_neighbor(
    x: Tensor, scale_factor_height: Tensor | float = 1, scale_factor_width: Tensor | float = 1
) -> Tensor:
    return F.interpolate(x, scale_factor=(number(scale_factor_height), number(scale_factor_width)), mode="nearest")


@op
def upsample_bilinear(
    x: Tensor,
    scale_factor_height: Tensor | float = 1,
    scale_factor_width: Tensor | float = 1,
    align_corners: Tensor | bool = True,
    half_pixel_centers: Tensor | None = None,
) -> Tensor:
    scale = (number(scale_factor_height), number(scale_factor_width))
    return F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=bool(align_corners))


@op
def pixel_shuffle(x: Tensor, upscale_factor: Tensor) -> Tensor:
    return F.pixel_shuffle(x, int(upscale_factor))


@op
def pixel_unshuffle(x: Tensor, downscale_factor: Tensor) -> Tensor:
    return F.pixel_unshuffle(x, int(downscale_factor))
