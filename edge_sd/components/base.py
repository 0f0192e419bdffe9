"""The Component protocol: one loaded network as the pipeline calls it, and optional abilities of some."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

from numpy.typing import NDArray

from .edits import Edits

Array = NDArray[Any]
Shapes = Mapping[str, tuple[int, ...]]

# Output of a UNet that may be passed back as an input instead of being computed again (see Shortcuts).
DEEP = "deep_features"
# What a denoiser's noisy input is called.
SAMPLES = ("sample", "hidden_states")


class Component(Protocol):
    """One loaded network. Static shapes, layouts and precisions of its backend end inside it.

    With a `sample` of one row the last row of each bound input is used: the prompt's, in steps without guidance.
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
    """A component that can give back memory between calls."""

    def rest(self) -> None:
        """Give the memory back; the next call allocates it again."""


def batches(inputs: Mapping[str, Array], shapes: Shapes) -> Iterator[dict[str, Array]]:
    """Inputs of a call in the batches that a graph of `shapes` takes. An input of one row goes with every batch."""
    rows = max(len(value) for value in inputs.values())
    size = max(shape[0] for shape in shapes.values())
    for n in range(0, rows, size):
        yield {name: value if len(value) == 1 else value[n : n + size] for name, value in inputs.items()}


def last_rows(inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Inputs of a call, given and bound, with as many rows as its `sample` has; a transformer's is `hidden_states`."""
    rows = next((len(inputs[name]) for name in SAMPLES if name in inputs), 0)
    return {name: value[-rows:] for name, value in inputs.items()}
