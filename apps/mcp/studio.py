"""Studio: what the tools do, without the protocol. Pictures are files of one folder; agents name them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_sd.errors import InvalidRequest
from edge_sd.images.grids import grid

from ..saving import Saver
from ..server.job import Job
from ..server.service import Service
from ..server.wish import Wish, decode_base64, open_given, png_base64

if TYPE_CHECKING:
    from PIL.Image import Image

    from edge_sd.pipeline.result import Picture

# Pixels of a preview's longer side. As base64 it costs an agent some thousand tokens, a full picture tens of thousands.
PREVIEW = 256
# Seconds between two looks at a job.
LOOK = 0.05
Progress = Callable[[float, str], Awaitable[None]]


@dataclass(frozen=True)
class Drawn:
    """A finished picture and its file."""

    picture: Picture
    path: Path

    def about(self) -> dict[str, Any]:
        """What an agent is told of it."""
        settings = self.picture.settings
        return {
            "name": self.path.name, "path": str(self.path), "seed": settings.seed, "prompt": settings.prompt,
            "width": settings.width, "height": settings.height, "steps": settings.steps, "model": self.picture.model,
            "variant": self.picture.variant, "device": self.picture.device,
        }  # fmt: skip


class Studio:
    """A service whose pictures are kept in `folder`; those in `sources` may be gone on from, too."""

    def __init__(self, service: Service, folder: Path, sources: Sequence[Path] = ()) -> None:
        self.service, self.folder = service, folder
        self._sources = [folder, *sources]

    async def draw(self, wish: Wish, progress: Progress) -> tuple[list[Drawn], Job]:
        """Draw a wish and keep its pictures. Cancelled, it stops within a step. Raises what is wrong with the wish."""
        job = await self.run(wish, progress)
        return [*await asyncio.to_thread(self._keep, job)], job

    async def run(self, wish: Wish, progress: Progress) -> Job:
        """The job of a wish, done."""
        job = await asyncio.to_thread(self.service.submit, wish, "mcp", False)
        said = ""
        try:
            while not job.ended.done():
                await asyncio.sleep(LOOK)
                told = f"step {job.step} of {job.total}" if job.state == "drawing" else job.state
                if told != said:
                    said = told
                    await progress(job.share, told)
        except BaseException:  # A cancelled task is one: nobody waits for the picture any more.
            self.service.cancel(job)
            raise
        job.check()
        return job

    def _keep(self, job: Job) -> list[Drawn]:
        count = len(job.drawn)
        with Saver(None, job.wish.prompt, count, folder=self.folder, say=False) as saver:
            saver.check()
            for n in range(count):
                saver.save(n, job.drawn[n])
        return [Drawn(job.drawn[n], path) for n, path in enumerate(saver.paths)]

    def given(self, picture: str, what: str) -> str:
        """A picture that an agent names, or sends as base64, as a wish carries it. Raises InvalidRequest."""
        found = self.find(picture)
        data = decode_base64(picture, f"{what}, which is no picture of this folder,") if found is None else _read(found)
        return png_base64(open_given(data, what))

    def open(self, picture: str) -> Path:
        """A picture's file. Raises InvalidRequest."""
        found = self.find(picture)
        if found is None:
            raise InvalidRequest(f"no picture {picture[:80]!r} in the folders of this server")
        return found

    def find(self, picture: str) -> Path | None:
        """A file in the folders that are let in, by its name or its path; None where it is none of them."""
        # Base64 of a picture is longer than any path.
        if len(picture) > 4096 or "\0" in picture:
            return None
        for folder in self._sources:
            home = os.path.realpath(folder)
            real = os.path.realpath(os.path.join(home, picture))
            if os.path.commonpath([home, real]) == home and os.path.isfile(real):
                return Path(real)
        return None


def preview(images: Sequence[Image]) -> bytes:
    """A small JPEG of a picture, or of several in rows."""
    image = images[0].copy() if len(images) == 1 else grid(images)
    image.thumbnail((PREVIEW, PREVIEW))
    buffer = BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"{path.name} cannot be read ({error.strerror})") from None
