"""What the benchmark counts, beside counting by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from edge_sd.apps.bench import profile
from edge_sd.apps.bench.profile import integer_rate, sums, tiny_seconds
from edge_sd.lora import read_lora


def test_sums_are_two_for_each_product() -> None:
    x = ops.parameter([1, 4, 6, 6], ov.Type.f32)
    same = ops.convolution(x, ops.constant(np.zeros((8, 4, 3, 3), np.float32)), [1, 1], [1, 1], [1, 1], [1, 1])
    half = ops.convolution(same, ops.constant(np.zeros((8, 8, 3, 3), np.float32)), [2, 2], [1, 1], [1, 1], [1, 1])
    double = ops.convolution_backprop_data(
        half, ops.constant(np.zeros((8, 8, 4, 4), np.float32)), [2, 2], None, [1, 1], [1, 1], [1, 1]
    )
    tokens = ops.reshape(double, ops.constant([1, 2, 36, 4]), False)
    attended = ops.scaled_dot_product_attention(tokens, tokens, tokens)
    product = ops.matmul(attended, ops.constant(np.zeros((5, 4), np.float32)), False, True)
    counted = sums(ov.Model([product], [x]))
    convolutions = 2 * 36 * 8 * 4 * 9 + 2 * 9 * 8 * 8 * 9 + 2 * 9 * 8 * 8 * 16
    assert counted == convolutions + 4 * 2 * 36 * 36 * 4 + 2 * 2 * 36 * 5 * 4


def test_rates_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RUNS", 1), ("SHAPES", ((64, 64, 64),)), ("SIDE", 128)):
        monkeypatch.setattr(profile, name, value)
    core = ov.Core()
    assert integer_rate(core) > 1e6
    assert 0 < tiny_seconds(core) < 600


def test_the_lora_that_is_switched_to_fits_the_model(emoji: Path, tmp_path: Path) -> None:
    from edge_sd.apps.bench.lora import RANK, write_lora

    write_lora(emoji, tmp_path / "a.safetensors", 0)
    lora = read_lora(tmp_path / "a.safetensors")
    weights = {"down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k": np.zeros((128, 192), np.float32)}
    (difference,) = lora.differences("unet", weights).values()
    change = difference.of((128, 192), 1.0)
    assert change.shape == (128, 192)
    assert np.linalg.matrix_rank(change) <= RANK
