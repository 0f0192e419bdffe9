"""Eight bits for weights and activations (W8A8) of an OpenVINO graph, by nncf, with settings for diffusion models.

Ranges come from inputs that real pictures produce: prompts x timesteps x guidance. SmoothQuant (Xiao et al. 2023) moves
outliers of activations into weights. Layers that the sensitivity analysis finds too costly stay in floating point, as
do layers that run once for a whole picture (see backends/openvino/graph.py). Weights take seven of eight bits: CPUs
without VNNI add products in 16 bits, and the sums of two would not fit.

The hybrid form is optimum-intel's for UNets: convolutions and products of activations as above, while layers that are
matrix products keep floating-point activations and have 8-bit weights alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from edge_sd.backends.openvino.telemetry import refuse_telemetry
from edge_sd.bundle.parts import DENOISERS

from ..form import Report
from ..parity import Arrays, Recording
from ..sources.wrappers import Wrapped

# SmoothQuant's alpha: how much of an outlier moves from activations to weights.
ALPHA_CONVOLUTION, ALPHA_MATMUL = 0.15, 0.5
# Layers are left alone until a twentieth of the error is left, or a quarter of the products is not in integers.
REMAINING_ERROR, MOST_PRODUCTS = 0.05, 0.25
# Enough for ranks of layers: so many inputs, the prompt's half of the batch, of so many latents a side (half of it for
# the autoencoder, which has 64 pixels for each). Fewer where each of hundreds of layers takes seconds.
ANALYSED, ANALYSED_SIDE = 6, 16
ANALYSED_LARGE, LARGE = 2, 100_000_000
# One input and few backward passes, where each takes a minute: the estimate is right within a half.
HUGE, PROBES_OF_HUGE = 1_000_000_000, 8
# Computed once per prompt or per timestep; the products of GEGLU, whose outliers no scale fits; a few channels wide.
ALWAYS_FLOAT = (
    r".*(time_emb|attn2\.to_k|attn2\.to_v|attn2\.processor|ff\.net\.2|add_embedding|conv_in/|conv_out/).*"
    # Of transformers: what makes tokens of latents and text, and latents of tokens, and what shifts and scales.
    r"|__module\.model\.(time_text_embed|context_embedder|pos_embed|norm_out|proj_out).*|.*norm1(_context)?\.linear.*"
)

# No CPU takes it in integers: rounding what goes in only costs time, and where the rest is bfloat16, as with AMX, the
# plugin of OpenVINO 2026.4 makes noise of it.
ATTENTION = "ScaledDotProductAttention"


def quantize_activations(
    model: Any, wrapped: Wrapped, recording: Recording, report: Report, hybrid: bool = False
) -> Any:
    """`model`, the graph of `wrapped`, with 8-bit convolutions and matrix products; calibrated on what was recorded.

    `hybrid` leaves the activations of linear layers alone and stores their weights in 8 bits.
    """
    refuse_telemetry()
    import nncf
    from nncf.quantization.advanced_parameters import (
        AdvancedQuantizationParameters,
        AdvancedSmoothQuantParameters,
        OverflowFix,
    )

    types = {port.any_name: port.element_type.to_dtype() for port in model.inputs}
    calibration = [{name: np.asarray(each[name], dtype) for name, dtype in types.items()} for each in recording.inputs]
    layers = sensitive_layers(wrapped, recording.inputs, hybrid, lambda share: report("weighing layers", share / 2))
    report("calibrating", 0.5)
    kept = [rf"__module\.{re.escape(layer)}/.*" for layer in layers]
    linear = linear_layers(model) if hybrid else []
    if hybrid:
        model = nncf.compress_weights(
            model,
            mode=nncf.CompressWeightsMode.INT8_ASYM,
            ignored_scope=nncf.IgnoredScope(types=["Convolution"], validate=False),
        )
    return nncf.quantize(
        model,
        nncf.Dataset(calibration),
        preset=nncf.QuantizationPreset.MIXED,
        model_type=nncf.ModelType.TRANSFORMER if wrapped.part in DENOISERS else None,
        subset_size=len(calibration),
        ignored_scope=nncf.IgnoredScope(linear, [ALWAYS_FLOAT, *kept], [ATTENTION], validate=False),
        advanced_parameters=AdvancedQuantizationParameters(
            overflow_fix=OverflowFix.ENABLE,
            disable_bias_correction=True,  # Off: it made no difference to pictures and takes most of the time.
            smooth_quant_alphas=AdvancedSmoothQuantParameters(convolution=ALPHA_CONVOLUTION, matmul=ALPHA_MATMUL),
        ),
    )


def linear_layers(model: Any) -> list[str]:
    """Names of the matrix products with constants, without attention's, where both sides are computed."""

    def is_constant(port: Any) -> bool:
        node = port.get_node()
        while node.get_type_name() == "Convert":
            node = node.input_value(0).get_node()
        return bool(node.get_type_name() == "Constant")

    products = (op for op in model.get_ops() if op.get_type_name() == "MatMul")
    return [op.get_friendly_name() for op in products if any(is_constant(port) for port in op.input_values())]


def sensitive_layers(
    wrapped: Wrapped, inputs: list[Arrays], hybrid: bool, report: Callable[[float], None]
) -> list[str]:
    """Names of the layers of `wrapped.module` that cost more than they save; with `hybrid`, of convolutions only."""
    import torch

    from ..sensitivity import PROBES, costs, sensitive

    def sample(name: str, value: Any) -> Any:
        # Latents are cut: what a layer rounds does not depend on how large the picture is.
        side = {"vae_decoder": ANALYSED_SIDE // 2, "vae_encoder": 4 * ANALYSED_SIDE}.get(wrapped.part, ANALYSED_SIDE)
        value = np.asarray(value)[-1:, ..., :side, :side] if np.ndim(value) == 4 else np.asarray(value)[-1:]
        return torch.from_numpy(np.ascontiguousarray(value))

    weights = sum(each.numel() for each in wrapped.module.parameters())
    huge = weights >= HUGE
    count = min(1 if huge else ANALYSED_LARGE if weights >= LARGE else ANALYSED, len(inputs))
    chosen = [inputs[n] for n in np.linspace(0, len(inputs) - 1, count + 2)[1:-1].round().astype(int)]
    samples = [tuple(sample(name, each[name]) for name in wrapped.example) for each in chosen]
    found = costs(wrapped.module, samples, report, PROBES_OF_HUGE if huge else PROBES)
    found = [cost for cost in found if not re.fullmatch(ALWAYS_FLOAT, f"__module.{cost.layer}/")]
    if hybrid:
        layers = dict(wrapped.module.named_modules())
        found = [cost for cost in found if isinstance(layers[cost.layer], torch.nn.Conv2d)]
    return sensitive(found, REMAINING_ERROR * sum(cost.error for cost in found), MOST_PRODUCTS)
