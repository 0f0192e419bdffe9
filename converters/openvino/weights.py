"""Weights of fewer bits in an OpenVINO graph, by the methods that nncf has.

Layers that are matrix products get the bits of the recipe. Convolutions, whose weights no CPU computes with in four
bits, and embeddings get eight.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from edge_sd.backends.openvino.loading import LARGE
from edge_sd.backends.openvino.telemetry import refuse_telemetry

from ..form import Report
from ..parity import Recording
from ..recipes import QuantRecipe
from ..sources.wrappers import Wrapped

# nncf's own switch, which it has as a variable of the environment alone.
BY_NUMPY = "NNCF_DISABLE_OPTIMIZED_COMPRESSION"
# The projection of an IP-Adapter keeps 16 bits. It is small beside its CLIP, and a resampler's first queries depend on
# no input: the CPU's plugin of 2026.4 cannot fold such products of compressed weights.
ALONE = r"__module\.projection\..*"
# What nncf is told for a method of QuantRecipe.
OPTIONS: dict[str, dict[str, bool]] = {
    "scale": {"scale_estimation": True},
    "awq": {"awq": True, "scale_estimation": True},
    "gptq": {"gptq": True},
    "lowrank": {"lora_correction": True},
}
# Calls of a component that nncf's methods learn from: they keep what every layer saw.
LEARNED = 32


def compress(
    model: Any,
    wrapped: Wrapped,
    recipe: QuantRecipe,
    recording: Recording | None = None,
    kept: str = "",
    report: Report = lambda what, share: None,
) -> Any:
    """`model`, the graph of `wrapped`, with weights as `recipe` says; below 8 bits layers whose names match `kept` are
    left as they are. A method that learns does so from the calls in `recording` that nothing is measured on."""
    refuse_telemetry()
    import nncf

    # nncf prints its statistics at INFO; what matters of them is in the manifest.
    logging.getLogger("nncf").setLevel(logging.ERROR)
    modes = nncf.CompressWeightsMode
    if recipe.bits == 8:
        # A scale for each output channel; for integers nncf takes no other word.
        mode = {"mode": modes.FP8_E4M3, "group_size": -1} if recipe.method == "fp8" else {"mode": modes.INT8_ASYM}
        left = nncf.IgnoredScope(patterns=[ALONE], validate=False)
        return nncf.compress_weights(model, **mode, ignored_scope=left)
    # An autoencoder is convolutions, but for one layer of attention whose transposed inputs nncf's methods do not take.
    learns = recipe.learns and not wrapped.part.startswith("vae")
    calls = recording.calibration if recording is not None and learns else []
    if calls:
        report("rounding by what layers see", 0.0)
    return nncf.compress_weights(
        model,
        mode=modes.NF4 if recipe.method == "nf4" else modes.INT4_ASYM,
        group_size=recipe.group_size,
        # Layers whose width is no multiple of the group get a smaller group of their own.
        advanced_parameters=nncf.AdvancedCompressionParameters(
            group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST, min_adjusted_group_size=8
        ),
        ignored_scope=nncf.IgnoredScope(patterns=[ALONE, *([kept] if kept else [])], validate=False),
        dataset=_dataset(model, calls) if recipe.method in OPTIONS and calls else None,
        **(OPTIONS.get(recipe.method, {}) if calls else {}),
    )


def _dataset(model: Any, calls: list[Any]) -> Any:
    import nncf

    types = {port.any_name: port.element_type.to_dtype() for port in model.inputs}
    some = [calls[n] for n in np.linspace(0, len(calls) - 1, min(LEARNED, len(calls))).astype(int)]
    return nncf.Dataset([{name: np.asarray(each[name], dtype) for name, dtype in types.items()} for each in some])


@contextmanager
def small_layers_by_numpy(model: Any) -> Iterator[None]:
    """Context in which nncf rounds the weights of a small model with numpy, unless its switch is set already.

    For each shape of a layer it compiles a graph that rounds it, which takes longer than to round some thousand
    numbers. Large models are worth the graphs.
    """
    weights = sum(node.get_byte_size() for node in model.get_ops() if node.get_type_name() == "Constant")
    if weights >= LARGE or BY_NUMPY in os.environ:
        yield
        return
    os.environ[BY_NUMPY] = "1"
    try:
        yield
    finally:
        del os.environ[BY_NUMPY]
