"""CoreAIForm: `.aimodel`s in Apple's layout, for the GPU or the Neural Engine, measured by Apple's own runtime."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edge_sd.backends.coreai.runtime import Arrays, Asset, Loop, array, check_finite
from edge_sd.bundle.apple_layout import TABLES, Layout
from edge_sd.bundle.coreai_layout import MAIN, TRANSFORMERS, layout_of, outputs_of, pick, rows_of, runs
from edge_sd.bundle.parts import TINY
from edge_sd.bundle.variants import Parity
from edge_sd.components.rotary import COSINES, turned
from edge_sd.errors import ConversionError, DeviceError, InvalidRequest, MissingExtra, NumericalError, choices
from edge_sd.text.tokenizer import TextTokenizer

from .. import static
from ..form import Made, Report
from ..parity import Recording, Runner, measure
from ..recipes import RECIPES, QuantRecipe, recipe_for
from ..sources.source import CONTROL, Source
from ..static import Sizes, latents_of, named, pixels_of

if TYPE_CHECKING:
    from ..coreml.mixed import BitRecipe
    from ..sources.wrappers import Wrapped

COMPUTE = ("gpu", "ane")
# The parts whose shapes depend on the size of pictures.
SIZED = ("unet", "transformer", "vae_decoder", "vae_encoder", TINY, *CONTROL)
# The parts with attention to text, which are rewritten for the Neural Engine.
SPLIT = ("unet", *CONTROL)
NEEDED = ("coreai", "coreai_torch", "coreai_opt")


@dataclass(frozen=True)
class CoreAIForm:
    """Static shapes, for the GPU or the Neural Engine of macOS 27.

    sizes   (width, height) in pixels; none is the model's own. Of several, the first is the function `main`, which
            Apple's loader asks for, and each other one a function of the same asset, with weights in common
    batch   rows of the denoiser: 2 is guidance in one call. None is what Apple's pipelines call: 1 of FLUX.2, else 2
    """

    compute: str = "gpu"
    sizes: tuple[tuple[int, int], ...] = ()
    batch: int | None = None
    backend: str = "coreai"
    lowest: str = "macOS27"
    halves: bool = False
    rounding: bool = True
    recipes: tuple[str, ...] = ("fp32", "fp16", "int8", "int4", "int4g64", "p8", "p6", "p4", "mixed", "mixed4")

    def __post_init__(self) -> None:
        if self.compute not in COMPUTE:
            raise InvalidRequest(f"unknown compute {self.compute!r}; valid: {choices(COMPUTE)}")
        if self.batch not in (None, 1, 2):
            raise InvalidRequest(f"batch {self.batch} is neither 1 nor 2 (guidance in one call)")

    @property
    def name(self) -> str:
        """The variant's name: coreai-gpu, with sizes that were asked for and other unusual options."""
        wishes = named(self.sizes, self.batch)
        return "-".join(["coreai", self.compute, *wishes])

    def check(self, source: Source, recipe: QuantRecipe) -> None:
        from importlib.util import find_spec

        static.check_denoiser(source, self.backend, self.compute, TRANSFORMERS)
        static.check_nets(source)
        static.check_encoder(source)
        if not all(find_spec(name) for name in NEEDED):
            raise MissingExtra("converting to Core AI", "coreai")
        static.check_sizes(self.sizes, source)
        static.check_rows(self.batch, source.facts)
        static.check_rotary(source)

    def latents(self, source: Source, recipe: QuantRecipe) -> list[tuple[int, int]]:
        return latents_of(self.sizes, source.facts)

    def convert(
        self, wrapped: Wrapped, source: Source, recipe: QuantRecipe, staging: Path, recording: Recording, report: Report
    ) -> Made:
        self._arrange(wrapped)
        if wrapped.part in ("vae_decoder", "vae_encoder") and source.facts.vae_float32:
            made = self._write(wrapped, source, RECIPES["fp32"], staging, recording, report)
            return replace(made, precision="float32")
        recipe = recipe_for(wrapped.part, recipe)
        from ..sources.wrappers import wrap as stock

        made = self._write(wrapped, source, recipe, staging, recording, report)
        if recipe.bits == 32 or not _overflows(wrapped.part, made, staging, recording):
            return made
        # As SDXL's autoencoder: float16 does not hold its values. What was rounded is read anew.
        exact = self._arrange(stock(wrapped.part, source.load(wrapped.part), source.facts))
        return replace(self._write(exact, source, RECIPES["fp32"], staging, recording, report), precision="float32")

    def _arrange(self, wrapped: Wrapped) -> Wrapped:
        """Attention as the Neural Engine wants it, where that is what is converted for."""
        from ..coreml import ane

        if self.compute == "ane" and wrapped.part in SPLIT:
            ane.rewrite(wrapped.module)
        return wrapped

    def _write(
        self, wrapped: Wrapped, source: Source, recipe: QuantRecipe, staging: Path, recording: Recording, report: Report
    ) -> Made:
        """Make weights smaller, convert for all sizes, and save one asset."""
        import torch

        from . import bits, compress, convert
        from .transformers import lowered
        from .wrappers import wrap

        part = wrapped.part
        places: list[str] = []
        chosen: BitRecipe | None = None
        pixels = pixels_of(self.sizes, source.facts) if part in SIZED else pixels_of(self.sizes, source.facts)[:1]
        rows = static.rows_of(self.batch, source.facts)
        sizes = [Sizes(height, width, rows) for width, height in pixels]
        dtype = torch.float32 if recipe.bits == 32 else torch.float16
        split = self.compute == "ane" and part in SPLIT
        call = _called(wrapped, split)
        if recipe.mixed:
            chosen = bits.choose(wrapped, call, source, recipe, recording, report)
        learned = (lambda: [call(given) for given in recording.calibration]) if recording.calibration else None
        module = compress.compress(wrapped.module, recipe, chosen.bits if chosen else None, learned)
        module = lowered(module, dtype)
        component = wrap(part, module, source.facts, sizes, dtype, split, _marks(part, source))
        program = convert.convert(component)
        graph = f"{component.name}.aimodel"
        if chosen:
            places.append(f"{component.name}.bits.json")
            chosen.save(staging / places[-1])
        shutil.rmtree(staging / graph, ignore_errors=True)
        told = f"{source.facts.name}, {part} of Stable Diffusion for {self.compute}, weights {recipe.name}"
        convert.save(program, staging / graph, told, source.facts.license)
        main = component.functions[0]
        return Made((graph, *places), graph, (f"{graph}/main.mlirb",), tuple(main.example), main.outputs)

    def measure(self, part: str, made: Made, staging: Path, recording: Recording) -> Parity:
        try:
            with _Runner(part, made, staging, recording) as run:
                return measure(run, recording)
        except NumericalError as error:
            raise ConversionError(f"{error}; nothing was added to the bundle") from error
        except DeviceError as error:
            raise ConversionError(f"{made.graph} cannot be measured: {error}") from error

    def finish(self, source: Source, staging: Path) -> None:
        """What Apple's loader reads beside the assets."""
        from .bundle import write_bundle

        rows = static.rows_of(self.batch, source.facts)
        write_bundle(source, staging, pixels_of(self.sizes, source.facts)[0], rows, self.name)


def _marks(part: str, source: Source) -> tuple[int, int] | None:
    """The tokens that end and fill up a text of CLIP, where these are two; None for others."""
    text = next((each for each in source.facts.encoders if each.part == part and each.kind == "clip"), None)
    if text is None:
        return None
    tokenizer = TextTokenizer(source.folder / text.tokenizer, source.facts.max_tokens)
    return None if tokenizer.end == tokenizer.pad else (tokenizer.end, tokenizer.pad)


class _Runner:
    """A written component by Apple's runtime, called by our names at any of its sizes."""

    def __init__(self, part: str, made: Made, staging: Path, recording: Recording) -> None:
        self.name = made.graph
        self.layout = _layout(part, (*made.inputs, *made.outputs), recording)
        self.asset = Asset(staging / made.graph, Loop())

    def __enter__(self) -> _Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self.asset.close()

    def __call__(self, given: Arrays) -> Arrays:
        if COSINES in self.layout.inputs:
            given = turned(given, self.asset.functions[MAIN][COSINES].shape[1])
        given = {name: value for name, value in given.items() if name in self.layout.inputs}
        function = pick(self.name, self.asset.functions, self.layout, _shapes(given), 1)
        ports = self.asset.functions[function]
        total = max(len(value) for name, value in given.items() if name not in TABLES)
        called = []
        for run in runs(total, rows_of(ports, self.layout)):
            theirs = {self.layout.inputs[name]: value for name, value in given.items()}
            theirs |= {name: np.full(ports[name].shape, value) for name, value in self.layout.fixed.items()}
            arrays = {name: array(run.of(value, ports[name].dtype, name in TABLES)) for name, value in theirs.items()}
            called.append(self.asset.call(function, arrays))
        outputs = outputs_of(self.layout, called, total)
        check_finite(self.name, outputs)
        return outputs


def _layout(part: str, names: Iterable[str], recording: Recording) -> Layout:
    """The layout of a part of the model that was recorded."""
    assert recording.facts is not None, part
    return layout_of(part, names, recording.facts)


def _shapes(given: Arrays) -> Mapping[str, tuple[int, ...]]:
    return {name: value.shape for name, value in given.items()}


def _called(wrapped: Wrapped, split: bool) -> Runner:
    """The torch module of a component, called by our names; `split` is attention for the Neural Engine."""
    import torch

    from .wrappers import Denoising

    module = Denoising(wrapped.module, True) if split else wrapped.module

    def run(given: Arrays) -> Arrays:
        with torch.no_grad():
            found = module(*(torch.from_numpy(np.ascontiguousarray(given[name])) for name in wrapped.example))
        row = found if isinstance(found, tuple) else (found,)
        return {name: value.numpy() for name, value in zip(wrapped.outputs, row, strict=True)}

    return run


def _overflows(part: str, made: Made, staging: Path, recording: Recording) -> bool:
    """Whether float16 does not hold what will be measured. Raises ConversionError."""
    try:
        with _Runner(part, made, staging, recording) as run:
            # The first and the last of a picture's calls; measuring, which comes after, is of all.
            for given in recording.inputs[:1] + recording.inputs[1:][-1:]:
                run(given)
    except NumericalError:
        return True
    except DeviceError as error:
        raise ConversionError(f"{made.graph} cannot be measured: {error}") from error
    return False
