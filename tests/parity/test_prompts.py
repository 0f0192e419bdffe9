"""Weights, chunks, CLIP skip and words of one's own beside diffusers, given a context made by hand in torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_sd import ModelBundle, Pipeline, Request
from edge_sd.converters.parity import psnr

from ..conftest import final_norm
from .test_peers import GUIDANCE, SEED

SIZE, STEPS = 64, 6
PROMPT, NEGATIVE = "a (red:1.6) apple BREAK [pizza], 3d style", "(ugly) cat"
# The same by hand: chunks of pieces and their weights.
CHUNKS = [[("a", 1.0), ("red", 1.6), ("apple", 1.0)], [("pizza", 1 / 1.1), (", 3d style", 1.0)]]
NEGATIVE_CHUNKS = [[("ugly", 1.1), ("cat", 1.0)], []]


@pytest.fixture(scope="module")
def theirs(miniature: Path) -> Any:
    return open_diffusers(miniature)


def open_diffusers(folder: Path) -> Any:
    import torch
    from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: Any, **prompt: Any) -> np.ndarray:
    import torch

    wishes = {"guidance_scale": GUIDANCE, "num_inference_steps": STEPS, "width": SIZE, "height": SIZE, **prompt}
    result = pipeline(generator=torch.Generator().manual_seed(SEED), **wishes)
    return np.asarray(result.images[0])


def ours(bundle: ModelBundle, prompt: str, negative: str = "", **wishes: Any) -> np.ndarray:
    wishes = {"guidance": GUIDANCE, "steps": STEPS, "sampler": "euler", "seed": SEED, **wishes}
    request = Request(prompt, negative, SIZE, SIZE, **wishes)
    with Pipeline.open(bundle.root, variant="openvino-fp32") as pipeline:
        return np.asarray(pipeline.generate(request).pictures[0].image)


def context(pipeline: Any, chunks: list[list[tuple[str, float]]], skip: int) -> Any:
    """[1, n S, C] by transformers and the formula of AUTOMATIC1111."""
    import torch

    tokenizer, model = pipeline.tokenizer, pipeline.text_encoder
    contexts = []
    for pieces in chunks:
        ids, weights = [tokenizer.bos_token_id], [1.0]
        for text, weight in pieces:
            found = tokenizer(text, add_special_tokens=False).input_ids
            ids, weights = ids + found, weights + [weight] * len(found)
        fill = tokenizer.model_max_length - len(ids)
        ids, weights = ids + [tokenizer.eos_token_id] * fill, weights + [1.0] * fill
        with torch.no_grad():
            states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-skip]
            z = final_norm(model)(states)
        scaled = z * torch.tensor(weights)[None, :, None]
        ratio = float(z.mean() / scaled.mean())
        within = 1 / max(*weights, 1.0) <= ratio <= 1 / min(*weights, 1.0)
        contexts.append(scaled * (ratio if within else 1.0))
    return torch.cat(contexts, dim=1)


@pytest.mark.parametrize("skip", [1, 2])
def test_weights_and_chunks_are_what_diffusers_draws_of_such_a_context(
    theirs: Any, bundle: ModelBundle, skip: int
) -> None:
    expected = draw(
        theirs,
        prompt_embeds=context(theirs, CHUNKS, skip),
        negative_prompt_embeds=context(theirs, NEGATIVE_CHUNKS, skip),
    )
    assert psnr(ours(bundle, PROMPT, NEGATIVE, clip_skip=skip), expected, peak=255) >= 40
    assert psnr(ours(bundle, "a red apple pizza, 3d style", clip_skip=skip), expected, peak=255) < 40


def test_clip_skip_is_one_more_than_diffusers_counts(theirs: Any, bundle: ModelBundle) -> None:
    """Without guidance: diffusers skips no layers for the negative prompt, AUTOMATIC1111 and we do."""
    if not hasattr(theirs.text_encoder, "text_model"):
        pytest.skip("this diffusers looks for a part of the text encoder that this transformers no longer has")
    expected = draw(theirs, prompt="a red apple", clip_skip=1, guidance_scale=1.0)
    assert psnr(ours(bundle, "a red apple", clip_skip=2, guidance=1.0), expected, peak=255) >= 40
    assert psnr(ours(bundle, "a red apple", guidance=1.0), expected, peak=255) < 40


def test_a_word_of_ones_own_is_what_diffusers_makes_of_the_same_file(
    theirs: Any, bundle: ModelBundle, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import save_file

    path = tmp_path / "zork.safetensors"
    save_file({"emb_params": torch.randn(3, 32, generator=torch.Generator().manual_seed(0))}, path)
    theirs.load_textual_inversion(str(path), token="zork")
    expected = draw(theirs, prompt="a zork apple", negative_prompt="zork")
    theirs.unload_textual_inversion()
    assert psnr(ours(bundle, "a zork apple", "zork", embeddings={"zork": path}), expected, peak=255) >= 40
    assert psnr(ours(bundle, "a zork apple", "zork"), expected, peak=255) < 40
