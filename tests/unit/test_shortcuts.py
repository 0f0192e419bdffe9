"""Sums that are left out: rewritten graphs beside the plain ones, and when the denoiser asks for which."""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino as ov
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openvino import opset13 as ops

from edge_sd import Pipeline, Request
from edge_sd.backends import LoadRequest
from edge_sd.backends.openvino import OpenVINOBackend, loading, reading
from edge_sd.backends.openvino.graph import (
    fold_upsampling,
    hoist,
    merge_tokens,
    pad_heads,
    products_in_convolutions,
    split_deep,
)
from edge_sd.bundle.bundle import ModelBundle
from edge_sd.components.base import DEEP, Array, last_rows
from edge_sd.components.denoiser import Denoiser
from edge_sd.components.edits import NONE, Edits, Shortcuts
from edge_sd.components.shapes import shapes_of
from edge_sd.errors import InvalidRequest
from edge_sd.pipeline.presets import PRESETS, preset_named
from edge_sd.sampling.schedule import Level
from edge_sd.sampling.windows import active_timesteps

from .test_adapters import in_float32

RNG = np.random.default_rng(0)
F32 = {"INFERENCE_PRECISION_HINT": ov.Type.f32}


def run(model: Any, inputs: dict[str, Array]) -> dict[str, Array]:
    compiled = ov.Core().compile_model(model, "CPU", F32)
    given = {port.any_name: inputs[port.any_name] for port in compiled.inputs}
    return {port.any_name: np.array(value) for port, value in compiled(given).items()}


def embedded_unet() -> tuple[Any, dict[str, Array]]:
    bundle = ModelBundle.open("emoji")
    artifact = bundle.variant("openvino-fp16").artifacts["unet"]
    model = reading.read_model(ov.Core(), bundle.path(artifact.graph), [bundle.path(name) for name in artifact.weights])
    reading.accept_fractional_timesteps(model)
    shapes = shapes_of(bundle.facts, 128, 128, 2)["unet"]
    model.reshape(dict(shapes))
    inputs = {name: RNG.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return model, {**inputs, "timestep": np.array([500.5], np.float32)}


def test_what_is_taken_out_of_a_unet_changes_nothing() -> None:
    """Keys and values of each cross-attention, a projection for each residual block; then deep features given back."""
    model, inputs = embedded_unet()
    expected = run(model, inputs)["out_sample"]
    attentions = sum("attn2" in op.get_friendly_name() and op.get_type_name() == "ScaledDotProductAttention"
                     for op in model.get_ordered_ops())  # fmt: skip
    projections = sum("time_emb_proj" in op.get_friendly_name() and op.get_type_name() == "MatMul"
                      for op in model.get_ordered_ops())  # fmt: skip
    known = {}
    for name, count in (("encoder_hidden_states", 2 * attentions), ("timestep", projections)):
        before = hoist(model, name)
        found = run(before, inputs)
        assert set(found) == {f"{name}.{n}" for n in range(count)}
        known |= found
    known["sample"] = inputs["sample"]
    assert hoist(model, "encoder_hidden_states") is None
    shallow = split_deep(model)
    full = run(model, known)
    np.testing.assert_array_equal(full["out_sample"], expected)
    again = run(shallow, {**known, DEEP: full[DEEP]})
    assert set(again) == {"out_sample"}
    np.testing.assert_allclose(again["out_sample"], expected, atol=1e-5)
    assert len(shallow.get_ordered_ops()) < len(model.get_ordered_ops()) / 4


@given(st.integers(1, 2), st.integers(1, 5), st.integers(1, 4), st.integers(1, 6), st.integers(1, 6))
@settings(max_examples=25, deadline=None)
def test_doubling_and_a_convolution_are_one_transposed_convolution(b: int, i: int, o: int, h: int, w: int) -> None:
    sample = ops.parameter([b, i, h, w], np.float32, name="sample")
    sample.output(0).set_names({"sample"})
    scales = ops.constant(np.array([2, 2], np.float32))
    large = ops.interpolate(
        sample, scales, "nearest", "scales", coordinate_transformation_mode="asymmetric", nearest_mode="floor",
        axes=ops.constant([2, 3]),
    )  # fmt: skip
    kernel = RNG.standard_normal((o, i, 3, 3)).astype(np.float32)
    result = ops.convolution(large, ops.constant(kernel), [1, 1], [1, 1], [1, 1], [1, 1])
    result.output(0).set_names({"out"})
    model = ov.Model([result], [sample])
    inputs = {"sample": RNG.standard_normal((b, i, h, w)).astype(np.float32)}
    expected = run(model, inputs)["out"]
    assert fold_upsampling(model) == 1
    assert not [op for op in model.get_ordered_ops() if op.get_type_name() == "Interpolate"]
    np.testing.assert_allclose(run(model, inputs)["out"], expected, atol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
def test_products_of_eight_bits_are_convolutions(bias: bool) -> None:
    """A quantized linear layer as nncf writes it: i8 weights, converted and scaled for each output."""
    x = ops.parameter([2, 6, 8], np.float32, name="x")
    x.output(0).set_names({"x"})
    levels = [ops.constant(np.float32(bound)) for bound in (-2, 127 / 64, -2, 127 / 64)]
    weights = ops.multiply(
        ops.convert(ops.constant(RNG.integers(-63, 64, (5, 8)).astype(np.int8)), "f32"),
        ops.constant(RNG.uniform(0.01, 0.02, (5, 1)).astype(np.float32)),
    )
    y = ops.matmul(ops.fake_quantize(x, *levels, 256), weights, False, True)
    if bias:
        y = ops.add(ops.constant(RNG.standard_normal((1, 1, 5)).astype(np.float32)), y)
    y = ops.relu(y)
    y.output(0).set_names({"out"})
    model = ov.Model([y], [x])
    inputs = {"x": RNG.standard_normal((2, 6, 8)).astype(np.float32)}
    expected = run(model, inputs)["out"]
    assert products_in_convolutions(model) == 1
    kinds = [op.get_type_name() for op in model.get_ordered_ops()]
    assert "Convolution" in kinds
    assert "MatMul" not in kinds
    np.testing.assert_allclose(run(model, inputs)["out"], expected, atol=2e-3)


def attention(b: int, heads: int, h: int, w: int, d: int) -> tuple[Any, dict[str, Array]]:
    """Self-attention over the positions of sample [b, heads * d, h, w]; the middle third of it asks itself."""
    sample = ops.parameter([b, heads * d, h, w], np.float32, name="sample")
    sample.output(0).set_names({"sample"})
    tokens = ops.reshape(sample, ops.constant([b, heads, d, h * w]), False)
    tokens = ops.transpose(tokens, ops.constant([0, 1, 3, 2]))
    result = ops.scaled_dot_product_attention(tokens, tokens, tokens)
    result.output(0).set_names({"out"})
    return ov.Model([result], [sample]), {"sample": RNG.standard_normal((b, heads * d, h, w)).astype(np.float32)}


def test_merged_tokens_are_the_means_of_four_neighbours() -> None:
    model, inputs = attention(2, 3, 32, 64, 4)
    assert merge_tokens(model) == 1
    x = inputs["sample"].reshape(2, 3, 4, 32, 64)
    q = x.reshape(2, 3, 4, -1).swapaxes(2, 3)
    k = x.reshape(2, 3, 4, 16, 2, 32, 2).mean((4, 6)).reshape(2, 3, 4, -1).swapaxes(2, 3)
    scores = np.exp(q @ k.swapaxes(2, 3) / 2)
    expected = scores / scores.sum(-1, keepdims=True) @ k
    np.testing.assert_allclose(run(model, inputs)["out"], expected, atol=1e-5)


@pytest.mark.parametrize(("h", "w"), [(16, 16), (33, 64)])
def test_few_tokens_and_odd_sides_are_left_alone(h: int, w: int) -> None:
    model, inputs = attention(1, 2, h, w, 4)
    expected = run(model, inputs)["out"]
    assert merge_tokens(model) == 0
    np.testing.assert_array_equal(run(model, inputs)["out"], expected)


@pytest.mark.parametrize("tokens_averaged", [False, True])
def test_wider_heads_change_no_sum(tokens_averaged: bool) -> None:
    model, inputs = attention(1, 2, 64, 64, 5)
    if tokens_averaged:
        assert merge_tokens(model) == 1
    expected = run(model, inputs)["out"]
    assert pad_heads(model) == 1
    assert not [op for op in model.get_ordered_ops() if op.get_type_name() == "ScaledDotProductAttention"]
    np.testing.assert_allclose(run(model, inputs)["out"], expected, atol=1e-5)


@pytest.mark.parametrize(("side", "width"), [(8, 5), (32, 32)])
def test_few_keys_and_whole_tiles_are_left_alone(side: int, width: int) -> None:
    model, _ = attention(1, 1, side, side, width)
    assert pad_heads(model) == 0


def test_a_component_is_the_same_one_row_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large latents: rows apart, what is invariant computed before, deep features as rows of one array."""
    monkeypatch.setattr(loading, "LARGE", 0)
    bundle = ModelBundle.open("emoji")
    variant, openvino = bundle.variant("openvino-fp16"), OpenVINOBackend()
    device = next(each for each in openvino.devices() if each.kind == "cpu")
    shapes = shapes_of(bundle.facts, 128, 128, 2)["unet"]
    _, inputs = embedded_unet()
    context = inputs.pop("encoder_hidden_states")

    # In float32: where the CPU would take bfloat16, rows of another batch are rounded differently.
    exact = in_float32(variant)

    def load(edits: Edits) -> Any:
        component = openvino.load(LoadRequest(bundle, exact, "unet", device, shapes, edits))
        component.bind(encoder_hidden_states=context)
        return component

    expected = load(NONE)(**inputs)["out_sample"]
    apart = load(Edits(shortcuts=Shortcuts(deep=True, apart=True)))
    found = apart(**inputs)
    np.testing.assert_allclose(found["out_sample"], expected, atol=1e-4)
    assert found[DEEP].shape[0] == 2
    last = {**inputs, "sample": inputs["sample"][1:]}
    np.testing.assert_allclose(apart(**last)["out_sample"], expected[1:], atol=1e-4)
    np.testing.assert_allclose(apart(**last, **{DEEP: found[DEEP][1:]})["out_sample"], expected[1:], atol=1e-4)


@pytest.mark.parametrize("cores", [2, 3])
def test_rows_side_by_side_are_those_of_a_batch(cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two lanes where two rows share the cores evenly; three calls of one row on two lanes; one row alone."""
    bundle, openvino = ModelBundle.open("emoji"), OpenVINOBackend()
    openvino.cores = cores
    variant = bundle.variant("openvino-fp16")
    exact = in_float32(variant)
    device = next(each for each in openvino.devices() if each.kind == "cpu")
    shapes = shapes_of(bundle.facts, 128, 128, 2)["unet"]
    _, inputs = embedded_unet()
    context = inputs.pop("encoder_hidden_states")

    def load() -> Any:
        component: Any = openvino.load(LoadRequest(bundle, exact, "unet", device, shapes))
        component.bind(encoder_hidden_states=context)
        return component

    expected = load()(**inputs)["out_sample"]
    monkeypatch.setattr(loading, "LARGE_LATENTS", 0)
    component = load()
    assert len(component.graphs[0].lanes) == (2 if cores == 2 else 1)
    for _ in range(2):
        np.testing.assert_allclose(component(**inputs)["out_sample"], expected, atol=1e-4)
    last = {**inputs, "sample": inputs["sample"][1:]}
    np.testing.assert_allclose(component(**last)["out_sample"], expected[1:], atol=1e-4)
    rows = [{**inputs, "encoder_hidden_states": context[n : n + 1], "sample": inputs["sample"][n : n + 1]}
            for n in (0, 1, 0)]  # fmt: skip
    found = [row["out_sample"].copy() for row in component.graphs[0].each(rows)]
    np.testing.assert_allclose(np.concatenate(found), expected[[0, 1, 0]], atol=1e-4)


class Counting:
    """A UNet that says how many rows each call had, and whether it was given deep features."""

    def __init__(self, splits: bool = True) -> None:
        self.splits = splits
        self.calls: list[tuple[int, bool]] = []

    def bind(self, **constants: Array) -> None: ...

    def __call__(self, **inputs: Array) -> dict[str, Array]:
        sample = inputs["sample"]
        self.calls.append((len(sample), DEEP in inputs))
        deep = {DEEP: sample} if self.splits and DEEP not in inputs else {}
        return {"out_sample": np.zeros_like(sample), **deep}

    def close(self) -> None: ...


def denoise(unet: Counting, steps: int, **options: Any) -> None:
    denoiser = Denoiser(unet, "epsilon", 4.0, **options)
    for n in range(steps):
        denoiser(np.ones((1, 4, 2, 2), np.float32), Level(1.0, float(n)))


def test_deep_features_are_made_on_every_third_step() -> None:
    unet = Counting()
    denoise(unet, 7, deep_every=3)
    assert [given for _, given in unet.calls] == [False, True, True, False, True, True, False]


def test_the_negative_half_is_left_out_beyond_the_guided_steps() -> None:
    unet = Counting()
    denoise(unet, 4, guided=frozenset({1.0, 2.0}))
    assert [rows for rows, _ in unet.calls] == [1, 2, 2, 1]


def test_one_row_of_features_does_not_serve_two() -> None:
    unet = Counting()
    denoise(unet, 3, guided=frozenset({1.0}), deep_every=3)
    assert unet.calls == [(1, False), (2, False), (1, True)]


def test_a_unet_that_cannot_be_split_computes_all() -> None:
    unet = Counting(splits=False)
    denoise(unet, 3, deep_every=3)
    assert not any(given for _, given in unet.calls)


def test_the_guided_share_of_the_steps() -> None:
    levels = [900.0, 700.0, 500.0, 300.0, 100.0]
    assert active_timesteps(levels, 0, 1) == {900, 700, 500, 300, 100}
    assert active_timesteps(levels, 0.2, 0.8) == {700, 500, 300}


def test_bound_rows_follow_the_sample() -> None:
    bound = {"encoder_hidden_states": np.arange(2)[:, None]}
    assert last_rows({**bound, "sample": np.zeros((1, 4))})["encoder_hidden_states"].tolist() == [[1]]
    assert last_rows({**bound, "sample": np.zeros((2, 4))})["encoder_hidden_states"].tolist() == [[0], [1]]


def test_shortcuts_draw_nearly_the_same_picture() -> None:
    request = Request("a red apple, glossy style", seed=7, steps=5)
    with Pipeline.open("emoji", "cpu", "openvino-fp16") as pipeline:

        def pixels(**options: Any) -> Array:
            picture = pipeline.generate(Request(request.prompt, seed=7, steps=5, **options)).pictures[0]
            return np.asarray(picture.image, np.float32)

        plain = pixels()
        spread = float(plain.std())
        error = float(np.sqrt(np.mean((pixels(deep_every=2, guidance_end=0.8) - plain) ** 2)))
        assert 0 < error < spread / 2
        np.testing.assert_array_equal(pixels(), plain)


@pytest.mark.parametrize("wrong", [{"deep_every": 0}, {"deep_every": 11}, {"guidance_start": 0.5, "guidance_end": 0.5},
                                   {"guidance_end": 1.5}])  # fmt: skip
def test_what_is_no_shortcut_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        Request("x", **wrong)


def test_presets_are_requests_and_name_what_the_model_has() -> None:
    bundle = ModelBundle.open("emoji")
    for preset in PRESETS.values():
        Request("x", **preset.changes)
    assert PRESETS["exact"].variant(bundle, {"openvino"}) is None
    assert PRESETS["turbo"].variant(bundle, {"openvino"}) == "openvino-fp16-lcm"
    assert PRESETS["turbo"].variant(bundle, {"coreml"}) is None
    with pytest.raises(InvalidRequest, match="turbo"):
        preset_named("warp")
