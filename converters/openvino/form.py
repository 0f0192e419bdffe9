"""OpenVINOForm: graphs in the layout of optimum-intel, for any device and any size."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_sd.bundle.diffusers import GRAPH
from edge_sd.bundle.ip_adapter import FOLDER
from edge_sd.bundle.parts import IMAGE_ENCODER, SAFETY_CHECKER
from edge_sd.bundle.transformers import statistics
from edge_sd.bundle.variants import Parity
from edge_sd.errors import InvalidRequest, choices
from edge_sd.files import read_json

from ..form import Made, Report
from ..parity import Recording
from ..recipes import LEARNED, RECIPES, QuantRecipe, recipe_for
from ..sources.source import Source
from .link import share_weights

if TYPE_CHECKING:
    from ..sources.wrappers import Wrapped

# Random-weight models of 512 pixels would take minutes here; the arithmetic is the same on fewer pixels.
LARGEST_SIDE = 32
# Of a model that takes seconds for a step.
SIDE_OF_LARGE = 16


@dataclass(frozen=True)
class OpenVINOForm:
    """The layout of optimum-intel; shapes stay open."""

    backend: str = "openvino"
    name: str = "openvino"
    compute: str = ""
    lowest: str = ""
    halves: bool = True
    rounding: bool = False
    recipes: tuple[str, ...] = (
        "fp32", "fp16", "int8", "fp8", "w8a8", "hybrid", "int4", "int4g64", "int4g128",
        *(f"int4{name}" for name in LEARNED), "nf4",
    )  # fmt: skip

    def check(self, source: Source, recipe: QuantRecipe) -> None:
        if recipe.activations and source.facts.family == "sana":
            # A few sums of it are far larger than the others, and OpenVINO 2026.4 crashed on such a graph.
            valid = choices(name for name in self.recipes if not RECIPES[name].activations)
            raise InvalidRequest(
                f"{source.facts.name} has linear attention, which {recipe.name} does not round; valid: {valid}"
            )

    def latents(self, source: Source, recipe: QuantRecipe) -> list[tuple[int, int]]:
        facts = source.facts
        # Ranges of activations are those of larger pictures.
        side = LARGEST_SIDE if recipe.calibrated or not source.is_large(facts.denoiser) else SIDE_OF_LARGE
        height, width = (min(pixels // facts.latents.factor, side)
                         for pixels in (facts.defaults.height, facts.defaults.width))  # fmt: skip
        return [(height, width)]

    def convert(
        self, wrapped: Wrapped, source: Source, recipe: QuantRecipe, staging: Path, recording: Recording, report: Report
    ) -> Made:
        from . import convert as openvino

        part = wrapped.part
        folder = staging / part
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        openvino.convert(wrapped, recipe_for(part, recipe), folder, source.facts, recording, report)
        (folder / "config.json").write_text(json.dumps(_config(source, part), indent=2), "utf-8")
        weights = [f"{part}/{Path(GRAPH).stem}.bin"]
        # Rounded activations change the plain UNet's weights, and so does rounding by what its layers see without a
        # ControlNet: there is nothing to share.
        own = recipe.of(part)
        if part == "controlled_unet" and not (own.activations or own.learns):
            weights = [f"unet/{weights[0].split('/')[1]}", f"{part}/{Path(GRAPH).stem}.constants"]
            share_weights(folder / GRAPH, staging / "unet" / GRAPH, staging / weights[1])
        return Made((part,), f"{part}/{GRAPH}", tuple(weights), tuple(wrapped.example), wrapped.outputs)

    def measure(self, part: str, made: Made, staging: Path, recording: Recording) -> Parity:
        from . import convert as openvino

        return openvino.measure_parity(staging / made.graph, [staging / name for name in made.weights], recording)

    def finish(self, source: Source, staging: Path) -> None:
        """The index, the scheduler, the tokenizer in two forms."""
        from . import convert as openvino

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


def _config(source: Source, part: str) -> dict[str, Any]:
    """A component's config as optimum-intel writes it: of a language model that was cut, and with FLUX.2's numbers."""
    config, facts = source.config(part), source.facts
    layers = next((text.layers for text in facts.encoders if text.part == part), None)
    if layers is not None:
        config |= {"num_hidden_layers": layers}
    if part == IMAGE_ENCODER:
        # So that the variant's folder is a model by itself.
        config |= {FOLDER: {"kind": facts.image_prompt, "tokens": facts.image_tokens}}
    if part == "vae_decoder" and facts.latents.fold > 1:
        mean, variance = statistics(source.folder, config)
        config |= {"bn_running_mean_data": mean.tolist(), "bn_running_var_data": variance.tolist()}
        config |= {"bn_eps": config.get("batch_norm_eps", 1e-4)}
    return config
