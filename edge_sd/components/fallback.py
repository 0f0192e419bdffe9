"""Guarded: a component that goes on elsewhere when its device fails, in the middle of a picture too.

A call that fails is made again, with the same inputs, at the component's next place. The sampler does not notice, and
goes on from the same step with the same latents.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..errors import DeviceError, NumericalError
from .base import Array, Changeable, Component, Resting
from .edits import Edits

# A decoder's picture lies in [-1, 1]; less than this between its darkest and brightest value is one colour.
FLAT = 1e-3


ADVICE = "; try a variant in fp32"
# Errors after which another place is tried.
FAILURES = (DeviceError, NumericalError, MemoryError)


def fault(outputs: dict[str, Array]) -> str:
    """What is wrong with a component's outputs, or ""."""
    for name, value in outputs.items():
        if not np.isfinite(value).all():
            return "returned NaN or infinity"
        # A ControlNet's residuals may all be equal.
        if value.size > 1 and float(np.ptp(value)) < FLAT and not name.startswith("additional_residual"):
            return "returned one flat value"
    return ""


def reason(error: BaseException) -> str:
    """The error in words, without advice about other devices. Python's MemoryError has no words of its own."""
    return str(error).removesuffix(ADVICE) or "out of memory"


class Guarded:
    """`component`, called `name` in messages, and then whatever `reload` returns, as often as there is another place.

    move     (why, numerical) -> whether there is another place; plans it
    reload   loads at the planned place; may raise DeviceError
    """

    def __init__(
        self, name: str, component: Component, move: Callable[[str, bool], bool], reload: Callable[[], Component]
    ) -> None:
        self.name = name
        self._component: Component | None = component
        self._move, self._reload = move, reload
        self._bound: dict[str, Array] = {}

    def bind(self, **constants: Array) -> None:
        self._bound |= constants
        if self._component is not None:
            self._component.bind(**constants)

    def change(self, edits: Edits) -> bool:
        return isinstance(self._component, Changeable) and self._component.change(edits)

    def rest(self) -> None:
        if isinstance(self._component, Resting):
            self._component.rest()

    def __call__(self, **inputs: Array) -> dict[str, Array]:
        """Run, here or elsewhere. Raises DeviceError or NumericalError where there is nowhere left to go."""
        while True:
            try:
                return self._run(inputs)
            except FAILURES as error:
                if not self._move(reason(error), isinstance(error, NumericalError)):
                    if isinstance(error, MemoryError):
                        raise DeviceError(f"{self.name}: out of memory") from error
                    raise
            # The memory is given back first: the next place may need it.
            self.close()
            self._component = self._reload()
            self._component.bind(**self._bound)

    def reject(self, why: str) -> bool:
        """Go on at the next place, since what was made of the outputs is wrong; False where there is none.

        A picture in tiles is whole only outside of this class, which sees one tile, and that may be all black.
        """
        if not self._move(why, True):
            return False
        self.close()
        self._component = self._reload()
        self._component.bind(**self._bound)
        return True

    def _run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        assert self._component is not None, f"{self.name} was closed"
        outputs = self._component(**inputs)
        if why := fault(outputs):
            raise NumericalError(f"the {self.name} {why}{ADVICE}")
        return outputs

    def close(self) -> None:
        if self._component is not None:
            self._component.close()
        self._component = None
