"""CoreMLForm: `.mlpackage`s in Apple's layout, for the Neural Engine or the GPU, measured by the executor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_sd.bundle.apple_layout import Arrays, Chain, Layout, call, layout_of, pick
from edge_sd.bundle.parts import SAFETY_CHECKER, TINY
from edge_sd.bundle.variants import Parity
from edge_sd.errors import ConversionError, DeviceError, InvalidRequest, MissingExtra, choices
from edge_sd.text.conditioning import HIDDEN
from edge_sd.text.tokenizer import read_vocabulary

from ..form import Made, Report
from ..parity import Recording, measure
from ..recipes import QuantRecipe, recipe_for
from ..sources.source import CONTROL, Source
from ..static import Sizes, check_denoiser, check_encoder, check_nets, check_sizes, latents_of, named, pixels_of

if TYPE_CHECKING:
    from ..sources.wrappers import Wrapped
    from .mixed import BitRecipe

COMPUTE = ("ane", "gpu")
# The fused attention of the GPU's form is an operation since iOS18; the Neural Engine's needs nothing newer, and
# several Swift programs know a model for it by the name of an iOS16 operation.
LOWEST = {"ane": "iOS16", "gpu": "iOS18"}
# The parts whose shapes depend on the size of pictures, and those that are cut into chunks.
SIZED = ("unet", "vae_decoder", "vae_encoder", TINY, SAFETY_CHECKER, *CONTROL)
CHUNKED = ("unet", "controlled_unet")
# The parts with attention to text, which are rewritten for the Neural Engine.
SPLIT = ("unet", *CONTROL)
# Margin in dB: mixed bits are chosen on the first and last call of a picture, but all calls must reach the floor.
ROOM = 0.5
# Most recorded calls used to calibrate activation ranges.
CALIBRATED = 16


@dataclass(frozen=True)
class CoreMLForm:
    """Static shapes and a deployment target.

    target   None is the lowest of `compute`
    sizes    (width, height) in pixels; none is the model's own. Of several, each is a function of every package, with
             weights in common
    batch    rows of the UNet: 2 is guidance in one call, as Swift programs expect
    chunks   the UNet as two packages, for devices that cannot hold it at once
    """

    compute: str = "ane"
    target: str | None = None
    sizes: tuple[tuple[int, int], ...] = ()
    batch: int = 2
    chunks: bool = False
    backend: str = "coreml"
    halves: bool = False
    rounding: bool = False
    recipes: tuple[str, ...] = ("fp16", "int8", "w8a8", "p8", "p6", "p4", "p4g16", "p2", "p1", "mixed")

    def __post_init__(self) -> None:
        from .convert import require_target, target_named

        if self.compute not in COMPUTE:
            raise InvalidRequest(f"unknown compute {self.compute!r}; valid: {choices(COMPUTE)}")
        if self.batch not in (1, 2):
            raise InvalidRequest(f"batch {self.batch} is neither 1 nor 2 (guidance in one call)")
        if self.target is not None:
            object.__setattr__(self, "target", target_named(self.target))
            require_target(f"the fused attention of {self.compute!r}", self.lowest, LOWEST[self.compute])
        if len(self.sizes) > 1:
            require_target("several sizes in one package", self.lowest, "iOS18")

    @property
    def name(self) -> str:
        """The variant's name: coreml-ane, with sizes that were asked for and other unusual options."""
        wishes = named(self.sizes, self.batch)
        wishes += ["chunks"] if self.chunks else []
        wishes += [self.target.lower()] if self.target and self.target != LOWEST[self.compute] else []
        return "-".join(["coreml", self.compute, *wishes])

    @property
    def lowest(self) -> str:
        """The target that is converted for."""
        return self.target or LOWEST[self.compute]

    def check(self, source: Source, recipe: QuantRecipe) -> None:
        from importlib.util import find_spec

        check_denoiser(source, self.backend, self.compute, ())
        check_nets(source)
        check_encoder(source)
        from .quantize import check_target

        if not find_spec("coremltools"):
            raise MissingExtra("converting to Core ML", "coreml")
        check_target(recipe, self.lowest)
        if source.facts.guidance_width:
            raise InvalidRequest(
                "Apple's layout has no input for the guidance scale of a latent consistency model; valid: --to openvino"
            )
        check_sizes(self.sizes, source)

    def latents(self, source: Source, recipe: QuantRecipe) -> list[tuple[int, int]]:
        return latents_of(self.sizes, source.facts)

    def convert(
        self, wrapped: Wrapped, source: Source, recipe: QuantRecipe, staging: Path, recording: Recording, report: Report
    ) -> Made:
        from . import ane

        if self.compute == "ane" and wrapped.part in SPLIT:
            ane.rewrite(wrapped.module)
        recipe = recipe_for(wrapped.part, recipe)
        if wrapped.part in ("vae_decoder", "vae_encoder") and source.facts.vae_float32:
            made = self._write(wrapped, source, recipe, staging, recording, report, float32=True)
            return replace(made, precision="float32")
        made = self._write(wrapped, source, recipe, staging, recording, report)
        if _overflow(wrapped.part, made, staging, recording) is None:
            return made
        # As SDXL's autoencoder: float16 does not hold its values, so it is kept in float32, which the GPU and CPU run.
        made = self._write(wrapped, source, recipe, staging, recording, report, float32=True)
        return replace(made, precision="float32")

    def _write(
        self,
        wrapped: Wrapped,
        source: Source,
        recipe: QuantRecipe,
        staging: Path,
        recording: Recording,
        report: Report,
        float32: bool = False,
    ) -> Made:
        """Convert for each size, cut into chunks, make weights smaller, and join the sizes again."""
        from . import convert, quantize
        from .wrappers import wrap

        part, bits = wrapped.part, None
        pixels = (
            pixels_of(self.sizes, source.facts) if wrapped.part in SIZED else pixels_of(self.sizes, source.facts)[:1]
        )
        # chunk -> function -> package
        packages: list[dict[str, Path]] = []
        making = staging / ".making"
        shutil.rmtree(making, ignore_errors=True)
        for width, height in pixels:
            folder = making / f"size_{width}x{height}"
            folder.mkdir(parents=True)
            split = self.compute == "ane" and part in SPLIT
            component = wrap(part, wrapped.module, source.facts, Sizes(height, width, self.batch), split)
            whole = folder / f"{component.name}.mlpackage"
            convert.save(convert.convert(component, self.lowest, float32), whole)
            if recipe.mixed and bits is None:
                layout = _layout(part, (*component.example, *component.outputs), recording)
                chosen = _choose_bits(whole, layout, recipe, recording, report)
                bits = chosen.bits
            if recipe.activations and not part.startswith("text_encoder") and part not in CONTROL:
                layout = _layout(part, (*component.example, *component.outputs), recording)
                whole = _round_activations(whole, layout, recipe, recording)
            pieces = convert.bisect(whole, folder) if self.chunks and part in CHUNKED else [whole]
            packages = packages or [{} for _ in pieces]
            for functions, piece in zip(packages, pieces, strict=True):
                model = quantize.compress(convert.opened(piece), recipe, self.lowest, bits)
                functions[folder.name] = folder / f"small_{piece.name}"
                convert.save(model, functions[folder.name])
        graphs = []
        for n, functions in enumerate(packages, 1):
            # Programs look for ControlNets in a folder of their own.
            place = "controlnet/" if part == "controlnet" else ""
            graphs.append(f"{place}{component.name}{f'Chunk{n}' if len(packages) > 1 else ''}.mlpackage")
            model = convert.opened(_joined(functions, making / f"{component.name}{n}.mlpackage"))
            _describe(model, source, "float32" if float32 else recipe.name, self.compute)
            shutil.rmtree(staging / graphs[-1], ignore_errors=True)
            convert.save(model, staging / graphs[-1])
        shutil.rmtree(making)
        places = list(graphs)
        if recipe.mixed:
            places.append(f"{component.name}.bits.json")
            chosen.save(staging / places[-1])
        weights = tuple(f"{graph}/Data/com.apple.CoreML/weights/weight.bin" for graph in graphs)
        return Made(
            tuple(places), graphs[0], weights, tuple(component.example), component.outputs, chunks=tuple(graphs[1:])
        )

    def measure(self, part: str, made: Made, staging: Path, recording: Recording) -> Parity:
        run = _Runner(part, made, staging, recording)
        try:
            parity = measure(run, recording)
        except DeviceError as error:
            raise ConversionError(f"{made.graph} cannot be measured: {error}") from error
        if run.overflow is not None:
            raise ConversionError(f"{made.graph} overflows float16: {run.overflow}; nothing was added to the bundle")
        return parity

    def finish(self, source: Source, staging: Path) -> None:
        """The vocabulary, which Swift programs read beside the models."""
        vocabulary, merges = read_vocabulary(source.folder / source.facts.encoders[0].tokenizer)
        lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
        (staging / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), "utf-8")
        (staging / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")


class _Runner:
    """A written component, called by our names at any of its sizes; each is opened when it is first asked for."""

    def __init__(self, part: str, made: Made, staging: Path, recording: Recording) -> None:
        from .mil import Program

        self.layout = _layout(part, (*made.inputs, *made.outputs), recording)
        self.graphs = [staging / graph for graph in (made.graph, *made.chunks)]
        self.functions = Program.functions(self.graphs[0])
        self.programs: dict[str, Chain] = {}

    def __call__(self, given: Arrays) -> Arrays:
        from .mil import Program

        name = pick(self.graphs[0].name, self.functions, self.layout, _shapes(given), 1)
        if name not in self.programs:
            self.programs[name] = Chain([Program.open(graph, function=name) for graph in self.graphs])
        program = self.programs[name]
        return call(program.predict, program.inputs, self.layout, given)

    @property
    def overflow(self) -> Any:
        found = [program.overflow for program in self.programs.values()]
        return next((each for each in found if each is not None), None)


def _layout(part: str, names: Iterable[str], recording: Recording) -> Layout:
    """The layout of a part; of a text encoder's states that were recorded, those before the last layer."""
    count = sum(name.startswith(HIDDEN) for name in recording.outputs[0])
    return layout_of(part, names, f"{HIDDEN}{count - 2}")


def _shapes(given: Arrays) -> Mapping[str, tuple[int, ...]]:
    return {name: value.shape for name, value in given.items()}


def _overflow(part: str, made: Made, staging: Path, recording: Recording) -> Any:
    """The first overflow of float16 in what will be measured, or None. Raises ConversionError."""
    run = _Runner(part, made, staging, recording)
    for given in recording.inputs:
        try:
            run(given)
        except DeviceError as error:
            raise ConversionError(f"{made.graph} cannot be measured: {error}") from error
        if run.overflow is not None:
            return run.overflow
    return None


def _joined(functions: dict[str, Path], package: Path) -> Path:
    """The one package there is, or `package`, in which several are functions."""
    from . import convert

    if len(functions) > 1:
        convert.join(functions, package)
        return package
    return next(iter(functions.values()))


def _choose_bits(package: Path, layout: Layout, recipe: QuantRecipe, recording: Recording, report: Report) -> BitRecipe:
    """The sensitivity analysis of a component, on its float16 package of the first size."""
    from . import convert, mixed, quantize
    from .mil import Program

    program = Program.open(package)
    names = quantize.weights(convert.opened(package))
    calls = [n for n, given in enumerate(recording.inputs) if _shapes(given) == _shapes(recording.inputs[0])]
    first = Recording([recording.inputs[n] for n in calls], [recording.outputs[n] for n in calls])
    floor = recipe.floor + ROOM
    return mixed.choose(
        program, names, lambda given: call(program.predict, program.inputs, layout, given), first, floor,
        lambda share: report("weighing layers", share),
    )  # fmt: skip


def _round_activations(package: Path, layout: Layout, recipe: QuantRecipe, recording: Recording) -> Path:
    """The package, of one size, with as many activations in 8 bits as its floor allows; beside it."""
    from . import activations, convert
    from .mil import Program

    program = Program.open(package)
    ours = next(name for name in ("sample", "latent_sample") if name in layout.inputs)
    size = program.inputs[layout.inputs[ours]].shape[1:]
    calls = [n for n, given in enumerate(recording.inputs) if given[ours].shape[1:] == size]
    some = calls[:: -(-len(calls) // CALIBRATED)]
    mine = Recording([recording.inputs[n] for n in some], [recording.outputs[n] for n in some])

    def run(program: Program, given: Arrays) -> Arrays:
        return call(program.predict, program.inputs, layout, given)

    met = activations.ranges(program, lambda: [run(program, given) for given in mine.inputs])
    layers = activations.by_noise(package, met)
    made = package.with_name(f"rounded_{package.name}")
    for share in activations.SHARES:
        shutil.rmtree(made, ignore_errors=True)
        convert.save(activations.compress(convert.opened(package), met, layers[int(len(layers) * share) :]), made)
        tried = Program.open(made)
        if measure(partial(run, tried), mine).psnr >= recipe.floor + ROOM:
            break
    return made


def _describe(model: Any, source: Source, stored: str, compute: str) -> None:
    model.short_description = f"{source.facts.name}, a Stable Diffusion component for {compute}, weights {stored}"
    model.license = source.facts.license
