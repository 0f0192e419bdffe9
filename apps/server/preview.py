"""Previews of a picture that is being drawn: what the sampler predicts so far, decoded."""

from __future__ import annotations

import time
from io import BytesIO
from typing import TYPE_CHECKING

from .engines import Engine
from .job import Job

if TYPE_CHECKING:
    from edge_sd.sampling.samplers import Step

# A preview is made only when this many times its own cost has passed since the last one.
PAUSE = 8.0


class Previews:
    """Decides which steps of a job get one, and makes it with the model's tiny decoder where it has one."""

    def __init__(self, job: Job, engine: Engine) -> None:
        self._job, self._engine = job, engine
        self._next, self._made = 0.0, 0

    def of(self, n: int, step: Step, watched: bool) -> bytes | None:
        """A JPEG of `step`, if its client asked for one now, or someone watches and it is cheap enough."""
        if step.index + 1 == step.total:
            return None
        due = step.index + 1 in _evenly(self._job.previews, step.total)
        if not due and not (watched and time.perf_counter() >= self._next):
            return None
        started = time.perf_counter()
        image = self._decode(step)
        if self._made:
            # The first one loads the decoder, which says nothing of the others.
            self._next = time.perf_counter() + PAUSE * (time.perf_counter() - started)
        self._made += 1
        return image

    def _decode(self, step: Step) -> bytes:
        from PIL import Image

        pipeline = self._engine.pipeline
        assert pipeline is not None, "it is drawing"
        buffer = BytesIO()
        Image.fromarray(pipeline.decode(step.denoised, "auto")).save(buffer, "JPEG", quality=85)
        return buffer.getvalue()


def _evenly(count: int, total: int) -> set[int]:
    """The steps, counted from 1, after which `count` previews divide `total` steps evenly."""
    return {max(1, round(total * k / (count + 1))) for k in range(1, count + 1)}
