"""Apple's layout of Core ML models beside ours: names of packages, inputs and outputs, and the way between the two.

Source: apple/ml-stable-diffusion, whose Swift package and the programs built on it load these names and shapes. Text
states are (B, C, 1, S) there, timesteps one for each of the batch, all sizes static, and latent scaling outside.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Layout:
    """One component: its package's name, and our names of inputs and outputs -> Apple's."""

    package: str
    inputs: dict[str, str]
    outputs: dict[str, str]


_UNET = {name: name for name in ("sample", "timestep", "encoder_hidden_states")}
LAYOUTS = {
    "text_encoder": Layout(
        "TextEncoder",
        {"input_ids": "input_ids"},
        {"last_hidden_state": "last_hidden_state", "pooler_output": "pooled_outputs"},
    ),
    "unet": Layout("Unet", _UNET, {"out_sample": "noise_pred"}),
    "vae_decoder": Layout("VAEDecoder", {"latent_sample": "z"}, {"sample": "image"}),
    "vae_encoder": Layout("VAEEncoder", {"sample": "x"}, {"latent_parameters": "latent"}),
}


class Port(Protocol):
    """What is known of an input: numpy's name of its type, and its static shape."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


def call(predict: Callable[[Arrays], Arrays], ports: Mapping[str, Port], layout: Layout, inputs: Arrays) -> Arrays:
    """Call a package of this layout with our names, shapes and any batch; float32 in return.

    The batch is cut into runs of the package's own, the last one filled up with copies of its last row.
    """
    given = {layout.inputs[name]: _to_apple(name, value) for name, value in inputs.items()}
    rows = max(value.shape[0] for value in given.values())
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
