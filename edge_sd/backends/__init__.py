"""The backends by name. Each is imported when it is asked for, so that none costs those who do not use it."""

from __future__ import annotations

from ..errors import DeviceError, choices
from .base import Backend, Component, Device

NAMES = ("openvino", "coreml")

__all__ = ["Backend", "Component", "Device", "NAMES", "backend"]


def backend(name: str) -> Backend:
    """The backend of that name. Raises MissingExtra where its library is not installed, DeviceError if unknown."""
    if name == "openvino":
        from .openvino import OpenVINOBackend

        return OpenVINOBackend()
    if name == "coreml":
        from .coreml import CoreMLBackend

        return CoreMLBackend()
    raise DeviceError(f"no backend {name!r}; valid: {choices(NAMES)}")
