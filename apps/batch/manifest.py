"""Manifest: what of a batch is done. A file of lines beside its pictures, each on the disk once it is written.

batch.jsonl    {"edge_sd_batch": 1, "seed": …}, then a line for each picture: its key, file, hash, seed, variant, …

A picture has its key in its name and is written whole before its line: if the line is missing, the picture is found by
its name. A line that a power cut tore is dropped. So no moment loses a picture, or has it drawn twice.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from edge_sd.errors import InvalidRequest, OutputError
from edge_sd.files import append_line, hash_file, is_partial, record_file, write_new
from edge_sd.images.files import FORMATS
from edge_sd.pipeline.control import Control
from edge_sd.pipeline.recorded import read_recorded
from edge_sd.pipeline.request import MAX_SEED, Request

from ..saving import stem_of
from .rows import Row

NAME = "batch.jsonl"
FORMAT = 1
# Hex digits of a key: among ten thousand pictures two are the same with a chance of 2e-7.
DIGITS = 12
# Letters of the prompt in a name.
STEM = 40


@dataclass(frozen=True)
class Job:
    """One picture of a row: its request with a definite seed, and the key that is equal for equal wishes alone."""

    row: Row
    key: str
    request: Request

    def name(self, ending: str) -> str:
        """The file's name: the row's number, the prompt, the key."""
        stem = stem_of(self.request.prompt)[:STEM].rstrip("-")
        return f"{self.row.number:04}-{stem}-{self.key}{ending}"


@dataclass(frozen=True)
class Done:
    """One picture that is drawn, as its line in the manifest."""

    key: str
    row: int
    file: str
    sha256: str
    bytes: int
    seed: int
    model: str
    model_hash: str
    variant: str
    device: str
    worker: str = ""


class Manifest:
    """The manifest of a folder. One process at a time may have it open (files.locked)."""

    def __init__(self, folder: Path) -> None:
        """Make the folder and its manifest, or go on with those that are there. Raises InvalidRequest, OutputError."""
        self.folder, self.path = folder, folder / NAME
        # A name for this run, and no other.
        self.run = secrets.token_hex(4)
        # Key -> what is done.
        self.done: dict[str, Done] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not self.path.exists():
                header = {"edge_sd_batch": FORMAT, "seed": secrets.randbelow(MAX_SEED)}
                write_new(self.path, json.dumps(header).encode() + b"\n")
            self._read()
            for debris in filter(is_partial, folder.iterdir()):
                debris.unlink(missing_ok=True)
        except InvalidRequest:
            raise  # It is a ValueError too.
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise OutputError(f"{folder} cannot hold a batch ({reason})") from error

    def _read(self) -> None:
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        try:
            header, *lines = (json.loads(line) for line in whole.splitlines())
            if header["edge_sd_batch"] != FORMAT:
                raise InvalidRequest(f"{self.path} is of format {header['edge_sd_batch']}; this version reads {FORMAT}")
            self._seed = int(header["seed"])
            self.done = {line["key"]: Done(**line) for line in lines}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            if isinstance(error, InvalidRequest):
                raise
            raise InvalidRequest(f"{self.path} is damaged ({error}); draw into another folder, or mend it") from error

    def jobs(self, rows: list[Row], about: dict[str, Any]) -> list[Job]:
        """One for each picture of each row. `about` is what else decides the pictures: model, variant, preset."""
        seen: dict[str, int] = {}
        found = []
        for row in rows:
            wish = json.dumps([_plain(row.fields), about], sort_keys=True)
            seen[wish] = seen.get(wish, 0) + 1
            # The same row twice is two pictures.
            key = hashlib.sha256(f"{wish}{seen[wish]}".encode()).hexdigest()
            request = row.request
            if request.seed is None:
                seed = int(hashlib.sha256(f"{self._seed} {key}".encode()).hexdigest(), 16)
                request = replace(request, seed=seed % (MAX_SEED + 2 - request.count))
            for n in range(request.count):
                digest = hashlib.sha256(f"{key} {n}".encode()).hexdigest()
                found.append(Job(row, digest[:DIGITS], request.nth(n)))
        return found

    def left(self, jobs: list[Job]) -> list[Job]:
        """Those that are still to be drawn. Pictures without a line get theirs; lines without a picture count for none.

        A line's file is looked for in the folder by its key alone: a manifest of a stranger names no other file.

        Raises InvalidRequest where a picture's name is taken by another file.
        """
        there = {path.stem[-DIGITS:]: path for path in self.folder.iterdir() if path.suffix in FORMATS}
        for job in jobs:
            known = self.done.get(job.key)
            if job.key in there and (known is None or known.file != there[job.key].name):
                self.add(self._found(job, there[job.key]))
            elif known is not None and job.key not in there:
                del self.done[job.key]
        return [job for job in jobs if job.key not in self.done]

    def _found(self, job: Job, path: Path) -> Done:
        """The line of a picture that was written when its process was killed."""
        recorded = read_recorded(path)
        if recorded.settings.get("seed") != job.request.seed:
            raise InvalidRequest(f"{path} has the name of a picture of this batch and is another; move it away")
        file = record_file(path)
        return Done(
            job.key, job.row.number, path.name, file.sha256, file.bytes, recorded.settings["seed"],
            recorded.model, recorded.model_hash, recorded.variant, recorded.device,
        )  # fmt: skip

    def add(self, done: Done) -> None:
        """Write a line; it is on the disk when this returns, and the picture is, too. Raises OutputError."""
        try:
            append_line(self.path, json.dumps(asdict(done)))
        except OSError as error:
            raise OutputError(f"{self.path} could not be written ({error.strerror})") from error
        self.done[done.key] = done


def _plain(value: Any) -> Any:
    """A request's field for JSON; a file is its path and its bytes' hash, so that another file is another picture."""
    if isinstance(value, Path):
        return [str(value), _hash(value) if value.is_file() else ""]
    if isinstance(value, Control):
        return _plain({name: getattr(value, name) for name in ("image", "weight", "start", "end", "reading", "net")})
    if isinstance(value, dict):
        return [[_plain(name), _plain(each)] for name, each in sorted(value.items(), key=str)]
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value


@lru_cache
def _hash(path: Path) -> str:
    return hash_file(path)
