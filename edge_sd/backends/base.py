"""What a backend is: devices it can name, and components it can load. Nothing else of it is seen by the pipeline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from numpy.typing import NDArray

from ..bundle.bundle import Artifact, ModelBundle, Variant
from ..components.edits import NONE, Edits

Array = NDArray[Any]
Shapes = Mapping[str, tuple[int, ...]]


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


# The output of a UNet that may be given back to it, as an input, in place of computing it again (see Shortcuts).
DEEP = "deep_features"


class Component(Protocol):
    """One loaded network. Static shapes, layouts and precisions of its backend end inside it.

    A `sample` of one row is the last of those that are bound: the prompt's, where the negative one is left out.
    """

    def bind(self, **constants: Array) -> None:
        """Give inputs that stay the same over many calls, once."""

    def __call__(self, **inputs: Array) -> dict[str, Array]:
        """Run on the bound and the given inputs; float32 outputs by name. Raises DeviceError."""

    def close(self) -> None:
        """Give the memory back."""


@runtime_checkable
class Changeable(Protocol):
    """A component that may take other edits without being loaded again."""

    def change(self, edits: Edits) -> bool:
        """Go on with `edits`; False, and nothing changed, where that needs loading. Raises InvalidRequest."""


@runtime_checkable
class Resting(Protocol):
    """A component that between calls has memory that it can do without."""

    def rest(self) -> None:
        """Give that back; the next call takes it again."""


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


def batches(inputs: Mapping[str, Array], shapes: Shapes) -> Iterator[dict[str, Array]]:
    """A call's inputs, so many rows at a time as a graph of `shapes` takes; what has one row goes with all of them."""
    rows = max(len(value) for value in inputs.values())
    size = max(shape[0] for shape in shapes.values())
    for n in range(0, rows, size):
        yield {name: value if len(value) == 1 else value[n : n + size] for name, value in inputs.items()}


def last_rows(inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Inputs of a call, given and bound, with as many rows as its `sample` has."""
    rows = len(inputs["sample"]) if "sample" in inputs else 0
    return {name: value[-rows:] for name, value in inputs.items()}
