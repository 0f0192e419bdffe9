"""OpenVINO: runs `openvino_model.xml` graphs in the layout of optimum-intel on CPU, GPU and NPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..bundle import Artifact, ModelBundle, Variant
from ..errors import DeviceError, InvalidModel, MissingExtra
from ..lora import add_lora
from .base import Array, Component, Device, Shapes


class OpenVINOBackend:
    """The devices that OpenVINO finds here: cpu, gpu (gpu.0, gpu.1, …), npu."""

    name = "openvino"

    def __init__(self) -> None:
        try:
            import openvino
        except ImportError as error:
            raise MissingExtra("running OpenVINO models", "openvino") from error
        self.core = openvino.Core()
        self.version = str(openvino.__version__)

    def devices(self) -> list[Device]:
        found = []
        for name in self.core.available_devices:
            description = str(self._told(name, "FULL_DEVICE_NAME") or name)
            features = frozenset(map(str, self._told(name, "OPTIMIZATION_CAPABILITIES") or ()))
            architecture = str(self._told(name, "DEVICE_ARCHITECTURE") or "")
            own = "DISCRETE" in str(self._told(name, "DEVICE_TYPE"))
            memory = int(self._told(name, "GPU_DEVICE_TOTAL_MEM_SIZE") or 0) if own else 0
            driver = str(self._told(name, "NPU_DRIVER_VERSION") or self.version)
            features |= {architecture} if architecture else set()
            found.append(Device(name.lower(), self.name, f"{description} (OpenVINO)", features, memory, driver))
        return found

    def _told(self, device: str, name: str) -> Any:
        """A property of a device; None where its plugin does not know it."""
        try:
            return self.core.get_property(device, name)
        except RuntimeError:
            return None

    def load(
        self, bundle: ModelBundle, variant: Variant, artifact: Artifact, device: Device, shapes: Shapes
    ) -> Component:
        import openvino as ov

        graph = bundle.path(artifact.graph)
        weights = [bundle.path(name) for name in artifact.weights]
        try:
            model = read_model(self.core, graph, weights, bundle.path(artifact.lora) if artifact.lora else None)
            _accept_fractional_timesteps(model)
            model.reshape(dict(shapes))
        except (RuntimeError, OSError) as error:
            raise InvalidModel(f"{graph} cannot be read by OpenVINO: {_first_line(error)}") from error
        config: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
        # Text steers every step and takes 1 % of the time: it is never rounded to bfloat16 as CPUs with AMX would.
        if variant.precision == "fp32" or "input_ids" in shapes:
            config["INFERENCE_PRECISION_HINT"] = ov.Type.f32
        try:
            compiled = self.core.compile_model(model, device.name.upper(), config)
        except RuntimeError as error:
            raise DeviceError(f"{device.name} refused {artifact.graph}: {_first_line(error)}") from error
        return OpenVINOComponent(artifact.graph, compiled, set(shapes))


class OpenVINOComponent:
    """A compiled model with one inference request; inputs other than the bound ones are given at each call."""

    def __init__(self, name: str, compiled: Any, inputs: set[str]) -> None:
        self.name = name
        self._inputs = inputs
        # A tensor may carry several names; any of them is good.
        self._dtypes = {name: port.element_type.to_dtype() for port in compiled.inputs for name in port.names}
        self._outputs = [(port.names, port) for port in compiled.outputs]
        self._request = compiled.create_infer_request()
        self._held: dict[str, Array] = {}

    def _set(self, name: str, value: Array) -> None:
        import openvino as ov

        # The request reads the array in place: hold it for as long as it may.
        self._held[name] = np.ascontiguousarray(value, self._dtypes[name])
        self._request.set_tensor(name, ov.Tensor(self._held[name], shared_memory=True))

    def bind(self, **constants: Array) -> None:
        for name, value in constants.items():
            self._set(name, value)

    def __call__(self, **inputs: Array) -> dict[str, Array]:
        for name, value in inputs.items():
            self._set(name, value)
        assert set(self._held) == self._inputs, f"{self.name} got {sorted(self._held)}, needs {sorted(self._inputs)}"
        try:
            self._request.infer()
        except RuntimeError as error:
            raise DeviceError(f"{self.name} failed: {_first_line(error)}") from error
        results: dict[str, Array] = {}
        for names, port in self._outputs:
            results |= dict.fromkeys(names, self._request.get_tensor(port).data.astype(np.float32))
        return results

    def close(self) -> None:
        self._held.clear()
        del self._request


def read_model(core: Any, graph: Path, weights: list[Path], lora: Path | None = None) -> Any:
    """A graph whose weights are `weights`, one file after the other (see Artifact), with a LoRA added."""
    import openvino as ov

    if len(weights) == 1 and lora is None:
        return core.read_model(graph, weights[0])
    parts = [np.fromfile(path, np.uint8) for path in weights]
    if lora is not None:
        files = zip(weights, parts, strict=True)
        add_lora([(path.name, part) for path, part in files if path.suffix == ".safetensors"], lora)
    return core.read_model(graph.read_bytes(), ov.Tensor(np.concatenate(parts)))


def _accept_fractional_timesteps(model: Any) -> None:
    """Let `timestep` be float32: files declare int64 for other programs, but Euler's timesteps lie between integers."""
    import openvino as ov

    for parameter in model.get_parameters():
        if "timestep" in parameter.output(0).get_names():
            parameter.set_element_type(ov.Type.f32)
    model.validate_nodes_and_infer_types()


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # OpenVINO puts source locations first and the reason last.
    return (lines[-1] if lines else type(error).__name__)[:300]
