"""Artists, which draw: a variant through our pipeline, or torch float32 through diffusers' pipeline."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edge_sd.bundle.bundle import ModelBundle
from edge_sd.pipeline.pipeline import Pipeline
from edge_sd.pipeline.request import Request
from edge_sd.pipeline.settings import Settings
from edge_sd.sampling.samplers import SAMPLERS
from edge_sd.sampling.schedule import Level

from ..libraries import hush_libraries
from .plan import Artist


@dataclass(frozen=True)
class Drawing:
    """One picture, with its latents and times.

    latents   float32 [steps, C, h, w], after each step, as diffusers' scheduler of that name holds them
    pixels    uint8 [H, W, 3]
    steps     seconds of each step; the first holds the text encoder too
    decode    seconds
    """

    latents: NDArray[np.float32]
    pixels: NDArray[np.uint8]
    steps: list[float]
    decode: float


class Open(Protocol):
    """An artist ready to draw."""

    def prepare(self, request: Request) -> None:
        """Load all that `request` needs."""

    def draw(self, request: Request) -> Drawing: ...

    def about(self, request: Request) -> dict[str, Any]:
        """The device and the settings, for the report."""


def open_artist(artist: Artist, model: Path, weights: Path | None) -> Open:
    """Open one artist. Raises what Pipeline.open raises, or InvalidModel for damaged torch weights."""
    if artist.variant:
        return Ours(artist, model)
    assert weights is not None, "the plan has no torch artist without weights"
    return Diffusers(model, weights)


class Ours:
    """A variant, with one component out of another where the artist says so."""

    def __init__(self, artist: Artist, model: Path) -> None:
        self.pipeline = Pipeline.open(model, artist.device, artist.variant)
        # A device that fails is a row that says so, not pictures by another one.
        plan = replace(self.pipeline.plan, spares={})
        if artist.part:
            given = replace(plan.parts[artist.part], variant=artist.donor)
            plan = replace(plan, parts={**plan.parts, artist.part: given})
        self.pipeline.components.plan = plan

    def prepare(self, request: Request) -> None:
        self.pipeline.prepare(self.pipeline.resolve(request))

    def draw(self, request: Request) -> Drawing:
        settings = self.pipeline.resolve(request)
        schedule = settings.schedule(self.pipeline.bundle.facts.schedule)
        levels = SAMPLERS[settings.sampler].levels(schedule, settings.steps)
        latents: list[NDArray[np.float32]] = []
        seconds: list[float] = []
        started = time.perf_counter()
        for step in self.pipeline.steps(request):
            seconds.append(time.perf_counter() - started)
            latents.append(_as_diffusers(step.latents, settings.sampler, levels, step.index, step.total))
            started = time.perf_counter()
        pixels = self.pipeline.decode(step.latents, settings.decoder)
        return Drawing(np.concatenate(latents), pixels, seconds, time.perf_counter() - started)

    def about(self, request: Request) -> dict[str, Any]:
        plan = self.pipeline.plan
        others = [f"{part} on {p.device.name}" for part, p in plan.parts.items() if p.device != plan.device]
        device = ", ".join([plan.device.name, *others])
        return {"device": device, "settings": _shared(self.pipeline.resolve(request))}


def _as_diffusers(
    x: NDArray[np.float32], sampler: str, levels: list[Level], index: int, total: int
) -> NDArray[np.float32]:
    """x = x_0 + sigma eps after step `index`, as x_vp = alpha x where the scheduler of diffusers works in that."""
    if SAMPLERS[sampler].from_sigma or index == total - 1:  # The last latents are scaled already.
        return x
    # PNDM's first two evaluations reach the same level.
    reached = [levels[1]] * (total - len(levels) + 1) + levels[1:]
    return np.asarray(x * reached[index].alpha, np.float32)


def _shared(settings: Settings) -> dict[str, Any]:
    kept = ("width", "height", "steps", "guidance", "sampler")
    return {key: value for key, value in asdict(settings).items() if key in kept}


class Diffusers:
    """diffusers' StableDiffusionPipeline in float32 on the CPU, with its scheduler for the sampler of that name."""

    def __init__(self, model: Path, weights: Path) -> None:
        hush_libraries()
        import diffusers
        import torch

        self.bundle = ModelBundle.open(model)
        self.pipe = diffusers.StableDiffusionPipeline.from_pretrained(
            weights, torch_dtype=torch.float32, safety_checker=None, use_safetensors=True, local_files_only=True
        )
        self.pipe.set_progress_bar_config(disable=True)
        self.config = self.pipe.scheduler.config

    def prepare(self, request: Request) -> None:
        """The constructor has loaded everything."""

    def _settings(self, request: Request) -> Settings:
        return Settings.of(request, self.bundle.defaults, 0)

    def draw(self, request: Request) -> Drawing:
        import diffusers
        import torch

        settings = self._settings(request)
        sampler = SAMPLERS[settings.sampler]
        kind = getattr(diffusers, sampler.diffusers_class)
        options = sampler.diffusers_config(settings.schedule(self.bundle.facts.schedule))
        self.pipe.scheduler = kind.from_config(self.config, **options)
        latents: list[NDArray[np.float32]] = []
        ends = [time.perf_counter()]

        def keep(pipe: Any, step: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
            ends.append(time.perf_counter())
            latents.append(values["latents"].numpy().copy())
            return values

        with torch.no_grad():
            last = self.pipe(
                settings.prompt, negative_prompt=settings.negative, width=settings.width, height=settings.height,
                num_inference_steps=settings.steps, guidance_scale=settings.guidance, output_type="latent",
                generator=torch.Generator().manual_seed(settings.seed), callback_on_step_end=keep,
            ).images  # fmt: skip
            started = time.perf_counter()
            image = self.pipe.vae.decode(last / self.pipe.vae.config.scaling_factor).sample
            (picture,) = self.pipe.image_processor.postprocess(image, output_type="pil")
        seconds = list(_differences(ends))
        return Drawing(np.concatenate(latents), np.asarray(picture), seconds, time.perf_counter() - started)

    def about(self, request: Request) -> dict[str, Any]:
        return {"device": "cpu", "settings": _shared(self._settings(request))}


def _differences(times: list[float]) -> Iterator[float]:
    return (after - before for before, after in itertools.pairwise(times))
