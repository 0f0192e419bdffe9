"""Every operation of the executor beside an independent reference: numpy, torch's own layers, coremltools."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch.nn import functional as F

from edge_sd.bundle.mlpackage.constexpr import CONSTEXPR
from edge_sd.converters.coreml.ops import OPS

Array = NDArray[Any]
RNG = np.random.default_rng(0)


def floats(*shape: int) -> Array:
    return RNG.normal(size=shape).astype(np.float32)


def integers(*values: int) -> Array:
    return np.array(values, np.int32)


def tensor(value: Any) -> Any:
    if isinstance(value, list):
        return [tensor(each) for each in value]
    return value if isinstance(value, str) else torch.from_numpy(np.array(value))


def run(name: str, **inputs: Any) -> Any:
    found = OPS[name](**{key: tensor(value) for key, value in inputs.items()})
    return [each.numpy() for each in found] if isinstance(found, tuple) else found.numpy()


@dataclass
class Case:
    inputs: dict[str, Any]
    reference: Callable[..., Any]

    def wanted(self) -> Any:
        # Our own references take inputs by name, numpy's functions by place.
        named = isinstance(self.reference, FunctionType) and self.reference.__module__ == __name__
        return self.reference(**self.inputs) if named else self.reference(*self.inputs.values())


X, Y = floats(2, 3, 4), floats(3, 1)
POSITIVE = np.abs(floats(2, 5)) + 0.1
TRUE = np.array([[True, False], [True, True]])
OTHER = np.array([[True, True], [False, True]])
IMAGE = floats(2, 4, 6, 5)
sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
erf = np.vectorize(math.erf)


def _conv(x: Array, weight: Array, **options: Any) -> Array:
    return F.conv2d(torch.from_numpy(x), torch.from_numpy(weight), **options).numpy()


def _attention(query: Array, key: Array, value: Array, attn_mask: Array | None = None) -> Array:
    scores = query @ key.swapaxes(-1, -2) / np.sqrt(query.shape[-1])
    if attn_mask is not None:
        scores = np.where(attn_mask, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ value


def _norm(x: Array, axes: tuple[int, ...], eps: float) -> Array:
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + eps)


CASES: dict[str, list[Case]] = {
    **{
        name: [Case({"x": X, "y": Y}, function)]
        for name, function in {
            "add": np.add, "sub": np.subtract, "mul": np.multiply, "floor_div": np.floor_divide, "mod": np.mod,
            "maximum": np.maximum, "minimum": np.minimum, "equal": np.equal, "not_equal": np.not_equal,
            "greater": np.greater, "greater_equal": np.greater_equal, "less": np.less, "less_equal": np.less_equal,
        }.items()
    },
    **{
        name: [Case({"x": TRUE, "y": OTHER}, function)]
        for name, function in {
            "logical_and": np.logical_and, "logical_or": np.logical_or, "logical_xor": np.logical_xor,
        }.items()
    },
    **{
        name: [Case({"x": X * 2}, function)]
        for name, function in {
            "abs": np.abs, "ceil": np.ceil, "cos": np.cos, "erf": erf, "exp": np.exp, "floor": np.floor,
            "identity": lambda x: x, "relu": lambda x: np.maximum(x, 0), "round": np.round, "sigmoid": sigmoid,
            "sign": np.sign, "silu": lambda x: x * sigmoid(x), "sin": np.sin, "square": lambda x: x * x,
            "softplus": lambda x: np.log1p(np.exp(x)), "tanh": np.tanh,
        }.items()
    },
    "logical_not": [Case({"x": TRUE}, np.logical_not)],
    "real_div": [
        Case({"x": X, "y": Y}, np.divide),
        Case({"x": integers(7, -7), "y": integers(2, 2)}, lambda x, y: np.array([3, -3])),
    ],
    "quantize": [
        Case({"input": X, "scale": np.float32(0.01), "zero_point": np.int32(3), "output_dtype": "int8"},
             lambda input, scale, zero_point, output_dtype: np.clip(np.round(input / scale) + zero_point, -128, 127)),
    ],
    "dequantize": [
        Case({"input": integers(7, -7), "scale": np.float32(0.5), "zero_point": np.int32(3)},
             lambda input, scale, zero_point: (input - zero_point) * scale),
    ],
    "pow": [Case({"x": POSITIVE, "y": np.float32(1.7)}, np.power)],
    "sqrt": [Case({"x": POSITIVE}, np.sqrt)],
    "rsqrt": [Case({"x": POSITIVE, "epsilon": np.float32(0.5)}, lambda x, epsilon: 1 / np.sqrt(x + epsilon))],
    "inverse": [Case({"x": POSITIVE}, lambda x: 1 / (x + 1e-4))],
    "log": [Case({"x": POSITIVE}, np.log)],
    "clip": [Case({"x": X, "alpha": np.float32(-0.5), "beta": np.float32(0.3)}, np.clip)],
    "leaky_relu": [Case({"x": X, "alpha": np.float32(0.2)}, lambda x, alpha: np.where(x > 0, x, alpha * x))],
    "gelu": [
        Case({"x": X, "mode": "EXACT"}, lambda x, mode: x * (1 + erf(x / math.sqrt(2))) / 2),
        Case({"x": X, "mode": "TANH_APPROXIMATION"},
             lambda x, mode: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2),
        Case({"x": X, "mode": "SIGMOID_APPROXIMATION"}, lambda x, mode: x * sigmoid(1.702 * x)),
    ],
    "softmax": [Case({"x": X, "axis": np.int32(1)}, lambda x, axis: np.exp(x) / np.exp(x).sum(1, keepdims=True))],
    "cast": [
        Case({"x": X, "dtype": "int32"}, lambda x, dtype: x.astype(np.int32)),
        Case({"x": integers(3, 0), "dtype": "fp16"}, lambda x, dtype: x.astype(np.float32)),
        Case({"x": integers(3, 0), "dtype": "bool"}, lambda x, dtype: x.astype(bool)),
    ],
    "linear": [
        Case({"x": X, "weight": floats(5, 4), "bias": floats(5)}, lambda x, weight, bias: x @ weight.T + bias),
        Case({"x": X, "weight": floats(5, 4)}, lambda x, weight: x @ weight.T),
    ],
    "matmul": [
        Case({"x": X, "y": floats(2, 4, 5)}, np.matmul),
        Case({"x": X, "y": floats(2, 5, 4), "transpose_y": True}, lambda x, y, transpose_y: x @ y.swapaxes(1, 2)),
        Case({"x": X, "y": floats(2, 3, 5), "transpose_x": True}, lambda x, y, transpose_x: x.swapaxes(1, 2) @ y),
    ],
    "einsum": [
        Case({"values": [floats(2, 3, 1, 4), floats(2, 4, 1, 5)], "equation": "nchw,nwhu->nchu"},
             lambda values, equation: np.einsum(equation, *values)),
    ],
    "scaled_dot_product_attention": [
        Case({"query": floats(2, 3, 4), "key": floats(2, 5, 4), "value": floats(2, 5, 4)}, _attention),
        Case({"query": floats(2, 3, 4), "key": floats(2, 3, 4), "value": floats(2, 3, 4),
              "attn_mask": np.tri(3, dtype=bool)}, _attention),
    ],
    "conv": [
        Case({"x": IMAGE, "weight": floats(3, 4, 3, 3), "bias": floats(3), "pad_type": "custom",
              "pad": integers(1, 1, 1, 1), "strides": integers(2, 2)},
             lambda x, weight, bias, **_: _conv(x, weight, bias=torch.from_numpy(bias), stride=2, padding=1)),
        Case({"x": IMAGE, "weight": floats(3, 4, 1, 1)}, _conv),
        Case({"x": IMAGE, "weight": floats(4, 1, 3, 3), "groups": np.int32(4), "dilations": integers(2, 1)},
             lambda x, weight, groups, dilations: _conv(x, weight, groups=4, dilation=(2, 1))),
        Case({"x": IMAGE, "weight": floats(3, 4, 3, 3), "pad_type": "same"},
             lambda x, weight, pad_type: _conv(x, weight, padding="same")),
        # Half of the padding of an even kernel does not exist: "same" has less before, "same_lower" more.
        Case({"x": IMAGE, "weight": floats(3, 4, 2, 2), "pad_type": "same_lower"},
             lambda x, weight, pad_type: _conv(np.pad(x, ((0, 0), (0, 0), (1, 0), (1, 0))), weight)),
        Case({"x": IMAGE, "weight": floats(3, 4, 3, 3), "pad_type": "custom", "pad": integers(0, 1, 2, 0)},
             lambda x, weight, **_: _conv(np.pad(x, ((0, 0), (0, 0), (0, 1), (2, 0))), weight)),
    ],
    "layer_norm": [
        Case({"x": IMAGE, "axes": integers(1), "gamma": (gamma := floats(4)), "beta": (beta := floats(4)),
              "epsilon": np.float32(1e-3)},
             lambda x, **_: _norm(x, (1,), 1e-3) * gamma[:, None, None] + beta[:, None, None]),
        Case({"x": X, "axes": integers(-2, -1)}, lambda x, axes: _norm(x, (1, 2), 1e-5)),
    ],
    "batch_norm": [
        Case({"x": IMAGE, "mean": floats(4), "variance": np.abs(floats(4)), "gamma": floats(4), "beta": floats(4),
              "epsilon": np.float32(1e-3)},
             lambda x, mean, variance, gamma, beta, epsilon: (
                 (x - mean[:, None, None]) / np.sqrt(variance + epsilon)[:, None, None] * gamma[:, None, None]
                 + beta[:, None, None])),
    ],
    "instance_norm": [
        Case({"x": IMAGE, "gamma": gamma, "beta": beta},
             lambda x, gamma, beta: _norm(x, (2, 3), 1e-5) * gamma[:, None, None] + beta[:, None, None]),
    ],
    **{
        name: [
            Case({"x": X, "axes": integers(0, 2), "keep_dims": True}, lambda x, f=function, **_: f(x, (0, 2), True)),
            Case({"x": X, "axes": integers(-1), "keep_dims": False}, lambda x, f=function, **_: f(x, (2,), False)),
            Case({"x": X}, lambda x, f=function: f(x, (0, 1, 2), False)),
        ]
        for name, function in {
            "reduce_mean": lambda x, axes, keep: x.mean(axes, keepdims=keep),
            "reduce_sum": lambda x, axes, keep: x.sum(axes, keepdims=keep),
            "reduce_max": lambda x, axes, keep: x.max(axes, keepdims=keep),
            "reduce_min": lambda x, axes, keep: x.min(axes, keepdims=keep),
            "reduce_l2_norm": lambda x, axes, keep: np.sqrt((x * x).sum(axes, keepdims=keep)),
            "reduce_sum_square": lambda x, axes, keep: (x * x).sum(axes, keepdims=keep),
        }.items()
    },
    "reduce_argmax": [
        Case({"x": X, "axis": np.int32(1)}, lambda x, axis: x.argmax(1)),
        Case({"x": np.zeros((2, 3), np.float32), "axis": np.int32(-1), "keep_dims": True, "output_dtype": "int32"},
             lambda x, **_: np.zeros((2, 1))),
    ],
    "expand_dims": [Case({"x": X, "axes": integers(-1, 0)}, lambda x, axes: x[None, ..., None])],
    "squeeze": [
        Case({"x": floats(1, 3, 1)}, lambda x: x[0, :, 0]),
        Case({"x": floats(1, 3, 1), "axes": integers(-1)}, lambda x, axes: x[..., 0]),
    ],
    "concat": [
        Case({"values": [X, X + 1], "axis": np.int32(-1)}, lambda values, axis: np.concatenate(values, -1)),
        Case({"values": [X, X + 1], "axis": np.int32(1), "interleave": True},
             lambda values, **_: np.stack(values, 2).reshape(2, 6, 4)),
    ],
    "stack": [Case({"values": [X, X + 1], "axis": np.int32(1)}, lambda values, axis: np.stack(values, 1))],
    "tile": [Case({"x": X, "reps": integers(1, 2, 3)}, lambda x, reps: np.tile(x, reps))],
    "fill": [Case({"shape": integers(2, 3), "value": np.float32(1.5)}, lambda shape, value: np.full(shape, value))],
    "shape": [Case({"x": X}, lambda x: np.array(x.shape))],
    "slice_by_size": [
        Case({"x": X, "begin": integers(0, 1, 0), "size": integers(1, -1, 2)}, lambda x, **_: x[:1, 1:, :2])
    ],
    "band_part": [
        Case({"x": floats(4, 5), "lower": np.int32(1), "upper": np.int32(2)},
             lambda x, **_: np.tril(np.triu(x, -1), 2)),
        Case({"x": floats(4, 5), "lower": np.int32(-1), "upper": np.int32(0)}, lambda x, **_: np.tril(x)),
    ],
    "gather_nd": [
        Case({"x": X, "indices": integers([1, 2], [0, 0])}, lambda x, indices: x[[1, 0], [2, 0]]),
    ],
    "gather_along_axis": [
        Case({"x": X, "indices": np.argsort(X, 1).astype(np.int32), "axis": np.int32(1)}, lambda x, **_: np.sort(x, 1)),
        Case({"x": X, "indices": np.full((2, 1, 4), -1, np.int32), "axis": np.int32(1)}, lambda x, **_: x[:, -1:]),
    ],
    "select": [Case({"cond": X > 0, "a": X, "b": Y}, lambda cond, a, b: np.where(cond, a, b))],
    "upsample_nearest_neighbor": [
        Case({"x": IMAGE, "scale_factor_height": np.float32(2), "scale_factor_width": np.int32(3)},
             lambda x, **_: x.repeat(2, 2).repeat(3, 3))
    ],
    "upsample_bilinear": [
        Case({"x": np.array([[[[0.0, 2.0]]]], np.float32), "scale_factor_height": 1, "scale_factor_width": 2,
              "align_corners": False}, lambda **_: np.array([[[[0, 0.5, 1.5, 2]]]]))
    ],
    "pixel_shuffle": [
        Case({"x": IMAGE, "upscale_factor": np.int32(2)},
             lambda x, **_: x.reshape(2, 1, 2, 2, 6, 5).transpose(0, 1, 4, 2, 5, 3).reshape(2, 1, 12, 10))
    ],
    "pixel_unshuffle": [
        Case({"x": floats(2, 3, 4, 6), "downscale_factor": np.int32(2)},
             lambda x, **_: x.reshape(2, 3, 2, 2, 3, 2).transpose(0, 1, 3, 5, 2, 4).reshape(2, 12, 2, 3))
    ],
}  # fmt: skip
# Those whose sizes hypothesis makes, below.
BY_SHAPE = {"reshape", "transpose", "slice_by_index", "pad", "gather", "split"}


@pytest.mark.parametrize("name", sorted(CASES))
def test_an_operation_computes_what_its_reference_does(name: str) -> None:
    for case in CASES[name]:
        found, wanted = run(name, **case.inputs), case.wanted()
        assert found.shape == np.shape(wanted), case.inputs
        np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-6)


def test_no_operation_is_without_a_test() -> None:
    assert set(OPS) == set(CASES) | BY_SHAPE
    assert {f"constexpr_{name}" for name in TESTED_CONSTANTS} == set(CONSTEXPR)


SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=4)


def counted(shape: list[int]) -> Array:
    return np.arange(math.prod(shape), dtype=np.float32).reshape(shape)


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.data())
def test_slices_are_numpys(shape: list[int], data: st.DataObject) -> None:
    x, where = counted(shape), []
    rows: dict[str, list[Any]] = {
        key: [] for key in ("begin", "end", "stride", "begin_mask", "end_mask", "squeeze_mask")
    }
    for size in shape:
        squeezed = data.draw(st.booleans())
        stride = data.draw(st.sampled_from([1, 2, -1]))
        first, last = data.draw(st.integers(0, size - 1)), data.draw(st.integers(-size, size))
        open_start, open_end = data.draw(st.booleans()), data.draw(st.booleans())
        where.append(first if squeezed else slice(None if open_start else first, None if open_end else last, stride))
        for key, value in zip(rows, (first, last, stride, open_start, open_end, squeezed), strict=True):
            rows[key].append(value)
    typed = {key: np.array(value, bool if "mask" in key else np.int32) for key, value in rows.items()}
    assert np.array_equal(run("slice_by_index", x=x, **typed), x[tuple(where)])


@settings(max_examples=25, deadline=None)
@given(SHAPES, st.data())
def test_pads_are_numpys(shape: list[int], data: st.DataObject) -> None:
    x = counted(shape)
    last = data.draw(st.integers(1, len(shape)))
    mode = data.draw(st.sampled_from(["constant", "reflect", "replicate"]))
    pairs = [
        tuple(data.draw(st.integers(0, size - 1 if mode == "reflect" else 3)) for _ in "ab") for size in shape[-last:]
    ]
    widths = [(0, 0)] * (len(shape) - last) + pairs
    kind = {"constant": "constant", "reflect": "reflect", "replicate": "edge"}[mode]
    wanted = np.pad(x, widths, kind, constant_values=2) if mode == "constant" else np.pad(x, widths, kind)  # type: ignore[call-overload]
    found = run("pad", x=x, pad=np.array(pairs, np.int32).reshape(-1), mode=mode, constant_val=np.float32(2))
    assert np.array_equal(found, wanted)


@settings(max_examples=25, deadline=None)
@given(SHAPES, st.data())
def test_gathers_are_numpys(shape: list[int], data: st.DataObject) -> None:
    x, axis = counted(shape), data.draw(st.integers(-len(shape), len(shape) - 1))
    size = shape[axis]
    indices = np.array(data.draw(st.lists(st.integers(-size, size - 1), min_size=4, max_size=4)), np.int32)
    for chosen in (indices, indices.reshape(2, 2), indices[0]):
        found = run("gather", x=x, indices=chosen, axis=np.int32(axis), validate_indices=False)
        assert np.array_equal(found, np.take(x, chosen, axis))


@settings(max_examples=25, deadline=None)
@given(SHAPES, st.data())
def test_splits_and_transposes_and_reshapes_are_numpys(shape: list[int], data: st.DataObject) -> None:
    x, axis = counted(shape), data.draw(st.integers(0, len(shape) - 1))
    first = data.draw(st.integers(0, shape[axis]))
    sizes = np.array([first, shape[axis] - first], np.int32)
    pairs = zip(run("split", x=x, axis=np.int32(axis), split_sizes=sizes), np.split(x, [first], axis), strict=True)
    assert all(np.array_equal(*pair) for pair in pairs)
    count = data.draw(st.sampled_from([n for n in range(1, 6) if shape[axis] % n == 0]))
    pairs = zip(run("split", x=x, axis=axis, num_splits=np.int32(count)), np.split(x, count, axis), strict=True)
    assert all(np.array_equal(*pair) for pair in pairs)
    perm = data.draw(st.permutations(range(len(shape))))
    assert np.array_equal(run("transpose", x=x, perm=np.array(perm, np.int32)), x.transpose(perm))
    kept = [0 if n == axis else size for n, size in enumerate(shape)]
    assert run("reshape", x=x, shape=np.array(kept, np.int32)).shape == tuple(shape)
    assert run("reshape", x=x, shape=integers(-1, shape[-1])).shape == (x.size // shape[-1], shape[-1])


TESTED_CONSTANTS = {"affine_dequantize", "lut_to_dense", "blockwise_shift_scale", "sparse_to_dense", "cast"}


def test_compressed_constants_are_those_of_coremltools() -> None:
    from coremltools.converters.mil.mil.ops.defs import iOS16, iOS18
    from coremltools.converters.mil.mil.ops.defs.iOS16 import constexpr_ops as old
    from coremltools.converters.mil.mil.ops.defs.iOS18 import compression as new

    assert iOS16
    assert iOS18

    def same(name: str, wanted: Array, **inputs: Any) -> None:
        found = CONSTEXPR[f"constexpr_{name}"](**inputs)
        assert found.shape == wanted.shape
        np.testing.assert_allclose(found.astype(float), wanted.astype(float), rtol=1e-6)

    data = RNG.integers(-128, 128, (4, 6, 3)).astype(np.int8)
    for axis, zero, scale in ((1, np.int8(3), np.float16(0.25)), (-2, data[0, :, 0], floats(6))):
        wanted = old.constexpr_affine_dequantize.decompress(data, np.array(zero), np.array(scale), axis)
        same("affine_dequantize", wanted, quantized_data=data, zero_point=np.array(zero), scale=np.array(scale),
             axis=np.int32(axis))  # fmt: skip
    for bits in (1, 2, 4, 6, 8):
        count, table = 4 * 7, floats(2**bits).astype(np.float16)
        packed = RNG.integers(0, 256, math.ceil(count * bits / 8)).astype(np.uint8)
        shape = np.array([4, 7], np.uint32)
        wanted = old.constexpr_lut_to_dense.decompress(table, packed, shape)
        same("lut_to_dense", wanted, indices=packed, lut=table, shape=shape)
    indices = RNG.integers(0, 4, (6, 4, 1, 1)).astype(np.uint8)
    for blocks in ((1, 1, 1, 1), (3, 1, 1, 1), (1, 2, 1, 1), (3, 2, 1, 1)):
        table = floats(*blocks, 4, 1)
        same("lut_to_dense", new.constexpr_lut_to_dense.decompress(indices, table, None), indices=indices, lut=table)
    table = floats(3, 1, 1, 1, 4, 2)
    for axis in (0, 1):
        wanted = new.constexpr_lut_to_dense.decompress(indices, table, np.int32(axis))
        same("lut_to_dense", wanted, indices=indices, lut=table, vector_axis=np.int32(axis))
    scale, offset = floats(4, 3, 1), RNG.integers(-9, 9, (4, 3, 1)).astype(np.int8)
    wanted = new.constexpr_blockwise_shift_scale.decompress(data, scale, offset)
    same("blockwise_shift_scale", wanted, data=data, scale=scale, offset=offset)
    mask = np.array([0b01101, 1], np.uint8)
    values = floats(4)
    wanted = old.constexpr_sparse_to_dense.decompress(values, mask, np.array([3, 5]))
    same("sparse_to_dense", wanted, nonzero_data=values, mask=mask, shape=np.array([3, 5]))
    flags = np.array([[1, 0, 1], [0, 1, 1]], np.uint8)
    wanted = new.constexpr_sparse_to_dense.decompress(values, flags)
    same("sparse_to_dense", wanted, nonzero_data=values, mask=flags)
    same(
        "cast", values.astype(np.float16).astype(np.float32), source_val=values.astype(np.float16), output_dtype="fp32"
    )
