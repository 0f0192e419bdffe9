"""A compiled network as a Component. Its graphs take one row at a time, or several."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np

from ...components.base import DEEP, Array, Shapes, batches, last_rows
from ...components.edits import NONE, Edits
from ...errors import DeviceError
from .adapters import Adapters
from .mapping import OFTEN, SELDOM, Places, forgetting
from .reading import first_line
from .unbroken import unbroken

# Results kept for each input: enough for two prompts, or the timesteps of a run.
KEPT = 64


class Graph:
    """A compiled model, and as many inference requests as it is to run side by side."""

    def __init__(self, compiled: Any, lanes: int = 1, weights: Mapping[str, Any] | None = None) -> None:
        """`weights`: constants that are inputs of it, by name (see streaming)."""
        self._compiled = compiled
        # A tensor may carry several names; any of them is good.
        self.dtypes = {name: port.element_type.to_dtype() for port in compiled.inputs for name in port.names}
        self._outputs = [(port.names, port) for port in compiled.outputs]
        # A request, and the inputs that it holds.
        self.lanes: list[tuple[Any, dict[str, Array]]] = [(compiled.create_infer_request(), {}) for _ in range(lanes)]
        for name, constant in (weights or {}).items():
            if name in self.dtypes:
                for request, _ in self.lanes:
                    request.set_tensor(name, constant.get_tensor_view())

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Inputs that the graph lacks are ignored. Outputs are valid until the next call."""
        return next(self.each([inputs]))

    def each(self, calls: Iterable[Mapping[str, Array]]) -> Iterator[dict[str, Array]]:
        """The outputs of several calls, in order; those of one are valid until the next is asked for."""
        waiting = iter(calls)
        while some := list(islice(waiting, len(self.lanes))):
            started = []
            try:
                for (request, held), inputs in zip(self.lanes, some, strict=False):
                    self._set(request, held, inputs)
                    request.start_async()
                    started.append(request)
                while started:
                    request = started.pop(0)
                    request.wait()
                    results: dict[str, Array] = {}
                    for names, port in self._outputs:
                        results |= dict.fromkeys(names, request.get_tensor(port).data)
                    yield results
            finally:
                # Where one has failed, or its caller asks for no more, the others still read their inputs.
                for request in started:
                    with suppress(RuntimeError):
                        request.wait()

    def rest(self) -> None:
        self._compiled.release_memory()

    def profile(self) -> list[Any]:
        """How long each operation of the last call took, where that is counted."""
        return list(self.lanes[0][0].get_profiling_info())

    def _set(self, request: Any, held: dict[str, Array], inputs: Mapping[str, Array]) -> None:
        import openvino as ov

        for name, value in inputs.items():
            # The request reads these arrays in place, so they need not be set again.
            if name in self.dtypes and held.get(name) is not value:
                array = np.ascontiguousarray(value, self.dtypes[name])
                request.set_tensor(name, ov.Tensor(array, shared_memory=True))
                held[name] = array


class OpenVINOComponent:
    """One or two graphs of a network (the second takes `DEEP` as an input), and the graphs computed before them.

    A graph may be compiled for fewer rows than a call has. They run in turn, as many at once as there are lanes.
    """

    def __init__(
        self,
        name: str,
        graphs: list[Graph],
        before: dict[str, Graph],
        shapes: Shapes,
        edits: Edits = NONE,
        adapters: Adapters | None = None,
    ) -> None:
        """`adapters`: the graphs' inputs for the LoRAs of `edits`, where those are no part of their weights."""
        self.name, self.graphs, self.before, self.shapes = name, graphs, before, shapes
        self.edits, self.adapters = edits, adapters
        self.thread = ThreadPoolExecutor(1, "edge-sd-openvino")
        self._given = adapters.values(edits) or {} if adapters else {}
        # Mapped weights, and the pages of them that are given back during a call.
        self.held: Mapping[str, Any] = {}
        self.places: Places = ()
        self._bound: dict[str, Array] = {}
        # Input name -> value of a row -> the results computed from it.
        self._known: dict[str, dict[bytes, dict[str, Array]]] = {name: {} for name in before}

    def bind(self, **constants: Array) -> None:
        self._bound |= constants

    @unbroken
    def change(self, edits: Edits) -> bool:
        """Take other LoRAs where these graphs can; False where they have to be loaded again."""
        if self.adapters is None or replace(edits, loras=self.edits.loras) != self.edits:
            return False
        given = self.adapters.values(edits)
        if given is None:
            return False
        self.edits, self._given = edits, given
        for known in self._known.values():
            known.clear()
        return True

    @unbroken
    def rest(self) -> None:
        for graph in (*self.graphs, *self.before.values()):
            graph.rest()

    @unbroken
    def __call__(self, **inputs: Array) -> dict[str, Array]:
        given = last_rows({**self._bound, **inputs})
        missing = set(self.shapes) - set(given)
        assert not missing, f"{self.name} got {sorted(given)}, needs {sorted(missing)}"
        graph = self.graphs[-1 if DEEP in inputs else 0]
        calls: list[dict[str, Array]] = []
        try:
            for some in batches(given, self.shapes):
                for name in self.before:
                    some |= self._computed(name, some.pop(name))
                calls.append(some | self._given)
            with forgetting(self.places, OFTEN if self.edits.shortcuts.lean else SELDOM):
                # Copies, since the next call overwrites these arrays.
                results = [{name: value.astype(np.float32) for name, value in row.items()} for row in graph.each(calls)]
        except RuntimeError as error:
            raise DeviceError(f"{self.name} failed: {first_line(error)}") from error
        if len(results) == 1:
            return results[0]
        return {name: np.concatenate([each[name] for each in results]) for name in results[0]}

    def _computed(self, name: str, value: Array) -> dict[str, Array]:
        """Results that depend on this input alone, cached: the steps of a picture use the same few values."""
        known, key = self._known[name], value.tobytes()
        if key not in known:
            if len(known) >= KEPT:
                known.pop(next(iter(known)))
            known[key] = {each: array.copy() for each, array in self.before[name]({name: value, **self._given}).items()}
        return known[key]

    @unbroken
    def close(self) -> None:
        self._bound.clear()
        self._given.clear()
        self._known.clear()
        self.graphs.clear()
        self.before.clear()
        self.held = {}
        self.places = ()
