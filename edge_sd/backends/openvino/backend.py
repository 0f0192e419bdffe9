"""The devices that OpenVINO finds, and with which settings a component is loaded there."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...bundle import Artifact, ModelBundle, Variant
from ...edits import NONE, Edits, Shortcuts
from ...errors import MissingExtra
from ...machine import this_machine
from ..base import Component, Device, Shapes
from .loading import PRECISION, STREAMS, Loading

# Positions from which a batch of two is no faster than two of one: 512 x 512 pixels.
LARGE_LATENTS = 64 * 64


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
        machine = this_machine()
        self.flags, self.cores = machine.flags, machine.cores

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
        return self.loading(bundle, variant, artifact, device, shapes, edits).open()

    def loading(
        self,
        bundle: ModelBundle,
        variant: Variant,
        artifact: Artifact,
        device: Device,
        shapes: Shapes,
        edits: Edits = NONE,
    ) -> Loading:
        """How a component is loaded: for how many rows at once, and with which of OpenVINO's properties."""
        rows = _rows_at_once(shapes, edits.shortcuts)
        fixed = {name: (min(shape[0], rows), *shape[1:]) for name, shape in shapes.items()}
        config = self._config(bundle, artifact.precision or variant.precision, shapes)
        if device.kind == "cpu" and rows < _rows(shapes) and not (edits.shortcuts.apart or edits.shortcuts.pieces):
            config |= self._side_by_side(_rows(shapes))
        return Loading(self.core, self.version, self.flags, bundle, variant, artifact, device, fixed, config, edits)

    def _config(self, bundle: ModelBundle, precision: str, shapes: Shapes) -> dict[str, Any]:
        import openvino as ov

        config: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
        # Text steers every step and takes 1 % of the time: it is never rounded to bfloat16 as CPUs with AMX would.
        overflows = bundle.facts.vae_float32 and set(shapes) in ({"latent_sample"}, {"sample"})
        if precision == "fp32" or "input_ids" in shapes or overflows:
            config[PRECISION] = ov.Type.f32
        return config

    def _side_by_side(self, rows: int) -> dict[str, Any]:
        """Each row on its share of the cores: they wait for each other once a call and not at every layer."""
        import openvino.properties.hint as hints

        if self.cores % rows:
            return {}
        # A row on slow cores would be waited for.
        return {STREAMS: rows, "SCHEDULING_CORE_TYPE": hints.SchedulingCoreType.PCORE_ONLY}


def _rows_at_once(shapes: Shapes, shortcuts: Shortcuts) -> int:
    """The batch that a graph is compiled for: large latents are no slower row by row, side by side or in turn."""
    sample = shapes.get("sample")
    if sample is None:
        return _rows(shapes)
    return 1 if shortcuts.apart or shortcuts.pieces or sample[2] * sample[3] >= LARGE_LATENTS else sample[0]


def _rows(shapes: Shapes) -> int:
    return max(shape[0] for shape in shapes.values())
