"""What the benchmark counts, beside counting by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from edge_sd.apps.bench import own, profile
from edge_sd.apps.bench.profile import integer_rate, of_denoiser, sums, tiny_seconds
from edge_sd.apps.bench.report import Column, Table, beside, gibibytes, seconds
from edge_sd.bundle.bundle import ModelBundle
from edge_sd.components.lora import read_lora
from edge_sd.errors import VariantNotFound


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


def test_a_table_is_markdown_and_a_record() -> None:
    columns = (
        Column("name", "program"),
        Column("time", "time", beside(seconds(1))),
        Column("peak", "at most", gibibytes(2)),
    )
    rows = [{"name": "a", "time": (2.0, None), "peak": 1 << 30}, {"name": "b", "time": (1.0, 0.5), "peak": None}]
    table = Table("t", columns, rows, ["A note."], {"rate": 3.0})
    assert table.markdown().splitlines() == [
        "| program | time | at most |",
        "| --- | --- | --- |",
        "| a | 2.0 s | 1.00 GiB |",
        "| b | 1.0 s (0.50 ×) |  |",
        "",
        "A note.",
    ]
    assert table.record() == {"name": "t", "rate": 3.0, "rows": rows}


def test_a_step_is_counted_and_timed_by_operation() -> None:
    found = of_denoiser(ModelBundle.open("emoji"), "openvino-fp16", 128, 128)
    twice = of_denoiser(ModelBundle.open("emoji"), "openvino-fp16", 128, 256)
    assert 1.9 < twice.sums / found.sums < 2.3
    assert any(kind.startswith("Convolution") for kind in found.kinds)
    # One row's operations, of two that may run side by side.
    assert 0 < sum(found.kinds.values()) < 100 * found.seconds


def test_a_model_of_ones_own_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own, "find_spec", lambda name: None)
    with pytest.raises(VariantNotFound, match="nope"):
        own.measure("emoji", ["nope"], "auto", 1)
    (row,) = own.measure("emoji", ["openvino-fp16"], "cpu", 1)
    assert (row["width"], row["height"], row["steps"], row["device"]) == (128, 128, 20, "cpu")
    assert 0 < row["step"] < row["picture"]
    assert row["peak"] > 50 << 20
