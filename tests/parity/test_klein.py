"""A miniature of FLUX.2 klein beside diffusers and optimum-intel: the same random weights, prompt and seed."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edge_sd import InvalidModel, InvalidRequest, ModelBundle, Pipeline, Request
from edge_sd.converters.parity import psnr

from ..conftest import convert
from ..transformers import diffusers_klein, save_klein
from .test_sd3 import edited

PROMPT, SEED = "a red apple, glossy style", 3
SIZE = {"width": 64, "height": 96}
PICTURES = [Image.radial_gradient("L").resize(size).convert("RGB") for size in ((64, 96), (80, 64))]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_klein(tmp_path_factory.mktemp("source") / "klein")


@pytest.fixture(scope="module")
def bundle(source: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    return convert(source, tmp_path_factory.mktemp("bundle") / "klein", "fp32")


@cache
def theirs(source: Path, prompt: str = PROMPT, guidance: float = 4.0, referring: bool = False) -> np.ndarray:
    import torch

    result = diffusers_klein(source)(
        image=PICTURES if referring else None, prompt=prompt, num_inference_steps=4, guidance_scale=guidance,
        generator=torch.Generator().manual_seed(SEED), **SIZE,
    )  # fmt: skip
    return np.asarray(result.images[0])


def ours(folder: Path, prompt: str = PROMPT, **wishes: Any) -> np.ndarray:
    with Pipeline.open(folder) as pipeline:
        *_, last = pipeline.steps(Request(prompt, seed=SEED, steps=4, **{**SIZE, **wishes}))
        return pipeline.decode(last.latents)


def test_torch_draws_a_folder_as_it_is(source: Path) -> None:
    assert psnr(ours(source), theirs(source), peak=255) >= 40
    other = "the green pear"
    assert psnr(ours(source, other), theirs(source, other), peak=255) >= 40
    assert psnr(theirs(source, other), theirs(source), peak=255) < 40, "the prompt matters"


def test_the_base_model_is_guided_away_from_no_words(tmp_path: Path) -> None:
    source = save_klein(tmp_path / "base", distilled=False)
    defaults = ModelBundle.open(source).defaults
    assert (defaults.steps, defaults.guidance) == (50, 4.0)
    assert psnr(ours(source), theirs(source), peak=255) >= 40


def test_openvino_draws_what_diffusers_draws(source: Path, bundle: ModelBundle) -> None:
    assert psnr(ours(bundle.root), theirs(source), peak=255) >= 40


def test_optimum_loads_what_was_written(source: Path, bundle: ModelBundle) -> None:
    import torch
    from optimum.intel import OVPipelineForText2Image

    pipeline = OVPipelineForText2Image.from_pretrained(
        bundle.root / "openvino-fp32", device="CPU", ov_config={"INFERENCE_PRECISION_HINT": "f32"}
    )
    pipeline.set_progress_bar_config(disable=True)
    # It does not know that the model is distilled, and would guide it by 4.
    for referring in (False, True):
        found = pipeline(
            image=PICTURES if referring else None, prompt=PROMPT, num_inference_steps=4, guidance_scale=1.0,
            generator=torch.Generator().manual_seed(SEED), **SIZE,
        )  # fmt: skip
        assert psnr(np.asarray(found.images[0]), theirs(source, referring=referring), peak=255) >= 40


@pytest.mark.long
def test_an_export_of_optimum_opens_with_the_layers_that_were_trained(source: Path, tmp_path: Path) -> None:
    """optimum-intel 2.2 calls layer 10's states hidden_states.9, and draws with those."""
    import openvino as ov
    from optimum.intel import OVFlux2KleinPipeline

    OVFlux2KleinPipeline.from_pretrained(source, export=True, compile=False).save_pretrained(tmp_path)
    (text,) = ModelBundle.open(tmp_path).facts.encoders
    assert text.states == "hidden_states.8,hidden_states.17,hidden_states.26"
    compiled = ov.Core().compile_model(tmp_path / "text_encoder/openvino_model.xml", "CPU")
    chat = diffusers_klein(source).tokenizer("<|im_start|>user\na", return_tensors="pt")
    expected = diffusers_klein(source).text_encoder(**chat, output_hidden_states=True).hidden_states[9].detach().numpy()
    found = compiled({name: value.numpy() for name, value in chat.items()})
    assert psnr(found["hidden_states.8"], expected) >= 40
    assert psnr(found["hidden_states.9"], expected) < 40
    assert psnr(ours(tmp_path), theirs(source), peak=255) >= 40
    assert psnr(ours(tmp_path, references=PICTURES), theirs(source, referring=True), peak=255) >= 40


def test_the_manifest_says_what_the_family_needs(source: Path, bundle: ModelBundle) -> None:
    facts = ModelBundle.open(bundle.root).facts
    others = ModelBundle.open(source).facts, ModelBundle.open(bundle.root / "openvino-fp32").facts
    assert all(replace(each, name=facts.name) == facts for each in others)
    (text,) = facts.encoders
    assert (text.kind, text.tokens, text.states) == ("qwen3", 512, "hidden_states.9,hidden_states.18,hidden_states.27")
    assert (facts.family, facts.grain, facts.latents.fold, facts.schedule.flow_mu) == ("flux2", 16, 2, "flux2")
    defaults = facts.defaults
    assert (defaults.width, defaults.steps, defaults.guidance, defaults.sampler) == (1024, 4, 1.0, "euler")


def test_the_template_is_that_of_the_folder(source: Path) -> None:
    (text,) = ModelBundle.open(source).facts.encoders
    turn = [{"role": "user", "content": PROMPT}]
    expected = diffusers_klein(source).tokenizer.apply_chat_template(
        turn, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert f"{text.before}{PROMPT}{text.after}" == expected


def test_latents_of_two_grids_are_each_others_inverse() -> None:
    from diffusers import Flux2KleinPipeline

    from edge_sd.bundle.facts import LatentSpace

    torch = pytest.importorskip("torch")
    space = LatentSpace(16, 16, 1.0, mean=tuple(np.linspace(-1, 1, 16)), std=tuple(np.linspace(1, 2, 16)), fold=2)
    own = np.random.default_rng(0).normal(size=(1, 4, 6, 8)).astype(np.float32)
    there = space.normalized(own)
    patched = Flux2KleinPipeline._patchify_latents(torch.from_numpy(own)).numpy()
    mean, std = (np.array(each, np.float32).reshape(1, -1, 1, 1) for each in (space.mean, space.std))
    np.testing.assert_allclose(there, (patched - mean) / std, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(space.restored(there), own, rtol=1e-5, atol=1e-6)


def test_what_the_family_cannot_do_is_said_by_name(source: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"width": 72}, "width 72 is not a multiple of 16, as this model needs"),
        ({"image": Image.new("RGB", (64, 64))}, "draws from text alone: it takes no image to go on from, but ref"),
    ]
    for wishes, said in cases:
        with Pipeline.open(source) as pipeline, pytest.raises(InvalidRequest, match=said):
            pipeline.resolve(Request(PROMPT, **wishes))


def test_a_folder_that_does_not_fit_together_is_refused(source: Path, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"transformer": {"joint_attention_dim": 32}}, "attends to 32 numbers, 3 layers of its text encoder have 48"),
        ({"transformer": {"guidance_embeds": True}}, "takes a guidance scale, as FLUX.2 dev's, which is not offered"),
    ]
    for n, (changes, said) in enumerate(cases):
        with pytest.raises(InvalidModel, match=said):
            ModelBundle.open(edited(tmp_path / str(n), source, **changes))


def test_the_end_of_a_long_prompt_is_named(source: Path) -> None:
    with Pipeline.open(source) as pipeline:
        settings = pipeline.resolve(Request("a red apple " * 60, seed=1))
        (note, *_) = pipeline.wording.notes(settings, "torch")
    assert note.startswith("text_encoder takes 512 tokens of the prompt; it does not read: ")
