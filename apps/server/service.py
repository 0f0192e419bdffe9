"""Service: jobs are accepted, drawn in their order, told about and kept. It knows no HTTP.

One thread hands jobs to the engine of their model; the engine's queue draws them, those that differ in words and seeds
together; a second thread writes pictures, so that drawing does not wait for the disk.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_sd.errors import EdgeSDError, OutputError
from edge_sd.pipeline.queue import MOST

from .engines import Engine, Engines
from .events import Event, Events
from .failure import QueueFull, describe, stopped
from .job import OPEN, Job, State
from .preview import Previews
from .store import Store
from .wish import Wish

if TYPE_CHECKING:
    from edge_sd import Request, Result
    from edge_sd.pipeline.result import Picture
    from edge_sd.sampling.samplers import Step

LOG = logging.getLogger("edge_sd.server")
# Pictures that an engine's queue is given ahead: beside a batch that is drawn, a whole one waits.
AHEAD = 2 * MOST
# Jobs of the two foreign APIs that are remembered after their end, for whoever still asks.
REMEMBERED = 64


class _Stop(Exception):
    """Leaves a picture that is being drawn."""


class Service:
    """Jobs by id, oldest first.

    limit   jobs that may wait; more are refused with QueueFull
    """

    def __init__(self, store: Store, engines: Engines, limit: int = 100, lora_folder: Path | None = None) -> None:
        self.store, self.engines, self.limit, self.lora_folder = store, engines, limit, lora_folder
        self._changed = threading.Condition(threading.RLock())
        self._jobs: dict[str, Job] = {}
        self._waiting: deque[Job] = deque()
        self._flying: dict[str, Job] = {}
        self._drawings: dict[str, _Drawing] = {}
        self._engine: Engine | None = None
        self._forgotten: deque[str] = deque()
        self.events = Events()
        self._closing = False
        self._stoppers: list[Callable[[], None]] = []
        self._writer = ThreadPoolExecutor(1, "edge-sd-writer")
        self.counts: dict[tuple[str, str], int] = {}
        self.pictures_drawn, self.seconds_drawing = 0, 0.0
        for job in store.read():
            self._jobs[job.id] = job
            if job.state in OPEN:
                self._waiting.append(job)
        self._thread = threading.Thread(target=self._work, name="edge-sd-jobs", daemon=True)
        self._thread.start()

    def submit(self, wish: Wish, door: str = "jobs", keep: bool = True, previews: int = 0, hours: float = 0) -> Job:
        """Accept a wish. It is checked whole first, and on disk when this returns if it is to be kept.

        `hours` is how long a kept job stays; 0 is for good. Raises QueueFull, Stopping, or what is wrong with the wish.
        """
        expires = time.time() + hours * 3600 if hours else 0.0
        named = wish.model_copy(update={"model": wish.model or self.engines.default})
        job = Job(named.seeded(), door, keep, previews=previews, expires=expires)
        self._refuse_where_full()
        self.engines.resolve(job.key, job.wish.request(self.lora_folder))
        if keep:
            try:
                self.store.add(job)
            except OSError as error:
                self.store.remove(job)
                raise OutputError(f"the job could not be written ({error.strerror}); nothing was accepted") from error
        with self._changed:
            try:
                self._refuse_where_full()
            except EdgeSDError:
                if keep:
                    self.store.remove(job)
                raise
            self._jobs[job.id] = job
            self._waiting.append(job)
            self._changed.notify_all()
        self.events.tell(Event("state", job))
        return job

    def _refuse_where_full(self) -> None:
        with self._changed:
            if self._closing:
                raise stopped()
            if len(self._waiting) >= self.limit:
                raise QueueFull(f"{len(self._waiting)} jobs wait already, which is all that are taken; try again later")

    def get(self, id_: str) -> Job | None:
        """A job by its id."""
        with self._changed:
            return self._jobs.get(id_)

    def jobs(self) -> list[Job]:
        """All that are known, oldest first."""
        with self._changed:
            return sorted(self._jobs.values(), key=lambda job: job.id)

    def place(self, job: Job) -> int:
        """How many jobs come before it: 0 for one that is being drawn or is done."""
        with self._changed:
            flying = [each.id for each in self._flying.values()]
            order = flying + [each.id for each in self._waiting]
            return order.index(job.id) if job.state == "waiting" and job.id in order else 0

    @property
    def stopping(self) -> bool:
        """Whether no more jobs are accepted."""
        return self._closing

    @property
    def depth(self) -> int:
        """Jobs that wait or are drawn."""
        with self._changed:
            return len(self._waiting) + len(self._flying)

    def cancel(self, job: Job) -> bool:
        """Stop a job: at once where it waits, within one step where it is drawn. False where it had ended."""
        with self._changed:
            if job.state not in OPEN:
                return False
            job.cancelling = True
            if job in self._waiting:
                self._waiting.remove(job)
                self._end(job, "cancelled")
            drawing = self._drawings.get(job.id)
        if drawing is not None:
            drawing.cancel()
        return True

    def pictures(self, job: Job) -> list[bytes]:
        """The finished pictures of a job as PNG files, in their order."""
        found = []
        for n in range(job.wish.count):
            if n in job.drawn:
                found.append(job.drawn[n].encode())
            elif (path := self.store.picture(job, n)) is not None:
                found.append(path.read_bytes())
        return found

    def delete(self, job: Job) -> None:
        """Take a job out of the history; it can be restored for a day."""
        self.cancel(job)
        with self._changed:
            job.deleted = time.time()
            self._save(job)
        self.events.tell(Event("gone", job))

    def restore(self, job: Job) -> None:
        """Undo `delete`."""
        with self._changed:
            job.deleted = 0.0
            self._save(job)
        self.events.tell(Event("state", job))

    def on_stop(self, act: Callable[[], None]) -> None:
        """Call `act` when the service is stopped."""
        self._stoppers.append(act)

    def stop(self) -> None:
        """Accept nothing more, leave what is drawn within a step, and end all listening."""
        with self._changed:
            self._closing = True
            drawings = list(self._drawings.values())
            self._changed.notify_all()
        for drawing in drawings:
            drawing.cancel()
        for act in self._stoppers:
            act()
        self.events.end()

    def close(self) -> None:
        """Stop and wait. Kept jobs that were open are drawn by the next service on the same store."""
        self.stop()
        self._thread.join()
        self.engines.close()
        self._writer.shutdown()
        with self._changed:
            for job in [*self._flying.values(), *self._waiting]:
                if job.keep:
                    job.state = "waiting"
                    self._save(job)
                elif not job.ended.done():
                    job.failure = stopped()
                    self._end(job, "failed")

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- handing jobs over

    def _work(self) -> None:
        while True:
            with self._changed:
                job = self._next()
                if job is None:
                    if self._closing:
                        return
                    self._changed.wait(1.0)
                    job = self._next()
                if job is not None:
                    self._flying[job.id] = job
            if job is None:
                self.engines.release_idle()
            else:
                self._hand_over(job)

    def _next(self) -> Job | None:
        """The first that waits, once the engine that is drawing serves it or has nothing left to draw."""
        if self._closing or not self._waiting:
            return None
        job = self._waiting[0]
        if self._flying:
            waiting = sum(each.wish.count - each.done for each in self._flying.values())
            if self._engine is None or self._engine.key != job.key or waiting >= AHEAD:
                return None
        return self._waiting.popleft()

    def _hand_over(self, job: Job) -> None:
        try:
            if self._engine is None or self._engine.key != job.key or not self._engine.loaded:
                self._set(job, "loading")
            engine = self._engine = self.engines.acquire(job.key)
            requests = job.wish.requests(self.lora_folder)
            missing = [n for n in range(job.wish.count) if n not in job.saved and n not in job.drawn]
            engine.flying += 1
            drawing = self._drawings[job.id] = _Drawing(self, job, engine, len(missing))
            for n in missing:
                drawing.submit(n, requests[n])
            if job.cancelling or self._closing:
                # It was cancelled meanwhile.
                drawing.cancel()
            if not missing:
                drawing.finish()
        except Exception as error:  # The thread goes on; the job ends with it.
            if not isinstance(error, EdgeSDError):
                LOG.exception("job %s", job.id)
            job.failure = error
            self._end(job, "failed")

    # -- what becomes of a job

    def _set(self, job: Job, state: State) -> None:
        with self._changed:
            if job.state == state or job.state not in OPEN:
                return
            job.state = state
            if not job.started and state != "waiting":
                job.started = time.time()
        self.events.tell(Event("state", job))

    def _end(self, job: Job, state: State) -> None:
        with self._changed:
            if job.ended.done():
                return
            job.state, job.finished = state, time.time()
            job.seconds = job.finished - job.started if job.started else 0.0
            if job.failure is not None:
                job.error = describe(job.failure).message
            self._flying.pop(job.id, None)
            self._save(job)
            if not job.keep:
                self._forget_later(job)
            key = (job.door, state)
            self.counts[key] = self.counts.get(key, 0) + 1
            self._changed.notify_all()
        job.ended.set_result(None)
        self.events.tell(Event("state", job))

    def _forget_later(self, job: Job) -> None:
        self._forgotten.append(job.id)
        while len(self._forgotten) > REMEMBERED:
            self._jobs.pop(self._forgotten.popleft(), None)

    def _save(self, job: Job) -> None:
        if not job.keep:
            return
        try:
            self.store.update(job)
        except OSError as error:
            LOG.error("job %s could not be written (%s)", job.id, error.strerror)

    def _keep_picture(self, job: Job, n: int, result: Result) -> None:
        """Take a finished picture; kept ones go to the disk and leave the memory."""
        picture = result.pictures[0]
        if job.keep:
            self.store.write_picture(job, n, picture.encode())
        with self._changed:
            if job.keep:
                job.saved.append(n)
            else:
                job.drawn[n] = picture
            job.settings = sorted([*job.settings, _settings(n, picture)], key=lambda row: row["n"])
            job.plan = result.plan
            job.notes += [note for note in result.notes if note not in job.notes]
            self.pictures_drawn += 1
            self.seconds_drawing += sum(result.seconds.values())
        self.events.tell(Event("picture", job, n))


class _Drawing:
    """A job in the hands of an engine's queue."""

    def __init__(self, service: Service, job: Job, engine: Engine, count: int) -> None:
        self.service, self.job, self.engine, self.left = service, job, engine, count
        self.previews = Previews(job, engine)
        self._futures: list[Future[Result]] = []

    def submit(self, n: int, request: Request) -> None:
        """Give one picture to the queue."""
        assert self.engine.queue is not None, "it was acquired"
        future = self.engine.queue.submit(request, partial(self.on_step, n), self.on_start)
        self._futures.append(future)
        future.add_done_callback(lambda done: self.service._writer.submit(self.settle, n, done))

    def cancel(self) -> None:
        """Cancel pictures that were not begun; the one that is drawn stops at its next step."""
        for future in self._futures:
            future.cancel()

    def on_start(self) -> None:
        """In the queue's thread, before components are loaded; only a job's first picture waits for them."""
        if self.job.state != "drawing":
            self.service._set(self.job, "loading")

    def on_step(self, n: int, _: int, step: Step) -> None:
        """In the queue's thread, after each step of picture `n`."""
        service, job = self.service, self.job
        if job.cancelling or service._closing or job.failure is not None:
            raise _Stop
        service._set(job, "drawing")
        job.step, job.total = step.index + 1, step.total
        service.events.tell(Event("step", job, n))
        if (image := self.previews.of(n, step, service.events.watched)) is not None:
            job.preview = image
            service.events.tell(Event("preview", job, n, image))

    def settle(self, n: int, future: Future[Result]) -> None:
        """In the writer's thread: one picture is drawn, or is not going to be."""
        service, job = self.service, self.job
        try:
            service._keep_picture(job, n, future.result())
        except (CancelledError, _Stop):
            pass
        except OSError as error:
            job.failure = OutputError(f"picture {n + 1} could not be written ({error.strerror})")
        except EdgeSDError as error:
            job.failure = job.failure or error
        except Exception as error:  # The thread goes on; the job ends with it.
            LOG.exception("job %s", job.id)
            job.failure = job.failure or error
        with service._changed:
            self.left -= 1
            if self.left:
                return
        self.finish()

    def finish(self) -> None:
        service, job = self.service, self.job
        with service._changed:
            self.engine.flying -= 1
            self.engine.used = time.monotonic()
            service._drawings.pop(job.id, None)
            requeued = service._closing and not job.cancelling and job.failure is None and job.done < job.wish.count
            if requeued:
                # `close` decides what becomes of it.
                service._changed.notify_all()
                return
        if job.failure is not None:
            service._end(job, "failed")
        elif job.done < job.wish.count:
            service._end(job, "cancelled")
        else:
            service._end(job, "done")


def _settings(n: int, picture: Picture) -> dict[str, Any]:
    """What makes picture `n` again, for people and programs."""
    about = {name: getattr(picture, name) for name in ("model", "variant", "device", "model_hash")}
    return {"n": n, **asdict(picture.settings), **about, "infotext": picture.texts()[0]}
