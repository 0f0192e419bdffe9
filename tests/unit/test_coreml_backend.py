"""Core ML's backend: the way between our shapes and Apple's, and macOS's part of it against a stand-in."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edge_sd.backends import LoadRequest
from edge_sd.backends.coreml.backend import CoreMLBackend, CoreMLComponent
from edge_sd.bundle.apple_layout import LAYOUTS, Arrays, Chain, call, pick
from edge_sd.bundle.bundle import ModelBundle
from edge_sd.bundle.variants import Artifact, Variant
from edge_sd.components.safety_checker import is_flagged, side_of
from edge_sd.devices.choose import choose
from edge_sd.errors import DeviceError, InvalidModel, InvalidRequest, MissingExtra, NumericalError
from edge_sd.files import FileRecord

RNG = np.random.default_rng(0)


@dataclass
class Port:
    dtype: str
    shape: tuple[int, ...]


def unet_ports(batch: int, side: int = 8) -> dict[str, Port]:
    return {
        "sample": Port("float16", (batch, 4, side, side)),
        "timestep": Port("float16", (batch,)),
        "encoder_hidden_states": Port("float16", (batch, 6, 1, 9)),
    }


class FakeProgram:
    """noise_pred = sample * timestep + the mean of the text; refuses whatever is not exactly the declared form."""

    def __init__(self, batch: int, side: int = 8) -> None:
        self.inputs, self.calls = unet_ports(batch, side), 0
        self.outputs: dict[str, Any] = {}
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


class SecondChunk:
    """doubled = 2 noise_pred, of float16, times a scale that only it takes."""

    def __init__(self) -> None:
        noise = Port("float16", (2, 4, 8, 8))
        self.inputs = {"noise_pred": noise, "sample": noise, "scale": Port("float32", (1,))}
        self.outputs = {"doubled": None}

    def predict(self, inputs: Arrays) -> Arrays:
        assert {name: value.dtype.name for name, value in inputs.items()} == {
            n: p.dtype for n, p in self.inputs.items()
        }
        return {"doubled": 2 * inputs["noise_pred"].astype(np.float32) * inputs["scale"]}


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


def test_a_safety_checker_is_shown_what_clip_sees_and_its_other_inputs_are_filled(tmp_path: Path) -> None:
    """Compiled, as Apple's converter has it: float16 inputs, and a picture that we have no use for."""
    ports = {"clip_input": Port("float16", (1, 3, 32, 32)), "images": Port("float16", (1, 64, 48, 3)),
             "adjustment": Port("float16", (1,))}  # fmt: skip
    rows = [{"name": n, "dataType": p.dtype.capitalize(), "shape": str(list(p.shape))} for n, p in ports.items()]
    model = tmp_path / "SafetyChecker.mlmodelc"
    model.mkdir()
    (model / "metadata.json").write_text(json.dumps([{"inputSchema": rows, "outputSchema": []}]))
    assert side_of(model) == 32

    def predict(inputs: Arrays) -> Arrays:
        assert {name: (each.dtype.name, each.shape) for name, each in inputs.items()} == {
            name: (port.dtype, port.shape) for name, port in ports.items()
        }
        assert not inputs["images"].any()
        # Three decimals of a special concept's score must be more than nothing, as diffusers rounds.
        assert [round(score, 3) > 0 for score in (0.0004, 0.0006)] == [
            score + float(inputs["adjustment"][0]) > 0 for score in (0.0004, 0.0006)
        ]
        return {"concept_scores": inputs["clip_input"].max(axis=(1, 2)), "filtered_images": inputs["images"]}

    found = call(predict, ports, LAYOUTS["safety_checker"], {"clip_input": np.ones((1, 3, 32, 32), np.float32)})
    assert list(found) == ["adjusted_scores"]
    assert is_flagged(found)
    (model / "metadata.json").write_text(json.dumps([{"inputSchema": rows[1:], "outputSchema": []}]))
    with pytest.raises(InvalidModel, match="has no input clip_input"):
        side_of(model)


def test_another_size_than_the_packages_is_refused() -> None:
    functions = {"main": unet_ports(2)}
    assert pick("Unet.mlpackage", functions, LAYOUTS["unet"], {"sample": (1, 4, 8, 8)}, 8) == "main"
    with pytest.raises(InvalidRequest, match=r"draws 64x64 only, not 128x64; convert"):
        pick("Unet.mlpackage", functions, LAYOUTS["unet"], {"sample": (2, 4, 8, 16)}, 8)


@pytest.mark.parametrize(("rows", "function"), [(1, "one"), (2, "two"), (4, "two")])
def test_of_several_batches_the_one_that_fits_is_picked(rows: int, function: str) -> None:
    functions = {"two": unet_ports(2), "one": unet_ports(1)}
    assert pick("Unet", functions, LAYOUTS["unet"], {"sample": (rows, 4, 8, 8)}, 8) == function


def test_chunks_are_one_program() -> None:
    """The second gets the first's outputs, by name and in its own types, beside the inputs of all."""
    first, second = FakeProgram(2), SecondChunk()
    first.outputs = {"noise_pred": None}
    chain = Chain([first, second])
    assert list(chain.inputs) == ["sample", "timestep", "encoder_hidden_states", "scale"]
    given = {name: np.ones(port.shape, port.dtype) for name, port in chain.inputs.items()}
    assert np.allclose(chain.predict(given)["doubled"], 4)
    assert chain.overflow is None
    first.overflow = "mul x"
    assert chain.overflow == "mul x"


def test_a_package_of_another_layout_is_refused() -> None:
    with pytest.raises(InvalidModel, match="no input z"):
        pick("x.mlpackage", {"main": unet_ports(2)}, LAYOUTS["vae_decoder"], {"latent_sample": (1, 4, 8, 8)}, 8)


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
    monkeypatch.setattr("edge_sd.backends.coreml.backend.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"edge-sd\[convert\]"):
        CoreMLBackend()


def test_a_coremltools_without_its_library_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is installed here has none, as on a Mac with a Python for which there is no wheel."""
    if find_spec("coremltools") is None:
        pytest.skip("coremltools is not installed")
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(DeviceError, match=r"no native library for Python 3\.\d+: take Python 3\.10 to 3.*openvino"):
        CoreMLBackend()


def stand_in(compiled: list[str], fail: str = "", functions: dict[str, int] | None = None) -> ModuleType:
    """coremltools as macOS has it, as far as the backend calls it; models "run" as FakeProgram does."""

    def load_spec(path: str) -> Any:
        def rows(ports: dict[str, Port]) -> list[Any]:
            kind = {"float16": 65552, "float32": 65568}
            arrays = {name: SimpleNamespace(dataType=kind[p.dtype], shape=p.shape) for name, p in ports.items()}
            return [SimpleNamespace(name=n, type=SimpleNamespace(multiArrayType=array)) for n, array in arrays.items()]

        out = rows({"noise_pred": Port("float32", (2, 4, 8, 8))})
        each = [
            SimpleNamespace(name=name, input=rows(unet_ports(2, side)), output=out)
            for name, side in (functions or {}).items()
        ]
        # Of several functions, each has its own inputs and the model has none.
        whole = SimpleNamespace(functions=each, input=[] if each else rows(unet_ports(2)), output=[] if each else out)
        whole.defaultFunctionName = each[0].name if each else ""
        return SimpleNamespace(description=whole)

    def compile_model(package: str, destination: str) -> str:
        if fail == "compile":
            raise RuntimeError("Error compiling model: no room")
        compiled.append(package)
        shutil.copytree(package, destination)
        return destination

    class CompiledMLModel:
        def __init__(self, path: str, compute_units: str, **named: str) -> None:
            assert (Path(path) / "weights.bin").is_file()
            # A function must be named where there are several, and cannot be on systems that have one each.
            assert set(named) == ({"function_name"} if functions else set())
            self.function = named.get("function_name", "")
            self.units, self.program = compute_units, FakeProgram(2, (functions or {}).get(self.function, 8))

        def predict(self, inputs: Arrays) -> Arrays:
            if fail == "predict":
                raise RuntimeError("ANE said no")
            return self.program.predict(inputs)

    class MLNeuralEngineComputeDevice:
        pass

    class MLCPUComputeDevice:
        pass

    class MLComputePlan:
        """Constants have no usage; of six operations, the last two are beyond the engine."""

        def __init__(self) -> None:
            block = SimpleNamespace(operations=range(-3, 6))
            functions = {name: SimpleNamespace(block=block) for name in functions_named}
            self.model_structure = SimpleNamespace(program=SimpleNamespace(functions=functions))

        @classmethod
        def load_from_path(cls, path: str, compute_units: str) -> Any:
            assert (Path(path).suffix, compute_units) == (".mlmodelc", "NE")
            if fail == "plan":
                raise RuntimeError("MLComputePlan is only available on macOS >= 14.4")
            return cls()

        def get_compute_device_usage_for_mlprogram_operation(self, operation: int) -> Any:
            engine = MLCPUComputeDevice() if operation > 3 else MLNeuralEngineComputeDevice()
            return None if operation < 0 else SimpleNamespace(preferred_compute_device=engine)

    functions_named = list(functions or {"main": 8})
    module: Any = ModuleType("coremltools")
    module.compute_plan = ModuleType("coremltools.models.compute_plan")
    module.compute_plan.MLComputePlan = MLComputePlan
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
    monkeypatch.setenv("EDGE_SD_CACHE", str(tmp_path / "home"))
    package = tmp_path / "bundle/v/Unet.mlpackage"
    package.mkdir(parents=True)
    (package / "weights.bin").write_bytes(b"weights")
    artifact = Artifact("v/Unet.mlpackage", (), (), ())
    usual = {"sample": (2, 4, 8, 8), "timestep": (1,), "encoder_hidden_states": (2, 9, 6)}

    def load(device: str, sha256: str = "ab" * 32, fail: str = "", **more: Any) -> Any:
        compiled: list[str] = []
        shapes = more.pop("shapes", usual)
        module = stand_in(compiled, fail, **more)
        monkeypatch.setitem(sys.modules, "coremltools", module)
        monkeypatch.setitem(sys.modules, "coremltools.models", module.models)
        monkeypatch.setitem(sys.modules, "coremltools.models.compute_plan", module.compute_plan)
        variant = Variant("coreml", "fp16", {"unet": artifact}, {"v/Unet.mlpackage/weights.bin": FileRecord(7, sha256)})
        bundle = replace(ModelBundle.open(emoji), root=tmp_path / "bundle", variants={"v": variant})
        backend = CoreMLBackend()
        (chosen,) = [each for each in backend.devices() if each.name == device]
        return backend.load(LoadRequest(bundle, variant, "unet", chosen, shapes)), compiled

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


def test_on_a_mac_the_function_of_the_wished_size_runs(mac: Any) -> None:
    functions = {"size_64x64": 8, "size_128x128": 16}
    for side, function in ((8, "size_64x64"), (16, "size_128x128")):
        component, _ = mac("ane", functions=functions, shapes={"sample": (2, 4, side, side)})
        assert component.program.model.function == function
        sample, context = np.ones((2, 4, side, side), np.float32), np.ones((2, 9, 6), np.float32)
        found = component(sample=sample, timestep=np.array([2.0]), encoder_hidden_states=context)["out_sample"]
        assert found.shape == sample.shape
    with pytest.raises(InvalidRequest, match="draws 64x64, 128x128 only"):
        mac("ane", functions=functions, shapes={"sample": (2, 4, 8, 16)})


@pytest.mark.parametrize("fail", ["compile", "predict"])
def test_what_core_ml_refuses_is_one_error(mac: Any, tmp_path: Path, fail: str) -> None:
    def draw() -> None:
        component, _ = mac("ane", fail=fail)
        component(sample=np.ones((2, 4, 8, 8)), timestep=np.ones(1), encoder_hidden_states=np.ones((2, 9, 6)))

    with pytest.raises(DeviceError, match="no room" if fail == "compile" else "ANE said no"):
        draw()
    home = tmp_path / "home/compiled"
    assert [path.name for path in home.iterdir() if path.name.startswith(".")] == []


def test_core_mls_plan_tells_what_runs_on_which_engine(mac: Any) -> None:
    component, _ = mac("ane")
    assert component.program.placements() == {"Neural Engine": 4, "CPU": 2}
    assert Chain([component.program] * 2).placements() == {"Neural Engine": 8, "CPU": 4}
    functions = {"size_64x64": 8, "size_128x128": 16}
    component, _ = mac("ane", functions=functions, shapes={"sample": (2, 4, 16, 16)})
    assert component.program.placements() == {"Neural Engine": 4, "CPU": 2}
    component, _ = mac("ane", fail="plan")
    with pytest.raises(DeviceError, match=r"tells no plan of Unet-.*\(macOS 14\.4 or newer does\)"):
        component.program.placements()


def test_in_low_memory_a_component_is_let_go_when_it_is_closed(mac: Any) -> None:
    component, _ = mac("ane")
    component.bind(encoder_hidden_states=np.ones((2, 9, 6), np.float32))
    component.close()
    assert component.program is None
    assert component._bound == {}


def test_a_part_is_found_by_its_name_in_a_copied_variant(emoji: Path) -> None:
    from copy import deepcopy

    bundle = ModelBundle.open(emoji)
    variant = deepcopy(bundle.variant("coreml-ane-fp16"))
    backend, shapes = CoreMLBackend(), {"input_ids": (1, 32)}
    device = backend.devices()[0]
    component = backend.load(LoadRequest(bundle, variant, "text_encoder", device, shapes))
    assert component(input_ids=np.ones((1, 32), np.int64))["last_hidden_state"].shape == (1, 32, 192)
    with pytest.raises(DeviceError, match=r"the variant has no component 'unnet'; valid: .*unet"):
        backend.load(LoadRequest(bundle, variant, "unnet", device, shapes))
