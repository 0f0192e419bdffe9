"""Weights as inputs of a graph: the same numbers as with weights in it, for every kind of layer and rounding."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openvino import opset13 as ops

from edge_sd.backends.openvino.mapping import Place, forget, forgetting, place_of_array, places_of_model
from edge_sd.backends.openvino.streaming import constants, stream

CORE = ov.Core()
# Weights of 8 bits in a graph have activations rounded as they come.
EXACT = {"INFERENCE_PRECISION_HINT": ov.Type.f32, "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}


def results(model: ov.Model, inputs: dict[str, Any], config: dict[str, Any] = EXACT) -> np.ndarray:
    request = CORE.compile_model(model, "CPU", config).create_infer_request()
    for name, value in inputs.items():
        request.set_tensor(name, ov.Tensor(value) if isinstance(value, np.ndarray) else value.get_tensor_view())
    request.infer()
    return np.array(request.get_output_tensor(0).data)


def source(shape: list[int]) -> Any:
    found = ops.parameter(shape, ov.Type.f32)
    found.output(0).set_names({"x"})
    return found


def weights(rng: np.random.Generator, shape: tuple[int, ...], kind: str) -> Any:
    axis = (-1,) + (1,) * (len(shape) - 1)
    scale = rng.uniform(0.01, 0.02, shape[0]).astype(np.float32).reshape(axis)
    if kind == "f16":
        return ops.convert(ops.constant(rng.standard_normal(shape).astype(np.float16)), "f32")
    if kind == "u8":
        numbers, zero = rng.integers(0, 255, shape, dtype=np.uint8), rng.integers(100, 150, scale.shape, dtype=np.uint8)
        shifted = ops.subtract(ops.convert(ops.constant(numbers), "f32"), ops.convert(ops.constant(zero), "f32"))
        return ops.multiply(shifted, ops.constant(scale))
    numbers = rng.integers(-127, 127, shape, dtype=np.int8)
    return ops.multiply(ops.convert(ops.constant(numbers), "f32"), ops.constant(scale))


def rounded(x: Any, low: float, high: float) -> Any:
    bounds = [ops.constant(np.float32(bound)) for bound in (low, high)]
    return ops.fake_quantize(x, *bounds, *bounds, 256)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["f16", "u8", "i8"]), st.sampled_from([1, 3]), st.sampled_from([1, 2]), st.integers(1, 2),
    st.sampled_from([None, 0, 14, 100, 128]), st.integers(0, 1000),
)  # fmt: skip
def test_a_convolution(kind: str, side: int, stride: int, batch: int, zero: int | None, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = source([batch, 128, 8, 8])
    value = x if zero is None else rounded(x, -zero * 0.02, (255 - zero) * 0.02)
    pads = [side // 2] * 2
    made = ops.convolution(value, weights(rng, (160, 128, side, side), kind), [stride] * 2, pads, pads, [1, 1])
    model = ov.Model([ops.add(made, ops.constant(rng.standard_normal((1, 160, 1, 1)).astype(np.float32)))], [x])
    given_x = rng.standard_normal((batch, 128, 8, 8)).astype(np.float32)
    expected = results(model, {"x": given_x})
    found = stream(model, lean=True)
    assert len(found) == 1
    got = results(model, {"x": given_x, **found})
    assert np.abs(got - expected).max() <= 2e-3 * np.abs(expected).max()


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(["f16", "u8", "i8"]), st.booleans(), st.sampled_from([None, 0, 14, 128]), st.integers(0, 1000))
def test_linear_layers_that_share_a_rounding(kind: str, turned: bool, zero: int | None, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = source([2, 9, 192])
    value = x if zero is None else rounded(x, -zero * 0.02, (255 - zero) * 0.02)
    layers = []
    for width in (160, 96):
        w = weights(rng, (width, 192), kind)
        if turned:
            numbers = w.input_value(0).get_node() if kind == "f16" else None
            w = ops.convert(ops.constant(numbers.data.T.copy()), "f32") if numbers is not None else w
        layers.append(ops.matmul(value, w, False, not (turned and kind == "f16")))
    model = ov.Model([ops.concat(layers, 2)], [x])
    given_x = rng.standard_normal((2, 9, 192)).astype(np.float32)
    expected = results(model, {"x": given_x})
    found = stream(model, lean=True)
    assert len(found) == 2
    got = results(model, {"x": given_x, **found})
    assert np.abs(got - expected).max() <= 2e-3 * np.abs(expected).max()


def test_what_is_rounded_and_then_moved_is_rounded_after_that() -> None:
    rng = np.random.default_rng(0)
    x = source([1, 64, 128])
    pixels = ops.transpose(ops.reshape(rounded(x, -0.28, 4.82), ops.constant([1, 8, 8, 128]), False),
                           ops.constant([0, 3, 1, 2]))  # fmt: skip
    doubled = ops.interpolate(
        pixels, ops.constant([16, 16]), "nearest", "sizes", [0, 0, 0, 0], [0, 0, 0, 0], "asymmetric", "floor",
        axes=ops.constant([2, 3]),
    )  # fmt: skip
    model = ov.Model(
        [ops.convolution(doubled, weights(rng, (256, 128, 3, 3), "i8"), [1, 1], [1, 1], [1, 1], [1, 1])], [x]
    )
    given_x = rng.standard_normal((1, 64, 128)).astype(np.float32)
    expected = results(model, {"x": given_x})
    found = stream(model, lean=False)
    assert len(found) == 1
    assert np.abs(results(model, {"x": given_x, **found}) - expected).max() <= 2e-3 * np.abs(expected).max()


def test_only_what_costs_no_time_where_memory_is_not_dear() -> None:
    rng = np.random.default_rng(0)
    x = source([1, 128, 16, 16])

    def layer(value: Any, outputs: int, kind: str) -> Any:
        w = weights(rng, (outputs, 128, 3, 3), kind)
        return ops.reduce_mean(ops.convolution(value, w, [1, 1], [1, 1], [1, 1], [1, 1]), ops.constant([1, 2, 3]))

    def model() -> ov.Model:
        value = rounded(x, 0, 5)
        # Rounded, with as many outputs as positions; with half as many; with a fourth; of 16 bits.
        parts = [layer(value, 256, "i8"), layer(value, 128, "i8"), layer(value, 64, "i8"), layer(x, 256, "f16")]
        return ov.Model([sum(parts[1:], parts[0])], [x])

    assert len(stream(model(), lean=False)) == 1
    assert len(stream(model(), lean=True)) == 3


def test_constants_are_found_again_in_the_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = source([1, 9, 192])
    ov.save_model(ov.Model([ops.matmul(x, weights(rng, (160, 192), "i8"), False, True)], [x]), tmp_path / "m.xml")
    model = CORE.read_model(tmp_path / "m.xml")
    found = stream(model, lean=True)
    again = constants(CORE.read_model(tmp_path / "m.xml"), found)
    assert set(again) == set(found)
    for name in found:
        np.testing.assert_array_equal(again[name].data, found[name].data)


@pytest.mark.skipif("sys.platform != 'linux'", reason="pages are counted in /proc")
def test_pages_are_given_back_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "numbers"
    expected = np.random.default_rng(0).integers(0, 255, 32 << 20, dtype=np.uint8)
    path.write_bytes(expected.tobytes())
    array = np.memmap(path, np.uint8, "r")

    def resident() -> int:
        text = Path("/proc/self/smaps").read_text()
        return int(text[text.index(str(path)) :].split("Rss:")[1].split()[0]) << 10

    assert array.sum() == expected.sum()
    assert resident() >= 30 << 20
    places = [place_of_array(array)]
    forget(places)
    assert resident() < 1 << 20
    with forgetting(places):
        assert (array == expected).all()
    assert resident() < 1 << 20


@pytest.mark.skipif("sys.platform != 'linux'", reason="pages are counted in /proc")
def test_pages_are_given_back_where_a_model_has_them_and_nowhere_else(tmp_path: Path) -> None:
    """Two models of one file: the other's place is anyone's once the other is gone."""

    def mappings() -> int:
        return Path("/proc/self/maps").read_text().count(str(tmp_path / "m.bin"))

    def read() -> tuple[Any, Place]:
        model = CORE.read_model(tmp_path / "m.xml")
        (place,) = places_of_model(model, [tmp_path / "m.bin"])
        return model, place

    rng = np.random.default_rng(0)
    matrix = ops.constant(rng.standard_normal((160, 192)).astype(np.float32))
    x = source([1, 9, 192])
    ov.save_model(ov.Model([ops.matmul(x, matrix, False, True)], [x]), tmp_path / "m.xml", compress_to_fp16=False)
    (first, own), (second, other) = read(), read()
    assert mappings() == 2
    assert own.start != other.start
    assert places_of_model(first, [tmp_path / "n.bin"]) == ()
    del first, second, other
    gc.collect()
    # The place keeps what it is of.
    assert mappings() == 1
    forget([own])
    np.testing.assert_array_equal(own.owner.data, matrix.data)
    del own
    gc.collect()
    assert mappings() == 0


@pytest.mark.skipif("sys.platform != 'linux'", reason="pages are counted in /proc")
def test_what_a_model_has_in_memory_of_its_own_stays(tmp_path: Path) -> None:
    x = source([1, 9, 192])
    model = ov.Model([ops.matmul(x, ops.constant(np.ones((160, 192), np.float32)), False, True)], [x])
    assert places_of_model(model, [tmp_path / "m.bin"]) == ()
    assert places_of_model(ov.Model([ops.relu(x)], [x]), []) == ()


def test_constants_of_one_name_stay_in_the_graph() -> None:
    rng = np.random.default_rng(0)
    x = source([1, 9, 192])
    both = [weights(rng, (160, 192), "f16") for _ in range(2)]
    for each in both:
        each.input_value(0).get_node().set_friendly_name("w")
    assert stream(ov.Model([ops.matmul(x, each, False, True) for each in both], [x]), lean=True) == {}


def test_layers_of_many_outputs_have_many_scales() -> None:
    rng = np.random.default_rng(0)
    x = source([1, 4, 16])
    model = ov.Model([ops.matmul(x, weights(rng, (1 << 14, 16), "u8"), False, True)], [x])
    given_x = rng.standard_normal((1, 4, 16)).astype(np.float32)
    expected = results(model, {"x": given_x})
    found = stream(model, lean=True)
    assert len(found) == 1
    np.testing.assert_allclose(results(model, {"x": given_x, **found}), expected, rtol=1e-4, atol=1e-4)
