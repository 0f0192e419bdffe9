"""A request becomes settings: the model's defaults filled in, pictures opened, and what it can't draw refused."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..bundle.bundle import ModelBundle
from ..bundle.parts import NET, SAFETY_CHECKER, TINY, home_of
from ..bundle.variants import Artifact
from ..components.base import Array
from ..components.controlnet import read_lines
from ..devices.plan import DevicePlan
from ..errors import InvalidRequest, choices
from ..images.canvas import Canvas, content_hash, grain, open_picture
from ..sampling.samplers import SAMPLERS
from ..text.prompt import take_loras
from .prompting import Wording
from .request import MAX_SEED, Request, Settings
from .sources import open_start

# Pixels a side that are decoded at once where memory is low.
LOW_TILE = 256


@dataclass(frozen=True)
class Source:
    """The pictures of a request: what it starts from, and the lines it follows, float32 [1, 3, H, W] in [0, 1]."""

    canvas: Canvas | None
    lines: NDArray[np.float32] | None


def steps_taken(settings: Settings) -> int:
    """How many of the steps are taken, counted as diffusers does."""
    return settings.steps if settings.strength is None else int(settings.steps * settings.strength)


@dataclass(frozen=True)
class Resolver:
    """What a model, where it is planned to run, makes of requests."""

    bundle: ModelBundle
    plan: DevicePlan
    wording: Wording
    low_memory: bool = False

    def resolve(self, request: Request) -> tuple[Settings, Source]:
        """Raises InvalidRequest for what this model can't draw, InvalidModel for files that are damaged."""
        defaults = self.bundle.defaults_of(self.plan.variant)
        limit, factor = defaults.max_side, self.bundle.facts.latents.factor
        opened = open_start(request)
        if opened is not None and request.width is None and request.height is None:
            width, height = opened[0].size(defaults.width * defaults.height, grain(defaults.width, factor), limit)
            defaults = replace(defaults, width=width, height=height)
        settings = request.resolve(defaults, secrets.randbelow(MAX_SEED + 2 - request.count))
        settings = self.worded(replace(settings, embeddings=self.wording.read(request)), request, settings.seed)
        settings = replace(settings, safety=self._safety(request.safety), decoder=self.decoder(request.decoder))
        if self.low_memory and settings.vae_tile is None:
            settings = replace(settings, vae_tile=LOW_TILE)
        self.wording.count(settings, self.plan.variant)  # A word that does not fit is reported here.
        for name, side, piece in zip(
            ("width", "height"), (settings.width, settings.height), settings.window, strict=True
        ):
            if piece > limit:
                raise InvalidRequest(f"{name} {piece} is beyond this model's limit of {limit}; larger ones need --tile")
            if side % factor:
                raise InvalidRequest(f"{name} {side} is not a multiple of {factor}, as this model needs")
        try:
            SAMPLERS[settings.sampler].levels(settings.schedule(self.bundle.facts.schedule), settings.steps)
        except ValueError as error:
            raise InvalidRequest(f"sampler {settings.sampler}: {error}") from error
        lines = None
        if request.control is not None:
            settings, lines = self._read_controls(request, settings)
        if self.bundle.facts.conditioning == "aesthetic" and request.image is None:
            raise InvalidRequest(
                f"{self.bundle.name} is a refiner: it goes on from an image, or from a base model that it is given to"
            )
        if self.bundle.facts.inpainting and request.mask is None and request.extend is None:
            raise InvalidRequest(
                f"{self.bundle.name} is a model for inpainting: it needs an image and a mask of what it is to draw"
            )
        if opened is None:
            return settings, Source(None, lines)
        self._need("vae_encoder", "an image")
        if not steps_taken(settings):
            raise InvalidRequest(
                f"strength {settings.strength:g} of {settings.steps} steps is less than one; give more of either"
            )
        start, hashes = opened
        canvas = start.canvas(settings.width, settings.height)
        settings = replace(settings, **hashes)
        if canvas.mask is not None:
            # A 128th of the picture's width: the four pixels at 512 that other programs have.
            blur = settings.width / 128 if request.mask_blur is None else request.mask_blur
            settings = replace(settings, mask_blur=blur)
        return settings, Source(canvas, lines)

    def _read_controls(self, request: Request, settings: Settings) -> tuple[Settings, Array]:
        """The settings with the pictures' hashes, and what the nets follow, three channels each."""
        hashes, lines = [], []
        for each in request.controls():
            self._need(each.part, "a control picture")
            drawing = open_picture(each.picture, "control picture")
            hashes.append(content_hash(drawing))
            lines.append(read_lines(drawing, settings.width, settings.height, each.reading))
        many = isinstance(request.control, (list, tuple))
        return replace(settings, control=tuple(hashes) if many else hashes[0]), np.concatenate(lines, axis=1)

    def _safety(self, wish: bool | None) -> bool | None:
        """Whether pictures are checked; None where the model has nothing to check them with."""
        there = SAFETY_CHECKER in self.artifacts(SAFETY_CHECKER)
        if wish and not there:
            raise InvalidRequest(f"{self.bundle.name} has no safety checker; convert a source that has one")
        return wish is not False if there else None

    def decoder(self, wish: str) -> str:
        """The decoder that is meant, "full" or "tiny". Raises InvalidRequest where there is no tiny one."""
        there = TINY in self.artifacts(TINY)
        if wish == "tiny" and not there:
            raise InvalidRequest(f"{self.bundle.name} has no tiny decoder; convert a source that has one in vae_tiny")
        return "tiny" if there and wish != "full" else "full"

    def worded(self, settings: Settings, request: Request, seed: int) -> Settings:
        """`settings` with the prompts, and the LoRAs that they name, of a template expanded with `seed`."""
        drawn = request.expanded(seed)
        prompt, loras = take_loras(drawn.prompt)[0], self.wording.read_loras(drawn)
        return replace(settings, prompt=prompt, negative=drawn.negative, loras=loras)

    def _need(self, part: str, what: str) -> None:
        if part not in (there := self.artifacts(part)):
            home, nets = self.plan.parts[home_of(part)].variant, [each for each in there if each.startswith(NET)]
            other = f"; it has: {choices(nets)}" if nets and part.startswith(NET) else ""
            raise InvalidRequest(f"{self.bundle.name}: variant {home} has no {part}, which {what} needs{other}")

    def artifacts(self, part: str) -> Mapping[str, Artifact]:
        """Those of the variant that a part is taken of."""
        return self.bundle.variant(self.plan.parts[home_of(part)].variant).artifacts
