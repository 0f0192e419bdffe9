"""Turns: components of which one is in memory at a time, for machines that can't hold them all.

Whichever is called is loaded, and the one before it is closed. A picture asks for the text encoder, then for the UNet
at every step, then for the decoder, so each is loaded once; with a ControlNet two of them change places at every step.
"""

from __future__ import annotations

from collections.abc import Callable

from .base import Array, Component
from .fallback import Guarded


class Turns:
    """The component that is in memory now."""

    def __init__(self) -> None:
        self._current: Turn | None = None

    def take(self, turn: Turn | None) -> None:
        if self._current is not turn and self._current is not None:
            self._current.leave()
        self._current = turn


class Turn:
    """A component that is loaded when it is called. Bound inputs are bound again after each load."""

    def __init__(self, turns: Turns, load: Callable[[], Component]) -> None:
        self._turns, self._load = turns, load
        self._component: Component | None = None
        self._bound: dict[str, Array] = {}

    def bind(self, **constants: Array) -> None:
        self._bound |= constants
        if self._component is not None:
            self._component.bind(**constants)

    def __call__(self, **inputs: Array) -> dict[str, Array]:
        self._turns.take(self)
        if self._component is None:
            self._component = self._load()
            self._component.bind(**self._bound)
        # The outputs of some backends lie in their own memory, which goes with them.
        return {name: value.copy() for name, value in self._component(**inputs).items()}

    def reject(self, why: str) -> bool:
        """See Guarded.reject."""
        return isinstance(self._component, Guarded) and self._component.reject(why)

    def leave(self) -> None:
        """Give the memory back, and keep what is bound."""
        if self._component is not None:
            self._component.close()
        self._component = None

    def close(self) -> None:
        self._bound.clear()
        self.leave()
