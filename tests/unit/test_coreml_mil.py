"""The executor: packages built with coremltools by hand, read back, run, damaged, and made to overflow."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_sd.bundle.mlpackage.package import Package, TensorType, unpack
from edge_sd.bundle.mlpackage.wire import WireError, decode
from edge_sd.converters.coreml.mil import Program
from edge_sd.errors import DeviceError, InvalidModel

logging.getLogger("coremltools").setLevel(logging.ERROR)
WEIGHT = np.linspace(-1, 1, 64 * 64, dtype=np.float32).reshape(64, 64)
DATA = "Data/com.apple.CoreML"


def build(path: Path, body: Any, target: str = "iOS16") -> Path:
    """A package of one function x [2, 64] float16 -> body(mb, x)."""
    import coremltools as ct
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import types

    opset = getattr(ct.target, target)

    @mb.program(input_specs=[mb.TensorSpec((2, 64), types.fp16)], opset_version=opset)
    def program(x: Any) -> Any:
        return body(mb, x)

    model = ct.convert(program, minimum_deployment_target=opset, skip_model_load=True)
    model.save(str(path))
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def body(mb: Any, x: Any) -> Any:
        return mb.softmax(x=mb.linear(x=x, weight=WEIGHT.astype(np.float16)), axis=-1, name="out")

    return build(tmp_path_factory.mktemp("packages") / "plain.mlpackage", body)


def x(scale: float = 1.0) -> dict[str, np.ndarray]:
    return {"x": (np.random.default_rng(0).normal(size=(2, 64)) * scale).astype(np.float16)}


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def test_a_package_is_read_and_run(plain: Path) -> None:
    program = Program.open(plain, "exact")
    assert program.inputs == {"x": TensorType("float16", (2, 64))}
    assert program.outputs == {"out": TensorType("float16", (2, 64))}
    wanted = softmax(x()["x"].astype(np.float32) @ WEIGHT.astype(np.float16).astype(np.float32).T)
    assert np.abs(program.predict(x())["out"] - wanted).max() < 1e-6
    rounded = Program.open(plain).predict(x())["out"]
    assert rounded.dtype == np.float16
    assert 0 < np.abs(rounded - wanted).max() < 1e-3


def test_the_result_is_coremltools_own_inference(plain: Path) -> None:
    """coremltools evaluates operations whose inputs are constants; the same numbers must come out of ours."""
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import Function
    from coremltools.converters.mil.mil import Program as Mil

    program = Mil()
    with Function({}) as function:
        scores = mb.linear(x=x()["x"].astype(np.float32), weight=WEIGHT)
        wanted = mb.softmax(x=scores, axis=-1).val
        function.set_outputs([scores])
    program.add_function("main", function)
    assert np.abs(Program.open(plain, "exact").predict(x())["out"] - wanted).max() < 1e-3


def test_an_overflow_is_named_at_its_first_operation(tmp_path: Path) -> None:
    def body(mb: Any, x: Any) -> Any:
        large = mb.square(x=mb.mul(x=x, y=np.float16(300)), name="too_large")
        return mb.sub(x=large, y=mb.mul(x=large, y=np.float16(2)), name="out")

    path = build(tmp_path / "p.mlpackage", body)
    program = Program.open(path)
    assert not np.isfinite(program.predict(x())["out"]).all()
    assert program.overflow is not None
    assert "too_large" in program.overflow.operation
    assert program.overflow.largest > 65504
    assert "float16 ends at 65504" in str(program.overflow)
    exact = Program.open(path, "exact")
    assert np.isfinite(exact.predict(x())["out"]).all()
    assert exact.overflow is None
    small = Program.open(path)
    small.predict(x(1e-3))
    assert small.overflow is None


def test_an_infinity_that_was_given_is_no_overflow(tmp_path: Path) -> None:
    mask = np.where(np.tri(64, dtype=bool), 0, -np.inf).astype(np.float16)

    def body(mb: Any, x: Any) -> Any:
        return mb.softmax(x=mb.add(x=mb.expand_dims(x=x, axes=[1]), y=mask), axis=-1, name="out")

    program = Program.open(build(tmp_path / "p.mlpackage", body))
    found = program.predict(x())["out"]
    assert program.overflow is None
    assert np.allclose(found[:, 0, 0], 1)
    assert (found[:, 0, 1:] == 0).all()


def test_an_operation_it_does_not_know_is_one_error_with_its_name(tmp_path: Path) -> None:
    path = build(tmp_path / "p.mlpackage", lambda mb, x: mb.cumsum(x=x, axis=1, name="running"))
    with pytest.raises(DeviceError, match=r"does not know the operation 'cumsum' \(running\)"):
        Program.open(path)


def test_inputs_are_checked(plain: Path) -> None:
    program = Program.open(plain)
    with pytest.raises(DeviceError, match="needs the input 'x'"):
        program.predict({})
    with pytest.raises(DeviceError, match=r"x of shape \(2, 64\), fixed at conversion; got \(1, 64\)"):
        program.predict({"x": x()["x"][:1]})
    with pytest.raises(DeviceError, match="no function 'other'; it has: main"):
        Program.open(plain, function="other")


def test_a_function_of_several_is_run_by_name(tmp_path: Path, plain: Path) -> None:
    import coremltools as ct

    other = build(tmp_path / "other.mlpackage", lambda mb, x: mb.mul(x=x, y=np.float16(2), name="out"))
    descriptor = ct.utils.MultiFunctionDescriptor()
    descriptor.add_function(str(plain), "main", "first")
    descriptor.add_function(str(other), "main", "second")
    descriptor.default_function_name = "second"
    both = tmp_path / "both.mlpackage"
    ct.utils.save_multifunction(descriptor, str(both))
    assert np.array_equal(Program.open(both).predict(x())["out"], x()["x"] * 2)
    first = Program.open(both, function="first").predict(x())["out"]
    assert np.array_equal(first, Program.open(plain).predict(x())["out"])


def copied(plain: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(plain, tmp_path / "copy.mlpackage"))


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("Manifest.json", lambda data: None, "cannot be read"),
        ("Manifest.json", lambda data: b"{", "no package's manifest"),
        ("Manifest.json", lambda data: b'{"rootModelIdentifier": "a", "itemInfoEntries": {"a": {"path": "../../x"}}}',
         "not a path inside"),
        (f"{DATA}/model.mlmodel", lambda data: None, "cannot be read"),
        (f"{DATA}/model.mlmodel", lambda data: b"", "no ML Program"),
        (f"{DATA}/model.mlmodel", lambda data: b"\xff" * 99, "damaged"),
        (f"{DATA}/weights/weight.bin", lambda data: None, "cannot be read"),
        (f"{DATA}/weights/weight.bin", lambda data: data[:100], "no blob"),
        (f"{DATA}/weights/weight.bin", lambda data: data[:-5000], "damaged"),
        (f"{DATA}/weights/weight.bin", lambda data: bytes(len(data)), "damaged"),
    ],
)  # fmt: skip
def test_a_damaged_package_is_refused(plain: Path, tmp_path: Path, file: str, damage: Any, message: str) -> None:
    package = copied(plain, tmp_path)
    changed = damage((package / file).read_bytes())
    (package / file).unlink()
    if changed is not None:
        (package / file).write_bytes(changed)
    with pytest.raises(InvalidModel, match=message) as caught:
        Program.open(package).predict(x())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
def test_a_graph_cut_short_is_refused_or_never_runs_wrong(plain: Path, tmp_path: Path, share: float) -> None:
    package = copied(plain, tmp_path)
    graph = package / DATA / "model.mlmodel"
    graph.write_bytes(graph.read_bytes()[: int(graph.stat().st_size * share)])
    with pytest.raises(InvalidModel):
        Package.open(package)


def test_small_integers_are_unpacked_lowest_bits_first() -> None:
    numbers = np.array([5, 63, 0, 18, 33, 1, 7], np.uint8)
    bits = np.unpackbits(numbers[:, None], axis=1, bitorder="little")[:, :6].reshape(-1)
    packed = np.packbits(bits, bitorder="little")
    assert np.array_equal(unpack(packed, TensorType("uint6", (7,))), numbers)
    assert np.array_equal(unpack(np.array([0x1F, 0x80], np.uint8), TensorType("int4", (4,))), [-1, 1, 0, -8])
    with pytest.raises(InvalidModel, match="only 1 bytes"):
        unpack(packed[:1], TensorType("uint6", (7,)))


def test_the_wire_format_is_protobufs() -> None:
    """The same bytes as coremltools' generated classes read and write."""
    from coremltools.proto import MIL_pb2

    value = MIL_pb2.Value()
    value.type.tensorType.dataType = MIL_pb2.INT32
    value.immediateValue.tensor.ints.values.extend([1, -2, 300, -(2**31)])
    read = decode("Value", value.SerializeToString())
    assert read["immediateValue"]["tensor"]["ints"]["values"] == [1, -2, 300, -(2**31)]
    assert read["type"]["tensorType"] == {"dataType": 23, "dimensions": []}
    for data in (b"\x12\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", b"\x12\x05a", b"\x17"):
        with pytest.raises(WireError):
            decode("Value", data)
