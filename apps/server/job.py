"""Job: a wish on its way. It is changed by the service alone, under the service's lock."""

from __future__ import annotations

import re
import secrets
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from edge_sd.errors import InvalidRequest

from .failure import JobCancelled
from .wish import PICTURES, Wish

if TYPE_CHECKING:
    from edge_sd.pipeline.result import Picture

State = Literal["waiting", "loading", "drawing", "done", "failed", "cancelled"]
OPEN: tuple[State, ...] = ("waiting", "loading", "drawing")
ID = re.compile(r"[0-9a-f]{24}")


def new_id() -> str:
    """A name that sorts by time and cannot be guessed."""
    return f"{time.time_ns() // 1_000_000:012x}{secrets.token_hex(6)}"


@dataclass
class Job:
    """What is known of a wish.

    door       the API it came by: "jobs", "openai" or "a1111"
    keep       it is on disk: it survives a restart and is part of the history
    expires    Unix time after which a kept job is removed; 0 is never
    drawn      pictures that are in memory, by their number; those of kept jobs leave it when they are saved
    saved      numbers of the pictures that are on disk
    step, total   of the picture that is being drawn
    previews   how many previews its client asked for, evenly spaced over the steps
    preview    the last one that was made, a JPEG
    error      why it failed, for people; `failure` is the exception itself
    """

    wish: Wish
    door: str = "jobs"
    keep: bool = True
    id: str = field(default_factory=new_id)
    state: State = "waiting"
    created: float = field(default_factory=time.time)
    started: float = 0.0
    finished: float = 0.0
    expires: float = 0.0
    deleted: float = 0.0
    drawn: dict[int, Picture] = field(default_factory=dict)
    saved: list[int] = field(default_factory=list)
    settings: list[dict[str, Any]] = field(default_factory=list)
    step: int = 0
    total: int = 0
    previews: int = 0
    preview: bytes = b""
    seconds: float = 0.0
    plan: str = ""
    notes: list[str] = field(default_factory=list)
    error: str = ""
    failure: Exception | None = None
    cancelling: bool = False
    # Settled, with None, when the job has reached its last state.
    ended: Future[None] = field(default_factory=Future)

    @property
    def key(self) -> tuple[str, str | None, str, str]:
        """What decides which loaded model draws it."""
        return self.wish.model, self.wish.variant, self.wish.device, self.wish.preset

    @property
    def done(self) -> int:
        """Pictures that are finished."""
        return len(self.drawn.keys() | set(self.saved))

    @property
    def share(self) -> float:
        """How much of it is drawn, 0 to 1."""
        if self.state == "done":
            return 1.0
        within = self.step / self.total if self.total else 0.0
        return min(1.0, (self.done + (within if self.state == "drawing" else 0.0)) / self.wish.count)

    def left(self, now: float) -> float | None:
        """Seconds to its end by the pace so far; None where nothing is known."""
        share = self.share
        if self.state != "drawing" or not share or not self.started:
            return None
        return max(0.0, (now - self.started) * (1 - share) / share)

    def check(self) -> None:
        """Raise why a job that ended has no pictures."""
        if self.failure is not None:
            raise self.failure
        if self.state == "cancelled":
            raise JobCancelled("the job was cancelled")
        if self.error:
            raise InvalidRequest(self.error)

    def view(self) -> dict[str, Any]:
        """What clients see of it. The pictures it was given are named, not repeated."""
        wish = self.wish.model_dump(exclude_defaults=True, exclude=set(PICTURES))
        given = [name for name in PICTURES if getattr(self.wish, name)]
        return {
            "id": self.id, "state": self.state, "door": self.door, "wish": wish, "given": given,
            "count": self.wish.count, "done": self.done, "step": self.step, "total": self.total,
            "share": round(self.share, 4), "left": self.left(time.time()), "created": self.created,
            "started": self.started, "finished": self.finished, "seconds": round(self.seconds, 3),
            "plan": self.plan, "notes": self.notes, "error": self.error, "pictures": sorted(self.saved),
            "settings": self.settings, "deleted": bool(self.deleted),
        }  # fmt: skip

    def record(self) -> dict[str, Any]:
        """What is on disk beside the wish."""
        names = ("id", "door", "state", "created", "started", "finished", "expires", "deleted", "saved", "settings",
                 "seconds", "plan", "notes", "error")  # fmt: skip
        return {name: getattr(self, name) for name in names}
