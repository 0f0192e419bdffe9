"""Where a step's time goes, and the share of this machine's integer throughput that is reached.

The machine's rate is measured, not looked up: the best of some products of 8-bit matrices of the UNet's own shapes, by
the same library. Sums are counted in the graph: two for each product of a convolution, a matrix product or attention.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edge_sd.backends.openvino.loading import TILES, Loading
from edge_sd.bundle.bundle import ModelBundle
from edge_sd.components.base import SAMPLES

from .large import SIDE, make_bundle
from .report import Column, Table, share

VARIANT = "openvino-w8a8"
# Rows, inputs and outputs of the products that the rate is the best of.
SHAPES = ((4096, 320, 2560), (4096, 1280, 1280), (1024, 2560, 1280), (4096, 2048, 2048))
RUNS = 7
# The negative prompt's and the prompt's.
ROWS = 2


def integer_rate(core: Any) -> float:
    """Sums a second of the fastest 8-bit matrix product here."""
    return max(_rate(core, *shape) for shape in SHAPES)


def _rate(core: Any, m: int, k: int, n: int) -> float:
    import openvino as ov
    from openvino import opset13 as ops

    x = ops.parameter([1, m, k], ov.Type.f32)
    low, high = ops.constant(np.float32(-1)), ops.constant(np.float32(1))
    quantized = ops.fake_quantize(x, low, high, low, high, 256)
    weights = ops.constant(np.random.default_rng(0).integers(-64, 64, (n, k)).astype(np.int8))
    scale = ops.constant(np.full((n, 1), 1e-3, np.float32))
    product = ops.matmul(quantized, ops.multiply(ops.convert(weights, "f32"), scale), False, True)
    # The output is rounded again, as in a chain of layers, so no float32 result is written.
    model = ov.Model([ops.reduce_max(ops.fake_quantize(product, low, high, low, high, 256), ops.constant([1]))], [x])
    request = core.compile_model(model, "CPU", {"PERFORMANCE_HINT": "LATENCY"}).create_infer_request()
    request.set_input_tensor(ov.Tensor(np.zeros((1, m, k), np.float32)))
    return 2 * m * k * n / statistics.median(_seconds(request) for _ in range(RUNS))


def _seconds(request: Any) -> float:
    started = time.perf_counter()
    request.infer()
    return time.perf_counter() - started


def sums(model: Any) -> float:
    """Sums of one call of a graph whose shapes are known."""
    found = 0.0
    for op in model.get_ordered_ops():
        kind = op.get_type_name()
        if kind in ("Convolution", "ConvolutionBackpropData", "GroupConvolution"):
            kernel = op.get_input_shape(1)
            # A transposed convolution spreads each input over its kernel.
            places = op.get_output_shape(0) if kind == "Convolution" else op.get_input_shape(0)
            found += 2 * float(np.prod(places[2:])) * float(np.prod(kernel))
        elif kind == "MatMul":
            inner = op.get_input_shape(0)[-2 if op.get_attributes()["transpose_a"] else -1]
            found += 2 * float(np.prod(op.get_output_shape(0))) * inner
        elif kind == "ScaledDotProductAttention":
            b, heads, queries, width = op.get_input_shape(0)
            found += 4.0 * b * heads * queries * op.get_input_shape(1)[2] * width
    return found


class Counted(Loading):
    """A component that counts how long each operation takes; it is not kept."""

    @property
    def config(self) -> dict[str, Any]:
        return {**super().config, "PERF_COUNT": True}

    @property
    def keeps(self) -> bool:
        return False


@dataclass(frozen=True)
class Profile:
    """Sums and seconds of a step of a denoiser, and seconds by kind of operation of one of its rows."""

    sums: float
    seconds: float
    kinds: Mapping[str, float]


def of_denoiser(bundle: ModelBundle, name: str, width: int, height: int) -> Profile:
    """The UNet or transformer of an OpenVINO variant on the CPU, drawing `width` x `height` pixels.

    With guidance, unless the model's own default is none.
    """
    from edge_sd.backends import LoadRequest
    from edge_sd.backends.openvino import OpenVINOBackend
    from edge_sd.components.shapes import shapes_of
    from edge_sd.components.transformer import form_of

    backend, variant = OpenVINOBackend(), bundle.variant(name)
    part, facts = bundle.facts.denoiser, bundle.facts
    rows = ROWS if facts.defaults.guidance != 1 and not facts.takes_guidance else 1
    shapes = shapes_of(facts, width, height, rows)[part]
    if (form := form_of(facts, part)) is not None:
        shapes = form.shapes(shapes)
    sample = next(each for each in SAMPLES if each in shapes)
    request = LoadRequest(bundle, variant, part, backend.devices()[0], shapes)
    loading = Counted(backend.core, backend.version, backend.flags, backend.cores, request)
    # Without the padding for this processor, which is no useful work.
    graph = replace(loading, flags=loading.flags - {TILES}).graphs()[0]["whole"]
    count = sums(graph) * rows / loading.shapes[sample][0]
    component = loading.open()
    rng = np.random.default_rng(0)
    inputs = {key: rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}
    # The first call computes what is of the prompt alone, too.
    component(**inputs)
    times = []
    for _ in range(RUNS):
        started = time.perf_counter()
        component(**inputs)
        times.append(time.perf_counter() - started)
    kinds: dict[str, float] = defaultdict(float)
    for row in component.graphs[0].profile():
        kinds[f"{row.node_type}, {_type(row.exec_type)}"] += row.real_time.total_seconds()
    component.close()
    return Profile(count, statistics.median(times), kinds)


def tiny_seconds(core: Any) -> float:
    """Seconds in which a decoder of TAESD's shape makes 512 x 512 pixels; its numbers are random."""
    import openvino as ov
    import torch
    from diffusers import AutoencoderTiny

    from edge_sd.converters.sources.wrappers import TinyDecoder

    side = SIDE // 8
    with torch.no_grad():
        traced = torch.jit.trace(TinyDecoder(AutoencoderTiny().eval()), torch.zeros(1, 4, 16, 16), check_trace=False)
        model = ov.convert_model(traced, example_input=torch.zeros(1, 4, 16, 16))
    model.reshape([1, 4, side, side])
    request = core.compile_model(model, "CPU", {"PERFORMANCE_HINT": "LATENCY"}).create_infer_request()
    request.set_input_tensor(_tensor(np.zeros((1, 4, side, side), np.float32)))
    return statistics.median(_seconds(request) for _ in range(RUNS))


def _tensor(array: Any) -> Any:
    import openvino as ov

    return ov.Tensor(array)


def _core() -> Any:
    import openvino as ov

    return ov.Core()


def _type(kernel: str) -> str:
    """The type that a kernel computes in, from a name such as brgconv_avx512_amx_I8."""
    return kernel.rsplit("_", 1)[-1].lower()


def shares(profile: Profile) -> list[dict[str, Any]]:
    """What takes more than a hundredth of a call, the most first."""
    whole = sum(profile.kinds.values())
    kinds = sorted(profile.kinds.items(), key=lambda kind: -kind[1])
    return [{"operation": kind, "share": spent / whole} for kind, spent in kinds if spent > 0.01 * whole]


COLUMNS = (Column("operation", "operation, type"), Column("share", "of a call", share))


def table(home: Path) -> Table:
    """The share of the machine's rate, and what takes more than a hundredth of a call."""
    profile = of_denoiser(ModelBundle.open(make_bundle(home)), VARIANT, SIDE, SIDE)
    core = _core()
    rate, reached, tiny = integer_rate(core), profile.sums / profile.seconds, tiny_seconds(core)
    notes = [
        f"A guided step of SD 1.5's UNet in W8A8: {profile.sums / 1e9:.0f} billion sums in {profile.seconds:.2f} s, "
        f"{reached / 1e9:.0f} G/s; 8-bit matrix products here: {rate / 1e9:.0f} G/s; share {reached / rate:.0%}.",
        f"A tiny decoder of TAESD's shape makes {SIDE} x {SIDE} pixels in {tiny:.2f} s.",
    ]
    facts = {"sums": profile.sums, "seconds": profile.seconds, "rate": rate, "share": reached / rate,
             "tiny_decoder_seconds": tiny}  # fmt: skip
    return Table("profile", COLUMNS, shares(profile), notes, facts)
