"""Pipeline: a prompt goes in, pictures come out. It knows no backend.

prompt -> token ids -> text encoder, bound once -> noise, the same everywhere -> sampler loop -> decoder -> pixels
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..backends import Component
from ..bundle.bundle import ModelBundle
from ..bundle.parts import DECODER, SAFETY_CHECKER, TINY
from ..components import safety_checker as safety
from ..components.autoencoder import decode, encode
from ..components.base import Shapes
from ..components.controlnet import ControlledUNet
from ..components.denoiser import Denoiser
from ..components.edits import NONE
from ..components.inpainting import Inpainting, Masked
from ..components.offload import Turns
from ..components.shapes import shapes_of
from ..components.tiling import fitted
from ..devices.choose import choose
from ..devices.discovery import discover
from ..devices.measurements import remembered
from ..devices.plan import DevicePlan
from ..errors import InvalidModel, InvalidRequest
from ..images.canvas import Canvas
from ..sampling.noise import TorchNoise, first_noise
from ..sampling.samplers import SAMPLERS, Denoise, Latents, Step
from ..sampling.schedule import Level, active_timesteps
from ..text.conditioning import conditions, states_of
from ..text.tokenizer import encode as encode_text
from .interpolation import bind_between
from .loader import Components
from .presets import preset_named
from .prompting import Wording
from .request import Request, Settings
from .resolver import Resolver, Source, steps_taken
from .result import Picture, Result
from .shapes import is_doubled, latent_shape, shapes_for

# Bytes of a UNet that keeps all cores busy with one picture.
LARGE = 256 << 20


class Pipeline:
    """A model on its devices. `generate` draws; `steps` is the loop itself, for those who want to watch or stop it.

    Components are loaded for the sizes of the first request and kept; another size loads them again (components.py).
    """

    def __init__(self, components: Components) -> None:
        self.bundle, self.components = components.bundle, components
        self.wording = Wording(self.bundle)
        # Settings.refiner -> the pipeline that draws the last steps.
        self._refiners: dict[str, Pipeline] = {}
        self._decoder = DECODER["full"]

    @property
    def plan(self) -> DevicePlan:
        """Where components run, and why; it changes where a device fails."""
        return self.components.plan

    @classmethod
    def open(
        cls,
        model: str | Path = "emoji",
        device: str = "auto",
        variant: str | None = None,
        preference: str = "speed",
        tell: Callable[[str], None] | None = None,
        preset: str = "exact",
        low_memory: bool = False,
    ) -> Pipeline:
        """Open a model by name or folder; `device` is "auto", "cpu", "gpu", …; `variant` one of the model's.

        `preference` is "speed", "quality", "battery" or "memory", for what is left open. With `tell`, devices between
        which estimates do not decide are measured at first use, for at most `tuning.FIRST_USE` seconds; it gets the
        line that says so. `preset` names the precisions that are drawn with where `variant` is None (presets.py). With
        `low_memory` one component is in memory at a time, weights stay in their files where they can, and pictures are
        decoded in tiles.
        Raises ModelNotFound, InvalidModel, VariantNotFound, DeviceError, MissingExtra or InvalidRequest.
        """
        bundle = ModelBundle.open(model)
        if variant is not None:
            bundle.variant(variant)
        here = discover()
        devices, machine = here.devices, here.machine
        if variant is None:
            variant = preset_named(preset).variant(bundle, {each.backend for each in devices})
        measured, note = remembered(bundle, devices, machine)
        if note and tell is not None:
            tell(f"note: {note}")
        plan = choose(bundle, devices, device, variant, machine=machine, preference=preference, measured=measured)
        if tell is not None and device == "auto" and variant is None:
            from ..devices.tuning import first_use

            if found := first_use(bundle, devices, machine, plan, measured, tell):
                measured = {**measured, **found}
                plan = choose(bundle, devices, machine=machine, preference=preference, measured=measured)
        for home, placement in plan.parts.items():
            texts = [text.part for text in bundle.facts.encoders]
            for part in texts if home == "text_encoder" else [home]:
                if part not in bundle.variant(placement.variant).artifacts:
                    raise InvalidModel(f"{bundle.name}: variant {placement.variant} has no {part}")
        return cls(Components(bundle, plan, here.backends, Turns() if low_memory else None))

    def prepare(self, settings: Settings) -> None:
        """Check the files and load what `settings` need and is not loaded yet; `steps` does this by itself."""
        wanted = self.shapes(settings)
        edits = self.wording.edits(settings)
        for part in ("unet", "controlled_unet", *(each.part for each in settings.controls())):
            edits[part] = replace(edits.get(part, NONE), shortcuts=settings.shortcuts)
        if self.components.turns is not None:
            lean = replace(settings.shortcuts, lean=True)
            edits = {part: replace(edits.get(part, NONE), shortcuts=lean) for part in (*wanted, *edits)}
        self._decoder = DECODER[settings.decoder]
        self.components.prepare(wanted, edits)
        if settings.control is not None:
            self.components.prepare(self._controlled_shapes(settings), edits)

    def shapes(self, settings: Settings) -> dict[str, Shapes]:
        """Component -> the shapes of its inputs, for what `settings` need."""
        view = 0
        if settings.safety:
            artifact = self._resolver.artifacts(SAFETY_CHECKER)[SAFETY_CHECKER]
            view = safety.side_of(self.bundle.path(artifact.graph))
        return shapes_for(self.bundle.facts, settings, self.wording.count(settings, self.plan.variant), view)

    def _controlled_shapes(self, settings: Settings) -> dict[str, Shapes]:
        """Those of the UNet that takes a ControlNet's residuals, whose shapes that alone knows."""
        part = settings.controls()[0].part
        shapes, controlnet = self.components.shapes(part), self.components[part]
        unet = {name: shape for name, shape in shapes.items() if name != "controlnet_cond"}
        if "controlled_unet" in self.components:
            kept = self.components.shapes("controlled_unet")
            if unet.items() <= kept.items():
                return {"controlled_unet": kept}
        residuals = controlnet(**{name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
        return {"controlled_unet": {**unet, **{name: value.shape for name, value in residuals.items()}}}

    def gathers(self, settings: Settings) -> bool:
        """Whether several such pictures could go through the UNet together: a small one, that takes any batch."""
        plain = settings.image is None and settings.control is None and settings.refiner is None and not settings.tile
        variant = self.bundle.variant(self.plan.parts["unet"].variant)
        if not plain or self.components.turns is not None or not variant.changeable:
            return False
        files = variant.artifacts["unet"].files()
        return sum(self.bundle.path(name).stat().st_size for name in files) < LARGE

    def seated(self, unet: Component) -> Pipeline:
        """This pipeline with `unet` in place of its own; they share the other components."""
        seated = copy.copy(self)
        seated.components = self.components.having("unet", unet)
        return seated

    def resolve(self, request: Request) -> Settings:
        """`request` with the model's defaults and a seed. Raises InvalidRequest for what this model can't draw."""
        return self._resolve(request)[0]

    @property
    def _resolver(self) -> Resolver:
        return Resolver(self.bundle, self.plan, self.wording, self.components.turns is not None)

    def _resolve(self, request: Request) -> tuple[Settings, Source]:
        settings, source = self._resolver.resolve(request)
        return (settings if request.refiner is None else self._resolve_refiner(request, settings)), source

    def _resolve_refiner(self, request: Request, settings: Settings) -> Settings:
        """Open the refiner, and say where it takes over."""
        assert request.refiner is not None
        name = str(request.refiner)
        refiner = self._refiners.get(name) or Pipeline.open(request.refiner, self.plan.device.name)
        refiner.components.turns = self.components.turns
        if refiner.bundle.facts.conditioning != "aesthetic":
            raise InvalidRequest(f"{refiner.bundle.name} is no refiner; SDXL's is one")
        if self.bundle.facts.conditioning != "size":
            raise InvalidRequest(f"{self.bundle.name} takes no refiner: that goes with the base model of SDXL")
        if settings.control is not None or settings.tile is not None:
            raise InvalidRequest("a refiner takes neither control pictures nor tiles")
        start = 0.8 if request.refiner_start is None else request.refiner_start
        self._refiners[name] = refiner
        return replace(settings, refiner=name, refiner_start=start)

    def _flagged(self, pixels: NDArray[np.uint8]) -> bool:
        """Whether the model's own checker objects to a finished picture [H, W, 3]."""
        side = self.components.shapes(SAFETY_CHECKER)["clip_input"][-1]
        return safety.is_flagged(self.components[SAFETY_CHECKER](clip_input=safety.view(pixels, side)))

    def steps(self, request: Request) -> Iterator[Step]:
        """Denoise one picture, a step at a time; the last step's `latents` are what `decode` wants.

        Stop by not going on. Raises NumericalError, DeviceError, or what loading the model raises.
        """
        yield from self._steps(*self._resolve(request))

    def _steps(self, settings: Settings, source: Source) -> Iterator[Step]:
        self.prepare(settings)
        schedule, sampler = settings.schedule(self.bundle.facts.schedule), SAMPLERS[settings.sampler]
        noise = TorchNoise(settings.seed)
        levels = sampler.levels(schedule, settings.steps)[settings.steps - steps_taken(settings) :]
        unet = self._unet(settings, source, levels)
        bind_between(self._bind_text, unet, settings)
        guided = active_timesteps([level.t for level in levels[:-1]], settings.guidance_start, settings.guidance_end)
        scale = settings.guidance if is_doubled(self.bundle.facts, settings) else 1.0
        denoiser = Denoiser(unet, schedule.prediction_type, scale, guided, settings.deep_every)
        denoise: Denoise = denoiser
        if source.canvas is None:
            x = sampler.start(
                first_noise(noise, latent_shape(self.bundle.facts, settings), *settings.variation), levels, schedule
            )
        else:
            denoise, x = self._begin(settings, source.canvas, denoiser, levels, noise)
        if settings.refiner is None:
            yield from sampler.run(denoise, x, levels, noise.normal)
            return
        own, total = self._before_refining(settings, levels), len(levels) - 1
        # `solve`, not `run`: these latents are no end, and stay x.
        for step in sampler.solve(denoise, x, levels[: own + 1], noise.normal):
            x = step.latents
            yield replace(step, total=total)
        for step in self._refiners[settings.refiner]._refine(settings, x, noise):
            yield replace(step, index=own + step.index, total=total)

    def _before_refining(self, settings: Settings, levels: list[Level]) -> int:
        """How many of the steps from `levels` are not the refiner's, counted by timesteps as diffusers does."""
        count = self.bundle.facts.schedule.num_train_timesteps
        handed_over = round(count - (settings.refiner_start or 1) * count)
        return sum(level.t >= handed_over for level in levels[:-1])

    def _refine(self, settings: Settings, x: Latents, noise: TorchNoise) -> Iterator[Step]:
        """Go on from where a base model stopped (Podell et al. 2023, section 2.5); words of one's own are not told."""
        settings = replace(settings, embeddings={}, loras={}, clip_skip=1, toward=None, safety=None)
        shapes = {part: each for part, each in self.shapes(settings).items() if not part.startswith("vae")}
        self.components.prepare(shapes, self.wording.edits(settings))
        schedule, sampler = settings.schedule(self.bundle.facts.schedule), SAMPLERS[settings.sampler]
        levels = sampler.levels(schedule, settings.steps)
        levels = levels[self._before_refining(settings, levels) :]
        unet = self.components.fitted("unet", latent_shape(self.bundle.facts, settings))
        self._bind_text(unet, settings)
        yield from sampler.run(Denoiser(unet, schedule.prediction_type, settings.guidance), x, levels, noise.normal)

    def _unet(self, settings: Settings, source: Source, levels: list[Level]) -> Component:
        if source.lines is None:
            return self.components.fitted("unet", latent_shape(self.bundle.facts, settings))
        timesteps = [level.t for level in levels[:-1]]
        controls = settings.controls()
        nets = [(self.components[each.part], each.weight, each.active(timesteps)) for each in controls]
        both = ControlledUNet(self.components["controlled_unet"], nets)
        shapes = self.components.shapes(controls[0].part)
        whole = fitted(
            both, "unet", shapes, latent_shape(self.bundle.facts, settings), self.bundle.facts.latents.factor
        )
        whole.bind(controlnet_cond=np.repeat(source.lines, shapes["controlnet_cond"][0], axis=0))
        return whole

    def _begin(
        self, settings: Settings, canvas: Canvas, denoise: Denoiser, levels: list[Level], noise: TorchNoise
    ) -> tuple[Denoise, Latents]:
        """The denoiser and the first x where a picture is gone on from; noise is drawn in the order of diffusers."""
        space, shape = self.bundle.facts.latents, latent_shape(self.bundle.facts, settings)
        encoder, mask = self.components.fitted("vae_encoder", shape), canvas.latent_mask(space.factor)
        if self.bundle.facts.inpainting:
            return self._begin_masked(settings, canvas, denoise, levels, noise)
        z = encode(encoder, space, canvas.pixels, noise.normal(shape))
        eps = first_noise(noise, shape, *settings.variation)
        x = z + np.float32(levels[0].sigma) * eps
        if mask is None:
            return denoise, x
        if settings.strength == 1:
            # Nothing of what is to go may shine through.
            start = SAMPLERS[settings.sampler].start(eps, levels, settings.schedule(self.bundle.facts.schedule))
            x = mask * start + (1 - mask) * x
        return Inpainting(denoise, z, mask), x

    def _begin_masked(
        self, settings: Settings, canvas: Canvas, denoise: Denoiser, levels: list[Level], noise: TorchNoise
    ) -> tuple[Denoise, Latents]:
        """The same for a UNet that sees the mask: it keeps the rest by itself."""
        space, shape = self.bundle.facts.latents, latent_shape(self.bundle.facts, settings)
        encoder, mask = self.components.fitted("vae_encoder", shape), canvas.latent_mask(space.factor)
        assert mask is not None, "a request without one was refused"
        if settings.strength == 1:
            eps = first_noise(noise, shape, *settings.variation)
            x = SAMPLERS[settings.sampler].start(eps, levels, settings.schedule(self.bundle.facts.schedule))
        else:
            z = encode(encoder, space, canvas.pixels, noise.normal(shape))
            x = z + np.float32(levels[0].sigma) * first_noise(noise, shape, *settings.variation)
        visible = encode(encoder, space, canvas.pixels, noise.normal(shape), canvas.mask)
        return replace(denoise, unet=Masked(denoise.unet, mask, visible)), x

    def _bind_text(self, unet: Component, settings: Settings) -> None:
        shapes = self.components.shapes("unet" if settings.control is None else settings.controls()[0].part)
        # What was loaded decides: a plan may have changed meanwhile.
        count = shapes["encoder_hidden_states"][1] // self.bundle.facts.max_tokens
        facts = self.bundle.facts
        encoded = {
            text.part: encode_text(
                self.components[text.part],
                self.wording.chunks(settings, count, text),
                states_of(text, settings.clip_skip),
            )
            for text in facts.encoders
        }
        told = conditions(facts, encoded, settings.width, settings.height, settings.guidance, settings.clip_skip)
        if facts.zero_negative and is_doubled(self.bundle.facts, settings) and not settings.negative:
            for name in ("encoder_hidden_states", "text_embeds"):
                told[name] = np.concatenate([np.zeros_like(told[name][:1]), told[name][1:]])
        unet.bind(**told)

    def decode(self, latents: NDArray[np.float32], decoder: str | None = None) -> NDArray[np.uint8]:
        """Latents [1, C, h, w] of a request that was prepared -> pixels [H, W, 3].

        `decoder` is "full" or "tiny", for previews (see Request); None is what the request was prepared for. Raises
        InvalidRequest where there is no tiny one.
        """
        space = self.bundle.facts.latents
        part = self._decoder if decoder is None else DECODER[self._resolver.decoder(decoder)]
        if part not in self.components:
            height, width = (side * space.factor for side in latents.shape[2:])
            self.components.prepare({part: shapes_of(self.bundle.facts, width, height, 1)["vae_decoder"]}, {})
        if part == TINY:
            # It reads latents as the UNet has them.
            space = replace(space, scale=1.0, shift=0.0, mean=(), std=())
        if decoder is None:
            # What the UNet computed with and what the decoder does need not be there at once.
            self.components.rest()
        pixels = decode(self.components.fitted(part, latents.shape), space, latents)
        if decoder is None:
            self.components.rest()
        return pixels

    def generate(
        self,
        request: Request,
        on_step: Callable[[int, Step], None] | None = None,
        on_picture: Callable[[int, Picture], None] | None = None,
    ) -> Result:
        """Draw all pictures of `request`.

        `on_step(n, step)` is called after each step of picture n, `on_picture(n, picture)` when it is drawn.
        """
        from PIL import Image

        settings, source = self._resolve(request)
        planned = len(self.plan.reasons)
        started = time.perf_counter()
        self.prepare(settings)
        seconds = {"load": time.perf_counter() - started, "denoise": 0.0, "decode": 0.0}
        pictures = []
        checked = [] if settings.safety is not False else ["the model's safety checker is switched off"]
        for n in range(settings.count):
            each = self._resolver.worded(settings.nth(n), request, settings.seed + n)
            started = time.perf_counter()
            for step in self._steps(each, source):
                latents = step.latents
                if on_step is not None:
                    on_step(n, step)
            drawn = time.perf_counter()
            pixels = self.decode(latents)
            if source.canvas is not None:
                pixels = source.canvas.finish(pixels, each.mask_blur or 0, each.colour)
            if each.safety and self._flagged(pixels):
                pixels = np.zeros_like(pixels)
                checked.append(f"the safety checker blacked out the picture of seed {each.seed}; another seed may pass")
            image = Image.fromarray(pixels)
            seconds["denoise"] += drawn - started
            seconds["decode"] += time.perf_counter() - drawn
            variant, device = self.plan.variant, self.plan.device.name
            fingerprint = self.bundle.fingerprint(variant)
            pictures.append(Picture(image, each, self.bundle.name, variant, device, fingerprint))
            if on_picture is not None:
                on_picture(n, pictures[-1])
        told = [note for picture in pictures for note in self.wording.notes(picture.settings, picture.variant)]
        unet = self.plan.parts["unet"].variant
        if (settings.shortcuts.deep or settings.shortcuts.merge) and not self.bundle.variant(unet).changeable:
            told.append(f"{unet} computes everything: deep_every and merge_tokens need a graph that can be changed")
        notes = [*self.plan.reasons[planned:], *checked, *dict.fromkeys(told)]
        return Result(pictures, self.plan.summary(), seconds, notes)

    def close(self) -> None:
        """Give the memory of all components back."""
        self.components.close()
        for refiner in self._refiners.values():
            refiner.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
