"""Miniatures of Z-Image beside diffusers: the same random weights, prompt and seed, in float32."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_sd import InvalidModel, InvalidRequest, ModelBundle, Pipeline, Request
from edge_sd.converters.parity import psnr

from ..conftest import convert
from ..families import half, picture
from ..transformers import save_z_image
from .test_sd3 import edited

PROMPT, SEED = "a red apple, glossy style", 3
# 24 tokens of the image, which are filled up to 32.
SIZE = {"width": 64, "height": 96}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_z_image(tmp_path_factory.mktemp("source") / "zimage", turbo=False)


@cache
def loaded(source: Path) -> Any:
    import diffusers

    return diffusers.ZImagePipeline.from_pretrained(source)


def theirs(source: Path, kind: str = "ZImagePipeline", **wishes: Any) -> np.ndarray:
    import diffusers
    import torch

    pipeline = getattr(diffusers, kind).from_pipe(loaded(source))
    pipeline.set_progress_bar_config(disable=True)
    # Its scale is one less than that of classifier-free guidance elsewhere.
    given = {"num_inference_steps": 4, "guidance_scale": 3.0, **SIZE, **wishes}
    result = pipeline(prompt=PROMPT, generator=torch.Generator().manual_seed(SEED), **given)
    return np.asarray(result.images[0])


def ours(folder: Path, **wishes: Any) -> np.ndarray:
    with Pipeline.open(folder) as pipeline:
        *_, last = pipeline.steps(Request(PROMPT, **{"seed": SEED, "steps": 4, "guidance": 4.0, **SIZE, **wishes}))
        return pipeline.decode(last.latents)


@pytest.mark.parametrize("negative", ["", "a green pear that is far longer than the prompt, and not at all glossy"])
def test_torch_draws_a_folder_as_it_is(source: Path, negative: str) -> None:
    """Two texts of different lengths stand in one batch."""
    expected = theirs(source, negative_prompt=negative)
    assert psnr(ours(source, negative=negative), expected, peak=255) >= 40


def test_turbo_is_drawn_without_guidance(tmp_path: Path) -> None:
    source = save_z_image(tmp_path / "turbo")
    defaults = ModelBundle.open(source).defaults
    assert (defaults.steps, defaults.guidance) == (8, 1.0)
    assert psnr(ours(source, guidance=1.0), theirs(source, guidance_scale=0.0), peak=255) >= 40


@pytest.mark.parametrize("inpaint", [False, True])
def test_it_goes_on_from_a_picture(source: Path, inpaint: bool) -> None:
    kind = f"ZImage{'Inpaint' if inpaint else 'Img2Img'}Pipeline"
    more = {"mask_image": half()} if inpaint else {}
    wishes = {"image": picture(), "strength": 0.5, "width": 64, "height": 64}
    expected = theirs(source, kind, **wishes, **more)
    assert psnr(ours(source, mask=half() if inpaint else None, **wishes), expected, peak=255) >= 40


def test_the_template_lets_it_think(source: Path) -> None:
    facts = ModelBundle.open(source).facts
    (text,) = facts.encoders
    expected = loaded(source).tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], tokenize=False, add_generation_prompt=True, enable_thinking=True
    )
    assert f"{text.before}{PROMPT}{text.after}" == expected
    assert (facts.family, facts.grain, facts.text_mask, text.states) == ("zimage", 16, True, "hidden_states.2")


def test_what_does_not_fit_is_said_by_name(source: Path, tmp_path: Path) -> None:
    with Pipeline.open(source) as pipeline, pytest.raises(InvalidRequest, match="width 72 is not a multiple of 16"):
        pipeline.resolve(Request(PROMPT, width=72))
    with pytest.raises(InvalidModel, match="attends to 8 numbers, its text encoder has 16"):
        ModelBundle.open(edited(tmp_path / "narrow", source, transformer={"cap_feat_dim": 8}))


@pytest.fixture(scope="module")
def bundle(source: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    return convert(source, tmp_path_factory.mktemp("bundle") / "zimage", "fp32")


def test_openvino_draws_what_diffusers_draws(source: Path, bundle: ModelBundle) -> None:
    negative = "a green pear that is far longer than the prompt, and not at all glossy"
    expected = theirs(source, negative_prompt=negative)
    assert psnr(ours(bundle.root, negative=negative), expected, peak=255) >= 40
    assert psnr(ours(bundle.root / "openvino-fp32", negative=negative), expected, peak=255) >= 40


def test_optimum_loads_what_was_written(source: Path, bundle: ModelBundle) -> None:
    import torch
    from optimum.intel import OVPipelineForText2Image

    pipeline = OVPipelineForText2Image.from_pretrained(
        bundle.root / "openvino-fp32", device="CPU", ov_config={"INFERENCE_PRECISION_HINT": "f32"}
    )
    image = pipeline(
        prompt=PROMPT, num_inference_steps=4, guidance_scale=3.0, generator=torch.Generator().manual_seed(SEED), **SIZE
    ).images[0]
    assert psnr(np.asarray(image), theirs(source), peak=255) >= 40


@pytest.mark.long
def test_an_export_of_optimum_opens_as_a_model(source: Path, tmp_path: Path) -> None:
    from optimum.intel import OVZImagePipeline

    OVZImagePipeline.from_pretrained(source, export=True, compile=False).save_pretrained(tmp_path)
    assert ModelBundle.open(tmp_path).facts.encoders[0].states == "last_hidden_state"
    assert psnr(ours(tmp_path), theirs(source), peak=255) >= 40
