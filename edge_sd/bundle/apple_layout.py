"""Apple's layout of Core ML models beside ours: names of packages, inputs and outputs, and the way between the two.

Source: apple/ml-stable-diffusion, whose Swift package and the programs built on it load these names and shapes. Text
states are (B, C, 1, S) there, timesteps one for each of the batch, all sizes static, and latent scaling outside.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidModel, InvalidRequest
from .parts import PICTURES, SAFETY_CHECKER, TINY, UPSCALER

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Layout:
    """One component: its package's name, and our names of inputs and outputs -> Apple's.

    fixed   inputs that our contract lacks -> the number that fills them
    """

    package: str
    inputs: dict[str, str]
    outputs: dict[str, str]
    fixed: dict[str, float] = field(default_factory=dict)


# Inputs that a call has one of, however many rows it has.
TABLES = ("rotary_emb_cos", "rotary_emb_sin")
# Of our own: neither of Apple's layouts has an upscaler.
UPSCALING = Layout("Upscaler", {"image": "image"}, {"sample": "enlarged"})
UNET = {name: name for name in ("sample", "timestep", "encoder_hidden_states")}
LAYOUTS = {
    "text_encoder": Layout(
        "TextEncoder",
        {"input_ids": "input_ids"},
        {"last_hidden_state": "last_hidden_state", "pooler_output": "pooled_outputs"},
    ),
    "unet": Layout("Unet", UNET, {"out_sample": "noise_pred"}),
    "vae_decoder": Layout("VAEDecoder", {"latent_sample": "z"}, {"sample": "image"}),
    TINY: Layout("TinyDecoder", {"latent_sample": "z"}, {"sample": "image"}),
    UPSCALER: UPSCALING,
    "vae_encoder": Layout("VAEEncoder", {"sample": "x"}, {"latent_parameters": "latent"}),
    # The runtime blackens pictures itself. Apple's graph asks whether special scores are above zero, diffusers whether
    # they are when rounded to three decimals.
    SAFETY_CHECKER: Layout(
        "SafetyChecker",
        {"clip_input": "clip_input"},
        {"adjusted_scores": "concept_scores"},
        {"images": 0.0, "adjustment": -0.0005},
    ),
}


# SDXL's conditions beside the text.
CONDITIONS = ("text_embeds", "time_ids")


def layout_of(
    part: str,
    names: Iterable[str],
    states: str = "",
    layouts: Mapping[str, Layout] = LAYOUTS,
    conditions: Sequence[str] = CONDITIONS,
    pooled: str = "",
) -> Layout:
    """The layout of a part whose package has inputs and outputs of these names: residuals are as many as there are.

    `states` is our name of hidden_embeds, the states before a text encoder's last layer, which SDXL attends to.
    `layouts` holds the parts whose names are always the same, `conditions` a UNet's inputs that not every model has,
    `pooled` our name of pooled_outputs where it is the same of all encoders.
    """
    names = set(names)
    if part.startswith("text_encoder") and "hidden_embeds" in names:
        name, theirs = ("TextEncoder", "pooler_output") if part == "text_encoder" else ("TextEncoder2", "text_embeds")
        return Layout(name, {"input_ids": "input_ids"}, {states: "hidden_embeds", pooled or theirs: "pooled_outputs"})
    unet = {**UNET, **{name: name for name in conditions if name in names}}
    if part == "unet":
        return Layout("Unet", unet, layouts[part].outputs)
    if part not in ("controlnet", "controlled_unet"):
        return layouts[part]
    count = sum(name.startswith("additional_residual_") for name in names)
    residuals = {name: name for name in (f"additional_residual_{n}" for n in range(count))}
    if part == "controlnet":
        return Layout("ControlNet", {**unet, "controlnet_cond": "controlnet_cond"}, residuals)
    return Layout("ControlledUnet", {**unet, **residuals}, {"out_sample": "noise_pred"})


class Port(Protocol):
    """What is known of an input: numpy's name of its type, and its static shape."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


class Chain:
    """Programs one after the other as one: each gets the inputs of all and what those before it made, by name."""

    def __init__(self, programs: Sequence[Any]) -> None:
        self.programs = programs
        self.inputs: dict[str, Port] = {}
        made: set[str] = set()
        for program in programs:
            self.inputs |= {name: port for name, port in program.inputs.items() if name not in made}
            made |= set(program.outputs)

    @property
    def overflow(self) -> Any:
        """First overflow that a program of the executor met."""
        found = (getattr(program, "overflow", None) for program in self.programs)
        return next((each for each in found if each is not None), None)

    def placements(self) -> Counter[str]:
        """Functions of all programs together."""
        return sum((program.placements() for program in self.programs), Counter())

    def predict(self, inputs: Arrays) -> Arrays:
        """Run all; the outputs of the last."""
        values, outputs = dict(inputs), {}
        for program in self.programs:
            outputs = program.predict({name: values[name].astype(p.dtype) for name, p in program.inputs.items()})
            values |= outputs
        return outputs


def pick(
    name: str,
    functions: Mapping[str, Mapping[str, Port]],
    layout: Layout,
    shapes: Mapping[str, tuple[int, ...]],
    factor: int,
) -> str:
    """The function of a package for inputs of these shapes (by our names): its pictures are of that size.

    Of several, the one of the smallest batch that takes all rows, or of the largest. Raises InvalidModel for a package
    of another layout, InvalidRequest listing the sizes there are, or for another number of tokens.
    """
    pictures = [ours for ours in shapes if ours in PICTURES]
    if not pictures:
        return next(iter(functions))
    wanted, theirs = shapes[pictures[0]], layout.inputs[pictures[0]]
    if any(theirs not in ports for ports in functions.values()):
        raise InvalidModel(f"{name} has no input {theirs}; it is not in Apple's layout")
    fixed = {function: ports[theirs].shape for function, ports in functions.items()}
    fitting = sorted((shape[0], function) for function, shape in fixed.items() if shape[1:] == tuple(wanted[1:]))
    if not fitting:
        scale = 1 if wanted[1] == 3 else factor
        sizes = dict.fromkeys(f"{shape[3] * scale}x{shape[2] * scale}" for shape in fixed.values())
        raise InvalidRequest(
            f"{name} draws {', '.join(sizes)} only, not {wanted[3] * scale}x{wanted[2] * scale}; "
            "convert a variant of that size"
        )
    if "encoder_hidden_states" in shapes:
        tokens = functions[fitting[0][1]][layout.inputs["encoder_hidden_states"]].shape[3]
        if shapes["encoder_hidden_states"][1] != tokens:
            raise InvalidRequest(f"{name} takes {tokens} tokens of text, not {shapes['encoder_hidden_states'][1]}")
    return next((function for batch, function in fitting if batch >= wanted[0]), fitting[-1][1])


def call(predict: Callable[[Arrays], Arrays], ports: Mapping[str, Port], layout: Layout, inputs: Arrays) -> Arrays:
    """Call a package of this layout with our names, shapes and any batch; float32 in return.

    The batch is cut into runs of the package's own, the last one filled up with copies of its last row.
    """
    given = {layout.inputs[name]: _to_apple(name, value) for name, value in inputs.items()}
    rows = max(value.shape[0] for value in given.values())
    given |= {name: np.full(ports[name].shape, value) for name, value in layout.fixed.items() if name in ports}
    size = min(port.shape[0] for port in ports.values())
    runs: list[Arrays] = []
    for n in range(math.ceil(rows / size)):
        some = {}
        for name, port in ports.items():
            # A timestep counts for every row.
            last = given[name].shape[0] - 1
            chosen = [min(row, rows - 1, last) for row in range(n * size, (n + 1) * size)]
            some[name] = np.ascontiguousarray(given[name][chosen], port.dtype)
        runs.append(predict(some))
    return {
        ours: np.concatenate([run[theirs] for run in runs])[:rows].astype(np.float32)
        for ours, theirs in layout.outputs.items()
        if theirs in runs[0]
    }


def _to_apple(name: str, value: NDArray[Any]) -> NDArray[Any]:
    return value.transpose(0, 2, 1)[:, :, None, :] if name == "encoder_hidden_states" else value
