"""Pipeline: a prompt goes in, pictures come out. It knows no backend.

prompt -> token ids -> text encoder, bound once -> noise, the same everywhere -> sampler loop -> decoder -> pixels
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from . import safety
from .autoencoder import decode, encode
from .backends import Backend, Component
from .backends.base import Changeable, Resting, Shapes
from .between import bind_between
from .bundle import TINY, Facts, ModelBundle
from .canvas import Canvas, Inpainting, Masked
from .conditioning import conditions, shapes_of_conditions, states_of
from .control import ControlledUNet
from .denoiser import Denoiser
from .devices import choose
from .discovery import discover
from .edits import NONE, Edits
from .errors import DeviceError, InvalidModel, InvalidRequest, NumericalError
from .fallback import FAILURES, Guarded, reason
from .measurements import remembered
from .noise import TorchNoise, first_noise
from .plan import DevicePlan
from .presets import preset_named
from .request import Request, Settings
from .resolving import DECODER, Resolver, Source, home_of, steps_taken
from .result import Picture, Result
from .samplers import SAMPLERS, Denoise, Latents, Step
from .schedule import Level, active_timesteps
from .text import encode as encode_text
from .tiles import fitted
from .turns import Turn, Turns
from .wording import Wording


def shapes_of(facts: Facts, width: int, height: int, batch: int) -> dict[str, Shapes]:
    """The inputs of each component for a picture of width x height pixels; `batch` is 2 with guidance."""
    space, tokens = facts.latents, facts.max_tokens
    h, w = height // space.factor, width // space.factor
    return {
        **{text.part: {"input_ids": (batch, tokens)} for text in facts.encoders},
        "unet": {
            "sample": (batch, facts.sample_channels, h, w),
            "timestep": (1,),
            **shapes_of_conditions(facts, batch),
        },
        "vae_decoder": {"latent_sample": (1, space.channels, h, w)},
    }


# Bytes of a UNet that keeps all cores busy with one picture.
LARGE = 256 << 20


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
    _edited: dict[str, Edits] = field(default_factory=dict)
    _planning: Lock = field(default_factory=Lock)
    # Settings.refiner -> the pipeline that draws the last steps.
    _refiners: dict[str, Pipeline] = field(default_factory=dict)
    # Where memory is low, components take turns.
    _turns: Turns | None = None

    def __post_init__(self) -> None:
        self.wording = Wording(self.bundle)
        self._decoder = DECODER["full"]

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
            from .tuning import first_use

            if found := first_use(bundle, devices, machine, plan, measured, tell):
                measured = {**measured, **found}
                plan = choose(bundle, devices, machine=machine, preference=preference, measured=measured)
        for home, placement in plan.parts.items():
            texts = [text.part for text in bundle.facts.encoders]
            for part in texts if home == "text_encoder" else [home]:
                if part not in bundle.variant(placement.variant).artifacts:
                    raise InvalidModel(f"{bundle.name}: variant {placement.variant} has no {part}")
        return cls(bundle, plan, here.backends, _turns=Turns() if low_memory else None)

    def prepare(self, settings: Settings) -> None:
        """Check the files and load what `settings` need and is not loaded yet; `steps` does this by itself."""
        edits = self.wording.edits(settings)
        for part in ("unet", "controlled_unet", *(each.part for each in settings.controls())):
            edits[part] = replace(edits.get(part, NONE), shortcuts=settings.shortcuts)
        if self._turns is not None:
            lean = replace(settings.shortcuts, lean=True)
            edits = {part: replace(edits.get(part, NONE), shortcuts=lean) for part in (*self._shapes(settings), *edits)}
        self._decoder = DECODER[settings.decoder]
        self._prepare(self._shapes(settings), edits)
        if settings.control is not None:
            self._prepare(self._controlled_shapes(settings), edits)

    def _prepare(self, wanted: dict[str, Shapes], edits: dict[str, Edits]) -> None:
        missing = [part for part in wanted if not self._serves(part, wanted[part], edits.get(part, NONE))]
        if not missing:
            return
        for part in missing:
            if part in self._components:
                self._components.pop(part)[1].close()
        variants = {placement.variant for placement in self.plan.parts.values()}
        with ThreadPoolExecutor(len(wanted) + len(variants)) as pool:
            checked = [pool.submit(self.bundle.check, variant) for variant in variants]
            self._edited |= {part: edits.get(part, NONE) for part in missing}
            loading = {part: pool.submit(self._load, part, wanted[part]) for part in missing}
            # A damaged file is named by the check before a backend stumbles over it.
            for check in checked:
                check.result()
            for part, loaded in loading.items():
                self._components[part] = (wanted[part], loaded.result())

    def _serves(self, part: str, shapes: Shapes, edits: Edits) -> bool:
        """Whether what is loaded of a part draws with these edits; it is changed where it can be."""
        loaded, component = self._components.get(part, (None, None))
        if component is None or loaded != shapes:
            return False
        if self._edited[part] != edits:
            if not (isinstance(component, Changeable) and component.change(edits)):
                return False
            self._edited[part] = edits
        return True

    def _load(self, part: str, shapes: Shapes) -> Component:
        if self._turns is not None:
            return Turn(self._turns, lambda: self._load_now(part, shapes))
        return self._load_now(part, shapes)

    def _load_now(self, part: str, shapes: Shapes) -> Component:
        planned = home_of(part)

        def load() -> Component:
            while True:
                placement = self.plan.parts[planned]
                variant = self.bundle.variant(placement.variant)
                try:
                    if part not in variant.artifacts:
                        # A variant may be older than a part of the model.
                        raise DeviceError(f"{placement.variant} has no {part}")
                    artifact = variant.artifacts[part]
                    edits = self._edited[part]
                    return self.backend.load(self.bundle, variant, artifact, placement.device, shapes, edits)
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

    def _doubled(self, settings: Settings) -> bool:
        """Whether the negative prompt is asked, too: not where the UNet itself takes the guidance scale."""
        return settings.guided and not self.bundle.facts.guidance_width

    def _shapes(self, settings: Settings) -> dict[str, Shapes]:
        batch = 2 if self._doubled(settings) else 1
        width, height = settings.window
        shapes = shapes_of(self.bundle.facts, width, height, batch)
        chunks = self.wording.count(settings, self.plan.variant)
        _, tokens, values = shapes["unet"]["encoder_hidden_states"]
        shapes["unet"] = {**shapes["unet"], "encoder_hidden_states": (batch, tokens * chunks, values)}
        if settings.control is not None:
            lines = {"controlnet_cond": (batch, 3, height, width)}
            unet = shapes.pop("unet")
            shapes |= {each.part: {**unet, **lines} for each in settings.controls()}
        width, height = settings.vae_window
        del shapes["vae_decoder"]
        shapes[DECODER[settings.decoder]] = shapes_of(self.bundle.facts, width, height, 1)["vae_decoder"]
        if settings.safety:
            artifact = self._resolver.artifacts(safety.PART)[safety.PART]
            side = safety.side_of(self.bundle.path(artifact.graph))
            shapes[safety.PART] = {"clip_input": (1, 3, side, side)}
        if settings.image is not None:
            shapes["vae_encoder"] = {"sample": (1, 3, height, width)}
        return shapes

    def _controlled_shapes(self, settings: Settings) -> dict[str, Shapes]:
        """Those of the UNet that takes a ControlNet's residuals, whose shapes that alone knows."""
        shapes, controlnet = self._components[settings.controls()[0].part]
        kept = self._components.get("controlled_unet")
        unet = {name: shape for name, shape in shapes.items() if name != "controlnet_cond"}
        if kept is not None and unet.items() <= kept[0].items():
            return {"controlled_unet": kept[0]}
        residuals = controlnet(**{name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
        return {"controlled_unet": {**unet, **{name: value.shape for name, value in residuals.items()}}}

    def gathers(self, settings: Settings) -> bool:
        """Whether several such pictures could go through the UNet together: a small one, that takes any batch."""
        plain = settings.image is None and settings.control is None and settings.refiner is None and not settings.tile
        variant = self.bundle.variant(self.plan.parts["unet"].variant)
        if not plain or self._turns is not None or not variant.changeable:
            return False
        files = variant.artifacts["unet"].files()
        return sum(self.bundle.path(name).stat().st_size for name in files) < LARGE

    def shapes(self, settings: Settings) -> dict[str, Shapes]:
        """Component -> the shapes of its inputs."""
        return self._shapes(settings)

    def loaded(self, part: str) -> tuple[Shapes, Component]:
        """A component that a request was prepared with, and what it was loaded for."""
        return self._components[part]

    def load_part(self, part: str, shapes: Shapes) -> Component:
        """One more of a component that is loaded, for other shapes. Raises as `prepare`."""
        return self._load_now(part, shapes)

    def seated(self, unet: Component) -> Pipeline:
        """This pipeline with `unet` in place of its own; they share the other components."""
        seated = copy.copy(self)
        seated._components = {**self._components, "unet": (self._components["unet"][0], unet)}
        return seated

    def resolve(self, request: Request) -> Settings:
        """`request` with the model's defaults and a seed. Raises InvalidRequest for what this model can't draw."""
        return self._resolve(request)[0]

    @property
    def _resolver(self) -> Resolver:
        return Resolver(self.bundle, self.plan, self.wording, self._turns is not None)

    def _resolve(self, request: Request) -> tuple[Settings, Source]:
        settings, source = self._resolver.resolve(request)
        return (settings if request.refiner is None else self._resolve_refiner(request, settings)), source

    def _resolve_refiner(self, request: Request, settings: Settings) -> Settings:
        """Open the refiner, and say where it takes over."""
        assert request.refiner is not None
        name = str(request.refiner)
        refiner = self._refiners.get(name) or Pipeline.open(request.refiner, self.plan.device.name)
        refiner._turns = self._turns
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
        shapes, checker = self._components[safety.PART]
        return safety.is_flagged(checker(clip_input=safety.view(pixels, shapes["clip_input"][-1])))

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
        scale = settings.guidance if self._doubled(settings) else 1.0
        denoiser = Denoiser(unet, schedule.prediction_type, scale, guided, settings.deep_every)
        denoise: Denoise = denoiser
        if source.canvas is None:
            x = sampler.start(first_noise(noise, self._latent_shape(settings), *settings.variation), levels, schedule)
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
        shapes = {part: each for part, each in self._shapes(settings).items() if not part.startswith("vae")}
        self._prepare(shapes, self.wording.edits(settings))
        schedule, sampler = settings.schedule(self.bundle.facts.schedule), SAMPLERS[settings.sampler]
        levels = sampler.levels(schedule, settings.steps)
        levels = levels[self._before_refining(settings, levels) :]
        unet = self._fitted("unet", self._latent_shape(settings))
        self._bind_text(unet, settings)
        yield from sampler.run(Denoiser(unet, schedule.prediction_type, settings.guidance), x, levels, noise.normal)

    def _unet(self, settings: Settings, source: Source, levels: list[Level]) -> Component:
        if source.lines is None:
            return self._fitted("unet", self._latent_shape(settings))
        timesteps = [level.t for level in levels[:-1]]
        controls = settings.controls()
        nets = [(self._components[each.part][1], each.weight, each.active(timesteps)) for each in controls]
        both = ControlledUNet(self._components["controlled_unet"][1], nets)
        shapes = self._components[controls[0].part][0]
        whole = fitted(both, "unet", shapes, self._latent_shape(settings), self.bundle.facts.latents.factor)
        whole.bind(controlnet_cond=np.repeat(source.lines, shapes["controlnet_cond"][0], axis=0))
        return whole

    def _latent_shape(self, settings: Settings) -> tuple[int, int, int, int]:
        space = self.bundle.facts.latents
        return 1, space.channels, settings.height // space.factor, settings.width // space.factor

    def _fitted(self, part: str, latents: tuple[int, ...]) -> Component:
        shapes, component = self._components[part]
        return fitted(component, part, shapes, latents, self.bundle.facts.latents.factor)

    def _begin(
        self, settings: Settings, canvas: Canvas, denoise: Denoiser, levels: list[Level], noise: TorchNoise
    ) -> tuple[Denoise, Latents]:
        """The denoiser and the first x where a picture is gone on from; noise is drawn in the order of diffusers."""
        space, shape = self.bundle.facts.latents, self._latent_shape(settings)
        encoder, mask = self._fitted("vae_encoder", shape), canvas.latent_mask(space.factor)
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
        space, shape = self.bundle.facts.latents, self._latent_shape(settings)
        encoder, mask = self._fitted("vae_encoder", shape), canvas.latent_mask(space.factor)
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
        shapes, _ = self._components["unet" if settings.control is None else settings.controls()[0].part]
        # What was loaded decides: a plan may have changed meanwhile.
        count = shapes["encoder_hidden_states"][1] // self.bundle.facts.max_tokens
        facts = self.bundle.facts
        encoded = {
            text.part: encode_text(
                self._components[text.part][1],
                self.wording.chunks(settings, count, text),
                states_of(text, settings.clip_skip),
            )
            for text in facts.encoders
        }
        told = conditions(facts, encoded, settings.width, settings.height, settings.guidance, settings.clip_skip)
        if facts.zero_negative and self._doubled(settings) and not settings.negative:
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
        if part not in self._components:
            height, width = (side * space.factor for side in latents.shape[2:])
            self._prepare({part: shapes_of(self.bundle.facts, width, height, 1)["vae_decoder"]}, {})
        if part == TINY:
            # It reads latents as the UNet has them.
            space = replace(space, scale=1.0, shift=0.0)
        if decoder is None:
            # What the UNet computed with and what the decoder does need not be there at once.
            self._rest()
        pixels = decode(self._fitted(part, latents.shape), space, latents)
        if decoder is None:
            self._rest()
        return pixels

    def _rest(self) -> None:
        for _, component in self._components.values():
            if isinstance(component, Resting):
                component.rest()

    def generate(self, request: Request, on_step: Callable[[int, Step], None] | None = None) -> Result:
        """Draw all pictures of `request`; `on_step(n, step)` is called after each step of picture n."""
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
        told = [note for picture in pictures for note in self.wording.notes(picture.settings, picture.variant)]
        unet = self.plan.parts["unet"].variant
        if (settings.shortcuts.deep or settings.shortcuts.merge) and not self.bundle.variant(unet).changeable:
            told.append(f"{unet} computes everything: deep_every and merge_tokens need a graph that can be changed")
        notes = [*self.plan.reasons[planned:], *checked, *dict.fromkeys(told)]
        return Result(pictures, self.plan.summary(), seconds, notes)

    def close(self) -> None:
        """Give the memory of all components back."""
        for _, component in self._components.values():
            component.close()
        self._components.clear()
        for refiner in self._refiners.values():
            refiner.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
