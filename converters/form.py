"""A form: what a model is converted to. All that `build` needs of a backend, so that it knows none."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from edge_sd.bundle.diffusers import GRAPH
from edge_sd.bundle.parts import SAFETY_CHECKER, TINY
from edge_sd.bundle.variants import Parity
from edge_sd.errors import InvalidRequest, choices
from edge_sd.files import read_json

from .openvino.link import share_weights
from .parity import Recording
from .recipes import RECIPES, QuantRecipe
from .sources.source import PARTS, Source

if TYPE_CHECKING:
    from .sources.wrappers import Wrapped

TARGETS = ("openvino", "coreml")
# Random-weight models of 512 pixels would take minutes here; the arithmetic is the same on fewer pixels.
LARGEST_SIDE = 32
# Of a model that takes seconds for a step.
SIDE_OF_LARGE = 16


@dataclass(frozen=True)
class Made:
    """One written component: paths are relative to the variant's folder; `places`, files or folders, are all of it.

    `chunks` are graphs that follow the first; `precision` is its own where it could not have the recipe's.
    """

    places: tuple[str, ...]
    graph: str
    weights: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    chunks: tuple[str, ...] = ()
    precision: str = ""


class Form(Protocol):
    """Methods raise InvalidRequest (a wish that cannot be), MissingExtra or ConversionError."""

    @property
    def backend(self) -> str: ...

    @property
    def name(self) -> str:
        """The variant's name without its recipe."""

    @property
    def compute(self) -> str:
        """The device that the arithmetic is arranged for, or ""."""

    @property
    def lowest(self) -> str:
        """The oldest system that it runs on, such as "iOS18"; "" is any that the backend runs on."""

    @property
    def parts(self) -> tuple[str, ...]:
        """The components that this form has (see sources.PARTS)."""

    @property
    def halves(self) -> bool:
        """Whether it traces modules that keep weights of 16 bits as they are (see halves)."""

    @property
    def recipes(self) -> tuple[str, ...]:
        """The names of the recipes that this form can store."""

    def check(self, source: Source, recipe: QuantRecipe) -> None:
        """Refuse what cannot be, before any work."""

    def latents(self, source: Source, recipe: QuantRecipe) -> list[tuple[int, int]]:
        """Heights and widths of the latents on which parity is measured."""

    def convert(
        self, wrapped: Wrapped, source: Source, recipe: QuantRecipe, staging: Path, recording: Recording
    ) -> Made:
        """Write one component into `staging`; `wrapped` may be changed on the way.

        `recording` is what it will be measured by, for choices that depend on what a component computes.
        """

    def measure(self, part: str, made: Made, staging: Path, recording: Recording) -> Parity:
        """Parity of a written component, the same on every machine."""

    def finish(self, source: Source, staging: Path) -> None:
        """Write what other programs look for beside the components."""


@dataclass(frozen=True)
class OpenVINOForm:
    """The layout of optimum-intel; shapes stay open."""

    backend: str = "openvino"
    name: str = "openvino"
    compute: str = ""
    lowest: str = ""
    halves: bool = True
    parts: tuple[str, ...] = tuple(PARTS)
    recipes: tuple[str, ...] = ("fp32", "fp16", "int8", "w8a8", "hybrid", "int4", "int4g64", "int4g128")

    def check(self, source: Source, recipe: QuantRecipe) -> None:
        return

    def latents(self, source: Source, recipe: QuantRecipe) -> list[tuple[int, int]]:
        facts = source.facts
        # Ranges of activations are those of larger pictures.
        side = LARGEST_SIDE if recipe.activations or not source.is_large("unet") else SIDE_OF_LARGE
        height, width = (min(pixels // facts.latents.factor, side)
                         for pixels in (facts.defaults.height, facts.defaults.width))  # fmt: skip
        return [(height, width)]

    def convert(
        self, wrapped: Wrapped, source: Source, recipe: QuantRecipe, staging: Path, recording: Recording
    ) -> Made:
        from .openvino import convert as openvino

        part = wrapped.part
        folder = staging / part
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        if part in (SAFETY_CHECKER, TINY) and recipe.bits < 16:
            # A picture's verdict is to be the same in every variant; the tiny decoder has nothing to save.
            recipe = RECIPES["fp16"]
        openvino.convert(wrapped, recipe, folder, source.facts, recording)
        (folder / "config.json").write_text(json.dumps(source.config(part), indent=2), "utf-8")
        weights = [f"{part}/{Path(GRAPH).stem}.bin"]
        if part == "controlled_unet":
            weights = [f"unet/{weights[0].split('/')[1]}", f"{part}/{Path(GRAPH).stem}.constants"]
            share_weights(folder / GRAPH, staging / "unet" / GRAPH, staging / weights[1])
        return Made((part,), f"{part}/{GRAPH}", tuple(weights), tuple(wrapped.example), wrapped.outputs)

    def measure(self, part: str, made: Made, staging: Path, recording: Recording) -> Parity:
        from .openvino import convert as openvino

        return openvino.measure_parity(staging / made.graph, [staging / name for name in made.weights], recording)

    def finish(self, source: Source, staging: Path) -> None:
        """The index, the scheduler, the tokenizer in two forms."""
        from .openvino import convert as openvino

        tokenizers = [text.tokenizer for text in source.facts.encoders]
        for folder in ("scheduler", *tokenizers):
            shutil.copytree(source.folder / folder, staging / folder, dirs_exist_ok=True)
        index = read_json(source.folder / "model_index.json")
        if SAFETY_CHECKER in source.parts:
            # Other programs would look for torch's weights of it.
            index |= {SAFETY_CHECKER: [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
        (staging / "model_index.json").write_text(json.dumps(index, indent=2), "utf-8")
        for folder in tokenizers:
            openvino.convert_tokenizer(source.folder / folder, staging / folder)


def form_named(name: str, **wishes: Any) -> Form:
    """The form for a backend's name; `wishes` are the fields of its class. Raises InvalidRequest."""
    if name == "openvino":
        if given := sorted(key for key, value in wishes.items() if value is not None):
            raise InvalidRequest(f"openvino takes no {', '.join(given)}: its variants run everywhere, in any size")
        return OpenVINOForm()
    if name == "coreml":
        from .coreml.form import CoreMLForm

        return CoreMLForm(**{key: value for key, value in wishes.items() if value is not None})
    raise InvalidRequest(f"unknown target {name!r}; valid: {choices(TARGETS)}")
