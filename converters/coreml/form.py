"""CoreMLForm: `.mlpackage`s in Apple's layout, for the Neural Engine or the GPU, measured by the executor."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_sd.apple import LAYOUTS, call
from edge_sd.bundle import Facts, Parity
from edge_sd.errors import ConversionError, DeviceError, InvalidRequest, MissingExtra, choices
from edge_sd.text import read_vocabulary

from ..forms import Made
from ..parity import Recording, measure
from ..recipes import QuantRecipe
from ..sources import Source

if TYPE_CHECKING:
    from ..wrappers import Wrapped

COMPUTE = ("ane", "gpu")
# The fused attention of the GPU's form is an operation since iOS18; the Neural Engine's needs nothing newer, and
# several Swift programs know a model for it by the name of an iOS16 operation.
LOWEST = {"ane": "iOS16", "gpu": "iOS18"}


@dataclass(frozen=True)
class CoreMLForm:
    """Static sizes and a deployment target; None is the model's own size and the lowest target of `compute`."""

    compute: str = "ane"
    target: str | None = None
    width: int | None = None
    height: int | None = None
    backend: str = "coreml"
    parts: tuple[str, ...] = tuple(LAYOUTS)
    recipes: tuple[str, ...] = ("fp16", "int8", "p8", "p6", "p4", "p4g16", "p2", "p1")

    def __post_init__(self) -> None:
        from .convert import require_target, target_named

        if self.compute not in COMPUTE:
            raise InvalidRequest(f"unknown compute {self.compute!r}; valid: {choices(COMPUTE)}")
        if self.target is not None:
            object.__setattr__(self, "target", target_named(self.target))
            require_target(f"the fused attention of {self.compute!r}", self.lowest, LOWEST[self.compute])

    @property
    def name(self) -> str:
        """coreml-ane; a size that was asked for is part of it, and a target that is not the usual one."""
        wishes = [f"{self.width}x{self.height}" if self.width else "", self.target or ""]
        wishes = [wish for wish in wishes if wish != LOWEST[self.compute]]
        return "-".join(["coreml", self.compute, *(wish.lower() for wish in wishes if wish)])

    @property
    def lowest(self) -> str:
        """The target that is converted for."""
        return self.target or LOWEST[self.compute]

    def check(self, source: Source, recipe: QuantRecipe) -> None:
        from importlib.util import find_spec

        from .quantize import check_target

        if not find_spec("coremltools"):
            raise MissingExtra("converting to Core ML", "coreml")
        check_target(recipe, self.lowest)
        width, height = self._pixels(source.facts)
        factor = source.facts.latents.factor * 2 ** (len(source.config("unet")["block_out_channels"]) - 1)
        for name, side in (("width", width), ("height", height)):
            if side < factor or side % factor:
                raise InvalidRequest(f"{name} {side} is not a multiple of {factor}, as this model's UNet needs")

    def _pixels(self, facts: Facts) -> tuple[int, int]:
        return self.width or facts.defaults.width, self.height or facts.defaults.height

    def latents(self, facts: Facts) -> tuple[int, int]:
        width, height = self._pixels(facts)
        return height // facts.latents.factor, width // facts.latents.factor

    def convert(self, wrapped: Wrapped, source: Source, recipe: QuantRecipe, staging: Path) -> Made:
        from . import ane, convert, quantize
        from .wrappers import Sizes, wrap

        split = self.compute == "ane" and wrapped.part == "unet"
        if split:
            ane.rewrite(wrapped.module)
        width, height = self._pixels(source.facts)
        component = wrap(wrapped.part, wrapped.module, source.facts, Sizes(height, width), split)
        package = staging / f"{component.name}.mlpackage"
        shutil.rmtree(package, ignore_errors=True)
        model = convert.convert(component, self.lowest)
        model = quantize.compress(model, recipe, self.lowest)
        _describe(model, source, recipe, self.compute)
        convert.save(model, package)
        weights = f"{package.name}/Data/com.apple.CoreML/weights/weight.bin"
        return Made(package.name, package.name, (weights,), tuple(component.example), component.outputs)

    def measure(self, part: str, made: Made, staging: Path, recording: Recording) -> Parity:
        from .mil import Program

        try:
            program = Program.open(staging / made.graph)
            parity = measure(lambda given: call(program.predict, program.inputs, LAYOUTS[part], given), recording)
        except DeviceError as error:
            raise ConversionError(f"{made.graph} cannot be measured: {error}") from error
        if program.overflow is not None:
            raise ConversionError(
                f"{made.graph} overflows float16: {program.overflow}; nothing was added to the bundle"
            )
        return parity

    def finish(self, source: Source, staging: Path) -> None:
        """The vocabulary, which Swift programs read beside the models."""
        vocabulary, merges = read_vocabulary(source.folder / "tokenizer")
        lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
        (staging / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), "utf-8")
        (staging / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")


def _describe(model: Any, source: Source, recipe: QuantRecipe, compute: str) -> None:
    model.short_description = f"{source.facts.name}, a Stable Diffusion component for {compute}, weights {recipe.name}"
    model.license = source.facts.license
