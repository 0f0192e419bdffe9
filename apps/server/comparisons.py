"""Comparisons of a model's variants: `edge-sd compare run` in a process of its own, one at a time.

comparisons/ID/wish.json     what was asked for
comparisons/ID/log.txt       what the command said
comparisons/ID/report.html   there once it is done; started again, the command goes on in its folder
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, HTTPException
from fastapi import Path as PathField
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import FileResponse, Response

from edge_sd.errors import InvalidRequest, choices
from edge_sd.files import write_atomically

from .answers import Problem, problems
from .failure import public
from .job import ID, new_id
from .service import Service

# The report's style and behaviour are inside it; it runs without an origin and can ask nobody for anything.
REPORT_CSP = (
    "sandbox allow-scripts; default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
)
Id = Annotated[str, PathField(pattern=r"^[0-9a-f]{24}$")]
State = Literal["running", "done", "failed", "stopped"]


class Ask(BaseModel):
    """Which variants are compared, and how thoroughly."""

    model_config = ConfigDict(extra="forbid")

    model: Annotated[str, Field(max_length=200)]
    variants: Annotated[list[Annotated[str, Field(max_length=200)]], Field(min_length=2, max_length=16)]
    prompts: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=2000, pattern=r"^[^\r\n]*$")]],
        Field(max_length=100, description="none is the standard set"),
    ] = []
    seeds: Annotated[int, Field(ge=1, le=16)] = 1
    rounds: Annotated[int, Field(ge=0, le=5)] = 1
    steps: Annotated[int, Field(ge=1, le=200)] | None = None


class Comparison(BaseModel):
    """`line` is the last that the command said."""

    id: str
    ask: Ask
    state: State
    created: float
    line: str


class Comparisons:
    """A folder of comparisons, and the process of the one that runs."""

    def __init__(self, service: Service) -> None:
        self.service, self.folder = service, service.store.folder.parent / "comparisons"
        self._lock = threading.Lock()
        self._running: tuple[str, subprocess.Popen[bytes]] | None = None
        service.on_stop(self.close)

    def start(self, ask: Ask) -> Comparison:
        """Begin one. Raises InvalidRequest where another runs, or for names that are not there."""
        bundle = self.service.engines.bundle(ask.model)
        for name in ask.variants:
            if name not in bundle.variants:
                raise InvalidRequest(f"{ask.model} has no variant {name[:80]!r}; valid: {choices(bundle.variants)}")
        with self._lock:
            if self._busy():
                raise InvalidRequest("a comparison is running; stop it first, or wait")
            id_ = new_id()
            home = self.folder / id_
            home.mkdir(parents=True, mode=0o700)
            record = {"created": time.time(), "ask": ask.model_dump()}
            write_atomically(home / "wish.json", json.dumps(record).encode())
            command = [sys.executable, "-m", "edge_sd", "compare", "run", str(bundle.root)]
            command += ["--report", str(home / "report"), "--variants", ",".join(ask.variants)]
            command += ["--seeds", str(ask.seeds), "--rounds", str(ask.rounds), "--swap", "0"]
            if ask.prompts:
                write_atomically(home / "prompts.txt", "\n".join(ask.prompts).encode())
                command += ["--prompts", str(home / "prompts.txt")]
            if ask.steps is not None:
                command += ["--steps", str(ask.steps)]
            with (home / "log.txt").open("wb") as log:
                process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log)
            self._running = (id_, process)
        return self.view(id_)

    def stop(self, id_: str) -> None:
        """End the process of one that runs; what it measured stays in its folder."""
        with self._lock:
            if self._running is not None and self._running[0] == id_ and self._busy():
                self._running[1].terminate()
                self._running[1].wait()

    def close(self) -> None:
        """End what runs."""
        if self._running is not None:
            self.stop(self._running[0])

    def all(self) -> list[Comparison]:
        """Newest first."""
        names = [home.name for home in self.folder.iterdir()] if self.folder.is_dir() else []
        found = []
        for name in sorted(filter(ID.fullmatch, names), reverse=True):
            if (self.folder / name / "wish.json").is_file():
                found.append(self.view(name))
        return found

    def view(self, id_: str) -> Comparison:
        """One of them."""
        home = self.folder / id_
        record: dict[str, Any] = json.loads((home / "wish.json").read_bytes())
        return Comparison(
            id=id_, ask=Ask(**record["ask"]), created=record["created"], state=self._state(id_), line=_last_line(home)
        )

    def report(self, id_: str) -> Path | None:
        """The page of one that is done."""
        path = self.folder / id_ / "report" / "report.html"
        return path if path.is_file() else None

    def _busy(self) -> bool:
        return self._running is not None and self._running[1].poll() is None

    def _state(self, id_: str) -> State:
        mine = self._running is not None and self._running[0] == id_
        if mine and self._busy():
            return "running"
        if self.report(id_) is not None:
            return "done"
        code = self._running[1].returncode if mine and self._running is not None else -1
        return "stopped" if code < 0 else "failed"


def _last_line(home: Path) -> str:
    try:
        with (home / "log.txt").open("rb") as log:
            log.seek(max(0, log.seek(0, 2) - 4000))
            lines = log.read().decode("utf-8", "replace").replace("\r", "\n").split("\n")
    except OSError:
        return ""
    return public(next((line for line in reversed(lines) if line.strip()), ""))


def router(comparisons: Comparisons) -> APIRouter:
    """The routes under /api/comparisons."""
    routes = APIRouter(prefix="/api/comparisons", tags=["comparisons"], responses=problems(Problem))

    def known(id_: str) -> str:
        if not any(each.id == id_ for each in comparisons.all()):
            raise HTTPException(404, "no such comparison")
        return id_

    @routes.get("")
    def rows() -> list[Comparison]:
        """All that were begun, newest first."""
        return comparisons.all()

    @routes.post("", status_code=202)
    def start(ask: Ask) -> Comparison:
        """Begin one; one runs at a time."""
        return comparisons.start(ask)

    @routes.post("/{id_}/stop")
    def stop(id_: Id) -> Comparison:
        """End it."""
        comparisons.stop(known(id_))
        return comparisons.view(id_)

    html: dict[int | str, dict[str, Any]] = {200: {"content": {"text/html": {"schema": {"type": "string"}}}}}

    @routes.get("/{id_}/report", response_class=FileResponse, responses=html)
    def report(id_: Id) -> Response:
        """Its page."""
        path = comparisons.report(known(id_))
        if path is None:
            raise HTTPException(404, "the comparison is not done")
        return FileResponse(path, media_type="text/html", headers={"content-security-policy": REPORT_CSP})

    return routes
