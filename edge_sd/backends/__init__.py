"""The backends by name. Each is imported at its first use, so that an unused one costs nothing."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import entry_points

from ..components.base import Component
from ..components.transformer import form_of
from ..errors import DeviceError, MissingExtra, choices
from .base import Backend, Device, LoadRequest

NAMES = ("openvino", "coreml", "coreai", "torch")

__all__ = ["AllBackends", "Backend", "Component", "Device", "LoadRequest", "NAMES", "backend", "names"]

# Where an installed package offers backends of its own: name -> a class, or a function, that makes one.
GROUP = "edge_sd.backends"


def names() -> tuple[str, ...]:
    """Names of our backends and of those that installed packages offer. One of our names is ours."""
    return tuple(dict.fromkeys([*NAMES, *sorted(entry_points(group=GROUP).names)]))


def backend(name: str) -> Backend:
    """The backend of that name. Raises MissingExtra where its library is not installed.

    DeviceError where it is unknown, or where a package offers it that can't be used.
    """
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
    offered = entry_points(group=GROUP, name=name)
    for point in offered:
        try:
            made: Backend = point.load()()
        except Exception as error:  # A package of anyone's is imported, which may raise anything.
            told = f"{type(error).__name__}: {error}"
            raise DeviceError(f"the backend {name!r} of {point.value} cannot be used: {told}") from error
        if made.name != name:
            raise DeviceError(f"the backend {name!r} of {point.value} cannot be used: its name is {made.name!r}")
        return made
    raise DeviceError(f"no backend {name!r}; valid: {choices(names())}")


class AllBackends:
    """All installed backends as one: each component is loaded by the backend of its device.

    `absent` holds a line for each backend that is not installed or can't be used.
    """

    name = "all"

    def __init__(self) -> None:
        self.absent: list[str] = []
        self._opened: dict[str, Backend] = {}
        for name in names():
            try:
                self._opened[name] = backend(name)
            except (MissingExtra, DeviceError) as error:
                self.absent.append(str(error))

    def devices(self) -> list[Device]:
        return [device for each in self._opened.values() for device in each.devices()]

    def load(self, request: LoadRequest) -> Component:
        """As Backend.load, by the backend that the request's device belongs to; transformers take `sample` here."""
        backend = self._opened[request.device.backend]
        form = form_of(request.bundle.facts, request.part)
        if form is None:
            return backend.load(request)
        return form(backend.load(replace(request, shapes=form.shapes(request.shapes))), request.bundle.facts)
