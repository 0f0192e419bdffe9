"""LoRAs as inputs of a graph: the same numbers as in its weights, and another one without loading."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops
from safetensors.numpy import save_file

from edge_sd import Pipeline, Request
from edge_sd.backends import LoadRequest
from edge_sd.backends.openvino import OpenVINOBackend, loading
from edge_sd.backends.openvino.adapters import adapt
from edge_sd.backends.openvino.edits import add_loras
from edge_sd.bundle.bundle import ModelBundle
from edge_sd.bundle.variants import Variant
from edge_sd.components.edits import Edits, Shortcuts
from edge_sd.components.lora import Lora, read_lora
from edge_sd.components.shapes import shapes_of
from edge_sd.errors import InvalidRequest

RNG = np.random.default_rng(0)
BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"
Q, K, OUT = f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn2.to_k", f"{BLOCK}.attn1.to_out.0"
PROJ, SKIP = "down_blocks.1.attentions.0.proj_in", "down_blocks.1.resnets.0.conv1"
# Outputs and inputs in the embedded model's UNet.
SHAPES = {Q: (128, 128), K: (128, 192), OUT: (128, 128), PROJ: (128, 128, 1, 1), SKIP: (128, 64, 3, 3)}


def random(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def lora(folder: Path, shapes: dict[str, tuple[int, ...]], name: str = "style", rank: int = 3) -> Lora:
    tensors = {}
    for module, (outputs, *rest) in shapes.items():
        tensors[f"unet.{module}.lora_A.weight"] = 0.3 * random(rank, *rest)
        tensors[f"unet.{module}.lora_B.weight"] = 0.3 * random(outputs, rank, *[1] * (len(rest) - 1))
    save_file(tensors, folder / f"{name}.safetensors")
    return read_lora(folder / f"{name}.safetensors")


def run(model: Any, inputs: dict[str, Any]) -> np.ndarray:
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": ov.Type.f32})
    return np.array(compiled({port.any_name: inputs[port.any_name] for port in compiled.inputs})[0])


def linear(turned: bool = False, eight_bits: bool = False) -> Any:
    """x [1, 4, 6] times a weight [8, 6]; in eight bits smoothed, rounded, and without its name, as nncf writes it."""
    weight = random(8, 6)
    x = ops.parameter([1, 4, 6], np.float32, "x")
    x.output(0).set_names({"x"})
    value, stored = ops.relu(x), ops.constant(weight.T.copy() if turned else weight)
    stored.set_friendly_name(f"self.model.{Q}.weight")
    if eight_bits:
        smoothing = np.linspace(0.25, 2, 6, dtype=np.float32)
        value = ops.multiply(value, ops.constant(smoothing.reshape(1, 1, 6)))
        value.set_friendly_name("x/nncf_smooth_quant")
        value = ops.fake_quantize(value, *(ops.constant(np.float32(bound)) for bound in (0, 8, 0, 8)), 256)
        scale = np.abs(weight / smoothing).max(1, keepdims=True) / 63
        numbers = np.round(weight / smoothing / scale).astype(np.int8)
        stored = ops.multiply(ops.convert(ops.constant(numbers), "f32"), ops.constant(scale))
    y = ops.matmul(value, stored, False, not turned)
    y.set_friendly_name(f"__module.model.{Q}/aten::linear/MatMul")
    return ov.Model([ops.add(y, ops.constant(np.zeros((1, 1, 8), np.float32)))], [x])


@pytest.mark.parametrize("as_inputs", [True, False])
@pytest.mark.parametrize(("turned", "eight_bits"), [(False, False), (True, False), (False, True)])
def test_a_linear_layer_takes_a_difference(tmp_path: Path, turned: bool, eight_bits: bool, as_inputs: bool) -> None:
    """Of eight bits too, where what the layer multiplies was smoothed for its weights."""
    model = linear(turned, eight_bits)
    mine = lora(tmp_path, {Q: (8, 6)})
    inputs = {"x": RNG.uniform(0, 4, (1, 4, 6)).astype(np.float32)}
    expected = inputs["x"] @ mine.differences("unet", [Q])[Q].of((8, 6), 4.0).T
    before = run(model, inputs)
    if as_inputs:
        adapters = adapt(model, Edits(loras=((mine, 4.0),), part="unet"), "unet")
        assert adapters is not None
        assert adapters.rank == 16
        inputs |= adapters.values(Edits(loras=((mine, 4.0),), part="unet")) or {}
    else:
        add_loras(model, [(mine, 4.0)], "unet", "unet")
    error = run(model, inputs) - before - expected
    # Seven bits of another range are rounded anew.
    assert np.sqrt((error**2).mean()) < (0.15 if eight_bits and not as_inputs else 1e-5) * expected.std()


def test_seven_bits_stay_seven(tmp_path: Path) -> None:
    """CPUs without VNNI add products of two in 16 bits."""
    model = linear(eight_bits=True)
    add_loras(model, [(lora(tmp_path, {Q: (8, 6)}), 1.0)], "unet", "unet")
    (numbers,) = [op.data for op in model.get_ops() if op.get_type_name() == "Constant" and op.data.dtype == np.int8]
    assert np.abs(numbers).max() == 63


def in_float32(variant: Variant) -> Variant:
    """A variant whose UNet computes in float32, whatever the CPU prefers."""
    return replace(variant, artifacts={"unet": replace(variant.artifacts["unet"], precision="fp32")})


@pytest.fixture
def place(tmp_path: Path) -> Any:
    """Loads the embedded model's UNet with LoRAs, as a large network or as a small one."""
    bundle, backend = ModelBundle.open("emoji"), OpenVINOBackend()
    exact = in_float32(bundle.variant("openvino-fp16"))
    device = next(each for each in backend.devices() if each.kind == "cpu")
    shapes = shapes_of(bundle.facts, 128, 128, 2)["unet"]
    inputs = {name: random(*shape) for name, shape in shapes.items()} | {"timestep": np.array([500.5], np.float32)}

    def load(large: bool, *loras: tuple[Lora, float], **shortcuts: bool) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loading, "LARGE", 0 if large else 1 << 40)
            edits = Edits(loras=loras, part="unet", shortcuts=Shortcuts(**shortcuts))
            return backend.load(LoadRequest(bundle, exact, "unet", device, shapes, edits))

    return load, inputs


def test_another_lora_needs_no_loading(tmp_path: Path, place: Any) -> None:
    """Layers before and after what is computed once, the prompt's keys among it, and a convolution of 1 x 1."""
    load, inputs = place
    four = {module: SHAPES[module] for module in (Q, K, OUT, PROJ)}
    first, second = lora(tmp_path, four, "first"), lora(tmp_path, {Q: SHAPES[Q], K: SHAPES[K]}, "second", rank=9)
    component = load(True, (first, 0.8), deep=True)
    assert component.adapters is not None
    for loras in (((first, 0.8),), ((second, 1.0),), ((first, 0.3), (second, -0.5))):
        assert component.change(Edits(loras=loras, part="unet", shortcuts=Shortcuts(deep=True)))
        expected = load(False, *loras)(**inputs)["out_sample"]
        np.testing.assert_allclose(component(**inputs)["out_sample"], expected, atol=1e-3)


def test_what_needs_loading_again_changes_nothing(tmp_path: Path, place: Any) -> None:
    load, inputs = place
    first = lora(tmp_path, {Q: SHAPES[Q]}, "first")
    component = load(True, (first, 1.0))
    expected = component(**inputs)["out_sample"]
    for name, loras, deep in (
        ("none", (), False),
        ("other layers", ((lora(tmp_path, {OUT: SHAPES[OUT]}, "other"), 1.0),), False),
        ("more ranks", ((lora(tmp_path, {Q: SHAPES[Q]}, "large", rank=17), 1.0),), False),
        ("another graph", ((first, 1.0),), True),
    ):
        assert not component.change(Edits(loras=loras, part="unet", shortcuts=Shortcuts(deep=deep))), name
    with pytest.raises(InvalidRequest, match="changes nothing that"):
        component.change(Edits(loras=((lora(tmp_path, {"mid_block.x": (4, 4)}, "odd"), 1.0),), part="unet"))
    with pytest.raises(InvalidRequest, match=r"to_q is \[128, 9\] where the weight is \[128, 128\]"):
        component.change(Edits(loras=((lora(tmp_path, {Q: (128, 9)}, "wide"), 1.0),), part="unet"))
    np.testing.assert_array_equal(component(**inputs)["out_sample"], expected)


@pytest.mark.parametrize(("module", "rank"), [(SKIP, 3), (Q, 65)])
def test_what_is_no_cheap_input_is_in_the_weights(tmp_path: Path, place: Any, module: str, rank: int) -> None:
    """A kernel of 3 x 3; many ranks."""
    load, inputs = place
    mine = (lora(tmp_path, {module: SHAPES[module]}, rank=rank), 0.5)
    component = load(True, mine)
    assert component.adapters is None
    expected = load(False, mine)(**inputs)["out_sample"]
    np.testing.assert_allclose(component(**inputs)["out_sample"], expected, atol=1e-3)


def test_a_pipeline_goes_from_one_to_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request("a red apple", seed=1, steps=2)
    for name in ("first", "second"):
        lora(tmp_path, {Q: SHAPES[Q], K: SHAPES[K]}, name)

    def draw(pipeline: Pipeline, *loras: str) -> np.ndarray:
        wish = replace(request, loras={tmp_path / f"{name}.safetensors": 1.0 for name in loras})
        return np.asarray(pipeline.generate(wish).pictures[0].image, np.float32)

    def count(pipeline: Pipeline) -> int:
        return id(pipeline.components["unet"])

    with Pipeline.open("emoji", "cpu", "openvino-fp16") as pipeline:
        expected = {loras: draw(pipeline, *loras) for loras in (("first",), ("second",), ())}
    monkeypatch.setattr(loading, "LARGE", 0)
    with Pipeline.open("emoji", "cpu", "openvino-fp16") as pipeline:
        draw(pipeline, "first")
        loaded = count(pipeline)
        for loras in (("second",), ("first",)):
            assert np.abs(draw(pipeline, *loras) - expected[loras]).mean() < 1
            assert count(pipeline) == loaded
        assert np.abs(draw(pipeline) - expected[()]).mean() < 1
        assert count(pipeline) != loaded
