"""AUTOMATIC1111's API, as far as real clients call it: Open WebUI, SillyTavern, webuiapi and their like."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from pydantic import BaseModel

from edge_sd.sampling.names import SIGMAS
from edge_sd.sampling.samplers import SAMPLERS

from . import recall
from .a1111_forms import CONTROLNET, READINGS, Body, ImageToImage, Options, TextToImage
from .answers import A1111Problem, finished, problems
from .failure import JobCancelled
from .job import Job
from .service import Service
from .wish import Base64, as_base64, decode_base64, loras_in

SIGMA_LABELS = {"sgm_uniform": "SGM Uniform"}


class Drawn(BaseModel):
    """`info` is JSON in a string; its `edge_sd_notes` say what had no effect."""

    images: list[str] | None
    parameters: dict[str, Any]
    info: str


class ProgressState(BaseModel):
    skipped: bool = False
    interrupted: bool = False
    stopping_generation: bool = False
    job: str = ""
    job_count: int = 0
    job_timestamp: str = "0"
    job_no: int = 0
    sampling_step: int = 0
    sampling_steps: int = 0


class Progress(BaseModel):
    progress: float = 0.0
    eta_relative: float = 0.0
    state: ProgressState = ProgressState()
    current_image: str | None = None
    textinfo: str | None = None


class ModelItem(BaseModel):
    title: str
    model_name: str
    hash: str | None = None
    sha256: str | None = None
    filename: str
    config: str | None = None


class SamplerItem(BaseModel):
    name: str
    aliases: list[str]
    options: dict[str, str] = {}


class SchedulerItem(BaseModel):
    name: str
    label: str
    aliases: list[str] | None = None
    default_rho: float = -1
    need_inner_model: bool = False


class UpscalerItem(BaseModel):
    name: str
    model_name: str | None = None
    model_path: str | None = None
    model_url: str | None = None
    scale: float | None = None


class LoraItem(BaseModel):
    name: str
    alias: str
    path: str
    metadata: dict[str, Any] = {}


class PngInfoRequest(BaseModel):
    image: Base64


class PngInfo(BaseModel):
    info: str
    items: dict[str, Any]
    parameters: dict[str, Any]


@dataclass
class _Door:
    """The service as this API shows it: one set of options for all clients."""

    service: Service
    options: Options

    @property
    def jobs(self) -> list[Job]:
        """Those of this API that are not done, in their order."""
        return [job for job in self.service.jobs() if job.door == "a1111" and not job.ended.done()]

    async def draw(self, request: HttpRequest, body: Body) -> Drawn:
        """Draw, and answer when all pictures are there or the job was interrupted."""

        def submit() -> Job:
            changed = self.options.changed(body.override_settings or {})
            wish = body.wish(self.options)
            job = self.service.submit(wish, "a1111", keep=bool(body.save_images))
            if body.override_settings and body.override_settings_restore_afterwards is False:
                self.options = changed
            return job

        job = await asyncio.to_thread(submit)
        try:
            await finished(request, self.service, job)
        except JobCancelled:
            if await request.is_disconnected():
                raise
        return await asyncio.to_thread(self._drawn, job, body)

    def _drawn(self, job: Job, body: Body) -> Drawn:
        images = None
        if body.send_images is not False:
            images = [as_base64(data) for data in self.service.pictures(job)]
        echo = body.model_dump()
        if not echo.get("include_init_images"):
            echo = {name: value for name, value in echo.items() if name not in ("init_images", "mask")}
        return Drawn(images=images, parameters=echo, info=json.dumps(_info(job, body)))

    def progress(self, with_image: bool) -> Progress:
        """Of the job of this API that is being drawn; nothing but zeros where there is none."""
        jobs = self.jobs
        if not jobs:
            return Progress()
        job = jobs[0]
        if with_image:
            self.service.events.watch(10.0)
        state = ProgressState(
            interrupted=job.cancelling, job=job.id, job_count=len(jobs), job_no=0, sampling_step=job.step,
            job_timestamp=time.strftime("%Y%m%d%H%M%S", time.localtime(job.created)), sampling_steps=job.total,
        )  # fmt: skip
        image = as_base64(job.preview) if with_image and job.preview else None
        text = {"waiting": "Waiting", "loading": "Compiling or loading the model"}.get(job.state)
        # A client that waits for 0.0 waits for the end.
        share = max(job.share, 0.001)
        return Progress(
            progress=share, eta_relative=job.left(time.time()) or 0.0, state=state, current_image=image, textinfo=text
        )


def _info(job: Job, body: Body) -> dict[str, Any]:
    """AUTOMATIC1111's account of the pictures."""
    rows = job.settings
    first = rows[0] if rows else {}
    prompts = [row["prompt"] for row in rows]
    negatives = [row["negative"] for row in rows]
    return {
        "prompt": job.wish.prompt, "all_prompts": prompts, "negative_prompt": job.wish.negative,
        "all_negative_prompts": negatives, "seed": first.get("seed", job.wish.seed),
        "all_seeds": [row["seed"] for row in rows], "subseed": first.get("variation_seed"),
        "all_subseeds": [row["variation_seed"] for row in rows], "subseed_strength": job.wish.variation_strength,
        "width": first.get("width"), "height": first.get("height"), "cfg_scale": first.get("guidance"),
        "steps": first.get("steps"), "sampler_name": SAMPLERS[first["sampler"]].title if first else None,
        "batch_size": body.batch_size or 1, "restore_faces": False, "sd_model_name": job.wish.model,
        "sd_model_hash": first.get("model_hash"), "denoising_strength": first.get("strength"),
        "extra_generation_params": {}, "index_of_first_image": 0, "infotexts": [row["infotext"] for row in rows],
        "styles": [], "job_timestamp": time.strftime("%Y%m%d%H%M%S", time.localtime(job.created)),
        "clip_skip": first.get("clip_skip", 1), "interrupted": job.state == "cancelled",
        "edge_sd_notes": [*body.notes(), *job.notes], "edge_sd_plan": job.plan,
    }  # fmt: skip


def router(service: Service) -> APIRouter:
    """The routes under /sdapi/v1 and the two of ControlNet's extension that list what there is."""
    routes = APIRouter(tags=["AUTOMATIC1111"], responses=problems(A1111Problem))
    door = _Door(service, Options(service.engines.names(), service.engines.default))

    @routes.post("/sdapi/v1/txt2img")
    async def txt2img(body: TextToImage, request: HttpRequest) -> Drawn:
        """Draw pictures."""
        return await door.draw(request, body)

    @routes.post("/sdapi/v1/img2img")
    async def img2img(body: ImageToImage, request: HttpRequest) -> Drawn:
        """Draw a picture anew, or what of it is under the mask."""
        return await door.draw(request, body)

    @routes.get("/sdapi/v1/progress")
    def progress(skip_current_image: bool = False) -> Progress:
        """How far the job is that is being drawn, of those that came by this API."""
        return door.progress(not skip_current_image)

    @routes.post("/sdapi/v1/interrupt")
    def interrupt() -> dict[str, str]:
        """Stop the job that is being drawn, of those that came by this API; its client gets what is finished."""
        for job in door.jobs[:1]:
            service.cancel(job)
        return {}

    @routes.get("/sdapi/v1/options")
    def options() -> dict[str, Any]:
        """What can be set."""
        return door.options.view()

    @routes.post("/sdapi/v1/options")
    def set_options(body: dict[str, Any]) -> None:
        """Set the model, or the text encoder's layer, for requests that say nothing of them."""
        door.options = door.options.changed(body)

    @routes.post("/sdapi/v1/png-info")
    def png_info(body: PngInfoRequest) -> PngInfo:
        """The parameters inside a picture."""
        found = recall.read(decode_base64(body.image, "image"))
        return PngInfo(info=found.text, items={"parameters": found.text}, parameters=found.settings)

    _lists(routes, service)
    return routes


def _lists(routes: APIRouter, service: Service) -> None:
    """What there is to choose from. What is not offered is an empty list."""

    @routes.get("/sdapi/v1/sd-models")
    def models() -> list[ModelItem]:
        return [ModelItem(title=name, model_name=name, filename=name) for name in service.engines.names()]

    @routes.get("/sdapi/v1/samplers")
    def samplers() -> list[SamplerItem]:
        return [SamplerItem(name=each.title, aliases=[name]) for name, each in SAMPLERS.items()]

    @routes.get("/sdapi/v1/schedulers")
    def schedulers() -> list[SchedulerItem]:
        rows = [SchedulerItem(name=name, label=SIGMA_LABELS.get(name, name.title())) for name in SIGMAS]
        return [SchedulerItem(name="automatic", label="Automatic"), *rows]

    @routes.get("/sdapi/v1/upscalers")
    def upscalers() -> list[UpscalerItem]:
        return [UpscalerItem(name="None", scale=4)]

    @routes.get("/sdapi/v1/loras")
    def loras() -> list[LoraItem]:
        return [LoraItem(name=name, alias=name, path=path.name) for name, path in loras_in(service.lora_folder).items()]

    @routes.get("/sdapi/v1/scripts")
    def scripts() -> dict[str, list[str]]:
        return {"txt2img": ["controlnet"], "img2img": ["controlnet"]}

    @routes.get("/sdapi/v1/embeddings")
    def embeddings() -> dict[str, dict[str, Any]]:
        return {"loaded": {}, "skipped": {}}

    @routes.get("/controlnet/model_list")
    def controlnets() -> dict[str, list[str]]:
        return {"model_list": [CONTROLNET]}

    @routes.get("/controlnet/module_list")
    def modules() -> dict[str, list[str]]:
        return {"module_list": list(READINGS)}

    def nothing() -> list[dict[str, Any]]:
        return []

    for name in ("latent-upscale-modes", "sd-vae", "prompt-styles", "face-restorers", "hypernetworks", "script-info"):
        routes.add_api_route(f"/sdapi/v1/{name}", nothing, operation_id=name.replace("-", "_"))
