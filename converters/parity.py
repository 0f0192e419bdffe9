"""How close an artifact is to torch float32, on inputs that a real picture produces."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_sd.bundle.facts import Facts
from edge_sd.bundle.parts import IMAGE_ENCODER, LATENTS, NET, SAFETY_CHECKER, TINY, UPSCALER, kind_of
from edge_sd.bundle.variants import Parity
from edge_sd.components import safety_checker as safety
from edge_sd.components.autoencoder import to_pixels
from edge_sd.components.base import Component
from edge_sd.components.denoiser import Denoiser
from edge_sd.components.image_prompt import PIXELS, SCALE, TOKENS, seen
from edge_sd.components.inpainting import Masked
from edge_sd.components.instructed import Instructed
from edge_sd.components.transformer import form_of
from edge_sd.components.upscaler import FIXED
from edge_sd.files import write_atomically
from edge_sd.images import metrics
from edge_sd.images.canny import canny
from edge_sd.images.clip import view
from edge_sd.images.files import encode
from edge_sd.pipeline.result import Picture
from edge_sd.pipeline.settings import IMAGE_GUIDANCE, Settings
from edge_sd.sampling.noise import TorchNoise
from edge_sd.sampling.samplers import SAMPLERS
from edge_sd.text.conditioning import conditions
from edge_sd.text.tokenizer import MASK
from edge_sd.text.tokenizer import encode as encode_text
from edge_sd.text.whole import PromptTokenizer

PROMPT = "a red apple, glossy style"
# Ranges of activations are of several pictures.
PROMPTS = (
    PROMPT, "a cat, flat style", "a snowman on a blue background", "a rocket, 3d style", "a slice of pizza",
    "a photo of a mountain lake at dawn", "a cactus on a pink background", "portrait of a woman, oil painting",
)  # fmt: skip
# Weights are rounded by what these show, none of which any figure is measured on.
ROUNDING = (
    ("a snowman on a blue background", 4), ("a slice of pizza", 5), ("a photo of a mountain lake at dawn", 6),
    ("a cactus on a pink background", 7), ("portrait of a woman, oil painting", 4), ("a dog, flat style", 5),
    ("a blue bird, 3d style", 6), ("a bowl of soup", 7),
)  # fmt: skip
STEPS, SEED, SAMPLER = 4, 0, "euler"
STEPS_OF_HUGE = 2
# A different number of steps for each prompt, so that calibration sees many timesteps.
CALIBRATION_STEPS = (4, 5, 6, 7, 8, 9, 10, 11)

Arrays = dict[str, NDArray[Any]]
Runner = Callable[[Arrays], Arrays]


@dataclass(frozen=True)
class Recording:
    """Inputs of a component during pictures, and the outputs of torch float32.

    measured   how many calls, from the first, it is measured on; None is all. The others are for calibration alone
    facts      of the model, where a form's names of inputs and outputs depend on them
    """

    inputs: list[Arrays]
    outputs: list[Arrays]
    measured: int | None = None
    facts: Facts | None = None

    @property
    def calibration(self) -> list[Arrays]:
        """Inputs of the calls on which it is not measured."""
        return [] if self.measured is None else self.inputs[self.measured :]


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
    tokenizers: Mapping[str, PromptTokenizer],
    before: Mapping[str, Arrays],
    latents: tuple[int, int],
    prompt: str = PROMPT,
    steps: int = STEPS,
) -> Arrays:
    """Run one component for a picture of `latents` (h, w) in torch; returns the outputs that later components take.

    Components come in the order of the pipeline, one in memory at a time: `before` holds what earlier ones returned.
    `tokenizers` are those of the text encoders, by part.
    """
    if part in tokenizers:
        return _record_text(part, component, facts, tokenizers[part], prompt)
    if part == facts.denoiser:
        return _record_denoiser(component, facts, before, latents, steps)
    if part == IMAGE_ENCODER:
        return component(**{PIXELS: view(_invented(), facts.image_side)})
    if part == "vae_decoder":
        z = facts.latents.restored(before[facts.denoiser]["latents"])
        return {"picture": np.clip(component(latent_sample=z)["sample"], -1, 1)}
    if part == "vae_encoder":
        found = component(sample=before["vae_decoder"]["picture"])
        if facts.family == "flux2":
            # What Apple's layout has of it.
            found[LATENTS] = np.split(found["latent_parameters"], 2, axis=1)[0]
        return found
    if part == TINY:
        return component(latent_sample=before[facts.denoiser]["latents"])
    if part == UPSCALER:
        return component(image=_window(before["vae_decoder"]["picture"]))
    if part == SAFETY_CHECKER:
        return _record_checker(component, before["vae_decoder"]["picture"][0])
    return _record_controlled(part, component, facts, before, latents)


def _window(picture: NDArray[Any]) -> NDArray[np.float32]:
    """A window of what an upscaler is made for: of a picture [1, 3, H, W] in [-1, 1], mirrored where it is smaller."""
    beyond = [(0, max(0, FIXED - side)) for side in picture.shape[2:]]
    whole = np.pad(picture[:, :, :FIXED, :FIXED] / 2 + 0.5, [(0, 0), (0, 0), *beyond], "symmetric")
    return np.ascontiguousarray(whole, np.float32)


def _record_text(part: str, component: TorchComponent, facts: Facts, tokenizer: PromptTokenizer, prompt: str) -> Arrays:
    """The states of the prompt, after those of the empty one where there is guidance."""
    texts = [prompt] if facts.takes_guidance else ["", prompt]
    (states,) = [text.states for text in facts.encoders if text.part == part]
    encoded = encode_text(component, [tokenizer.chunks(text, negative=text != prompt)[:1] for text in texts], states)
    return {name: value for name, value in encoded.items() if name in (states, "text_embeds", MASK)}


def _record_denoiser(
    component: TorchComponent, facts: Facts, before: Mapping[str, Arrays], latents: tuple[int, int], steps: int
) -> Arrays:
    """The latents at which the sampler ends."""
    form = form_of(facts, facts.denoiser)
    whole: Component = component if form is None else form(component, facts)
    whole.bind(**_told(before, facts, latents))
    sampler, noise = SAMPLERS[SAMPLER], TorchNoise(SEED)
    height, width = (side * facts.latents.factor for side in latents)
    levels = sampler.levels(facts.schedule_for(facts.schedule, width, height, steps), steps)
    x = sampler.start(noise.normal((1, facts.latents.channels, *latents)), levels, facts.schedule)
    guidance = 1.0 if facts.takes_guidance else facts.defaults.guidance
    edited = IMAGE_GUIDANCE if facts.instructed else None
    denoiser = Denoiser(_sees(whole, facts, latents), facts.schedule.prediction_type, guidance, image_guidance=edited)
    *_, last = sampler.run(denoiser, x, levels, noise.normal)
    if facts.image_prompt:
        # The picture is one without a picture beside the words: these calls are of the way there with one.
        whole.bind(**{SCALE: np.ones(1, np.float32)})
        rows = len(component.recording.inputs[0]["sample"])
        for inputs in _noised(last.latents, facts, rows):
            _sees(whole, facts, latents)(**inputs)
    return {"latents": last.latents}


def _sees(component: Component, facts: Facts, latents: tuple[int, int]) -> Component:
    """A UNet with the picture that it sees: all to be drawn, beside noise in place of the latents of another."""
    shape = (1, facts.latents.channels, *latents)
    if facts.inpainting:
        return Masked(component, np.ones((1, 1, *latents), np.float32), np.zeros(shape, np.float32))
    return Instructed(component, TorchNoise(SEED + 1).normal(shape)) if facts.instructed else component


def _record_checker(component: TorchComponent, decoded: NDArray[np.float32]) -> Arrays:
    """The safety checker on three pictures: the decoded one [3, H, W], upside down, and as a negative."""
    picture = to_pixels(decoded)
    for shown in (picture, picture[::-1], 255 - picture):
        component(clip_input=view(np.ascontiguousarray(shown), component.module.side))
    for scores in component.recording.outputs:
        # What Apple's layout has of them.
        scores["adjusted_scores"] = safety.adjusted(scores)
    return {}


def _record_controlled(
    part: str, component: TorchComponent, facts: Facts, before: Mapping[str, Arrays], latents: tuple[int, int]
) -> Arrays:
    """A ControlNet's residuals at several noise levels, or the UNet that takes those of `before`."""
    told = _told(before, facts, latents)
    rows = len(told["encoder_hidden_states"])
    component.bind(**told)
    if facts.image_prompt:
        component.bind(**{SCALE: np.ones(1, np.float32)})
    if kind_of(part) == NET:
        component.bind(controlnet_cond=np.repeat(_edges(before["vae_decoder"]["picture"]), rows, axis=0))
        outputs = [component(**inputs) for inputs in _noised(before[facts.denoiser]["latents"], facts, rows)]
        return {f"{n}.{name}": value for n, output in enumerate(outputs) for name, value in output.items()}
    assert part == "controlled_unet", part
    unet = _sees(component, facts, latents)
    residuals = next(given for name, given in before.items() if kind_of(name) == NET)
    for n, inputs in enumerate(_noised(before[facts.denoiser]["latents"], facts, rows)):
        given = {name.removeprefix(f"{n}."): value for name, value in residuals.items()
                 if name.startswith(f"{n}.")}  # fmt: skip
        unet(**inputs, **given)
    return {}


def _told(before: Mapping[str, Arrays], facts: Facts, latents: tuple[int, int]) -> Arrays:
    """Bound inputs of a UNet or ControlNet: of the prompt alone where samples have one row, without guidance."""
    height, width = (side * facts.latents.factor for side in latents)
    told = conditions(facts, before, width, height, facts.defaults.guidance)
    if facts.image_prompt:
        # Of weight 0 where a picture is drawn of the words alone.
        rows = len(told["encoder_hidden_states"])
        told |= seen([before[IMAGE_ENCODER][TOKENS]], 0.0, rows, rows - 1)
    return told if facts.takes_guidance or facts.defaults.guidance != 1 else {n: v[-1:] for n, v in told.items()}


def _invented() -> NDArray[np.uint8]:
    """A picture before one is drawn, [H, W, 3]: slopes of colours, and noise."""
    y, x = np.indices((256, 256))
    slopes = np.stack([x, y, 255 - x], axis=2)
    return np.asarray(slopes // 2 + np.random.default_rng(SEED).integers(0, 128, slopes.shape), np.uint8)


def _edges(picture: NDArray[Any]) -> NDArray[np.float32]:
    """White on black, float32 [1, 3, H, W] in [0, 1], of a picture [1, 3, H, W] in [-1, 1]."""
    pixels = ((picture[0].transpose(1, 2, 0) + 1) * 127.5).round().astype(np.uint8)
    return np.repeat(canny(pixels)[None, None], 3, axis=1).astype(np.float32)


def _noised(x_0: NDArray[Any], facts: Facts, rows: int) -> Iterator[Arrays]:
    """A UNet's inputs on the way to x_0, as if it were always right; `rows` of them alike."""
    noise = TorchNoise(SEED)
    for level in SAMPLERS[SAMPLER].levels(facts.schedule, STEPS)[:-1]:
        x_t = np.float32(level.alpha) * (x_0 + np.float32(level.sigma) * noise.normal(x_0.shape))
        yield {"sample": np.repeat(x_t, rows, axis=0), "timestep": np.array([level.t], np.float32)}


def save_reference(image: NDArray[np.float32], facts: Facts, path: Path, source: str, steps: int = STEPS) -> None:
    """Keep the decoder's picture [1, 3, H, W] of a `record`ed run of so many steps, as a PNG that says how to draw it.

    `source` is the hash of the weights; `edge-sd doctor` draws the same elsewhere and compares.
    """
    from PIL import Image

    height, width = image.shape[2:]
    settings = Settings(PROMPT, "", width, height, steps, facts.defaults.guidance, SEED, SAMPLER)
    pixels = Image.fromarray(to_pixels(image[0]))
    picture = Picture(pixels, settings, facts.name, "torch-fp32", "torch", source)
    write_atomically(path, encode(pixels, "PNG", *picture.texts()))


def measure(run: Runner, recording: Recording) -> Parity:
    """The worst PSNR over the outputs of `run`, each against its reference's range, and the largest error of all."""
    worst, largest = np.inf, 0.0
    results = [run(inputs) for inputs in recording.inputs[: recording.measured]]
    outputs = recording.outputs[: recording.measured]
    for name in results[0]:
        reference = np.concatenate([output[name].ravel() for output in outputs]).astype(np.float64)
        found = np.concatenate([np.asarray(result[name]).ravel() for result in results]).astype(np.float64)
        worst = min(worst, psnr(found, reference))
        largest = max(largest, float(np.abs(found - reference).max()))
    return Parity(round(worst, 2), largest)


# Float32 against float32 reaches 140 dB, which metrics.CEILING would hide.
CEILING = 200.0


def psnr(found: NDArray[Any], reference: NDArray[Any], peak: float | None = None) -> float:
    """`edge_sd.images.metrics.psnr`, finite: the manifest is JSON, which has no infinity."""
    return metrics.finite(metrics.psnr(found, reference, peak), CEILING)
