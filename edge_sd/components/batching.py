"""Several pictures through one network: a thread draws each, and their UNet calls are run as one batch.

One thread works at a time; at the UNet it waits for the others, the last one runs it for all rows, and each goes on
with its own. Samplers, guidance and noise know nothing of it, so a picture is what it would have been alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from threading import Condition

import numpy as np

from .base import Array, Component, Shapes, last_rows


@dataclass
class Gathering:
    """`component` takes the rows of `count` callers at once; its inputs have `shapes`. `callers` of them take part."""

    component: Component
    shapes: Shapes
    count: int
    callers: int
    # Held by the one thread that works.
    working: Condition = field(default_factory=Condition)

    def __post_init__(self) -> None:
        self._here = set(range(self.callers))
        self._asked: dict[int, dict[str, Array]] = {}
        self._results: dict[int, dict[str, Array] | BaseException] = {}

    def seats(self) -> list[Seat]:
        """One for each caller."""
        return [Seat(self, n) for n in range(self.callers)]

    def ask(self, n: int, inputs: dict[str, Array]) -> dict[str, Array]:
        """The network's outputs for the rows of one caller. Raises what the network raises."""
        self._asked[n] = inputs
        self._run()
        while n not in self._results:
            self.working.wait()
        result = self._results.pop(n)
        if isinstance(result, BaseException):
            raise result
        return result

    def leave(self, n: int) -> None:
        """Leave the gathering: the others no longer wait for this caller."""
        self._here.discard(n)
        self._run()

    def _run(self) -> None:
        if not self._asked or set(self._asked) != self._here:
            return
        asked, self._asked = self._asked, {}
        # Pad with a copy of the first waiting input: the batch size is fixed.
        order = [*asked, *[min(asked)] * (self.count - len(asked))]
        try:
            outputs = self.component(**self._joined([asked[n] for n in order]))
        except BaseException as error:  # All who wait get it, or they would wait without end.
            self._results |= dict.fromkeys(asked, error)
        else:
            for place, n in enumerate(asked):
                self._results[n] = {name: np.split(value, self.count)[place] for name, value in outputs.items()}
        self.working.notify_all()

    def _joined(self, inputs: list[dict[str, Array]]) -> dict[str, Array]:
        """Concatenate the rows of all callers. An input of one row, such as the timestep, is the first caller's."""
        return {
            name: np.concatenate([each[name] for each in inputs]) if self.shapes.get(name, (0,))[0] != 1 else value
            for name, value in inputs[0].items()
        }


@dataclass
class Seat:
    """The UNet as one of several callers sees it."""

    gathering: Gathering
    n: int
    _bound: dict[str, Array] = field(default_factory=dict)

    def bind(self, **constants: Array) -> None:
        self._bound |= constants

    def __call__(self, **inputs: Array) -> dict[str, Array]:
        return self.gathering.ask(self.n, last_rows({**self._bound, **inputs}))

    def close(self) -> None:
        self._bound.clear()
