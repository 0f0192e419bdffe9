"""Core ML's backend: the way between our shapes and Apple's, and macOS's part of it against a stand-in."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edge_sd.apple import LAYOUTS, Arrays, call
from edge_sd.backends.coreml import CoreMLBackend, CoreMLComponent
from edge_sd.bundle import Artifact, FileRecord, ModelBundle, Variant
from edge_sd.devices import choose
from edge_sd.errors import DeviceError, InvalidModel, InvalidRequest, MissingExtra, NumericalError

RNG = np.random.default_rng(0)


@dataclass
class Port:
    dtype: str
    shape: tuple[int, ...]


def unet_ports(batch: int) -> dict[str, Port]:
    return {
        "sample": Port("float16", (batch, 4, 8, 8)),
        "timestep": Port("float16", (batch,)),
        "encoder_hidden_states": Port("float16", (batch, 6, 1, 9)),
    }


class FakeProgram:
    """noise_pred = sample * timestep + the mean of the text; refuses whatever is not exactly the declared form."""

    def __init__(self, batch: int) -> None:
        self.inputs, self.calls = unet_ports(batch), 0
        self.overflow: Any = None
        self.scale = 1.0

    def predict(self, inputs: Arrays) -> Arrays:
        self.calls += 1
        assert set(inputs) == set(self.inputs)
        for name, port in self.inputs.items():
            assert (inputs[name].dtype, inputs[name].shape) == (np.dtype(port.dtype), port.shape)
        text = inputs["encoder_hidden_states"].mean(axis=(1, 2, 3), dtype=np.float32)[:, None, None, None]
        noise = inputs["sample"].astype(np.float32) * inputs["timestep"][:, None, None, None] + text
        return {"noise_pred": noise * np.float32(self.scale)}


@pytest.mark.parametrize(("rows", "batch", "calls"), [(1, 1, 1), (1, 2, 1), (2, 2, 1), (2, 1, 2), (3, 2, 2)])
def test_any_batch_runs_on_a_package_of_any_other(rows: int, batch: int, calls: int) -> None:
    sample = RNG.integers(-4, 4, (rows, 4, 8, 8)).astype(np.float32)
    context = RNG.integers(-4, 4, (rows, 9, 6)).astype(np.float32)
    program = FakeProgram(batch)
    component = CoreMLComponent("Unet", program, LAYOUTS["unet"])
    component.bind(encoder_hidden_states=context)
    found = component(sample=sample, timestep=np.array([3.0], np.float32))["out_sample"]
    assert program.calls == calls
    assert found.dtype == np.float32
    assert np.allclose(found, sample * 3 + context.mean(axis=(1, 2))[:, None, None, None])


def test_text_states_are_turned_not_reshaped() -> None:
    seen: list[Arrays] = []

    def predict(inputs: Arrays) -> Arrays:
        seen.append(inputs)
        return {"noise_pred": inputs["sample"]}

    context = RNG.normal(size=(2, 9, 6)).astype(np.float16)
    sample = np.zeros((2, 4, 8, 8), np.float32)
    inputs = {"sample": sample, "timestep": np.array([5.0]), "encoder_hidden_states": context}
    call(predict, unet_ports(2), LAYOUTS["unet"], inputs)
    assert seen[0]["encoder_hidden_states"][1, 4, 0, 7] == context[1, 7, 4]
    assert seen[0]["timestep"].tolist() == [5, 5]


def test_another_size_than_the_packages_is_refused() -> None:
    component = CoreMLComponent("Unet.mlpackage", FakeProgram(2), LAYOUTS["unet"])
    component.check({"sample": (1, 4, 8, 8)}, 8)
    with pytest.raises(InvalidRequest, match=r"draws 64x64 only, not 128x64; convert"):
        component.check({"sample": (2, 4, 8, 16)}, 8)


def test_a_package_of_another_layout_is_refused() -> None:
    with pytest.raises(InvalidModel, match="no input z"):
        CoreMLComponent("x.mlpackage", FakeProgram(2), LAYOUTS["vae_decoder"])


def test_an_infinite_result_names_the_operation_that_overflowed() -> None:
    program = FakeProgram(1)
    program.scale, program.overflow = np.inf, "mul too_large reaches 1e+06"
    component = CoreMLComponent("Unet.mlpackage", program, LAYOUTS["unet"])
    with pytest.raises(NumericalError, match="overflows float16: mul too_large"):
        component(
            sample=np.ones((1, 4, 8, 8)), timestep=np.array([1.0]), encoder_hidden_states=np.ones((1, 9, 6))
        )  # fmt: skip


def test_a_device_gets_the_form_that_was_arranged_for_it(emoji: Path) -> None:
    from dataclasses import replace

    from edge_sd.backends import Device

    opened = ModelBundle.open(emoji)
    variants = {
        name: Variant("coreml", precision, {}, compute=compute)
        for name, precision, compute in (
            ("coreml-ane-fp16", "fp16", "ane"), ("coreml-gpu-fp16", "fp16", "gpu"), ("coreml-gpu-int8", "int8", "gpu"),
        )
    }  # fmt: skip
    bundle = replace(opened, variants=variants)
    for device, wanted in (("ane", "coreml-ane-fp16"), ("gpu", "coreml-gpu-fp16"), ("cpu", "coreml-ane-fp16")):
        assert choose(bundle, [Device(device, "coreml", "")], device).variant == wanted


def test_elsewhere_there_is_the_reference_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    assert [device.name for device in CoreMLBackend().devices()] == ["coreml-reference"]
    monkeypatch.setattr("edge_sd.backends.coreml.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"edge-sd\[convert\]"):
        CoreMLBackend()


def stand_in(compiled: list[str], fail: str = "") -> ModuleType:
    """coremltools as macOS has it, as far as the backend calls it; models "run" as FakeProgram does."""

    def load_spec(path: str) -> Any:
        ports = unet_ports(2).items()
        rows = [
            SimpleNamespace(name=n, type=SimpleNamespace(multiArrayType=SimpleNamespace(dataType=65552, shape=p.shape)))
            for n, p in ports
        ]
        return SimpleNamespace(description=SimpleNamespace(input=rows))

    def compile_model(package: str, destination: str) -> str:
        if fail == "compile":
            raise RuntimeError("Error compiling model: no room")
        compiled.append(package)
        shutil.copytree(package, destination)
        return destination

    class CompiledMLModel:
        def __init__(self, path: str, compute_units: str) -> None:
            assert (Path(path) / "weights.bin").is_file()
            self.units, self.program = compute_units, FakeProgram(2)

        def predict(self, inputs: Arrays) -> Arrays:
            if fail == "predict":
                raise RuntimeError("ANE said no")
            return self.program.predict(inputs)

    module: Any = ModuleType("coremltools")
    module.__spec__ = ModuleSpec("coremltools", None)
    module.utils = SimpleNamespace(load_spec=load_spec)
    module.models = SimpleNamespace(utils=SimpleNamespace(compile_model=compile_model), CompiledMLModel=CompiledMLModel)
    module.ComputeUnit = SimpleNamespace(CPU_AND_NE="NE", CPU_AND_GPU="GPU", CPU_ONLY="CPU")
    return module  # type: ignore[no-any-return]


@pytest.fixture
def mac(tmp_path: Path, emoji: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Load a UNet as on a Mac; `compiled` lists what was compiled."""
    from dataclasses import replace

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setenv("EDGE_SD_MODELS", str(tmp_path / "home/models"))
    package = tmp_path / "bundle/v/Unet.mlpackage"
    package.mkdir(parents=True)
    (package / "weights.bin").write_bytes(b"weights")
    artifact = Artifact("v/Unet.mlpackage", (), (), ())
    shapes = {"sample": (2, 4, 8, 8), "timestep": (1,), "encoder_hidden_states": (2, 9, 6)}

    def load(device: str, sha256: str = "ab" * 32, fail: str = "") -> Any:
        compiled: list[str] = []
        monkeypatch.setitem(sys.modules, "coremltools", stand_in(compiled, fail))
        variant = Variant("coreml", "fp16", {"unet": artifact}, {"v/Unet.mlpackage/weights.bin": FileRecord(7, sha256)})
        bundle = replace(ModelBundle.open(emoji), root=tmp_path / "bundle", variants={"v": variant})
        backend = CoreMLBackend()
        (chosen,) = [each for each in backend.devices() if each.name == device]
        return backend.load(bundle, variant, artifact, chosen, shapes), compiled

    return load


@pytest.mark.parametrize(("device", "units"), [("ane", "NE"), ("gpu", "GPU"), ("cpu", "CPU")])
def test_on_a_mac_a_package_is_compiled_once_and_runs_on_the_device(mac: Any, device: str, units: str) -> None:
    component, compiled = mac(device)
    assert len(compiled) == 1
    assert component.program.model.units == units
    sample, context = np.ones((2, 4, 8, 8), np.float32), np.ones((2, 9, 6), np.float32)
    found = component(sample=sample, timestep=np.array([2.0]), encoder_hidden_states=context)["out_sample"]
    assert np.allclose(found, 3)
    assert mac(device)[1] == [], "the second time finds the compiled model"
    assert len(mac(device, "cd" * 32)[1]) == 1, "other weights are compiled on their own"


@pytest.mark.parametrize("fail", ["compile", "predict"])
def test_what_core_ml_refuses_is_one_error(mac: Any, tmp_path: Path, fail: str) -> None:
    def draw() -> None:
        component, _ = mac("ane", fail=fail)
        component(sample=np.ones((2, 4, 8, 8)), timestep=np.ones(1), encoder_hidden_states=np.ones((2, 9, 6)))

    with pytest.raises(DeviceError, match="no room" if fail == "compile" else "ANE said no"):
        draw()
    home = tmp_path / "home/compiled"
    assert [path.name for path in home.iterdir() if path.name.startswith(".")] == []
