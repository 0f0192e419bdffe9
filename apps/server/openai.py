"""The OpenAI Images API: generations, edits, models. Shapes as openai-python's types have them.

Fields that OpenAI lacks are taken beside its own, as `extra_body` of the client sends them: negative_prompt, steps,
guidance, seed, sampler, strength.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from io import BytesIO
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.responses import Response

from edge_sd.errors import InvalidRequest
from edge_sd.pipeline.request import MAX_PROMPT, MAX_SEED, MAX_STEPS

from .answers import OpenAIProblem, error_response, finished, problems, sse
from .events import Event
from .failure import describe, stopped
from .job import Job
from .service import Service
from .wish import MAX_REFERENCES, Wish, as_base64, open_given, open_raw, png_base64

if TYPE_CHECKING:
    from edge_sd.pipeline.result import Picture

# Likeness for speed, in OpenAI's words.
PRESETS = {"low": "fast", "medium": "balanced"}
KINDS = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}
# Hours for which the address of a picture holds, as at OpenAI.
HOURS = 1.0
MAX_IMAGES = 16


class FieldError(InvalidRequest):
    """A value that makes no sense, and the field it is in."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


class Common(BaseModel):
    """What generations and edits have in common."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    prompt: Annotated[str, Field(min_length=1, max_length=MAX_PROMPT)]
    model: Annotated[str, Field(max_length=200, description="NAME or NAME:VARIANT of /v1/models")] | None = None
    n: Annotated[int, Field(ge=1, le=10)] | None = 1
    size: Annotated[str, Field(pattern=r"^(auto|[0-9]{1,4}x[0-9]{1,4})$", description="auto, or WxH")] | None = "auto"
    quality: Literal["auto", "standard", "hd", "low", "medium", "high", "xhigh", "max"] | None = "auto"
    response_format: Literal["url", "b64_json"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = "png"
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    background: Literal["auto", "opaque", "transparent"] | None = "auto"
    user: Annotated[str, Field(max_length=1000)] | None = None
    safety_identifier: Annotated[str, Field(max_length=1000)] | None = None
    stream: bool | None = False
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = 0
    negative_prompt: Annotated[str, Field(max_length=MAX_PROMPT)] | None = None
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] | None = None
    guidance: Annotated[float, Field(ge=0, le=100)] | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    sampler: Annotated[str, Field(max_length=80)] | None = None

    def wish(self, **more: Any) -> Wish:
        """The same in our words. Raises FieldError for what this server can't do."""
        if self.background == "transparent":
            raise FieldError("background", "transparent pictures are not drawn here; valid: auto, opaque")
        if self.output_compression is not None and self.output_format == "png":
            raise FieldError("output_compression", "PNG has no compression to choose; it goes with jpeg and webp")
        if self.partial_images and not self.stream:
            raise FieldError("partial_images", "partial images are sent in a stream: set stream to true")
        name, _, variant = (self.model or "").partition(":")
        width, height = _size(self.size)
        given = {"negative": self.negative_prompt, "steps": self.steps, "guidance": self.guidance, "seed": self.seed,
                 "sampler": self.sampler, "width": width, "height": height, **more}  # fmt: skip
        return Wish(
            prompt=self.prompt, model=name, variant=variant or None, count=self.n or 1,
            preset=PRESETS.get(self.quality or "", "exact"),
            **{key: value for key, value in given.items() if value is not None},
        )  # fmt: skip

    def notes(self) -> list[str]:
        """What has no effect here, by name."""
        return []


class Generation(Common):
    """The body of POST /v1/images/generations."""

    moderation: Literal["auto", "low"] | None = None
    style: Literal["vivid", "natural"] | None = None

    def notes(self) -> list[str]:
        told = [("moderation", self.moderation), ("style", self.style)]
        return [f"{name} has no effect here" for name, value in told if value is not None]


class Edit(Common):
    """The text fields of POST /v1/images/edits."""

    strength: Annotated[float, Field(gt=0, le=1)] | None = None
    input_fidelity: Literal["high", "low"] | None = None

    def notes(self) -> list[str]:
        return ["input_fidelity has no effect here: strength has"] if self.input_fidelity is not None else []


class Datum(BaseModel):
    b64_json: str | None = None
    url: str | None = None
    revised_prompt: str | None = None


class TokensDetails(BaseModel):
    image_tokens: int = 0
    text_tokens: int = 0


class Usage(BaseModel):
    """The prompt's tokens; a picture of diffusion is not made of tokens."""

    input_tokens: int
    input_tokens_details: TokensDetails
    output_tokens: int = 0
    total_tokens: int


class Images(BaseModel):
    """`notes` is ours: what had no effect, and what the device plan did on the way."""

    created: int
    data: list[Datum]
    background: Literal["opaque"] = "opaque"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    size: str
    usage: Usage
    notes: list[str] = []


class ModelRow(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "edge-sd"


class ModelRows(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelRow]


def _size(size: str | None) -> tuple[int | None, int | None]:
    if size is None or size == "auto":
        return None, None
    width, height = map(int, size.split("x"))
    for side in (width, height):
        if side % 8 or not 8 <= side <= 4096:
            raise FieldError("size", f"size {size}: {side} is not a multiple of 8 from 8 to 4096")
    return width, height


def router(service: Service) -> APIRouter:
    """The routes, all errors in OpenAI's shape."""
    routes = APIRouter(prefix="/v1", tags=["OpenAI"], responses=problems(OpenAIProblem))

    @routes.get("/models")
    def models() -> ModelRows:
        """Models, and each variant of them as NAME:VARIANT."""
        return ModelRows(data=[ModelRow(id=name) for name in service.engines.names()])

    @routes.get("/models/{name:path}")
    def model(name: str) -> ModelRow:
        """One of them."""
        if name not in service.engines.names():
            service.engines.bundle(name.partition(":")[0])
            raise FieldError("model", "the model has no such variant")
        return ModelRow(id=name)

    streams: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}

    @routes.post("/images/generations", response_model=Images, responses=streams)
    async def generations(body: Generation, request: HttpRequest) -> Any:
        """Draw pictures."""
        return await _answer(service, request, body, body.wish, "image_generation")

    form = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _edit_schema()}}}}

    @routes.post("/images/edits", response_model=Images, responses=streams, openapi_extra=form)
    async def edits(request: HttpRequest) -> Any:
        """Draw a picture anew, or only where the mask is transparent; FLUX.2 klein refers to several."""
        async with request.form(max_files=MAX_IMAGES + 1, max_fields=40, max_part_size=1 << 17) as found:
            body, given = _read_form(found)
            files = {name: [await file.read() for file in several] for name, several in given.items()}

        def wish() -> Wish:
            name = (body.model or "").partition(":")[0] or service.engines.default
            refers = service.engines.bundle(name).facts.refers
            return body.wish(**(_references if refers else _pictures)(files, body.strength))

        return await _answer(service, request, body, wish, "image_edit")

    return routes


def _edit_schema() -> dict[str, Any]:
    schema = Edit.model_json_schema()
    file = {"type": "string", "format": "binary"}
    several = {"type": "array", "items": file, "minItems": 1, "maxItems": MAX_IMAGES}
    schema["properties"] |= {"image": {"anyOf": [file, several]}, "mask": file}
    schema["required"] = [*schema["required"], "image"]
    return schema


def _read_form(form: FormData) -> tuple[Edit, dict[str, list[UploadFile]]]:
    """Text fields and files of the form. Raises FieldError."""
    texts: dict[str, Any] = {}
    files: dict[str, list[UploadFile]] = {}
    for key, value in form.multi_items():
        name = key.removesuffix("[]")
        if isinstance(value, UploadFile) != (name in ("image", "mask")):
            raise FieldError(name[:40], f"{name[:40]} has to be {'a file' if name in ('image', 'mask') else 'text'}")
        if name in texts or (name in files and name != "image"):
            raise FieldError(name[:40], f"{name[:40]} is given twice")
        if isinstance(value, UploadFile):
            files.setdefault(name, []).append(value)
        else:
            texts[name] = value
    if "image" not in files:
        raise FieldError("image", "there is no image to edit")
    try:
        return Edit.model_validate_strings(texts), files
    except ValidationError as error:
        first = error.errors()[0]
        param = ".".join(map(str, first["loc"]))[:100]
        raise FieldError(param, f"{param}: {first['msg']}") from None


def _references(files: dict[str, list[bytes]], strength: float | None) -> dict[str, Any]:
    """The pictures of an edit as those that its prompt refers to. Raises FieldError."""
    for name, value in (("mask", files.get("mask")), ("strength", strength)):
        if value is not None:
            raise FieldError(name, f"this model draws all anew and refers to the images: it takes no {name}")
    if len(files["image"]) > MAX_REFERENCES:
        raise FieldError("image", f"there are {len(files['image'])} images; at most {MAX_REFERENCES} are taken")
    return {"references": [png_base64(open_given(each, "image")) for each in files["image"]]}


def _pictures(files: dict[str, list[bytes]], strength: float | None) -> dict[str, Any]:
    """The fields of a wish that hold pictures. OpenAI's mask is transparent where it is drawn anew."""
    if len(files["image"]) > 1:
        raise FieldError("image", "several pictures cannot be joined into one by this model; give one image")
    image = open_given(files["image"][0], "image")
    given: dict[str, Any] = {"image": png_base64(image), "strength": strength}
    if "mask" in files:
        mask = open_raw(files["mask"][0], "mask")
        if mask.mode not in ("RGBA", "LA", "PA") and "transparency" not in mask.info:
            raise FieldError("mask", "the mask has no transparency, which says where the image is drawn anew")
        alpha = mask.convert("RGBA").getchannel("A")
        given["mask"] = png_base64(alpha.point([255] + [0] * 255))
    return given


async def _answer(service: Service, request: HttpRequest, body: Common, wish: Any, kind: str) -> Any:
    by_url = body.response_format == "url"
    if by_url and body.stream:
        raise FieldError("response_format", "a stream carries b64_json")

    def submit() -> Job:
        return service.submit(
            wish(), "openai", keep=by_url, previews=body.partial_images or 0, hours=HOURS if by_url else 0
        )

    if body.stream:
        return await _stream(service, request, body, submit, kind)
    job = await asyncio.to_thread(submit)
    await finished(request, service, job)
    return await asyncio.to_thread(_images, service, request, body, job)


def _images(service: Service, request: HttpRequest, body: Common, job: Job) -> Images:
    data = []
    for n in range(job.wish.count):
        if job.keep:
            data.append(Datum(url=f"{request.base_url}api/jobs/{job.id}/pictures/{n}"))
        else:
            data.append(Datum(b64_json=as_base64(_encoded(job.drawn[n], body))))
    first = job.settings[0]
    size = f"{first['width']}x{first['height']}"
    notes = [*body.notes(), *job.notes]
    kind = "png" if job.keep else body.output_format or "png"
    if job.keep and body.output_format not in (None, "png"):
        notes.append("pictures at an address are PNG; other formats come as b64_json")
    return Images(
        created=int(job.created), data=data, output_format=kind, size=size, usage=_usage(service, job), notes=notes
    )


def _encoded(picture: Picture, body: Common) -> bytes:
    quality = 95 if body.output_compression is None else max(1, body.output_compression)
    return picture.encode(KINDS[body.output_format or "png"], quality)


def _usage(service: Service, job: Job) -> Usage:
    tokens = service.engines.count_tokens(job.key, job.wish.prompt)
    return Usage(input_tokens=tokens, input_tokens_details=TokensDetails(text_tokens=tokens), total_tokens=tokens)


async def _stream(service: Service, request: HttpRequest, body: Common, submit: Any, kind: str) -> Response:
    """Server-sent events; what is wrong with the request itself is answered before the stream begins."""
    loop = asyncio.get_running_loop()
    events: asyncio.Queue[Event | None] = asyncio.Queue()

    def on_event(event: Event | None) -> None:
        loop.call_soon_threadsafe(events.put_nowait, event)

    listening = service.events.listening(on_event)
    listening.__enter__()
    try:
        job = await asyncio.to_thread(submit)
    except BaseException:  # A cancelled task is one. No stream begins, so nothing else ends the listening.
        listening.__exit__(None, None, None)
        raise

    async def sent() -> AsyncIterator[bytes]:
        index = 0
        try:
            while True:
                event = await events.get()
                if event is None:
                    raise stopped()
                if event.job is job and event.kind == "state" and job.ended.done():
                    break
                if event.job is not job:
                    continue
                if event.kind == "preview":
                    image = await asyncio.to_thread(_converted, event.image, body)
                    yield sse({**_about(body, job, kind, "partial_image", image), "partial_image_index": index})
                    index += 1
                elif event.kind == "picture":
                    image = await asyncio.to_thread(_encoded, job.drawn[event.index], body)
                    usage = await asyncio.to_thread(_usage, service, job)
                    done = _about(body, job, kind, "completed", image)
                    yield sse({**done, "usage": usage.model_dump(), "notes": [*body.notes(), *job.notes]})
                    index = 0
            job.check()
        except Exception as error:  # The stream has begun: a bug's error is an event of it, too.
            answer = json.loads(bytes(error_response("/v1/", describe(error)).body))
            yield sse(answer, "error")
        finally:
            listening.__exit__(None, None, None)
            service.cancel(job)
        yield b"data: [DONE]\n\n"

    return StreamingResponse(sent(), media_type="text/event-stream", headers={"x-accel-buffering": "no"})


def _converted(jpeg: bytes, body: Common) -> bytes:
    """A preview in the format that was asked for."""
    if body.output_format == "jpeg":
        return jpeg
    from PIL import Image

    buffer = BytesIO()
    Image.open(BytesIO(jpeg)).save(buffer, KINDS[body.output_format or "png"])
    return buffer.getvalue()


def _about(body: Common, job: Job, kind: str, what: str, image: bytes) -> dict[str, Any]:
    shown = job.settings[-1] if job.settings else {}
    size = f"{shown['width']}x{shown['height']}" if shown else body.size or "auto"
    quality = body.quality if body.quality in ("low", "medium", "high", "xhigh", "max") else "auto"
    return {
        "type": f"{kind}.{what}", "b64_json": as_base64(image), "background": "opaque",
        "created_at": int(job.created), "output_format": body.output_format or "png", "quality": quality, "size": size,
    }  # fmt: skip
