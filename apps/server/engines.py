"""Engines: models that are loaded on demand, one queue before each, and released when idle or when memory is short."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from edge_sd import ModelBundle, Pipeline, Queue, Request
from edge_sd.errors import DeviceError, InvalidRequest, ModelNotFound, choices
from edge_sd.machine import this_machine
from edge_sd.pipeline.settings import Settings

LOG = logging.getLogger("edge_sd.server")
# Model, variant (None: the plan's choice), device, preset.
Key = tuple[str, str | None, str, str]


@dataclass
class Engine:
    """A pipeline with its queue. The pipeline is the queue's alone; `front` answers questions and loads nothing."""

    key: Key
    front: Pipeline
    pipeline: Pipeline | None = None
    queue: Queue | None = None
    used: float = field(default_factory=time.monotonic)
    flying: int = 0

    @property
    def loaded(self) -> bool:
        """Whether it may hold memory."""
        return self.queue is not None

    @property
    def need(self) -> int:
        """Bytes that the plan expects it to take."""
        return sum(self.front.plan.need.values())


class Engines:
    """The models that clients may name.

    offered   name -> folder, the default first
    idle      seconds without work after which a model is released; 0 is never
    free      bytes of memory that can be had now; 0 is unknown
    """

    def __init__(self, offered: Mapping[str, Path], idle: float = 600.0, free: Callable[[], int] | None = None) -> None:
        if not offered:
            raise ModelNotFound("no model is installed: edge-sd convert makes one, edge-sd models pull fetches one")
        self.offered, self.idle = dict(offered), idle
        self._free = free or (lambda: this_machine().free)
        self._engines: dict[Key, Engine] = {}
        self._lock = threading.RLock()

    @property
    def default(self) -> str:
        """The model that is drawn with where none is named."""
        return next(iter(self.offered))

    def names(self) -> list[str]:
        """What clients may ask for: NAME for the planned variant, and NAME:VARIANT."""
        found = []
        for name in self.offered:
            found += [name, *(f"{name}:{variant}" for variant in self.bundle(name).variants)]
        return found

    def bundle(self, name: str) -> ModelBundle:
        """A model by its name alone. Raises ModelNotFound."""
        if name not in self.offered:
            raise ModelNotFound(f"no model {name[:80]!r}; valid: {choices(self.offered)}")
        return ModelBundle.open(self.offered[name])

    def resolve(self, key: Key, request: Request) -> Settings:
        """What would be drawn. Raises what Pipeline.open and Pipeline.resolve raise; loads no weights."""
        with self._lock:
            return self._engine(key).front.resolve(request)

    def plan(self, key: Key) -> tuple[str, str]:
        """The device plan in a line, and in full."""
        with self._lock:
            plan = self._engine(key).front.plan
            return plan.summary(), plan.explain()

    def count_tokens(self, key: Key, prompt: str) -> int:
        """Tokens that the text encoder takes of a prompt: whole chunks, begin, end and padding included."""
        with self._lock:
            tokenizer = self._engine(key).front.wording.tokenizer()
            return sum(len(chunk.ids) for chunk in tokenizer.chunks(prompt))

    def acquire(self, key: Key) -> Engine:
        """The engine, ready to draw; others that are idle make room first where memory is short."""
        with self._lock:
            engine = self._engine(key)
            if engine.queue is None:
                self._make_room(engine)
                engine.pipeline = self._open(key)
                engine.queue = Queue(engine.pipeline)
            engine.used = time.monotonic()
            return engine

    def loaded(self) -> list[Engine]:
        """Those that hold memory."""
        with self._lock:
            return [engine for engine in self._engines.values() if engine.loaded]

    def release_idle(self) -> None:
        """Release what was not used for `idle` seconds."""
        if not self.idle:
            return
        limit = time.monotonic() - self.idle
        for engine in self.loaded():
            if not engine.flying and engine.used < limit:
                self._release(engine, "idle")

    def close(self) -> None:
        """Release all; what a queue is drawing is finished first."""
        for engine in self.loaded():
            self._release(engine, "stopping")

    def _engine(self, key: Key) -> Engine:
        if key not in self._engines:
            self._engines[key] = Engine(key, self._open(key))
        return self._engines[key]

    def _open(self, key: Key) -> Pipeline:
        model, variant, device, preset = key
        name = model or self.default
        if name not in self.offered:
            raise ModelNotFound(f"no model {name[:80]!r}; valid: {choices(self.offered)}")
        try:
            return Pipeline.open(self.offered[name], device, variant, preset=preset)
        except DeviceError as error:
            # Nothing is loaded yet: the device that was named is not here, or runs no variant.
            raise InvalidRequest(str(error)) from error

    def _make_room(self, wanted: Engine) -> None:
        idle = sorted((each for each in self.loaded() if not each.flying), key=lambda each: each.used)
        for engine in idle:
            free = self._free()
            if not free or free > wanted.need:
                return
            self._release(engine, "memory is short")

    def _release(self, engine: Engine, why: str) -> None:
        with self._lock:
            queue, pipeline, engine.queue, engine.pipeline = engine.queue, engine.pipeline, None, None
        LOG.info("released %s: %s", engine.key[0] or self.default, why)
        if queue is not None:
            queue.close()
        if pipeline is not None:
            pipeline.close()
