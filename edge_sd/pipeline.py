"""Pipeline: a prompt goes in, pictures come out. It knows no backend.

prompt -> token ids -> text encoder, bound once -> noise, the same everywhere -> sampler loop -> decoder -> pixels
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from .autoencoder import decode, encode
from .backends import Backend, Component
from .backends.base import Shapes
from .bundle import Facts, ModelBundle
from .canvas import Canvas, Inpainting, content_hash, make_canvas, open_picture, proportioned
from .control import ControlledUNet, read_lines
from .denoiser import Denoiser
from .devices import choose
from .discovery import discover
from .errors import DeviceError, InvalidModel, InvalidRequest, NumericalError
from .fallback import FAILURES, Guarded, reason
from .measurements import remembered
from .noise import TorchNoise
from .plan import DevicePlan
from .request import MAX_SEED, Picture, Request, Result, Settings
from .samplers import SAMPLERS, Denoise, Latents, Step
from .schedule import Level
from .text import TextTokenizer

# Components that are where another is: both halves of the autoencoder, and the UNet with its ControlNet.
HOMES = {"vae_encoder": "vae_decoder", "controlnet": "unet", "controlled_unet": "unet"}


@dataclass(frozen=True)
class Source:
    """The pictures of a request: what it starts from, and the lines it follows, float32 [1, 3, H, W] in [0, 1]."""

    canvas: Canvas | None
    lines: NDArray[np.float32] | None


def shapes_of(facts: Facts, width: int, height: int, batch: int) -> dict[str, Shapes]:
    """The inputs of each component for a picture of width x height pixels; `batch` is 2 with guidance."""
    space, tokens = facts.latents, facts.max_tokens
    h, w = height // space.factor, width // space.factor
    return {
        "text_encoder": {"input_ids": (batch, tokens)},
        "unet": {
            "sample": (batch, space.channels, h, w),
            "timestep": (1,),
            "encoder_hidden_states": (batch, tokens, facts.text_width),
        },
        "vae_decoder": {"latent_sample": (1, space.channels, h, w)},
    }


@dataclass
class Pipeline:
    """A model on its devices. `generate` draws; `steps` is the loop itself, for those who want to watch or stop it.

    Components are loaded for the sizes of the first request and kept; another size loads them again. One whose device
    fails goes on at the plan's next place for it, and `plan` tells so.
    """

    bundle: ModelBundle
    plan: DevicePlan
    backend: Backend
    _components: dict[str, tuple[Shapes, Component]] = field(default_factory=dict)
    _tokenizer: TextTokenizer | None = None
    _planning: Lock = field(default_factory=Lock)

    @classmethod
    def open(
        cls,
        model: str | Path = "emoji",
        device: str = "auto",
        variant: str | None = None,
        preference: str = "speed",
        tell: Callable[[str], None] | None = None,
    ) -> Pipeline:
        """Open a model by name or folder; `device` is "auto", "cpu", "gpu", …; `variant` one of the model's.

        `preference` is "speed", "quality", "battery" or "memory", for what is left open. With `tell`, devices between
        which estimates do not decide are measured at first use, for at most `tuning.FIRST_USE` seconds; it gets the
        line that says so.
        Raises ModelNotFound, InvalidModel, VariantNotFound, DeviceError, MissingExtra or InvalidRequest.
        """
        bundle = ModelBundle.open(model)
        if variant is not None:
            bundle.variant(variant)
        here = discover()
        devices, machine = here.devices, here.machine
        measured, note = remembered(bundle, devices, machine)
        if note and tell is not None:
            tell(f"note: {note}")
        plan = choose(bundle, devices, device, variant, machine=machine, preference=preference, measured=measured)
        if tell is not None and device == "auto" and variant is None:
            from .tuning import first_use

            if found := first_use(bundle, devices, machine, plan, measured, tell):
                measured = {**measured, **found}
                plan = choose(bundle, devices, machine=machine, preference=preference, measured=measured)
        for part, placement in plan.parts.items():
            if part not in bundle.variant(placement.variant).artifacts:
                raise InvalidModel(f"{bundle.name}: variant {placement.variant} has no {part}")
        return cls(bundle, plan, here.backends)

    def prepare(self, settings: Settings) -> None:
        """Check the files and load what `settings` need and is not loaded yet; `steps` does this by itself."""
        self._prepare(self._shapes(settings))
        if settings.control is not None:
            self._prepare(self._controlled_shapes(settings))

    def _prepare(self, wanted: dict[str, Shapes]) -> None:
        missing = [part for part in wanted if self._components.get(part, (None, None))[0] != wanted[part]]
        if not missing:
            return
        for part in missing:
            if part in self._components:
                self._components.pop(part)[1].close()
        variants = {placement.variant for placement in self.plan.parts.values()}
        with ThreadPoolExecutor(len(wanted) + len(variants)) as pool:
            checked = [pool.submit(self.bundle.check, variant) for variant in variants]
            loading = {part: pool.submit(self._load, part, wanted[part]) for part in missing}
            # A damaged file is named by the check before a backend stumbles over it.
            for check in checked:
                check.result()
            for part, loaded in loading.items():
                self._components[part] = (wanted[part], loaded.result())

    def _load(self, part: str, shapes: Shapes) -> Component:
        planned = HOMES.get(part, part)

        def load() -> Component:
            while True:
                placement = self.plan.parts[planned]
                variant = self.bundle.variant(placement.variant)
                try:
                    return self.backend.load(self.bundle, variant, variant.artifacts[part], placement.device, shapes)
                except (*FAILURES, InvalidRequest) as error:
                    # InvalidRequest: a package of fixed size can't draw this one; another variant may.
                    if not move(reason(error), isinstance(error, NumericalError)):
                        if isinstance(error, MemoryError):
                            raise DeviceError(f"{part}: out of memory") from error
                        raise

        def move(why: str, numerical: bool) -> bool:
            with self._planning:
                plan = self.plan.fall_back(planned, why, numerical)
                if plan is not None:
                    self.bundle.check(plan.parts[planned].variant)
                    self.plan = plan
            return plan is not None

        return Guarded(part.replace("_", " "), load(), move, load)

    def _shapes(self, settings: Settings) -> dict[str, Shapes]:
        batch = 2 if settings.guided else 1
        shapes = shapes_of(self.bundle.facts, settings.width, settings.height, batch)
        if settings.control is not None:
            lines = {"controlnet_cond": (batch, 3, settings.height, settings.width)}
            shapes["controlnet"] = {**shapes.pop("unet"), **lines}
        if settings.image is not None:
            shapes["vae_encoder"] = {"sample": (1, 3, settings.height, settings.width)}
        return shapes

    def _controlled_shapes(self, settings: Settings) -> dict[str, Shapes]:
        """Those of the UNet that takes a ControlNet's residuals, whose shapes that alone knows."""
        shapes, controlnet = self._components["controlnet"]
        kept = self._components.get("controlled_unet")
        unet = {name: shape for name, shape in shapes.items() if name != "controlnet_cond"}
        if kept is not None and unet.items() <= kept[0].items():
            return {"controlled_unet": kept[0]}
        residuals = controlnet(**{name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
        return {"controlled_unet": {**unet, **{name: value.shape for name, value in residuals.items()}}}

    def resolve(self, request: Request) -> Settings:
        """`request` with the model's defaults and a seed. Raises InvalidRequest for what this model can't draw."""
        return self._resolve(request)[0]

    def _resolve(self, request: Request) -> tuple[Settings, Source]:
        defaults = self.bundle.defaults_of(self.plan.variant)
        limit, factor = defaults.max_side, self.bundle.facts.latents.factor
        image = None if request.image is None else open_picture(request.image, "image")
        if image is not None and request.width is None and request.height is None:
            width, height = proportioned(image.size, defaults.width * defaults.height, factor, limit)
            defaults = replace(defaults, width=width, height=height)
        settings = request.resolve(defaults, secrets.randbelow(MAX_SEED + 2 - request.count))
        for name, side in (("width", settings.width), ("height", settings.height)):
            if side > limit:
                raise InvalidRequest(f"{name} {side} is beyond this model's limit of {limit}")
            if side % factor:
                raise InvalidRequest(f"{name} {side} is not a multiple of {factor}, as this model needs")
        try:
            SAMPLERS[settings.sampler].levels(self.bundle.facts.schedule, settings.steps)
        except ValueError as error:
            raise InvalidRequest(f"sampler {settings.sampler}: {error}") from error
        lines = None
        if request.control is not None:
            self._need("controlnet", "a control picture")
            drawing = open_picture(request.control, "control picture")
            lines = read_lines(drawing, settings.width, settings.height, settings.control_reading)
            settings = replace(settings, control=content_hash(drawing))
        if image is None:
            return settings, Source(None, lines)
        self._need("vae_encoder", "an image")
        if not self._tail(settings):
            raise InvalidRequest(
                f"strength {settings.strength:g} of {settings.steps} steps is less than one; give more of either"
            )
        mask = None if request.mask is None else open_picture(request.mask, "mask")
        canvas = make_canvas(image, mask, settings.width, settings.height)
        settings = replace(settings, image=content_hash(image))
        if mask is not None:
            # A 128th of the picture's width: the four pixels at 512 that other programs have.
            blur = settings.width / 128 if request.mask_blur is None else request.mask_blur
            settings = replace(settings, mask=content_hash(mask), mask_blur=blur)
        return settings, Source(canvas, lines)

    def _need(self, part: str, what: str) -> None:
        home = self.plan.parts[HOMES[part]].variant
        if part not in self.bundle.variant(home).artifacts:
            raise InvalidRequest(f"{self.bundle.name}: variant {home} has no {part}, which {what} needs")

    def _tail(self, settings: Settings) -> int:
        """How many of the steps are taken, counted as diffusers does."""
        return settings.steps if settings.strength is None else int(settings.steps * settings.strength)

    def steps(self, request: Request) -> Iterator[Step]:
        """Denoise one picture, a step at a time; the last step's `latents` are what `decode` wants.

        Stop by not going on. Raises NumericalError, DeviceError, or what loading the model raises.
        """
        yield from self._steps(*self._resolve(request))

    def _steps(self, settings: Settings, source: Source) -> Iterator[Step]:
        self.prepare(settings)
        schedule, sampler = self.bundle.facts.schedule, SAMPLERS[settings.sampler]
        noise = TorchNoise(settings.seed)
        levels = sampler.levels(schedule, settings.steps)[settings.steps - self._tail(settings) :]
        unet = self._unet(settings, source, levels)
        self._bind_text(unet, settings)
        denoise: Denoise = Denoiser(unet, schedule.prediction_type, settings.guidance)
        if source.canvas is None:
            x = sampler.start(noise.normal(self._latent_shape(settings)), levels, schedule)
        else:
            denoise, x = self._begin(settings, source.canvas, denoise, levels, noise)
        yield from sampler.run(denoise, x, levels, noise.normal)

    def _unet(self, settings: Settings, source: Source, levels: list[Level]) -> Component:
        if source.lines is None:
            return self._components["unet"][1]
        # As diffusers counts: a step takes part if all of it lies between start and end.
        count = len(levels) - 1
        start, end = settings.control_start, settings.control_end
        active = {float(np.float32(level.t)) for n, level in enumerate(levels[:-1])
                  if n / count >= start and (n + 1) / count <= end}  # fmt: skip
        (shapes, controlnet), (_, unet) = self._components["controlnet"], self._components["controlled_unet"]
        both = ControlledUNet(unet, controlnet, settings.control_weight, frozenset(active))
        both.bind(controlnet_cond=np.repeat(source.lines, shapes["controlnet_cond"][0], axis=0))
        return both

    def _latent_shape(self, settings: Settings) -> tuple[int, int, int, int]:
        space = self.bundle.facts.latents
        return 1, space.channels, settings.height // space.factor, settings.width // space.factor

    def _begin(
        self, settings: Settings, canvas: Canvas, denoise: Denoise, levels: list[Level], noise: TorchNoise
    ) -> tuple[Denoise, Latents]:
        """The denoiser and the first x where a picture is gone on from; noise is drawn in the order of diffusers."""
        space, shape = self.bundle.facts.latents, self._latent_shape(settings)
        z = encode(self._components["vae_encoder"][1], space, canvas.pixels, noise.normal(shape))
        eps = noise.normal(shape)
        x = z + np.float32(levels[0].sigma) * eps
        mask = canvas.latent_mask(space.factor)
        if mask is None:
            return denoise, x
        if settings.strength == 1:
            # Nothing of what is to go may shine through.
            start = SAMPLERS[settings.sampler].start(eps, levels, self.bundle.facts.schedule)
            x = mask * start + (1 - mask) * x
        return Inpainting(denoise, z, mask), x

    def _bind_text(self, unet: Component, settings: Settings) -> None:
        tokenizer = self.tokenizer()
        prompts = [settings.negative, settings.prompt] if settings.guided else [settings.prompt]
        ids = np.concatenate([tokenizer(prompt).ids for prompt in prompts])
        context = self._components["text_encoder"][1](input_ids=ids)["last_hidden_state"]
        unet.bind(encoder_hidden_states=context)

    def tokenizer(self) -> TextTokenizer:
        """The model's tokenizer, read at first use."""
        if self._tokenizer is None:
            folder = self.bundle.path(self.bundle.facts.tokenizer)
            self._tokenizer = TextTokenizer(folder, self.bundle.facts.max_tokens)
        return self._tokenizer

    def decode(self, latents: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Latents [1, C, h, w] of a request that was prepared -> pixels [H, W, 3]."""
        return decode(self._components["vae_decoder"][1], self.bundle.facts.latents, latents)

    def generate(self, request: Request, on_step: Callable[[int, Step], None] | None = None) -> Result:
        """Draw all pictures of `request`; `on_step(n, step)` is called after each step of picture n."""
        from PIL import Image

        settings, source = self._resolve(request)
        planned = len(self.plan.reasons)
        started = time.perf_counter()
        self.prepare(settings)
        seconds = {"load": time.perf_counter() - started, "denoise": 0.0, "decode": 0.0}
        pictures = []
        for n in range(settings.count):
            each = replace(settings, seed=settings.seed + n, count=1)
            started = time.perf_counter()
            for step in self._steps(each, source):
                latents = step.latents
                if on_step is not None:
                    on_step(n, step)
            drawn = time.perf_counter()
            pixels = self.decode(latents)
            if source.canvas is not None and each.mask_blur is not None:
                pixels = source.canvas.paste(pixels, each.mask_blur)
            image = Image.fromarray(pixels)
            seconds["denoise"] += drawn - started
            seconds["decode"] += time.perf_counter() - drawn
            variant, device = self.plan.variant, self.plan.device.name
            fingerprint = self.bundle.fingerprint(variant)
            pictures.append(Picture(image, each, self.bundle.name, variant, device, fingerprint))
        notes = [*self.plan.reasons[planned:], *self._notes(settings)]
        return Result(pictures, self.plan.summary(), seconds, notes)

    def _notes(self, settings: Settings) -> list[str]:
        notes = []
        for name, text in (("prompt", settings.prompt), ("negative prompt", settings.negative)):
            if dropped := self.tokenizer()(text).dropped:
                room = self.bundle.facts.max_tokens - 2
                notes.append(f"the {name} is longer than this model's {room} tokens; not used: {dropped!r}")
        return notes

    def close(self) -> None:
        """Give the memory of all components back."""
        for _, component in self._components.values():
            component.close()
        self._components.clear()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
