"""The devices that OpenVINO finds. `loading` loads components there."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...components.base import Component
from ...errors import MissingExtra
from ...machine import this_machine
from ..base import Device, LoadRequest
from .loading import Loading
from .telemetry import refuse_telemetry


class OpenVINOBackend:
    """The devices that OpenVINO finds here: cpu, gpu (gpu.0, gpu.1, …), npu."""

    name = "openvino"

    def __init__(self) -> None:
        try:
            refuse_telemetry()
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

    def load(self, request: LoadRequest) -> Component:
        return Loading(self.core, self.version, self.flags, self.cores, request).open()
