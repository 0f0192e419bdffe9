"""Apple's layout of Core AI models beside ours: names of assets, inputs and outputs, and the way between the two.

Source: apple/coreai-models, whose exporter writes these names and whose Swift package `CoreAIDiffusionPipeline` loads
them. Text states are (B, S, C), timesteps one for each of the batch, all sizes static, and latent scaling outside.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidModel, InvalidRequest
from . import apple_layout
from .apple_layout import TABLES, UNET, UPSCALING, Arrays, Layout, Port
from .facts import Facts
from .parts import LATENTS, PICTURES, SAFETY_CHECKER, TINY, UPSCALER

# The function that Apple's loader asks for.
MAIN = "main"
# The function of a text encoder with every layer's states, which CLIP skip reads; Apple's loader does not ask for it.
LAYERS = "layers"

LAYOUTS = {
    "text_encoder": Layout("TextEncoder", {"input_ids": "input_ids"}, {"last_hidden_state": "last_hidden_state"}),
    # Of our own. In a name with TextEncoder in it Apple's loader would find its own, where metadata.json is not there.
    "text_encoder_3": Layout("T5Encoder", {"input_ids": "input_ids"}, {"last_hidden_state": "last_hidden_state"}),
    "unet": Layout("Unet", UNET, {"out_sample": "noise_pred"}),
    "vae_decoder": Layout("VAEDecoder", {"latent_sample": "z"}, {"sample": "image"}),
    "vae_encoder": Layout("VAEEncoder", {"sample": "image"}, {"latent_parameters": "latent_params"}),
    TINY: Layout("TinyDecoder", {"latent_sample": "z"}, {"sample": "image"}),
    UPSCALER: UPSCALING,
    SAFETY_CHECKER: Layout(
        "SafetyChecker",
        {"clip_input": "clip_input"},
        {"special_scores": "special_scores", "concept_scores": "concept_scores"},
    ),
}
# Family -> the layout of its transformer.
TRANSFORMERS = {
    "sd3": Layout(
        "MMDiT",
        {name: name for name in ("timestep", "encoder_hidden_states", "pooled_projections")}
        | {"hidden_states": "sample"},
        {"out_sample": "noise_pred"},
    ),
    "flux2": Layout(
        "Transformer",
        {name: name for name in ("hidden_states", "encoder_hidden_states", "timestep", *TABLES)},
        {"out_sample": "output"},
        {"guidance": 1.0},
    ),
}


def layout_of(part: str, names: Iterable[str], facts: Facts) -> Layout:
    """The layout of a part of a model whose asset has inputs and outputs of these names (apple_layout.layout_of)."""
    states = next((text.states for text in facts.encoders if text.part == part), "")
    if part == "transformer":
        return TRANSFORMERS[facts.family]
    if facts.family == "flux2" and part == "text_encoder":
        inputs = {name: name for name in ("input_ids", "attention_mask")}
        return Layout("TextEncoder", inputs, {states: "hidden_states"})
    if facts.family == "flux2" and part == "vae_encoder":
        # The mean alone.
        return Layout("VAEEncoder", {"sample": "image"}, {LATENTS: "latent_params"})
    pooled = "text_embeds" if facts.conditioning == "joint" else ""
    conditions = (*apple_layout.CONDITIONS, "timestep_cond")
    return apple_layout.layout_of(part, names, states, LAYOUTS, conditions, pooled)


def pick(
    name: str,
    functions: Mapping[str, Mapping[str, Port]],
    layout: Layout,
    shapes: Mapping[str, tuple[int, ...]],
    factor: int,
) -> str:
    """The function of an asset for inputs of these shapes (by our names): its pictures are of that size.

    Raises InvalidModel for an asset of another layout, InvalidRequest listing the sizes there are, or for another
    number of tokens.
    """
    # Both are for others: the main function of SD 3 takes text as Apple's pipeline gives it.
    left = {LAYERS, MAIN} if layout == TRANSFORMERS["sd3"] else {LAYERS}
    sized = {function: ports for function, ports in functions.items() if function not in left}
    for function, ports in sized.items():
        if missing := set(layout.inputs.values()) - set(ports):
            raise InvalidModel(f"{name} has no input {min(missing)} in {function}; it is not in Apple's layout")
    pictures = [ours for ours in shapes if ours in PICTURES or ours == "hidden_states"]
    if not pictures:
        return next(iter(sized))
    wanted, theirs = shapes[pictures[0]], layout.inputs[pictures[0]]
    fixed = {function: ports[theirs].shape for function, ports in sized.items()}
    fitting = [function for function, shape in fixed.items() if shape[1:] == tuple(wanted[1:])]
    if not fitting:
        raise InvalidRequest(_of_other_size(name, wanted, [*fixed.values()], factor))
    if "encoder_hidden_states" not in shapes:
        return fitting[0]
    text = shapes["encoder_hidden_states"][1]
    taken = {sized[function][layout.inputs["encoder_hidden_states"]].shape[1]: function for function in fitting}
    if text not in taken:
        there = ", ".join(str(count) for count in taken)
        raise InvalidRequest(f"{name} takes {there} tokens of text, not {text}")
    return taken[text]


def _of_other_size(name: str, wanted: tuple[int, ...], fixed: list[tuple[int, ...]], factor: int) -> str:
    """What to say where a program has not the size that is wanted."""
    if len(wanted) == 3:
        there = ", ".join(str(shape[1]) for shape in fixed)
        return (
            f"{name} takes {there} tokens of pictures, {factor}x{factor} pixels each, not {wanted[1]}: one of other "
            "sizes, or with reference pictures, needs a variant of that size, of OpenVINO, or torch"
        )
    scale = 1 if wanted[1] == 3 else factor
    sizes = dict.fromkeys(f"{shape[3] * scale}x{shape[2] * scale}" for shape in fixed)
    return (
        f"{name} draws {', '.join(sizes)} only, not {wanted[3] * scale}x{wanted[2] * scale}; "
        "convert a variant of that size"
    )


@dataclass(frozen=True)
class Run:
    """The rows of one call of a static program: `rows` of each input, the last one repeated to fill the batch."""

    start: int
    size: int
    total: int

    def of(self, value: NDArray[Any], dtype: str, table: bool = False) -> NDArray[Any]:
        """These rows of an input; one row goes with all of them, and a `table` has none."""
        if table:
            return np.ascontiguousarray(value, dtype)
        last = min(self.total, len(value)) - 1
        chosen = [min(row, last) for row in range(self.start, self.start + self.size)]
        return np.ascontiguousarray(value[chosen], dtype)


def runs(total: int, size: int) -> list[Run]:
    """`total` rows cut into runs of a program's batch `size`."""
    return [Run(start, size, total) for start in range(0, total, size)]


def rows_of(ports: Mapping[str, Port], layout: Layout) -> int:
    """Rows of one call of a program."""
    return min(ports[theirs].shape[0] for theirs in layout.inputs.values() if theirs not in TABLES)


def outputs_of(layout: Layout, called: list[Arrays], total: int) -> Arrays:
    """Outputs of all runs by our names, float32, without the rows that filled the last batch.

    What has several names with "," between them is cut into as many parts of the same width.
    """
    found: Arrays = {}
    for ours, theirs in layout.outputs.items():
        if theirs in called[0]:
            whole = np.concatenate([each[theirs] for each in called])[:total].astype(np.float32)
            names = ours.split(",")
            found |= dict(zip(names, np.split(whole, len(names), axis=-1) if len(names) > 1 else [whole], strict=True))
    return found
