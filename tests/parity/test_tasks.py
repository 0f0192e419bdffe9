"""Image to image and inpainting beside diffusers: the same weights, seed, picture and mask."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from edge_sd import ModelBundle, Pipeline, Request
from edge_sd.converters.parity import psnr
from edge_sd.pipeline.control import Control, controls_of

from ..conftest import convert
from .test_peers import GUIDANCE, PROMPT, SEED, STEPS


@pytest.fixture(scope="module")
def emoji_bundle(emoji: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    return convert(emoji, tmp_path_factory.mktemp("tasks") / "emoji", "fp32")


def sketch() -> Image.Image:
    image = Image.new("RGB", (128, 128), (250, 240, 200))
    ImageDraw.Draw(image).ellipse((28, 32, 100, 104), (40, 160, 60))
    return image


def mask() -> Image.Image:
    image = Image.new("L", (128, 128))
    image.paste(255, (64, 0, 128, 128))
    return image


def theirs(kind: str, emoji: Path, **wishes: Any) -> np.ndarray:
    import diffusers
    import torch

    pipeline = getattr(diffusers, kind).from_pretrained(emoji, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(SEED)
    result = pipeline(
        PROMPT, image=sketch(), num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=generator, **wishes
    )
    return np.asarray(result.images[0])


def ours(bundle: ModelBundle, **wishes: Any) -> np.ndarray:
    """As decoded, before anything is pasted: diffusers' pipelines paste nothing."""
    request = Request(PROMPT, seed=SEED, steps=STEPS, guidance=GUIDANCE, image=sketch(), **wishes)
    with Pipeline.open(bundle.root) as pipeline:
        *_, last = pipeline.steps(request)
        return pipeline.decode(last.latents)


@pytest.mark.parametrize("strength", [0.35, 0.8, 1.0])
def test_image_to_image_is_what_diffusers_draws(emoji: Path, emoji_bundle: ModelBundle, strength: float) -> None:
    expected = theirs("StableDiffusionImg2ImgPipeline", emoji, strength=strength)
    assert psnr(ours(emoji_bundle, strength=strength), expected, peak=255) >= 40


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpainting_is_what_diffusers_draws(emoji: Path, emoji_bundle: ModelBundle, strength: float) -> None:
    size = {"width": 128, "height": 128}
    expected = theirs("StableDiffusionInpaintPipeline", emoji, mask_image=mask(), strength=strength, **size)
    assert psnr(ours(emoji_bundle, mask=mask(), strength=strength), expected, peak=255) >= 40


@pytest.mark.parametrize("wishes", [{}, {"weight": 0.6}, {"start": 0.25, "end": 0.75}, {"guidance": 1.0}])
def test_a_controlnet_does_what_it_does_in_diffusers(
    miniature: Path, bundle: ModelBundle, wishes: dict[str, float]
) -> None:
    import torch
    from diffusers import ControlNetModel, EulerDiscreteScheduler, StableDiffusionControlNetPipeline

    net = ControlNetModel.from_pretrained(miniature / "controlnet", torch_dtype=torch.float32)
    pipe = StableDiffusionControlNetPipeline.from_pretrained(miniature, controlnet=net, torch_dtype=torch.float32)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    lines = Image.new("RGB", (64, 64))
    ImageDraw.Draw(lines).ellipse((12, 12, 50, 50), outline="white")
    shares = {"weight": 1.0, "start": 0.0, "end": 1.0, **wishes}
    guidance = shares.pop("guidance", GUIDANCE)
    expected = pipe(
        PROMPT, image=lines, num_inference_steps=8, guidance_scale=guidance, width=64, height=64,
        controlnet_conditioning_scale=shares["weight"], control_guidance_start=shares["start"],
        control_guidance_end=shares["end"], generator=torch.Generator().manual_seed(SEED),
    ).images[0]  # fmt: skip
    request = Request(
        PROMPT, seed=SEED, steps=8, sampler="euler", width=64, height=64, guidance=guidance,
        controls=[Control(lines, **shares)],
    )  # fmt: skip
    with Pipeline.open(bundle.root, variant="openvino-fp32") as pipeline:
        found = np.asarray(pipeline.generate(request).pictures[0].image)
        plain = pipeline.generate(Request(PROMPT, seed=SEED, steps=8, sampler="euler", width=64, height=64))
    assert psnr(found, np.asarray(expected), peak=255) >= 40
    assert psnr(found, np.asarray(plain.pictures[0].image), peak=255) < 35, "the lines matter"


def test_several_controls_add_up_as_in_diffusers(miniature: Path, bundle: ModelBundle) -> None:
    """One net follows two pictures, with a weight and a share of the steps each."""
    import torch
    from diffusers import ControlNetModel, EulerDiscreteScheduler, StableDiffusionControlNetPipeline

    net = ControlNetModel.from_pretrained(miniature / "controlnet", torch_dtype=torch.float32)
    pipe = StableDiffusionControlNetPipeline.from_pretrained(miniature, controlnet=[net, net])
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    pictures = [Image.new("RGB", (64, 64)), Image.new("RGB", (64, 64))]
    ImageDraw.Draw(pictures[0]).ellipse((12, 12, 50, 50), outline="white")
    ImageDraw.Draw(pictures[1]).line((0, 60, 60, 10), fill="white", width=3)
    shares = {"weight": [0.9, 0.5], "start": [0.0, 0.25], "end": [0.75, 1.0]}
    expected = pipe(
        PROMPT, image=pictures, num_inference_steps=8, guidance_scale=GUIDANCE, width=64, height=64,
        controlnet_conditioning_scale=shares["weight"], control_guidance_start=shares["start"],
        control_guidance_end=shares["end"], generator=torch.Generator().manual_seed(SEED),
    ).images[0]  # fmt: skip
    request = Request(
        PROMPT, seed=SEED, steps=8, sampler="euler", guidance=GUIDANCE, width=64, height=64,
        controls=controls_of(pictures, reading=["lines"], **shares),
    )  # fmt: skip
    with Pipeline.open(bundle.root, variant="openvino-fp32") as pipeline:
        found = np.asarray(pipeline.generate(request).pictures[0].image)
        first = replace(request, controls=request.controls[:1])
        alone = pipeline.generate(first)
    assert psnr(found, np.asarray(expected), peak=255) >= 40
    assert psnr(found, np.asarray(alone.pictures[0].image), peak=255) < 50, "the second matters"


def test_an_autoencoder_in_tiles_decodes_nearly_what_it_decodes_at_once() -> None:
    with Pipeline.open("emoji") as pipeline:
        whole = Request(PROMPT, seed=2, steps=2, sampler="euler", width=256, height=256, vae_tile=0)
        *_, last = pipeline.steps(whole)
        expected = pipeline.decode(last.latents)
        pipeline.prepare(pipeline.resolve(replace(whole, vae_tile=192)))
        assert pipeline.components.shapes("vae_decoder")["latent_sample"] == (1, 4, 24, 24)
        assert psnr(pipeline.decode(last.latents), expected, peak=255) >= 38
