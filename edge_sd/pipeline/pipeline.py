"""Pipeline: a model on its devices. It opens, plans, loads and draws; what draws one picture is drawing.py.

It knows no backend.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..bundle.bundle import ModelBundle
from ..bundle.parts import DECODER, SAFETY_CHECKER, TINY, UPSCALER, home_of
from ..components import safety_checker as safety
from ..components.autoencoder import decode
from ..components.base import Component, Shapes
from ..components.edits import NONE
from ..components.fallback import reason
from ..components.offload import Turns
from ..components.shapes import shapes_of
from ..components.upscaler import enlarge, window_of
from ..devices.discovery import discover
from ..devices.plan import DevicePlan
from ..devices.planning import check_plan, plan_here
from ..errors import InvalidModel, InvalidRequest, NumericalError
from ..images.clip import view
from ..sampling.noise import NoiseSource, TorchNoise
from ..sampling.samplers import Step
from .drawing import Drawing, NoiseOf, source_of
from .expected import expected
from .loader import Components
from .options import Choice, Place
from .presets import EXACT, Preset, preset_named
from .prompting import Wording
from .references import References
from .request import DECODERS, Request
from .resolver import Resolver
from .result import Picture, Result
from .run import Run
from .settings import Settings
from .shapes import pictures_for, shapes_for

# Bytes of a UNet that keeps all cores busy with one picture.
LARGE = 256 << 20
# Times the pixels that a model was made for, up to which pictures mostly keep their shapes.
FEW_TIMES = 2.25
OnStep = Callable[[int, Step], None]
OnPicture = Callable[[int, Picture], None]


class Pipeline:
    """A model on its devices. `generate` draws; `steps` is the loop itself, for those who want to watch or stop it.

    Components are loaded for the sizes of the first request and kept; another size loads them again (loader.py).

    Example:
        with Pipeline.open("emoji") as pipeline:
            pipeline.generate("a red apple, glossy style").save("apple.png")
    """

    def __init__(self, components: Components, preset: Preset = EXACT) -> None:
        self.bundle, self.components, self.preset = components.bundle, components, preset
        self.wording, self._references = Wording(self.bundle), References()
        # Settings.refiner -> the pipeline that draws the last steps.
        self._refiners: dict[str, Pipeline] = {}

    @property
    def denoiser(self) -> str:
        """The name of the component that denoises."""
        return self.bundle.facts.denoiser

    @property
    def plan(self) -> DevicePlan:
        """Where components run, and why; it changes where a device fails."""
        return self.components.plan

    @classmethod
    def open(
        cls,
        model: str | Path = "emoji",
        device: str | Mapping[str, str] = "auto",
        variant: str | None = None,
        preference: str = "speed",
        tell: Callable[[str], None] | None = None,
        preset: str = "exact",
        low_memory: bool = False,
        measure: bool = False,
        plan: DevicePlan | None = None,
    ) -> Pipeline:
        """Open a model by name or folder; `device` is "auto", "cpu", "gpu", …; `variant` one of the model's.

        `device` may also be component -> device, {"unet": "gpu", "vae_decoder": "cpu"}; the others are placed as by
        "auto". `preference` is "speed", "quality", "battery" or "memory", for what is left open. With `measure`,
        devices between which estimates do not decide are measured at first use, for at most `tuning.FIRST_USE` seconds.
        `tell` gets the lines that say so. A `plan` replaces device, variant, preference and preset.

        `preset` names the precisions that are drawn with where `variant` is None, and what requests get that leave it
        open (presets.py). With `low_memory` one component is in memory at a time, weights stay in their files where
        they can, and pictures are decoded in tiles.

        Raises ModelNotFound, InvalidModel, VariantNotFound, DeviceError, MissingExtra or InvalidRequest.
        """
        if plan is not None and not isinstance(plan, DevicePlan):
            raise InvalidRequest(f"a plan is a DevicePlan, not {type(plan).__name__}; `device` takes names")
        if not isinstance(device, str | Mapping):
            raise InvalidRequest(f"a device is a name, or component -> name, not {type(device).__name__}")
        bundle = ModelBundle.open(Place(type=str).check("model", model))
        if variant is not None:
            bundle.variant(variant)
        here, chosen = discover(), preset_named(preset)
        if plan is not None:
            if device != "auto" or variant is not None or chosen.precisions:
                raise InvalidRequest("a plan has devices and variants in it; give no device, variant or preset")
            check_plan(plan, bundle, here)
        else:
            if variant is None:
                variant = chosen.variant(bundle, {each.backend for each in here.devices})
            plan = plan_here(bundle, here, device, variant, preference, tell or (lambda line: None), measure)
        for home, placement in plan.parts.items():
            texts = [text.part for text in bundle.facts.encoders]
            for part in texts if home == "text_encoder" else [home]:
                if part not in bundle.variant(placement.variant).artifacts:
                    raise InvalidModel(f"{bundle.name}: variant {placement.variant} has no {part}")
        return cls(Components(bundle, plan, here.backends, Turns() if low_memory else None), chosen)

    def expected(self, run: Run) -> DevicePlan:
        """The plan with what the pictures of `run` are expected to take here, loading included."""
        if self.components.turns is not None:
            # Components are loaded anew for each picture.
            return replace(self.plan, picture="")
        return expected(self.plan, self.bundle, run, self.wording.count(run.settings, self.plan.variant))

    def prepare(self, settings: Settings) -> None:
        """Check the files and load what `settings` need and is not loaded yet; `steps` does this by itself."""
        wanted = self.shapes(settings)
        edits, shortcuts = self.wording.edits(settings), settings.shortcuts
        if self.denoiser != "unet":
            # What is left out are parts of UNets; `_notes` says so.
            shortcuts = replace(shortcuts, deep=False, merge=False)
        for part in (self.denoiser, "controlled_unet", *(each.part for each in settings.controls)):
            edits[part] = replace(edits.get(part, NONE), shortcuts=shortcuts)
        if self.components.turns is not None:
            lean = replace(shortcuts, lean=True)
            edits = {part: replace(edits.get(part, NONE), shortcuts=lean) for part in (*wanted, *edits)}
        self.components.prepare(wanted, edits)
        if settings.controls:
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
        part = settings.controls[0].part
        shapes, controlnet = self.components.shapes(part), self.components[part]
        unet = {name: shape for name, shape in shapes.items() if name != "controlnet_cond"}
        batch, _, *sides = shapes["sample"]
        unet["sample"] = (batch, self.bundle.facts.sample_channels, *sides)
        unet |= pictures_for(self.bundle.facts, settings)
        if "controlled_unet" in self.components:
            kept = self.components.shapes("controlled_unet")
            if unet.items() <= kept.items():
                return {"controlled_unet": kept}
        residuals = controlnet(**{name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
        return {"controlled_unet": {**unet, **{name: value.shape for name, value in residuals.items()}}}

    def gathers(self, settings: Settings) -> bool:
        """Whether several such pictures could go through the denoiser together: a small one, that takes any batch."""
        pictures = settings.image is not None or settings.references or settings.controls
        plain = not pictures and settings.refiner is None and not settings.tile
        variant = self.bundle.variant(self.plan.parts[self.denoiser].variant)
        return plain and self.components.turns is None and variant.changeable and self.denoiser_bytes < LARGE

    @property
    def denoiser_bytes(self) -> int:
        """Bytes of the denoiser's files in the variant that is planned."""
        files = self.bundle.variant(self.plan.parts[self.denoiser].variant).artifacts[self.denoiser].files()
        return sum(self.bundle.path(name).stat().st_size for name in files)

    def seated(self, unet: Component) -> Pipeline:
        """This pipeline with `unet` in place of its own; they share the other components."""
        seated = copy.copy(self)
        seated.components = self.components.having(self.denoiser, unet)
        return seated

    def resolve(self, request: Request | str) -> Settings:
        """`request` with the model's defaults and a seed. Raises InvalidRequest for what this model can't draw."""
        return self.run(request).settings

    def run(self, request: Request | str) -> Run:
        """`request` with its files opened and nothing left open, to be drawn with `draw`. Raises as `resolve` does."""
        if isinstance(request, str):
            request = Request(request)
        if not isinstance(request, Request):
            raise InvalidRequest(f"a request is a Request or a prompt, not {type(request).__name__}")
        request = self.preset.applied(request)
        run = self._resolver.resolve(request)
        return run if request.refiner is None else run.having(self._with_refiner(request, run.settings))

    @property
    def _resolver(self) -> Resolver:
        return Resolver(self.bundle, self.plan, self.wording, self.components.turns is not None)

    def _with_refiner(self, request: Request, settings: Settings) -> Settings:
        """Open the refiner, and say where it takes over."""
        assert request.refiner is not None
        given = str(request.refiner)
        refiner = self._refiners.get(given) or Pipeline.open(request.refiner, self.plan.device.name)
        refiner.components.turns = self.components.turns
        if refiner.bundle.facts.conditioning != "aesthetic":
            raise InvalidRequest(f"{refiner.bundle.name} is no refiner; SDXL's is one")
        if self.bundle.facts.conditioning != "size":
            raise InvalidRequest(f"{self.bundle.name} takes no refiner: that goes with the base model of SDXL")
        if settings.controls or settings.tile is not None:
            raise InvalidRequest("a refiner takes neither control pictures nor tiles")
        start = 0.8 if request.refiner_start is None else request.refiner_start
        # Pictures record its name, never the folder that it lies in.
        name = Path(given).name
        self._refiners[given] = self._refiners[name] = refiner
        return replace(settings, refiner=name, refiner_start=start)

    def _flagged(self, pixels: NDArray[np.uint8]) -> bool:
        """Whether the model's own checker objects to a finished picture [H, W, 3]."""
        side = self.components.shapes(SAFETY_CHECKER)["clip_input"][-1]
        return safety.is_flagged(self.components[SAFETY_CHECKER](clip_input=view(pixels, side)))

    def steps(self, request: Request | str, noise: NoiseOf = TorchNoise) -> Iterator[Step]:
        """Denoise one picture, a step at a time; the last step's `latents` are what `decode` wants.

        Stop by not going on. `noise` makes the source of noise from a seed. Raises NumericalError, DeviceError, or
        what loading the model raises.
        """
        yield from self._steps(self.run(request), noise)

    def _steps(self, run: Run, noise_of: NoiseOf) -> Iterator[Step]:
        settings, noise = run.settings, source_of(noise_of, run.settings.seed)
        second = None if settings.variation_seed is None else source_of(noise_of, settings.variation_seed)
        self.prepare(settings)
        seen = self._references.inputs(run, self.components)
        for step in Drawing(run, self.components, self.wording, noise, second, seen).steps():
            x = step.latents
            yield step
        if settings.refiner is None:
            return
        own, total = run.before_refining(), len(run.levels) - 1
        for step in self._refiners[settings.refiner]._refine(run, x, noise):
            yield replace(step, index=own + step.index, total=total)

    def _refine(self, base: Run, x: NDArray[np.float32], noise: NoiseSource) -> Iterator[Step]:
        run = base.refining(self.bundle.facts)
        shapes = {part: each for part, each in self.shapes(run.settings).items() if not part.startswith("vae")}
        self.components.prepare(shapes, self.wording.edits(run.settings))
        yield from Drawing(run, self.components, self.wording, noise).refine(x)

    def decode(self, latents: NDArray[np.float32], decoder: str = "full", preview: bool = False) -> NDArray[np.uint8]:
        """Latents [1, C, h, w] -> pixels [H, W, 3].

        `decoder` is "full", "tiny" or "auto" (see Request). A `preview` is one of several while a picture is drawn:
        the memory that components compute with is kept. Raises InvalidRequest for another decoder or shape, and where
        there is no tiny one.
        """
        space = self.bundle.facts.latents
        Choice(DECODERS).check("decoder", decoder)
        if np.ndim(latents) != 4 or np.shape(latents)[:2] != (1, space.channels):
            raise InvalidRequest(f"latents of shape {np.shape(latents)} are not (1, {space.channels}, height, width)")
        part = DECODER[self._resolver.decoder(decoder)]
        if part not in self.components:
            height, width = (side * space.factor for side in latents.shape[2:])
            self.components.prepare({part: shapes_of(self.bundle.facts, width, height, 1)["vae_decoder"]}, {})
        if part == TINY:
            # It reads latents as the UNet has them.
            space = replace(space, scale=1.0, shift=0.0, mean=(), std=())
        if not preview:
            # What the UNet computed with and what the decoder does need not be there at once.
            self.components.rest()
        while True:
            try:
                pixels = decode(self.components.fitted(part, latents.shape), space, latents)
                break
            except NumericalError as error:
                # An early preview may well be of one colour.
                if preview or not self.components.reject(part, reason(error)):
                    raise
        if not preview:
            self.components.rest()
        return pixels

    @property
    def upscales(self) -> bool:
        """Whether the variant that is drawn with has an upscaler."""
        return UPSCALER in self._resolver.artifacts(UPSCALER)

    def enlarge(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Pixels [H, W, 3] made larger by the model's upscaler, two or four times as its weights are.

        Raises InvalidRequest where the model has none.
        """
        if not self.upscales:
            raise InvalidRequest(f"{self.bundle.name} has no upscaler; convert a source with --upscaler FILE")
        static = self.bundle.variant(self.plan.parts[home_of(UPSCALER)].variant).static
        height, width = pixels.shape[:2]
        sides = window_of(height, width, static)
        self.components.prepare({UPSCALER: {"image": (1, 3, *sides)}}, {})
        return enlarge(self.components[UPSCALER], pixels, sides)

    def generate(
        self,
        request: Request | str,
        on_step: OnStep | None = None,
        on_picture: OnPicture | None = None,
        noise: NoiseOf = TorchNoise,
    ) -> Result:
        """Draw all pictures of `request`, a Request or just a prompt.

        Args:
            on_step: Called as on_step(n, step) after each step of picture n.
            on_picture: Called as on_picture(n, picture) when picture n is drawn.
            noise: Makes the source of noise from a picture's seed.

        Raises:
            InvalidRequest, InvalidModel, DeviceError, NumericalError
        """
        return self.draw(self.run(request), on_step, on_picture, noise)

    def draw(
        self,
        run: Run,
        on_step: OnStep | None = None,
        on_picture: OnPicture | None = None,
        noise: NoiseOf = TorchNoise,
    ) -> Result:
        """Draw all pictures of what `run` returned; the rest is as in `generate`."""
        planned, settings = len(self.plan.reasons), run.settings
        started = time.perf_counter()
        self.prepare(settings)
        seconds = {"load": time.perf_counter() - started, "denoise": 0.0, "decode": 0.0}
        pictures: list[Picture] = []
        for n in range(settings.count):
            pictures.append(self._draw_one(n, run, on_step, noise, seconds))
            if on_picture is not None:
                on_picture(n, pictures[-1])
        notes = self._notes(run, pictures, planned)
        if noise is not TorchNoise:
            notes.append("the noise was handed in: the seed alone does not make these pictures again")
        return Result(pictures, self.expected(run).summary(), seconds, notes)

    def _draw_one(self, n: int, run: Run, on_step: OnStep | None, noise: NoiseOf, seconds: dict[str, float]) -> Picture:
        """Picture n of a run; the time that it took is added to `seconds`."""
        from PIL import Image

        settings = self._resolver.worded(run.settings.nth(n), run.request, run.settings.seed + n)
        started = time.perf_counter()
        for step in self._steps(run.having(settings), noise):
            if on_step is not None:
                on_step(n, step)
        drawn = time.perf_counter()
        pixels = self.decode(step.latents, settings.decoder)
        if run.source.canvas is not None:
            pixels = run.source.canvas.finish(pixels, settings.mask_blur or 0, settings.colour)
        flagged = bool(settings.safety) and self._flagged(pixels)
        if flagged:
            pixels = np.zeros_like(pixels)
        seconds["denoise"] += drawn - started
        seconds["decode"] += time.perf_counter() - drawn
        variant, device = self.plan.variant, self.plan.device.name
        fingerprint = self.bundle.fingerprint(variant)
        own = "" if noise is TorchNoise else getattr(noise, "__name__", type(noise).__name__)
        return Picture(Image.fromarray(pixels), settings, self.bundle.name, variant, device, fingerprint, flagged, own)

    def _notes(self, run: Run, pictures: list[Picture], planned: int) -> list[str]:
        """What a person should know of the pictures: changes of the plan, and what had no effect."""
        notes = [*self.plan.reasons[planned:], *run.source.notes, *self.components.changed]
        self.components.changed.clear()
        notes += self._beyond(run.settings)
        if run.settings.safety is False:
            notes.append("the model's safety checker is switched off")
        notes += [
            f"the safety checker blacked out the picture of seed {each.settings.seed}; another seed may pass"
            for each in pictures
            if each.flagged
        ]
        dropped = [note for each in pictures for note in self.wording.notes(each.settings, each.variant)]
        named = self.plan.parts[self.denoiser].variant
        if run.settings.shortcuts.deep or run.settings.shortcuts.merge:
            if self.denoiser != "unet":
                dropped.append(f"{named} computes everything: deep_every and merge_tokens leave out parts of a UNet")
            elif not self.bundle.variant(named).changeable:
                why = "deep_every and merge_tokens need a graph that can be changed"
                dropped.append(f"{named} computes everything: {why}")
        return [*notes, *dict.fromkeys(dropped)]

    def _beyond(self, settings: Settings) -> list[str]:
        """A note where the denoiser draws many more pixels at once than it was made for."""
        made, (width, height) = self.bundle.defaults_of(self.plan.variant), settings.window
        if width * height <= FEW_TIMES * made.width * made.height:
            return []
        return [
            f"{self.bundle.name} was made for {made.width}x{made.height}: at {width}x{height} shapes may repeat or "
            f"come apart; --tile {made.width} draws in pieces"
        ]

    def close(self) -> None:
        """Give the memory of all components back."""
        self.components.close()
        for refiner in set(self._refiners.values()):
            refiner.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
