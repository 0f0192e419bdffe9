"""A queue before one pipeline, for programs in which several ask for pictures at a time.

Requests are drawn in the order in which they came. Those that wait and differ in nothing but words and seeds go through
the UNet together, where that was measured to be faster: small networks leave half of a processor's units idle, large
ones do not.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..components.base import Component, Shapes
from ..components.batching import Gathering, Seat
from ..components.fallback import FAILURES
from ..errors import EdgeSDError
from ..sampling.samplers import Step
from .pipeline import Pipeline
from .request import Request
from .result import Result
from .run import Run
from .settings import Settings

OnStep = Callable[[int, Step], None]
# Largest batch, and the batch sizes tried; each needs a UNet compiled for it.
MOST, NUMBERS = 4, (4, 2)
# Timed runs of each batch size that decide which is faster.
RUNS = 3


@dataclass
class _Waiting:
    """`likeness` is equal for runs that can be drawn together; None is one that is drawn alone."""

    run: Run
    likeness: tuple[Settings, dict[str, Shapes]] | None
    on_step: OnStep | None
    future: Future[Result]
    on_start: Callable[[], None] | None = None


class Queue:
    """Draws what is submitted, one or several requests at a time, in a thread of its own; `pipeline` is its alone."""

    def __init__(self, pipeline: Pipeline, most: int = MOST) -> None:
        self._pipeline, self._most = pipeline, most
        self._waiting: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._wide = _Wide()
        self._thread = threading.Thread(target=self._work, name="edge-sd-queue", daemon=True)
        self._thread.start()

    def submit(
        self, request: Request | str, on_step: OnStep | None = None, on_start: Callable[[], None] | None = None
    ) -> Future[Result]:
        """A picture to come; `on_step` as in `Pipeline.generate`, in the queue's threads. Cancel it while it waits.

        `on_start` is called in the queue's thread before anything is loaded for it.
        Raises InvalidRequest for what the model can't draw, and RuntimeError after `close`; the future raises what
        drawing raises.
        """
        run = self._pipeline.run(request)
        waiting = _Waiting(run, self._likeness(run), on_step, Future(), on_start)
        with self._changed:
            if self._closed:
                raise RuntimeError("the queue is closed")
            self._waiting.append(waiting)
            self._changed.notify()
        return waiting.future

    def close(self) -> None:
        """Finish what is being drawn and cancel what waits; the pipeline stays open."""
        with self._changed:
            self._closed = True
            for each in self._waiting:
                each.future.cancel()
            self._waiting.clear()
            self._changed.notify()
        self._thread.join()
        self._wide.close()

    def __enter__(self) -> Queue:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _work(self) -> None:
        while group := self._next():
            group = [each for each in group if each.future.set_running_or_notify_cancel()]
            for each in group:
                if each.on_start is not None:
                    each.on_start()
            while group:
                count = next((n for n in NUMBERS if n <= len(group)), 1)
                self._draw(group[:count])
                group = group[count:]

    def _next(self) -> list[_Waiting]:
        """The first waiting request and those that can be drawn with it. Empty once the queue is closed."""
        with self._changed:
            while not self._waiting:
                if self._closed:
                    return []
                self._changed.wait()
            first = self._waiting.popleft()
            group = [first]
            for each in list(self._waiting):
                if len(group) < self._most and first.likeness is not None and each.likeness == first.likeness:
                    group.append(each)
                    self._waiting.remove(each)
            return group

    def _likeness(self, run: Run) -> tuple[Settings, dict[str, Shapes]] | None:
        if not self._pipeline.gathers(run.settings):
            return None
        return replace(run.settings, prompt="", negative="", seed=0), self._pipeline.shapes(run.settings)

    def _draw(self, group: list[_Waiting]) -> None:
        wide = None
        # What is wrong with the model or its device is said to each by drawing it; the queue has to go on.
        with suppress(EdgeSDError, *FAILURES):
            wide = self._wide.of(self._pipeline, group[0].run.settings, len(group)) if len(group) > 1 else None
        if wide is None:
            for each in group:
                _settle(each, self._pipeline)
            return
        threads = [
            threading.Thread(target=_settle_seated, args=(each, self._pipeline, seat), name="edge-sd-seat", daemon=True)
            for each, seat in zip(group, wide.seats(), strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def _settle(waiting: _Waiting, pipeline: Pipeline) -> None:
    try:
        waiting.future.set_result(pipeline.draw(waiting.run, waiting.on_step))
    except Exception as error:
        # The thread goes on; whoever waits for this picture gets its error, a bug's as well.
        waiting.future.set_exception(error)
    except BaseException as stop:
        # Only a callback raises those here; whoever waits is not to be stopped by it.
        waiting.future.set_exception(RuntimeError(f"on_step raised {type(stop).__name__}"))


def _settle_seated(waiting: _Waiting, pipeline: Pipeline, seat: Seat) -> None:
    with seat.gathering.working:
        try:
            _settle(waiting, pipeline.seated(seat))
        finally:
            seat.gathering.leave(seat.n)


class _Wide:
    """The UNet for several pictures at once, for what was drawn last."""

    def __init__(self) -> None:
        self._key: Any = None
        self._loaded: dict[int, tuple[Component, Shapes] | None] = {}

    def of(self, pipeline: Pipeline, settings: Settings, count: int) -> Gathering | None:
        """A gathering of `count`, or None where they are drawn faster one after the other."""
        pipeline.prepare(settings)
        part = pipeline.denoiser
        key = (pipeline.shapes(settings)[part], settings.shortcuts, settings.loras)
        if key != self._key:
            self.close()
            self._key = key
        if count not in self._loaded:
            shapes, narrow = pipeline.components.shapes(part), pipeline.components[part]
            wide = {name: (shape[0] * count if len(shape) > 1 else 1, *shape[1:]) for name, shape in shapes.items()}
            try:
                component = pipeline.components.load(part, wide)
            except FAILURES:
                # Not tried again.
                self._loaded[count] = None
                return None
            faster = _seconds(component, wide) < count * _seconds(narrow, shapes)
            if not faster:
                component.close()
            self._loaded[count] = (component, wide) if faster else None
        found = self._loaded[count]
        return None if found is None else Gathering(*found, count)

    def close(self) -> None:
        for found in self._loaded.values():
            if found is not None:
                found[0].close()
        self._loaded.clear()


def _seconds(component: Component, shapes: Shapes) -> float:
    """Fastest of several calls, after a warm-up call."""
    rng = np.random.default_rng(0)
    inputs = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    times = []
    for _ in range(RUNS + 1):
        started = time.perf_counter()
        component(**inputs)
        times.append(time.perf_counter() - started)
    return min(times[1:])
