"""Store: jobs on disk, each a folder of its own: the wish, what became of it, and its pictures.

jobs/ID/wish.json   what was asked for, written once
jobs/ID/job.json    its state, replaced whole at each change
jobs/ID/N.png       pictures, with their parameters inside
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import time
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from edge_sd.files import write_atomically

from .job import ID, OPEN, Job
from .wish import Wish

LOG = logging.getLogger("edge_sd.server")
# Seconds for which a deleted job can be brought back.
UNDO = 24 * 3600.0
# A record that is larger is not one of ours.
MAX_RECORD = 1 << 20


class Store:
    """A folder of jobs. Names in it are made by us; ids of clients are checked before they become part of a path."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "jobs"
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def add(self, job: Job) -> None:
        """Write a new job; it is on disk when this returns."""
        home = self._home(job.id)
        home.mkdir(mode=0o700)
        write_atomically(home / "wish.json", job.wish.model_dump_json(exclude_defaults=True).encode())
        self.update(job)

    def update(self, job: Job) -> None:
        """Replace what is known of a job."""
        write_atomically(self._home(job.id) / "job.json", json.dumps(job.record()).encode())

    def write_picture(self, job: Job, n: int, data: bytes) -> None:
        """Write picture `n`, a PNG."""
        write_atomically(self._home(job.id) / f"{n}.png", data)

    def picture(self, job: Job, n: int) -> Path | None:
        """The file of picture `n`, if it is there."""
        path = self._home(job.id) / f"{int(n)}.png"
        return path if n in job.saved and path.is_file() else None

    def remove(self, job: Job) -> None:
        """Remove a job's folder for good."""
        shutil.rmtree(self._home(job.id), ignore_errors=True)

    def read(self) -> list[Job]:
        """All jobs, oldest first. Those past their time are removed; what is damaged is left and said in the log."""
        found = []
        for home in sorted(self.folder.iterdir()):
            if not ID.fullmatch(home.name) or not home.is_dir():
                continue
            for debris in home.glob(".*.partial"):
                debris.unlink(missing_ok=True)
            job = self._read(home)
            if job is None:
                continue
            now = time.time()
            if (job.deleted and job.deleted + UNDO < now) or (job.expires and job.expires < now):
                self.remove(job)
                continue
            found.append(job)
        return found

    def _read(self, home: Path) -> Job | None:
        try:
            wish = Wish.model_validate_json((home / "wish.json").read_bytes())
            record = _small_json(home / "job.json")
            job = Job(wish, id=home.name, keep=True, **{name: value for name, value in record.items() if name != "id"})
        except (OSError, ValueError, TypeError, ValidationError) as error:
            if not (home / "wish.json").exists() or not (home / "job.json").exists():
                # The server was killed while it accepted the job, before its client had an answer.
                shutil.rmtree(home, ignore_errors=True)
            else:
                LOG.warning("job %s is damaged and left alone (%s)", home.name, type(error).__name__)
            return None
        job.saved = [n for n in range(wish.count) if (home / f"{n}.png").is_file()]
        if job.state in OPEN:
            job.state, job.started = "waiting", 0.0
        else:
            with contextlib.suppress(Exception):
                job.ended.set_result(None)
        return job

    def _home(self, id_: str) -> Path:
        if not ID.fullmatch(id_):
            raise ValueError("not an id")
        return self.folder / id_


def _small_json(path: Path) -> dict[str, Any]:
    if path.stat().st_size > MAX_RECORD:
        raise ValueError("too large")
    document = json.loads(path.read_bytes())
    if not isinstance(document, dict):
        raise ValueError("not an object")
    return document
