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
from .apple_layout import UNET, UPSCALING, Arrays, Layout, Port
from .parts import PICTURES, SAFETY_CHECKER, TINY, UPSCALER

# The function that Apple's loader asks for.
MAIN = "main"
# The function of a text encoder with every layer's states, which CLIP skip reads; Apple's loader does not ask for it.
LAYERS = "layers"

LAYOUTS = {
    "text_encoder": Layout("TextEncoder", {"input_ids": "input_ids"}, {"last_hidden_state": "last_hidden_state"}),
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


def layout_of(part: str, names: Iterable[str], states: str = "") -> Layout:
    """The layout of a part whose asset has inputs and outputs of these names (see apple_layout.layout_of)."""
    return apple_layout.layout_of(part, names, states, LAYOUTS, (*apple_layout.CONDITIONS, "timestep_cond"))


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
    sized = {function: ports for function, ports in functions.items() if function != LAYERS}
    for function, ports in sized.items():
        if missing := set(layout.inputs.values()) - set(ports):
            raise InvalidModel(f"{name} has no input {min(missing)} in {function}; it is not in Apple's layout")
    pictures = [ours for ours in shapes if ours in PICTURES]
    if not pictures:
        return next(iter(sized))
    wanted, theirs = shapes[pictures[0]], layout.inputs[pictures[0]]
    fixed = {function: ports[theirs].shape for function, ports in sized.items()}
    fitting = [function for function, shape in fixed.items() if shape[1:] == tuple(wanted[1:])]
    if not fitting:
        scale = 1 if wanted[1] == 3 else factor
        sizes = dict.fromkeys(f"{shape[3] * scale}x{shape[2] * scale}" for shape in fixed.values())
        raise InvalidRequest(
            f"{name} draws {', '.join(sizes)} only, not {wanted[3] * scale}x{wanted[2] * scale}; "
            "convert a variant of that size"
        )
    if "encoder_hidden_states" in shapes:
        tokens = sized[fitting[0]][layout.inputs["encoder_hidden_states"]].shape[1]
        if shapes["encoder_hidden_states"][1] != tokens:
            raise InvalidRequest(f"{name} takes {tokens} tokens of text, not {shapes['encoder_hidden_states'][1]}")
    return fitting[0]


@dataclass(frozen=True)
class Run:
    """The rows of one call of a static program: `rows` of each input, the last one repeated to fill the batch."""

    start: int
    size: int
    total: int

    def of(self, value: NDArray[Any], dtype: str) -> NDArray[Any]:
        """These rows of an input; one row goes with all of them."""
        last = min(self.total, len(value)) - 1
        chosen = [min(row, last) for row in range(self.start, self.start + self.size)]
        return np.ascontiguousarray(value[chosen], dtype)


def runs(total: int, size: int) -> list[Run]:
    """`total` rows cut into runs of a program's batch `size`."""
    return [Run(start, size, total) for start in range(0, total, size)]


def outputs_of(layout: Layout, called: list[Arrays], total: int) -> Arrays:
    """Outputs of all runs by our names, float32, without the rows that filled the last batch."""
    return {
        ours: np.concatenate([each[theirs] for each in called])[:total].astype(np.float32)
        for ours, theirs in layout.outputs.items()
        if theirs in called[0]
    }
