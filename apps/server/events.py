"""Events: what happens to jobs, for all who listen."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .job import Job


@dataclass(frozen=True)
class Event:
    """Something happened to a job: `kind` is "state", "step", "preview", "picture" or "gone".

    `image` is a JPEG of what is drawn so far, for previews.
    """

    kind: str
    job: Job
    index: int = 0
    image: bytes = b""


class Events:
    """The listeners, and whether any of them wants previews."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listeners: dict[int, Callable[[Event | None], None]] = {}
        self._watchers, self._watched_until = 0, 0.0
        self._ended = False

    @property
    def watched(self) -> bool:
        """Whether anyone wants previews."""
        return self._watchers > 0 or time.monotonic() < self._watched_until

    def watch(self, seconds: float) -> None:
        """Make previews for so long, for those who ask instead of listening; a job has its last one."""
        self._watched_until = time.monotonic() + seconds

    @contextlib.contextmanager
    def listening(self, callback: Callable[[Event | None], None], previews: bool = False) -> Iterator[None]:
        """Call `callback` with every event, in threads of the service, and with None at the end of all."""
        token = id(callback)
        with self._lock:
            self._listeners[token] = callback
            self._watchers += previews
            ended = self._ended
        try:
            if ended:
                callback(None)
            yield
        finally:
            with self._lock:
                self._listeners.pop(token, None)
                self._watchers -= previews

    def tell(self, event: Event) -> None:
        """Tell all listeners."""
        for callback in self._all():
            callback(event)

    def end(self) -> None:
        """Tell all listeners, and those that come later, that nothing more will happen."""
        with self._lock:
            self._ended = True
        for callback in self._all():
            callback(None)

    def _all(self) -> list[Callable[[Event | None], None]]:
        with self._lock:
            return list(self._listeners.values())
