"""The own API: the queue, its events, the history, and what there is to draw with. The page uses it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, HTTPException, Path, Query
from fastapi import Request as HttpRequest
from fastapi.responses import FileResponse, StreamingResponse
from pydantic import BaseModel, Field
from starlette.responses import Response

from edge_sd.pipeline.presets import PRESETS
from edge_sd.sampling.names import SIGMAS
from edge_sd.sampling.samplers import SAMPLERS

from .answers import Problem, problems, sse
from .events import Event
from .guard import COOKIE
from .job import Job
from .recall import recall
from .service import Service
from .wish import Base64, Wish, as_base64, decode_base64, loras_in

# Events that a slow listener may fall behind; after that it is told to read everything anew.
BACKLOG = 1000
# Seconds between comments that keep a silent stream open.
BEAT = 15.0
# In a model's folder: the words that it was taught.
WORDS = "words.json"
MAX_WORDS = 1 << 20

Id = Annotated[str, Path(pattern=r"^[0-9a-f]{24}$")]


class JobView(BaseModel):
    """A job as clients see it; `place` is how many come before it, `left` seconds to its end."""

    id: str
    state: Literal["waiting", "loading", "drawing", "done", "failed", "cancelled"]
    door: str
    wish: dict[str, Any]
    given: list[str]
    count: int
    done: int
    step: int
    total: int
    share: float
    left: float | None
    created: float
    started: float
    finished: float
    seconds: float
    plan: str
    notes: list[str]
    error: str
    pictures: list[int]
    settings: list[dict[str, Any]]
    deleted: bool
    place: int


class JobList(BaseModel):
    """Newest first; `more` says whether there are older ones."""

    jobs: list[JobView]
    more: bool


class VariantView(BaseModel):
    name: str
    backend: str
    precision: str
    bytes: int
    static: bool


class ModelView(BaseModel):
    name: str
    family: str
    license: str
    defaults: dict[str, Any]
    variants: list[VariantView]
    controlnet: bool
    inpainting: bool


class Offer(BaseModel):
    """All there is to choose from."""

    version: str
    models: list[ModelView]
    devices: list[dict[str, str]]
    samplers: list[dict[str, str]]
    sigmas: list[str]
    presets: list[str]
    loras: list[str]


class Words(BaseModel):
    """What a model was taught, as its words.json says; empty where it has none."""

    concepts: list[str] = []
    styles: list[str] = []
    backgrounds: list[str] = []
    pattern: str = ""


class Plan(BaseModel):
    """Where a model would be drawn, and why."""

    summary: str
    explanation: str


class Picture(BaseModel):
    """A picture to read."""

    image: Base64


class Recorded(BaseModel):
    """What a picture says of how it was made: `wish` holds the fields that can be asked for again.

    `reason` says why there is nothing, where there is nothing.
    """

    reason: str
    exact: bool
    model: str
    variant: str
    text: str
    wish: dict[str, Any]
    left_out: Annotated[list[str], Field(description="what it was made with and has to be given anew")]


def router(service: Service) -> APIRouter:
    """The routes under /api."""
    routes = APIRouter(prefix="/api", tags=["jobs"], responses=problems(Problem))
    _route_jobs(routes, service)
    _route_pictures(routes, service)
    _route_models(routes, service)
    return routes


def _view(service: Service, job: Job) -> JobView:
    return JobView(**job.view(), place=service.place(job))


def _known(service: Service, id_: str) -> Job:
    job = service.get(id_)
    if job is None:
        raise HTTPException(404, "no such job")
    return job


def _route_jobs(routes: APIRouter, service: Service) -> None:
    """The queue, the history, their pictures and events."""

    @routes.post("/jobs", status_code=202)
    def submit(wish: Wish) -> JobView:
        """Put a wish into the queue. It is drawn after a restart of the server too."""
        return _view(service, service.submit(wish))

    @routes.get("/jobs")
    def jobs(
        search: Annotated[str, Query(max_length=200, description="words of the prompt")] = "",
        before: Annotated[str, Query(pattern=r"^([0-9a-f]{24})?$", description="older than this id")] = "",
        limit: Annotated[int, Query(ge=1, le=500)] = 60,
        open_only: bool = False,
    ) -> JobList:
        """The queue and the history."""
        words = search.lower().split()
        found = [
            job for job in reversed(service.jobs())
            if job.keep and not job.deleted and not (before and job.id >= before)
            and not (open_only and job.ended.done()) and all(word in job.wish.prompt.lower() for word in words)
        ]  # fmt: skip
        return JobList(jobs=[_view(service, job) for job in found[:limit]], more=len(found) > limit)

    @routes.get("/jobs/{id_}")
    def job(id_: Id) -> JobView:
        """One job."""
        return _view(service, _known(service, id_))

    @routes.post("/jobs/{id_}/cancel")
    def cancel(id_: Id) -> JobView:
        """Stop a job: at once where it waits, within one step where it is drawn."""
        service.cancel(_known(service, id_))
        return _view(service, _known(service, id_))

    @routes.delete("/jobs/{id_}")
    def delete(id_: Id) -> JobView:
        """Take a job and its pictures out of the history; for a day it can be restored."""
        service.delete(_known(service, id_))
        return _view(service, _known(service, id_))

    @routes.post("/jobs/{id_}/restore")
    def restore(id_: Id) -> JobView:
        """Undo a deletion."""
        service.restore(_known(service, id_))
        return _view(service, _known(service, id_))


def _route_pictures(routes: APIRouter, service: Service) -> None:
    """Pictures of the history, and what happens while they are drawn."""

    @routes.get("/jobs/{id_}/pictures/{n}", response_class=FileResponse, responses=_PNG)
    def picture(id_: Id, n: Annotated[int, Path(ge=0, le=999)], download: bool = False) -> Response:
        """A picture, with its parameters inside."""
        path = service.store.picture(_known(service, id_), n)
        if path is None:
            raise HTTPException(404, "no such picture")
        name = f"edge-sd-{id_}-{n}.png" if download else None
        return FileResponse(
            path, media_type="image/png", filename=name, headers={"cache-control": "private, max-age=86400"}
        )

    @routes.get("/events", response_class=StreamingResponse, responses={200: {"content": {"text/event-stream": {}}}})
    async def events(previews: bool = False) -> Response:
        """Server-sent events of all jobs: state, step, picture, gone, and preview with a JPEG in base64."""
        return StreamingResponse(_events(service, previews), media_type="text/event-stream")


def _route_models(routes: APIRouter, service: Service) -> None:
    """What can be drawn and where, and what pictures say; the page's session."""

    @routes.get("/offer")
    def offer() -> Offer:
        """Models, devices, samplers, presets and LoRAs."""
        return _offer(service)

    @routes.get("/plan")
    def plan(
        model: Annotated[str, Query(max_length=200)] = "",
        variant: Annotated[str | None, Query(max_length=200)] = None,
        device: Annotated[str, Query(max_length=40)] = "auto",
        preset: Annotated[str, Query(max_length=40)] = "exact",
    ) -> Plan:
        """Where and why."""
        summary, explanation = service.engines.plan((model, variant or None, device, preset))
        return Plan(summary=summary, explanation=explanation)

    @routes.get("/words")
    def words(model: Annotated[str, Query(max_length=200)] = "") -> Words:
        """What a model knows."""
        path = service.engines.bundle(model or service.engines.default).root / WORDS
        if not path.is_file() or path.stat().st_size > MAX_WORDS:
            return Words()
        return Words.model_validate_json(path.read_bytes())

    @routes.post("/session", status_code=204)
    def session(request: HttpRequest) -> Response:
        """Take the token that was shown as Bearer into a cookie that only this page can send."""
        answer = Response(status_code=204)
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and token:
            answer.set_cookie(COOKIE, token.strip(), httponly=True, samesite="strict", path="/")
        return answer

    @routes.post("/recorded")
    def recorded(picture: Picture) -> Recorded:
        """Read the parameters inside a picture."""
        return Recorded(**recall(decode_base64(picture.image, "image")))


_PNG: dict[int | str, dict[str, Any]] = {
    200: {"content": {"image/png": {"schema": {"type": "string", "format": "binary"}}}}
}


async def _events(service: Service, previews: bool) -> AsyncIterator[bytes]:
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[Event | None] = asyncio.Queue()

    def on_event(event: Event | None) -> None:
        if event is None or queue.qsize() < BACKLOG:
            loop.call_soon_threadsafe(queue.put_nowait, event)

    with service.events.listening(on_event, previews):
        yield b": listening\n\n"
        while True:
            try:
                event = await asyncio.wait_for(queue.get(), BEAT)
            except asyncio.TimeoutError:
                yield b": still here\n\n"
                continue
            if event is None:
                return
            if event.kind == "preview":
                if previews:
                    yield sse({"id": event.job.id, "n": event.index, "jpeg": as_base64(event.image)}, "preview")
            else:
                yield sse({"n": event.index, "job": _view(service, event.job).model_dump()}, event.kind)


def _offer(service: Service) -> Offer:
    from edge_sd import __version__
    from edge_sd.devices.discovery import discover

    models = []
    for name in service.engines.offered:
        bundle = service.engines.bundle(name)
        defaults = bundle.defaults
        variants = [
            VariantView(name=key, backend=each.backend, precision=each.precision, bytes=each.size(), static=each.static)
            for key, each in bundle.variants.items()
        ]
        models.append(
            ModelView(
                name=name, family=bundle.facts.family, license=bundle.facts.license, variants=variants,
                defaults={"width": defaults.width, "height": defaults.height, "steps": defaults.steps,
                          "guidance": defaults.guidance, "sampler": defaults.sampler, "max_side": defaults.max_side},
                controlnet=any("controlnet" in each.artifacts for each in bundle.variants.values()),
                inpainting=bundle.facts.inpainting,
            )
        )  # fmt: skip
    devices = [
        {"name": each.name, "description": each.description, "backend": each.backend} for each in discover().devices
    ]
    return Offer(
        version=__version__, models=models, devices=devices,
        samplers=[{"name": name, "title": each.title} for name, each in SAMPLERS.items()],
        sigmas=list(SIGMAS), presets=list(PRESETS), loras=list(loras_in(service.lora_folder)),
    )  # fmt: skip
