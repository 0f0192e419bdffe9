"""The protocol of a backend: it names devices and loads components. The pipeline sees nothing else of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ..bundle.bundle import ModelBundle
from ..bundle.variants import Artifact, Variant
from ..components.base import Component, Shapes
from ..components.edits import NONE, Edits
from ..errors import DeviceError, choices


@dataclass(frozen=True)
class Device:
    """A place where components can run. `name` is what --device takes, `backend` the library that runs it.

    features   what its driver says it can do ("FP16", "BF16", "INT8", "GPU_HW_MATMUL", …)
    memory     bytes of its own; 0 where it shares the machine's
    driver     version of its driver or library, "" where it does not say
    """

    name: str
    backend: str
    description: str
    features: frozenset[str] = frozenset()
    memory: int = 0
    driver: str = ""

    @property
    def kind(self) -> str:
        """ "cpu", "gpu" (whichever of several), "npu", "ane", …"""
        return self.name.split(".")[0]


@dataclass(frozen=True)
class LoadRequest:
    """One component that a backend is asked to load.

    variant  the variant of `bundle` whose files are loaded
    part     name of the component in that variant: "unet", "text_encoder", …
    shapes   exact shape of each input of a call, by name
    edits    changes of the weights or the graph, made while loading
    """

    bundle: ModelBundle
    variant: Variant
    part: str
    device: Device
    shapes: Shapes
    edits: Edits = NONE

    @property
    def artifact(self) -> Artifact:
        """Files of the component. Raises DeviceError where the variant has no such component."""
        try:
            return self.variant.artifacts[self.part]
        except KeyError:
            valid = choices(self.variant.artifacts)
            raise DeviceError(f"the variant has no component {self.part!r}; valid: {valid}") from None


class Backend(Protocol):
    """A way to run artifacts: OpenVINO, Core ML, …"""

    @property
    def name(self) -> str: ...

    def devices(self) -> list[Device]:
        """The devices of this machine, the best supported first."""

    def load(self, request: LoadRequest) -> Component:
        """Load a component. Raises InvalidModel or DeviceError, and InvalidRequest for sizes or edits it can't take."""
