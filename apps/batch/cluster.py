"""Cluster: the jobs of a batch on the workers of a Dask cluster that is there already.

Each worker opens the model by name with its own devices, so that a Mac draws by Core ML and the laptop beside it by
OpenVINO. It is given few jobs ahead, so that a slow one holds up few, and those of one that is lost go to others. At
the end idle workers draw what others still have, and the first picture counts. What comes back is compared with its
hash, and kept once.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edge_sd import __version__
from edge_sd.errors import DeviceError, EdgeSDError, InvalidRequest, MissingExtra
from edge_sd.images.opening import open_mask, open_picture
from edge_sd.pipeline.request import Request

from .keeping import Encoded, Keeper, encode
from .manifest import Job
from .place import Place

if TYPE_CHECKING:
    from edge_sd.pipeline.pipeline import Pipeline
    from edge_sd.pipeline.queue import Queue

# Jobs that a worker is given ahead, for each of its threads: it should not wait for the next one.
AHEAD = 2
# Seconds between two looks at which workers are there, and those that connecting may take.
LOOK, PATIENCE = 1.0, 20
# Options whose files lie on this machine alone.
LOCAL = ("loras", "lora_folder", "embeddings", "refiner")


# -- on a worker

_lock = threading.Lock()
# What a worker's process has open; its threads hand their jobs to one queue, which draws several together.
_open: dict[Place, tuple[Pipeline, Queue]] = {}


def settle(place: Place, version: str) -> tuple[bool, str]:
    """Open the model on this worker: whether it can draw, and its plan or the reason why not."""
    if version != __version__:
        return False, f"it has edge-sd {__version__}, this is {version}"
    try:
        return True, _opened(place)[0].plan.summary()
    except EdgeSDError as error:
        return False, str(error)


def _opened(place: Place) -> tuple[Pipeline, Queue]:
    from edge_sd.pipeline.queue import Queue

    with _lock:
        if place not in _open:
            pipeline = place.open(lambda line: None, measure=False)
            _open[place] = pipeline, Queue(pipeline)
        return _open[place]


def draw_one(place: Place, request: Request, ending: str) -> Encoded | str:
    """The picture of a request, or why it could not be drawn."""
    import socket

    from distributed import get_worker

    try:
        result = _opened(place)[1].submit(request).result()
    except EdgeSDError as error:
        return str(error)
    return encode(result, ending, f"{socket.gethostname()} {get_worker().address}")


# -- here


def portable(request: Request) -> Request:
    """The request with its pictures' pixels in place of their files, and its templates expanded.

    Raises InvalidRequest for options whose files a worker does not have.
    """
    for name in LOCAL:
        if getattr(request, name):
            raise InvalidRequest(f"{name} is a file of this machine, which workers of a cluster do not have")
    assert request.seed is not None, "jobs have seeds"
    given: dict[str, Any] = {}
    if request.image is not None:
        given["image"] = open_picture(request.image, "image")
    if request.mask is not None:
        given["mask"] = open_mask(request.mask)
    if request.references:
        given["references"] = [open_picture(each, "reference picture") for each in request.references]
    if request.controls:
        given["controls"] = [
            replace(each, image=open_picture(each.image, "control picture")) for each in request.controls
        ]
    return replace(request.expanded(request.seed), **given)


def draw(
    jobs: Sequence[Job], address: str, place: Place, keeper: Keeper, report: Callable[[str, float], None],
    tell: Callable[[str], None],
) -> None:  # fmt: skip
    """Draw all `jobs` on the cluster whose scheduler is at `address`.

    Raises MissingExtra, or DeviceError where no scheduler answers or no worker can draw.
    """
    try:
        from distributed import Client
    except ImportError:
        raise MissingExtra("drawing on a cluster", "dask") from None
    try:
        client = Client(address, timeout=PATIENCE)
    except (OSError, ValueError, TimeoutError) as error:
        raise DeviceError(f"no scheduler of Dask answers at {address} ({error})") from error
    with client:
        _Crew(client, place, keeper, tell).draw(jobs, report)


class _Crew:
    """The workers of a cluster, and what they are drawing."""

    def __init__(self, client: Any, place: Place, keeper: Keeper, tell: Callable[[str], None]) -> None:
        self.client, self.place, self.keeper, self.tell = client, place, keeper, tell
        self._waiting: deque[Job] = deque()
        # Address -> the future of its `settle`; its threads, once it can draw; why it can't.
        self._asked: dict[str, Any] = {}
        self._able: dict[str, int] = {}
        self._refused: dict[str, str] = {}
        # Future -> its job, and the worker that has it.
        self._flying: dict[Any, tuple[Job, str]] = {}
        self._sent = 0
        self._alone = False

    def draw(self, jobs: Sequence[Job], report: Callable[[str, float], None]) -> None:
        from distributed import wait

        self._waiting.extend(jobs)
        while self._waiting or self._flying:
            self._look()
            for address, threads in self._able.items():
                has = sum(each == address for _, each in self._flying.values())
                for _ in range(min(AHEAD * threads - has, len(self._waiting))):
                    self._send(self._waiting.popleft(), address)
            if not self._waiting:
                self._help()
            done = len(jobs) - len(self._waiting) - len({job.key for job, _ in self._flying.values()})
            report(f"picture {min(done + 1, len(jobs))} of {len(jobs)}, {len(self._able)} workers", done / len(jobs))
            futures = [*self._flying, *(each for each in self._asked.values() if not each.done())]
            try:
                found = wait(futures, timeout=LOOK, return_when="FIRST_COMPLETED").done if futures else _pause()
            except TimeoutError:
                continue
            for future in found:
                if future in self._flying:
                    self._settle(future)

    def _look(self) -> None:
        """Ask new workers whether they can draw, and take back what those have that are gone."""
        there = self.client.scheduler_info(n_workers=-1)["workers"]
        for address in [each for each in self._asked if each not in there]:
            self._asked.pop(address).cancel()
            if self._able.pop(address, None):
                self.tell(f"{address} is gone; others draw what it had")
            for future in [each for each, (_, home) in self._flying.items() if home == address]:
                self._take_back(self._flying.pop(future)[0])
                future.cancel()
        for address in there:
            if address not in self._asked:
                self._asked[address] = self._submit(address, settle, self.place, __version__)
        for address, future in self._asked.items():
            if address in self._able or address in self._refused or not future.done():
                continue
            able, line = self._answer(future)
            if able:
                self._able[address] = int(there[address]["nthreads"])
                self.tell(f"{address}: {line}")
            else:
                self._refused[address] = line
                self.tell(f"{address} is left out: {line}")
        self._check(there)

    def _submit(self, address: str, function: Callable[..., Any], *given: Any) -> Any:
        """A task for one worker. Each has a name of its own: one that was taken back must not be found again."""
        self._sent += 1
        key = f"edge-sd-{self.keeper.manifest.run}-{self._sent}"
        return self.client.submit(function, *given, workers=[address], allow_other_workers=False, key=key, pure=False)

    def _answer(self, future: Any) -> tuple[bool, str]:
        if future.status == "finished":
            found: tuple[bool, str] = future.result()
            return found
        # Most often edge-sd is not installed there.
        return False, f"{future.exception() if future.status == 'error' else future.status}"

    def _check(self, there: Collection[str]) -> None:
        """Say once that nobody draws; raise DeviceError where all workers answered and none can."""
        if self._able:
            self._alone = False
        elif there and all(address in self._refused for address in there):
            raise DeviceError(f"no worker of the cluster can draw; {min(self._refused.items())[1]}")
        elif not there and not self._alone:
            self._alone = True
            self.tell("the cluster has no worker; waiting for one (Ctrl-C stops)")

    def _send(self, job: Job, address: str) -> None:
        try:
            request = portable(job.request)
        except EdgeSDError as error:
            self.keeper.fail(job, error)
            return
        self._flying[self._submit(address, draw_one, self.place, request, self.keeper.ending)] = job, address

    def _settle(self, future: Any) -> None:
        """Keep what came back. A picture whose bytes are not those that were sent is drawn again."""
        job, address = self._flying.pop(future)
        if future.status != "finished":
            if address not in self.client.scheduler_info(n_workers=-1)["workers"]:
                self._take_back(job)
                return
            found = f"{address} failed: {future.exception() if future.status == 'error' else future.status}"
        else:
            found = future.result()
        if isinstance(found, str):
            if not self._copies(job):
                self.keeper.fail(job, DeviceError(found))
        elif hashlib.sha256(found.data).hexdigest() != found.sha256:
            self.tell(f"{found.worker}: a picture arrived damaged; it is drawn again")
            self._take_back(job)
        else:
            self.keeper.keep_encoded(job, found)
            for other in self._copies(job):
                del self._flying[other]
                other.cancel()

    def _help(self) -> None:
        """Give idle workers jobs that others still have: a slow one, or one that went to sleep, is not waited for."""
        busy = {address for _, address in self._flying.values()}
        for address in self._able.keys() - busy:
            late = next((job for job, _ in self._flying.values() if len(self._copies(job)) == 1), None)
            if late is not None:
                self._send(late, address)

    def _copies(self, job: Job) -> list[Any]:
        """The futures that draw a job."""
        return [future for future, (each, _) in self._flying.items() if each.key == job.key]

    def _take_back(self, job: Job) -> None:
        """Let a job wait again, unless another worker draws it anyway."""
        if not self._copies(job):
            self._waiting.appendleft(job)


def _pause() -> list[Any]:
    time.sleep(LOOK)
    return []
