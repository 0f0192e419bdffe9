"""How close an artifact is to torch float32, on inputs that a real picture produces."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_sd.autoencoder import to_pixels
from edge_sd.bundle import Facts, Parity, write_atomically
from edge_sd.denoiser import Denoiser
from edge_sd.image_io import encode
from edge_sd.noise import TorchNoise
from edge_sd.request import Picture, Settings
from edge_sd.samplers import SAMPLERS
from edge_sd.text import TextTokenizer

PROMPT = "a red apple, glossy style"
STEPS, SEED, SAMPLER = 4, 0, "euler"

Arrays = dict[str, NDArray[Any]]
Runner = Callable[[Arrays], Arrays]


@dataclass(frozen=True)
class Recording:
    """What went into a component during one picture, and what torch float32 made of it."""

    inputs: list[Arrays]
    outputs: list[Arrays]


class TorchComponent:
    """A wrapped torch module as a Component that remembers its calls."""

    def __init__(self, module: Any, outputs: tuple[str, ...]) -> None:
        self.module, self.outputs = module, outputs
        self.recording = Recording([], [])
        self._bound: Arrays = {}

    def bind(self, **constants: NDArray[Any]) -> None:
        self._bound |= constants

    def __call__(self, **inputs: NDArray[Any]) -> Arrays:
        import torch

        inputs = {**self._bound, **inputs}
        with torch.no_grad():
            result = self.module(**{name: torch.from_numpy(np.ascontiguousarray(v)) for name, v in inputs.items()})
        results = result if isinstance(result, tuple) else (result,)
        output = {name: value.numpy() for name, value in zip(self.outputs, results, strict=True)}
        self.recording.inputs.append(inputs)
        self.recording.outputs.append(output)
        return output

    def close(self) -> None:
        self._bound.clear()


def record(
    part: str,
    component: TorchComponent,
    facts: Facts,
    tokenizer: TextTokenizer,
    before: Mapping[str, Any],
    latents: tuple[int, int],
) -> Any:
    """Run one component's share of a picture of `latents` (h, w) in torch; returns what the next component needs.

    Components come in the order of the pipeline, one in memory at a time: `before` holds what earlier ones returned.
    """
    if part == "text_encoder":
        ids = np.concatenate([tokenizer("").ids, tokenizer(PROMPT).ids])
        return component(input_ids=ids)["last_hidden_state"]
    if part == "unet":
        component.bind(encoder_hidden_states=before["text_encoder"])
        sampler, noise = SAMPLERS[SAMPLER], TorchNoise(SEED)
        levels = sampler.levels(facts.schedule, STEPS)
        x = sampler.start(noise.normal((1, facts.latents.channels, *latents)), levels, facts.schedule)
        denoiser = Denoiser(component, facts.schedule.prediction_type, facts.defaults.guidance)
        *_, last = sampler.run(denoiser, x, levels, noise.normal)
        return last.latents
    if part == "vae_decoder":
        z = before["unet"] / np.float32(facts.latents.scale) + np.float32(facts.latents.shift)
        return component(latent_sample=z)["sample"]
    return component(sample=np.clip(before["vae_decoder"], -1, 1))["latent_parameters"]


def save_reference(image: NDArray[np.float32], facts: Facts, path: Path, source: str) -> None:
    """Keep the decoder's picture [1, 3, H, W] of a `record`ed run as a PNG that says how to draw it again.

    `source` is the hash of the weights; `edge-sd doctor` draws the same elsewhere and compares.
    """
    from PIL import Image

    height, width = image.shape[2:]
    settings = Settings(PROMPT, "", width, height, STEPS, facts.defaults.guidance, SEED, SAMPLER, 1)
    pixels = Image.fromarray(to_pixels(image[0]))
    write_atomically(path, encode(Picture(pixels, settings, facts.name, "torch-fp32", "torch", source), "PNG"))


def measure(run: Runner, recording: Recording) -> Parity:
    """The worst PSNR over the outputs of `run`, each against its reference's range, and the largest error of all."""
    worst, largest = np.inf, 0.0
    results = [run(inputs) for inputs in recording.inputs]
    for name in results[0]:
        reference = np.concatenate([output[name].ravel() for output in recording.outputs]).astype(np.float64)
        found = np.concatenate([np.asarray(result[name]).ravel() for result in results]).astype(np.float64)
        worst = min(worst, psnr(found, reference))
        largest = max(largest, float(np.abs(found - reference).max()))
    return Parity(round(worst, 2), largest)


def psnr(found: NDArray[Any], reference: NDArray[Any], peak: float | None = None) -> float:
    """10 log10(peak^2 / MSE) in dB; `peak` is the reference's range unless given. 200 for equal arrays."""
    error = float(np.mean((found.astype(np.float64) - reference.astype(np.float64)) ** 2))
    if not np.isfinite(error):
        return -np.inf
    peak = float(np.ptp(reference)) if peak is None else peak
    return float(min(200.0, 10 * np.log10(max(peak, 1e-30) ** 2 / max(error, 1e-300))))
