"""OpenVINO: runs `openvino_model.xml` graphs in the layout of optimum-intel on CPU, GPU and NPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle import Artifact, ModelBundle, Variant
from ..edits import NONE, Edits, Shortcuts
from ..errors import DeviceError, InvalidModel, InvalidRequest, MissingExtra
from ..machine import this_machine
from .base import DEEP, Array, Component, Device, Shapes, batches, last_rows

# Positions from which a batch of two is no faster than one after the other: 512 x 512 pixels.
LARGE_LATENTS = 64 * 64
# Values of one input whose consequences are kept: two prompts, or the timesteps of a run.
KEPT = 64


class OpenVINOBackend:
    """The devices that OpenVINO finds here: cpu, gpu (gpu.0, gpu.1, …), npu."""

    name = "openvino"

    def __init__(self) -> None:
        try:
            import openvino
        except ImportError as error:
            raise MissingExtra("running OpenVINO models", "openvino") from error
        # The bindings make their tables of types at first use, and let go of Python's lock on the way: two threads that
        # are the first at once would wait for each other for ever.
        constant = openvino.op.Constant(np.zeros(1, np.float32))
        constant.get_data()
        constant.get_element_type().to_dtype()
        self.core = openvino.Core()
        self.version = str(openvino.__version__)
        self.flags = this_machine().flags

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
        self,
        bundle: ModelBundle,
        variant: Variant,
        artifact: Artifact,
        device: Device,
        shapes: Shapes,
        edits: Edits = NONE,
    ) -> Component:
        from .openvino_loading import Loading

        rows = _rows_at_once(shapes, edits.shortcuts)
        fixed = {name: (min(shape[0], rows), *shape[1:]) for name, shape in shapes.items()}
        config = self._config(bundle, artifact.precision or variant.precision, shapes)
        return Loading(
            self.core, self.version, self.flags, bundle, variant, artifact, device, fixed, config, edits
        ).open()

    def _config(self, bundle: ModelBundle, precision: str, shapes: Shapes) -> dict[str, Any]:
        import openvino as ov

        config: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
        # Text steers every step and takes 1 % of the time: it is never rounded to bfloat16 as CPUs with AMX would.
        overflows = bundle.facts.vae_float32 and set(shapes) in ({"latent_sample"}, {"sample"})
        if precision == "fp32" or "input_ids" in shapes or overflows:
            config["INFERENCE_PRECISION_HINT"] = ov.Type.f32
        return config


def _rows_at_once(shapes: Shapes, shortcuts: Shortcuts) -> int:
    """The batch that a graph is compiled for: large latents are as fast one after the other, in half the memory."""
    sample = shapes.get("sample")
    if sample is None:
        return max(shape[0] for shape in shapes.values())
    return 1 if shortcuts.apart or shortcuts.pieces or sample[2] * sample[3] >= LARGE_LATENTS else sample[0]


class Graph:
    """A compiled model with one inference request."""

    def __init__(self, compiled: Any) -> None:
        # A tensor may carry several names; any of them is good.
        self.dtypes = {name: port.element_type.to_dtype() for port in compiled.inputs for name in port.names}
        self._outputs = [(port.names, port) for port in compiled.outputs]
        self._request = compiled.create_infer_request()
        self._held: dict[str, Array] = {}

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Inputs that the graph does not have are passed over; outputs are valid until the next call."""
        import openvino as ov

        for name, value in inputs.items():
            # What is held is read in place by the request, and need not be set again.
            if name in self.dtypes and self._held.get(name) is not value:
                array = np.ascontiguousarray(value, self.dtypes[name])
                self._request.set_tensor(name, ov.Tensor(array, shared_memory=True))
                self._held[name] = array
        self._request.infer()
        results: dict[str, Array] = {}
        for names, port in self._outputs:
            results |= dict.fromkeys(names, self._request.get_tensor(port).data)
        return results


class OpenVINOComponent:
    """One or two graphs of a network, the second for calls that give `DEEP` back, and what is computed before them.

    A graph may be compiled for fewer rows than a call has; they are then taken one after the other.
    """

    def __init__(self, name: str, graphs: list[Graph], before: dict[str, Graph], shapes: Shapes) -> None:
        self.name, self.graphs, self.before, self.shapes = name, graphs, before, shapes
        self.held: Mapping[str, Array] = {}
        self._bound: dict[str, Array] = {}
        # Input name -> its value, row by row -> what is computed of that.
        self._known: dict[str, dict[bytes, dict[str, Array]]] = {name: {} for name in before}

    def bind(self, **constants: Array) -> None:
        self._bound |= constants

    def __call__(self, **inputs: Array) -> dict[str, Array]:
        given = last_rows({**self._bound, **inputs})
        missing = set(self.shapes) - set(given)
        assert not missing, f"{self.name} got {sorted(given)}, needs {sorted(missing)}"
        graph = self.graphs[-1 if DEEP in inputs else 0]
        results: list[dict[str, Array]] = []
        try:
            for some in batches(given, self.shapes):
                for name in self.before:
                    some |= self._computed(name, some.pop(name))
                results.append({name: value.astype(np.float32) for name, value in graph(some).items()})
        except RuntimeError as error:
            raise DeviceError(f"{self.name} failed: {_first_line(error)}") from error
        if len(results) == 1:
            return results[0]
        return {name: np.concatenate([each[name] for each in results]) for name in results[0]}

    def _computed(self, name: str, value: Array) -> dict[str, Array]:
        """What depends on this input alone, kept: a picture's steps ask for the same few values again and again."""
        known, key = self._known[name], value.tobytes()
        if key not in known:
            if len(known) >= KEPT:
                known.pop(next(iter(known)))
            known[key] = {each: array.copy() for each, array in self.before[name]({name: value}).items()}
        return known[key]

    def close(self) -> None:
        self._bound.clear()
        self._known.clear()
        self.graphs.clear()
        self.before.clear()
        self.held = {}


def read_model(core: Any, graph: Path, weights: list[Path]) -> Any:
    """A graph whose weights are `weights`, one file after the other (see Artifact)."""
    import openvino as ov

    if len(weights) == 1:
        return core.read_model(graph, weights[0])
    parts = [np.fromfile(path, np.uint8) for path in weights]
    return core.read_model(graph.read_bytes(), ov.Tensor(np.concatenate(parts)))


def _accept_fractional_timesteps(model: Any) -> None:
    """Let `timestep` be float32: files declare int64 for other programs, but Euler's timesteps lie between integers."""
    import openvino as ov

    for parameter in model.get_parameters():
        if "timestep" in parameter.output(0).get_names():
            parameter.set_element_type(ov.Type.f32)
    model.validate_nodes_and_infer_types()


def _reshape(model: Any, shapes: Shapes, graph: str, factor: int) -> None:
    """Give `model` its sizes, or raise InvalidRequest that says which it takes."""
    try:
        model.reshape(dict(shapes))
    except RuntimeError as error:
        name = next((each for each in ("sample", "latent_sample") if each in shapes), "")
        if not name:
            raise InvalidModel(f"{graph} does not take the inputs of this model: {_first_line(error)}") from error
        scale = 1 if shapes[name][1] == 3 else factor
        (port,) = [each for each in model.inputs if name in each.names]
        fixed = port.partial_shape
        asked = f"{shapes[name][3] * scale}x{shapes[name][2] * scale}"
        if fixed[2].is_static and fixed[3].is_static:
            sizes = f"only {fixed[3].get_length() * scale}x{fixed[2].get_length() * scale}"
        else:
            # Skip connections are as large as what they meet where halving leaves no remainder.
            sizes = f"sizes in multiples of {8 * factor}, and of less where its UNet is shallow"
        raise InvalidRequest(f"{graph} does not take {asked} pixels; it takes {sizes}") from error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # OpenVINO puts source locations first and the reason last.
    return (lines[-1] if lines else type(error).__name__)[:300]
