"""A queue before one pipeline, for programs in which several ask for pictures at a time.

Requests are drawn in the order in which they came. Those that wait and differ in nothing but words and seeds go through
the UNet together, where that was measured to be faster: small networks leave half of a processor's units idle, large
ones do not.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..components.base import Component, Shapes
from ..components.batching import Gathering, Seat
from ..components.fallback import FAILURES
from ..errors import EdgeSDError, InvalidRequest
from ..machine import this_machine
from ..sampling.samplers import Step
from .pipeline import Pipeline
from .request import Request
from .result import Result
from .run import Run
from .settings import Settings

OnStep = Callable[[int, Step], None]
# Pictures of a batch; each size needs a UNet compiled for it, and is tried where the one before it gains.
SIZES = (2, 4, 8)
MOST = SIZES[-1]
# A size is tried where so many times the UNet's files are free: what is compiled for it took four times them.
ROOM = 6
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
    """Draws what is submitted, one or several requests at a time, in a thread of its own.

    Args:
        pipeline: Draws for this queue alone, and stays open when the queue is closed.
        most: Requests that are drawn together at most, 1 to 8.

    Raises InvalidRequest for another `most`.

    Example:
        with Pipeline.open("emoji") as pipeline, Queue(pipeline) as queue:
            drawn = [queue.submit(f"a {each}") for each in ("cat", "dog")]
            pictures = [each.result().pictures[0] for each in drawn]
    """

    def __init__(self, pipeline: Pipeline, most: int = MOST) -> None:
        if type(most) is not int or not 1 <= most <= MOST:
            raise InvalidRequest(f"most {most!r} is not a whole number from 1 to {MOST}")
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
        Raises InvalidRequest for what the model can't draw, and after `close`; the future raises what drawing raises.
        """
        run = self._pipeline.run(request)
        waiting = _Waiting(run, self._likeness(run), on_step, Future(), on_start)
        with self._changed:
            if self._closed:
                raise InvalidRequest("the queue is closed; make another one")
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
            group = [each for each in group if each.future.set_running_or_notify_cancel() and _start(each)]
            while group:
                group = group[self._draw(group) :]

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

    def _draw(self, group: list[_Waiting]) -> int:
        """Draw the first of `group`, or as many as is fastest for the whole of it; how many these were."""
        wide = None
        if len(group) > 1:
            try:
                wide = self._wide.of(self._pipeline, group[0].run.settings, len(group))
            except (EdgeSDError, *FAILURES):
                # What is wrong with the model or its device is said to each by drawing it.
                pass
            except Exception as error:
                # A bug is the error of those who wait for these pictures; the thread goes on.
                for each in group:
                    each.future.set_exception(error)
                return len(group)
        if wide is None:
            _settle(group[0], self._pipeline)
            return 1
        threads = [
            threading.Thread(target=_settle_seated, args=(each, self._pipeline, seat), name="edge-sd-seat", daemon=True)
            for each, seat in zip(group[: wide.callers], wide.seats(), strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return wide.callers


def _start(waiting: _Waiting) -> bool:
    """Call `on_start`; False where it raised, which is then the picture's error."""
    if waiting.on_start is None:
        return True
    with _errors_of(waiting.future, "on_start"):
        waiting.on_start()
        return True
    return False


def _settle(waiting: _Waiting, pipeline: Pipeline) -> None:
    with _errors_of(waiting.future, "on_step"):
        waiting.future.set_result(pipeline.draw(waiting.run, waiting.on_step))


@contextmanager
def _errors_of(future: Future[Result], callback: str) -> Iterator[None]:
    """Hand an error, a bug's as well, to whoever waits for the picture; the queue's thread goes on."""
    try:
        yield
    except Exception as error:
        future.set_exception(error)
    except BaseException as stop:
        # Only a callback raises those here; whoever waits is not to be stopped by it.
        future.set_exception(RuntimeError(f"{callback} raised {type(stop).__name__}"))


def _settle_seated(waiting: _Waiting, pipeline: Pipeline, seat: Seat) -> None:
    with seat.gathering.working:
        try:
            _settle(waiting, pipeline.seated(seat))
        finally:
            seat.gathering.leave(seat.n)


class _Wide:
    """The UNets for several pictures at once, for what was drawn last."""

    def __init__(self) -> None:
        self._key: Any = None
        # By pictures at once; None is a size that gains nothing, cannot be loaded or has no room.
        self._loaded: dict[int, tuple[Component, Shapes] | None] = {}
        # Of one call, by pictures at once, from 1.
        self._seconds: dict[int, float] = {}

    def of(self, pipeline: Pipeline, settings: Settings, waiting: int) -> Gathering | None:
        """A gathering of the first of `waiting` pictures, or None where the first is drawn alone: what is fastest."""
        pipeline.prepare(settings)
        part = pipeline.denoiser
        key = (pipeline.shapes(settings)[part], settings.shortcuts, settings.loras)
        if key != self._key:
            self.close()
            self._key = key
            self._seconds = {1: _seconds(pipeline.components[part], pipeline.components.shapes(part))}
        for size in SIZES:
            # The size before this one seats all of them.
            if 2 * waiting <= size:
                break
            if size not in self._loaded:
                self._loaded[size] = self._tried(pipeline, size)
            if self._loaded[size] is None:
                break
        size = _first(self._seconds, waiting)
        found = self._loaded.get(size)
        return None if found is None else Gathering(*found, size, min(size, waiting))

    def _tried(self, pipeline: Pipeline, size: int) -> tuple[Component, Shapes] | None:
        """The UNet for `size` pictures, if it draws them faster than that for half as many."""
        part = pipeline.denoiser
        free = this_machine().free
        if free and free < ROOM * pipeline.denoiser_bytes:
            return None
        shapes = pipeline.components.shapes(part)
        wide = {name: (shape[0] * size if len(shape) > 1 else 1, *shape[1:]) for name, shape in shapes.items()}
        try:
            component = pipeline.components.load(part, wide)
        except FAILURES:
            # Not tried again.
            return None
        seconds = _seconds(component, wide)
        if seconds >= 2 * self._seconds[size // 2]:
            component.close()
            return None
        self._seconds[size] = seconds
        return component, wide

    def close(self) -> None:
        for found in self._loaded.values():
            if found is not None:
                found[0].close()
        self._loaded.clear()


def _first(seconds: Mapping[int, float], waiting: int) -> int:
    """Pictures of the first batch where `waiting` ones take the least time in all.

    `seconds` holds what a call takes for each size of a batch, full or not. Of two ways that take as long, the one
    with the larger batch first lets more go earlier.
    """
    first, least = [0], [0.0]
    for count in range(1, waiting + 1):
        ways = {size: seconds[size] + least[max(0, count - size)] for size in sorted(seconds, reverse=True)}
        first.append(min(ways, key=ways.__getitem__))
        least.append(ways[first[-1]])
    return first[-1]


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
