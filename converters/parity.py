"""How close an artifact is to torch float32, on inputs that a real picture produces."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_sd import metrics
from edge_sd.autoencoder import to_pixels
from edge_sd.bundle import Facts, Parity, write_atomically
from edge_sd.denoiser import Denoiser
from edge_sd.edges import canny
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
    """A torch module, its inputs and outputs in order, as a Component that remembers its calls."""

    def __init__(self, module: Any, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> None:
        self.module, self.inputs, self.outputs = module, inputs, outputs
        self.recording = Recording([], [])
        self._bound: Arrays = {}

    def bind(self, **constants: NDArray[Any]) -> None:
        self._bound |= constants

    def __call__(self, **inputs: NDArray[Any]) -> Arrays:
        import torch

        inputs = {**self._bound, **inputs}
        with torch.no_grad():
            result = self.module(*(torch.from_numpy(np.ascontiguousarray(inputs[name])) for name in self.inputs))
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
    before: Mapping[str, Arrays],
    latents: tuple[int, int],
) -> Arrays:
    """Run one component's share of a picture of `latents` (h, w) in torch; returns what other components need of it.

    Components come in the order of the pipeline, one in memory at a time: `before` holds what earlier ones returned.
    """
    if part == "text_encoder":
        ids = np.concatenate([tokenizer("").ids, tokenizer(PROMPT).ids])
        return {"context": component(input_ids=ids)["last_hidden_state"]}
    if part == "unet":
        component.bind(encoder_hidden_states=before["text_encoder"]["context"])
        sampler, noise = SAMPLERS[SAMPLER], TorchNoise(SEED)
        levels = sampler.levels(facts.schedule, STEPS)
        x = sampler.start(noise.normal((1, facts.latents.channels, *latents)), levels, facts.schedule)
        denoiser = Denoiser(component, facts.schedule.prediction_type, facts.defaults.guidance)
        *_, last = sampler.run(denoiser, x, levels, noise.normal)
        return {"latents": last.latents}
    if part == "vae_decoder":
        z = before["unet"]["latents"] / np.float32(facts.latents.scale) + np.float32(facts.latents.shift)
        return {"picture": np.clip(component(latent_sample=z)["sample"], -1, 1)}
    if part == "vae_encoder":
        return component(sample=before["vae_decoder"]["picture"])
    component.bind(encoder_hidden_states=before["text_encoder"]["context"])
    if part == "controlnet":
        component.bind(controlnet_cond=np.concatenate([_edges(before["vae_decoder"]["picture"])] * 2))
        outputs = [component(**inputs) for inputs in _noised(before["unet"]["latents"], facts)]
        return {f"{n}.{name}": value for n, output in enumerate(outputs) for name, value in output.items()}
    assert part == "controlled_unet", part
    for n, inputs in enumerate(_noised(before["unet"]["latents"], facts)):
        given = {name.removeprefix(f"{n}."): value for name, value in before["controlnet"].items()
                 if name.startswith(f"{n}.")}  # fmt: skip
        component(**inputs, **given)
    return {}


def _edges(picture: NDArray[Any]) -> NDArray[np.float32]:
    """White on black, float32 [1, 3, H, W] in [0, 1], of a picture [1, 3, H, W] in [-1, 1]."""
    pixels = ((picture[0].transpose(1, 2, 0) + 1) * 127.5).round().astype(np.uint8)
    return np.repeat(canny(pixels)[None, None], 3, axis=1).astype(np.float32)


def _noised(x_0: NDArray[Any], facts: Facts) -> Iterator[Arrays]:
    """A UNet's inputs on the way to x_0, as if it were always right."""
    noise = TorchNoise(SEED)
    for level in SAMPLERS[SAMPLER].levels(facts.schedule, STEPS)[:-1]:
        x_t = np.float32(level.alpha) * (x_0 + np.float32(level.sigma) * noise.normal(x_0.shape))
        yield {"sample": np.concatenate([x_t, x_t]), "timestep": np.array([level.t], np.float32)}


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
    """`edge_sd.metrics.psnr`, with 200 dB for equal arrays: the manifest is JSON, which has no infinity."""
    return min(200.0, metrics.psnr(found, reference, peak))
