"""A request becomes settings: the model's defaults filled in, pictures opened, and what it can't draw refused."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from ..bundle.bundle import ModelBundle
from ..bundle.facts import Defaults
from ..bundle.parts import DENOISERS, NET, SAFETY_CHECKER, TINY, home_of
from ..bundle.variants import Artifact
from ..components.base import Array
from ..devices.plan import DevicePlan
from ..errors import InvalidRequest, choices
from ..images.canvas import Canvas, Start, content_hash, grain, proportioned
from ..images.lines import read_lines
from ..images.opening import open_picture
from ..text.prompt import take_loras
from ..text.schedule import composed
from .prompting import Wording
from .references import Shown, encoder_of, open_references
from .request import MAX_SEED, Request
from .run import Run, Source
from .settings import IMAGE_GUIDANCE, REFERENCE_WEIGHT, Settings
from .sources import open_start

# Pixels a side that are decoded at once where memory is low.
LOW_TILE = 256


@dataclass(frozen=True)
class Resolver:
    """What a model, where it is planned to run, makes of requests."""

    bundle: ModelBundle
    plan: DevicePlan
    wording: Wording
    low_memory: bool = False

    def resolve(self, request: Request) -> Run:
        """Raises InvalidRequest for what this model can't draw, InvalidModel for files that are damaged."""
        facts, defaults = self.bundle.facts, self.bundle.defaults_of(self.plan.variant)
        start, references = open_start(request), self._read_references(request)
        if references and facts.refers:
            defaults = self._sized(defaults, references[0])
        if start is not None and request.width is None and request.height is None:
            multiple = grain(defaults.width, facts.grain)
            width, height = start[0].size(defaults.width * defaults.height, multiple, defaults.max_side)
            defaults = replace(defaults, width=width, height=height)
        settings = Settings.of(request, defaults, secrets.randbelow(MAX_SEED + 2 - request.count))
        settings = self.worded(replace(settings, embeddings=self.wording.read(request)), request, settings.seed)
        settings = replace(settings, safety=self._safety(request.safety), decoder=self.decoder(settings.decoder))
        if self.low_memory and settings.vae_tile is None:
            settings = replace(settings, vae_tile=LOW_TILE)
        self.wording.count(settings, self.plan.variant)  # A word that does not fit is reported here.
        self._check_parts(settings)
        self._check_size(settings, defaults.max_side)
        self._check_task(request)
        settings = self._instructed(settings, request)
        settings = self._referring(settings, references)
        settings, lines = self._read_controls(settings)
        canvas = None
        if start is not None:
            settings, canvas = self._read_start(settings, request, *start)
        seen, cuts = tuple(each.pixels for each in references), tuple(each.note for each in references if each.note)
        return Run.of(request, settings, Source(canvas, lines, seen, cuts), facts)

    def _check_parts(self, settings: Settings) -> None:
        """Refuse AND where there is no negative prompt to compose from, or another number of parts to go towards."""
        if settings.weights != (1.0,) and self.bundle.facts.takes_guidance:
            raise InvalidRequest(f"AND needs a negative prompt, which {self.bundle.name} does not take")
        if settings.toward is not None and len(composed(settings.toward)) != len(settings.weights):
            raise InvalidRequest("both prompts need as many parts between ANDs to go from one to the other")

    def _check_size(self, settings: Settings, limit: int) -> None:
        multiple = self.bundle.facts.grain
        for name, side, piece in zip(
            ("width", "height"), (settings.width, settings.height), settings.window, strict=True
        ):
            if piece > limit:
                raise InvalidRequest(f"{name} {piece} is beyond this model's limit of {limit}; larger ones need --tile")
            if side % multiple:
                raise InvalidRequest(f"{name} {side} is not a multiple of {multiple}, as this model needs")
            if piece % multiple:
                raise InvalidRequest(f"tile {piece} is not a multiple of {multiple}, as this model needs")

    def _check_task(self, request: Request) -> None:
        """Refuse a request without the pictures that this model can't do without, or with one that it can't take."""
        if self.bundle.facts.text_only and request.image is not None:
            other = ", but reference pictures" if self.bundle.facts.refers else ""
            raise InvalidRequest(f"{self.bundle.name} draws from text alone: it takes no image to go on from{other}")
        if self.bundle.facts.conditioning == "aesthetic" and request.image is None:
            raise InvalidRequest(
                f"{self.bundle.name} is a refiner: it goes on from an image, or from a base model that it is given to"
            )
        if self.bundle.facts.inpainting and request.mask is None and request.extend is None:
            raise InvalidRequest(
                f"{self.bundle.name} is a model for inpainting: it needs an image and a mask of what it is to draw"
            )

    def _instructed(self, settings: Settings, request: Request) -> Settings:
        """The settings of a model that edits a picture by instruction; of others, as they are.

        Raises InvalidRequest for what it can't do, and for an image guidance elsewhere.
        """
        name = self.bundle.name
        if not self.bundle.facts.instructed:
            if request.image_guidance is not None:
                raise InvalidRequest(f"image guidance is for models that edit by instruction; {name} is none")
            return settings
        if request.image is None:
            raise InvalidRequest(f"{name} edits a picture by instruction: it needs an image")
        anew = None if request.strength in (None, 1) else request.strength
        for what, asked in (("mask", request.mask), ("extend", request.extend), ("strength below 1", anew)):
            if asked is not None:
                raise InvalidRequest(f"{name} edits the whole picture from noise on: it takes no {what}")
        if settings.weights != (1.0,):
            raise InvalidRequest(f"{name} follows one instruction: it takes no AND")
        return replace(settings, strength=None, image_guidance=settings.image_guidance or IMAGE_GUIDANCE)

    def _read_references(self, request: Request) -> tuple[Shown, ...]:
        """The pictures that the prompt refers to, as the model is shown them. Raises InvalidRequest."""
        if not request.references:
            return ()
        facts, name = self.bundle.facts, self.bundle.name
        if not facts.refers and not facts.image_prompt:
            raise InvalidRequest(
                f"{name} takes no reference pictures; FLUX.2 klein does, and a model converted with --ip-adapter FILE"
            )
        if facts.refers and request.tile is not None:
            raise InvalidRequest("reference pictures go with no tile: each would be drawn of the whole of them")
        if facts.refers and request.reference_weight is not None:
            raise InvalidRequest(
                f"{name} takes no reference weight: the prompt says what becomes of its reference pictures"
            )
        self._need(encoder_of(facts), "a reference picture")
        return open_references(request.references, facts)

    def _referring(self, settings: Settings, references: tuple[Shown, ...]) -> Settings:
        """The settings with the hashes of reference pictures, and their weight where they have one."""
        weight = settings.reference_weight
        if references and self.bundle.facts.image_prompt and weight is None:
            weight = REFERENCE_WEIGHT
        return replace(settings, references=tuple(each.reference for each in references), reference_weight=weight)

    def _sized(self, defaults: Defaults, shown: Shown) -> Defaults:
        """`defaults` with the size of a reference picture; as near as the model draws, of a long one."""
        width, height = shown.reference.width, shown.reference.height
        if max(width, height) > defaults.max_side:
            multiple = self.bundle.facts.grain
            width, height = proportioned((width, height), width * height, multiple, defaults.max_side)
        return replace(defaults, width=width, height=height)

    def _read_start(
        self, settings: Settings, request: Request, start: Start, hashes: Mapping[str, str]
    ) -> tuple[Settings, Canvas]:
        """The settings with the pictures' hashes, and the canvas that is gone on from."""
        self._need("vae_encoder", "an image")
        if not settings.steps_taken:
            raise InvalidRequest(
                f"strength {settings.strength:g} of {settings.steps} steps is less than one; give more of either"
            )
        canvas = start.canvas(settings.width, settings.height)
        settings = replace(settings, image=hashes["image"], mask=hashes.get("mask"))
        if canvas.mask is not None:
            # A 128th of the picture's width: the four pixels at 512 that other programs have.
            blur = canvas.width / 128 if request.mask_blur is None else request.mask_blur
            settings = replace(settings, mask_blur=blur)
        return settings, canvas

    def _read_controls(self, settings: Settings) -> tuple[Settings, Array | None]:
        """The settings with the pictures' hashes, and what the nets follow, three channels each."""
        if not settings.controls:
            return settings, None
        controls, lines = [], []
        for each in settings.controls:
            self._need(each.part, "a control picture")
            drawing = open_picture(each.image, "control picture")
            controls.append(replace(each, image=content_hash(drawing)))
            lines.append(read_lines(drawing, settings.width, settings.height, each.reading))
        return replace(settings, controls=tuple(controls)), np.concatenate(lines, axis=1)

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
            home, nets = self.plan.parts[self._home(part)].variant, [each for each in there if each.startswith(NET)]
            other = f"; it has: {choices(nets)}" if nets and part.startswith(NET) else ""
            raise InvalidRequest(f"{self.bundle.name}: variant {home} has no {part}, which {what} needs{other}")

    def artifacts(self, part: str) -> Mapping[str, Artifact]:
        """Artifacts of the variant that `part` is loaded from."""
        return self.bundle.variant(self.plan.parts[self._home(part)].variant).artifacts

    def _home(self, part: str) -> str:
        """The component that decides where `part` is or would be; ControlNets go where the denoiser is."""
        home = home_of(part)
        return self.bundle.facts.denoiser if home in DENOISERS else home
