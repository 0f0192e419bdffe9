"""Keeping: a drawn picture goes to the disk, then into the manifest, and is said."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edge_sd.errors import EdgeSDError, OutputError
from edge_sd.images.files import FORMATS, TooLongForExif, write

from ..terminal import say
from .manifest import Done, Job, Manifest

if TYPE_CHECKING:
    from edge_sd.pipeline.result import Result


@dataclass(frozen=True)
class Encoded:
    """A picture as its file's bytes, and what drew it. Workers of a cluster send these."""

    data: bytes
    ending: str
    sha256: str
    seed: int
    model: str
    model_hash: str
    variant: str
    device: str
    notes: tuple[str, ...] = ()
    worker: str = ""


def encode(result: Result, ending: str, worker: str = "") -> Encoded:
    """The one picture of `result`, as PNG where `ending` can't hold its texts."""
    (picture,) = result.pictures
    notes = list(result.notes)
    try:
        data = picture.encode(FORMATS[ending])
    except TooLongForExif as error:
        notes.append(f"{error}; saved as .png")
        ending, data = ".png", picture.encode("PNG")
    return Encoded(
        data, ending, hashlib.sha256(data).hexdigest(), picture.settings.seed, picture.model, picture.model_hash,
        picture.variant, picture.device, tuple(notes), worker,
    )  # fmt: skip


class Keeper:
    """Writes pictures and their lines; says each path as it is written, and each note once."""

    def __init__(self, manifest: Manifest, ending: str, silent: bool) -> None:
        self.manifest, self.ending, self.silent = manifest, ending, silent
        # Where -> why a row was not drawn.
        self.failed: dict[str, str] = {}
        self.notes: list[str] = []

    def keep(self, job: Job, result: Result) -> None:
        """Keep a picture that was drawn here. Raises OutputError."""
        self.keep_encoded(job, encode(result, self.ending))

    def keep_encoded(self, job: Job, found: Encoded) -> None:
        """Write the picture, then its line. A second one of the same job is dropped. Raises OutputError."""
        if job.key in self.manifest.done:
            return
        path = self.manifest.folder / job.name(found.ending)
        try:
            write(found.data, path, new=True)
        except FileExistsError:
            raise OutputError(f"{path} was written by another program meanwhile") from None
        done = Done(
            job.key, job.row.number, path.name, found.sha256, len(found.data), found.seed, found.model,
            found.model_hash, found.variant, found.device, found.worker,
        )  # fmt: skip
        self.manifest.add(done)
        for note in found.notes:
            self.note(note)
        if not self.silent:
            say(path)

    def fail(self, job: Job, error: EdgeSDError) -> None:
        """Say that a job could not be drawn. It has no line, so that the next run tries it again."""
        self.failed[job.row.where] = str(error)
        if not self.silent:
            say(f"failed: {job.row.where}: {error}", error=True)

    def note(self, note: str) -> None:
        """Say a note, once."""
        if note in self.notes:
            return
        self.notes.append(note)
        if not self.silent:
            say(f"note: {note}", error=True)
