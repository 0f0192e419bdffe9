"""Drawing: jobs through one queue on this machine, each picture handed over when it is drawn."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial

from edge_sd.errors import EdgeSDError, OutputError
from edge_sd.pipeline.pipeline import Pipeline
from edge_sd.pipeline.queue import MOST, Queue
from edge_sd.pipeline.result import Result
from edge_sd.sampling.samplers import Step

from .keeping import Keeper
from .manifest import Job

# Jobs in the queue at a time: enough that it finds some to draw together, few enough that their images fit in memory.
AHEAD = 2 * MOST


class _Stop(BaseException):
    """Ends the picture that is being drawn. No EdgeSDError, so that nothing retries it."""


def draw(
    jobs: Sequence[Job], pipeline: Pipeline, keeper: Keeper, ready: Callable[[], None],
    report: Callable[[str, float], None],
) -> None:  # fmt: skip
    """Draw all `jobs`. `ready` is called before each is handed to the queue, and may wait; `report` as in terminal.

    Stopped by an exception, such as Ctrl-C's, it ends within a step and keeps what is drawn.
    """
    stop = threading.Event()

    def on_step(k: int, _: int, step: Step) -> None:
        if stop.is_set():
            raise _Stop
        report(
            f"picture {k + 1} of {len(jobs)}, step {step.index + 1} of {step.total}",
            (k + (step.index + 1) / step.total) / len(jobs),
        )

    waiting: deque[tuple[Job, Future[Result]]] = deque()
    queue = Queue(pipeline)
    try:
        for k, job in enumerate(jobs):
            ready()
            try:
                waiting.append((job, queue.submit(job.request, partial(on_step, k))))
            except EdgeSDError as error:
                # Its files have changed since all rows were checked.
                keeper.fail(job, error)
            if len(waiting) == AHEAD:
                _settle(waiting, keeper)
        while waiting:
            _settle(waiting, keeper)
    except BaseException:  # Ctrl-C as well: what is drawn is kept before it goes on its way.
        stop.set()
        queue.close()
        for job, future in waiting:
            if future.done() and not future.cancelled() and future.exception() is None:
                with suppress(OutputError):
                    keeper.keep(job, future.result())
        raise
    finally:
        queue.close()


def _settle(waiting: deque[tuple[Job, Future[Result]]], keeper: Keeper) -> None:
    """Wait for the first and keep it; it stays in `waiting` until it is kept."""
    job, future = waiting[0]
    try:
        result = future.result()
    except EdgeSDError as error:
        keeper.fail(job, error)
    else:
        keeper.keep(job, result)
    waiting.popleft()
