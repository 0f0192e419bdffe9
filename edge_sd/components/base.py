"""What the pipeline calls: a component, one loaded network; and what some of them can do beside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

from numpy.typing import NDArray

from .edits import Edits

Array = NDArray[Any]
Shapes = Mapping[str, tuple[int, ...]]

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
