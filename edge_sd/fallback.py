"""Guarded: a component that goes on elsewhere when its device fails, in the middle of a picture too.

A call that fails is made again, with the same inputs, at the component's next place. The sampler above never hears of
it, so it goes on from the same step with the same latents.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .backends.base import Array, Component
from .errors import DeviceError, NumericalError

# A decoder's picture lies in [-1, 1]; less than this between its darkest and brightest value is one colour.
FLAT = 1e-3


def fault(outputs: dict[str, Array]) -> str:
    """What is wrong with a component's outputs, or ""."""
    for value in outputs.values():
        if not np.isfinite(value).all():
            return "it returned NaN or infinity"
        if value.size > 1 and float(np.ptp(value)) < FLAT:
            return "it returned nothing but one value"
    return ""


class Guarded:
    """`component`, and then whatever `reload` returns, as often as `move` finds another place.

    move     (why, numerical) -> whether there is another place; plans it
    reload   loads at the planned place; may raise DeviceError
    """

    def __init__(
        self, component: Component, move: Callable[[str, bool], bool], reload: Callable[[], Component]
    ) -> None:
        self._component: Component | None = component
        self._move, self._reload = move, reload
        self._bound: dict[str, Array] = {}

    def bind(self, **constants: Array) -> None:
        self._bound |= constants
        if self._component is not None:
            self._component.bind(**constants)

    def __call__(self, **inputs: Array) -> dict[str, Array]:
        """Run; a result that is no numbers and has nowhere to go is returned as it is, for the caller to judge."""
        while True:
            assert self._component is not None, "the component was closed"
            outputs, error = None, None
            try:
                outputs = self._component(**inputs)
                why = fault(outputs)
            except (DeviceError, NumericalError, MemoryError) as raised:
                error, why = raised, str(raised) or "out of memory"
            if outputs is not None and not why:
                return outputs
            if not self._move(why, not isinstance(error, (DeviceError, MemoryError))):
                if outputs is None:
                    assert error is not None
                    raise error if not isinstance(error, MemoryError) else DeviceError("out of memory") from error
                return outputs
            self._go_on()

    def _go_on(self) -> None:
        # The memory is given back first: the next place may need it.
        self.close()
        self._component = self._reload()
        self._component.bind(**self._bound)

    def close(self) -> None:
        if self._component is not None:
            self._component.close()
        self._component = None
