"""What a backend is: devices it can name, and components it can load. Nothing else of it is seen by the pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ..bundle.bundle import ModelBundle
from ..bundle.variants import Artifact, Variant
from ..components.base import Component, Shapes
from ..components.edits import NONE, Edits


@dataclass(frozen=True)
class Device:
    """A place where components can run: `name` is what --device takes, `backend` who runs it there.

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


class Backend(Protocol):
    """A way to run artifacts: OpenVINO, Core ML, …"""

    @property
    def name(self) -> str: ...

    def devices(self) -> list[Device]:
        """What is on this machine, best known first."""

    def load(
        self,
        bundle: ModelBundle,
        variant: Variant,
        artifact: Artifact,
        device: Device,
        shapes: Shapes,
        edits: Edits = NONE,
    ) -> Component:
        """Load a component for inputs of exactly `shapes`, changed by `edits`.

        Raises InvalidModel or DeviceError, and InvalidRequest for sizes or edits that this artifact has no place for.
        """
