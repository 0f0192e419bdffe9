"""Miniatures of Stable Diffusion 3 and 3.5 beside diffusers: the same random weights, prompt and seed, in float32."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from edge_sd import Pipeline, Request
from edge_sd.converters.parity import psnr

from ..transformers import save_sd3

PROMPT, NEGATIVE, SEED = "a red apple, glossy style", "a green pear", 3
Sources = Callable[[str], Path]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, emoji: Path) -> Sources:
    """Name -> a miniature's diffusers folder: "sd3", "sd35" (medium), "bare" (without T5)."""
    wishes: dict[str, dict[str, bool]] = {"sd3": {}, "sd35": {"dual": True}, "bare": {"t5": False}}

    @cache
    def made(name: str) -> Path:
        return save_sd3(tmp_path_factory.mktemp(name) / name, emoji, **wishes[name])

    return made


@cache
def loaded(source: Path) -> Any:
    import diffusers
    import torch

    absent = {} if (source / "text_encoder_3").is_dir() else {"text_encoder_3": None, "tokenizer_3": None}
    return diffusers.StableDiffusion3Pipeline.from_pretrained(source, torch_dtype=torch.float32, **absent)


def theirs(source: Path, kind: str = "StableDiffusion3Pipeline", **wishes: Any) -> np.ndarray:
    import diffusers
    import torch

    pipeline = getattr(diffusers, kind).from_pipe(loaded(source))
    pipeline.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": 4, "guidance_scale": 5.0, **wishes}
    result = pipeline(PROMPT, generator=torch.Generator().manual_seed(SEED), **given)
    return np.asarray(result.images[0])


def ours(folder: Path, **wishes: Any) -> np.ndarray:
    """As decoded, before anything is pasted."""
    given = {"seed": SEED, "steps": 4, "guidance": 5.0, **wishes}
    with Pipeline.open(folder) as pipeline:
        *_, last = pipeline.steps(Request(PROMPT, **given))
        return pipeline.decode(last.latents)


def picture() -> Image.Image:
    image = Image.new("RGB", (64, 64), (250, 240, 200))
    ImageDraw.Draw(image).ellipse((14, 16, 50, 52), (40, 160, 60))
    return image


def half() -> Image.Image:
    mask = Image.new("L", (64, 64))
    mask.paste(255, (32, 0, 64, 64))
    return mask


@pytest.mark.parametrize("name", ["sd3", "sd35", "bare"])
def test_torch_draws_a_folder_as_it_is(sources: Sources, name: str) -> None:
    source = sources(name)
    expected = theirs(source, width=64, height=96)
    assert psnr(ours(source, width=64, height=96), expected, peak=255) >= 40


def test_a_negative_prompt_is_read_by_all_encoders(sources: Sources) -> None:
    source = sources("sd3")
    expected = theirs(source, negative_prompt=NEGATIVE)
    assert psnr(ours(source, negative=NEGATIVE), expected, peak=255) >= 40
    assert psnr(ours(source), expected, peak=255) < 40


def test_without_guidance_the_prompt_alone_is_drawn(sources: Sources) -> None:
    source = sources("sd3")
    assert psnr(ours(source, guidance=1.0), theirs(source, guidance_scale=1.0), peak=255) >= 40


@pytest.mark.parametrize("inpaint", [False, True])
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_it_goes_on_from_a_picture(sources: Sources, inpaint: bool, strength: float) -> None:
    source = sources("sd3")
    kind = f"StableDiffusion3{'Inpaint' if inpaint else 'Img2Img'}Pipeline"
    more: dict[str, Any] = {"mask_image": half(), "width": 64, "height": 64} if inpaint else {}
    expected = theirs(source, kind, image=picture(), strength=strength, **more)
    found = ours(source, image=picture(), strength=strength, mask=half() if inpaint else None)
    assert psnr(found, expected, peak=255) >= 40
