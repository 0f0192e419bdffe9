"""The backends by name. Each is imported at its first use, so that an unused one costs nothing."""

from __future__ import annotations

from ..components.base import Component
from ..errors import DeviceError, MissingExtra, choices
from .base import Backend, Device, LoadRequest

NAMES = ("openvino", "coreml", "coreai", "torch")

__all__ = ["AllBackends", "Backend", "Component", "Device", "LoadRequest", "NAMES", "backend"]


def backend(name: str) -> Backend:
    """The backend of that name. Raises MissingExtra where its library is not installed, DeviceError if unknown."""
    if name == "openvino":
        from .openvino import OpenVINOBackend

        return OpenVINOBackend()
    if name == "coreml":
        from .coreml import CoreMLBackend

        return CoreMLBackend()
    if name == "coreai":
        from .coreai import CoreAIBackend

        return CoreAIBackend()
    if name == "torch":
        from .torch import TorchBackend

        return TorchBackend()
    raise DeviceError(f"no backend {name!r}; valid: {choices(NAMES)}")


class AllBackends:
    """All installed backends as one: each component is loaded by the backend of its device.

    `absent` holds a line for each backend that is not installed.
    """

    name = "all"

    def __init__(self) -> None:
        self.absent: list[str] = []
        self._opened: dict[str, Backend] = {}
        for name in NAMES:
            try:
                self._opened[name] = backend(name)
            except MissingExtra as error:
                self.absent.append(str(error))

    def devices(self) -> list[Device]:
        return [device for each in self._opened.values() for device in each.devices()]

    def load(self, request: LoadRequest) -> Component:
        """As Backend.load, by the backend that the request's device belongs to."""
        return self._opened[request.device.backend].load(request)
