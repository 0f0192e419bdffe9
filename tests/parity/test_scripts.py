"""Prompt editing, alternation and AND beside a loop over diffusers' networks and scheduler with swapped embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_sd import Pipeline, Request
from edge_sd.converters.parity import psnr

SEED, STEPS, SIZE, GUIDANCE = 5, 6, 64, 4.0


@pytest.fixture(scope="module")
def theirs(emoji: Path) -> Any:
    import torch
    from diffusers import StableDiffusionPipeline

    # Its text encoder's configuration says float16, its weights are what torch draws in float32 here.
    return StableDiffusionPipeline.from_pretrained(emoji, torch_dtype=torch.float32)


@pytest.fixture(scope="module")
def ours(emoji: Path) -> Any:
    with Pipeline.open(emoji, "torch-cpu") as pipeline:
        yield pipeline


def draw(pipeline: Pipeline, prompt: str, negative: str = "", **wishes: Any) -> np.ndarray:
    wishes = {"sampler": "ddim", "width": SIZE, "height": SIZE, "steps": STEPS, "guidance": GUIDANCE, **wishes}
    return np.asarray(pipeline.generate(Request(prompt, negative, seed=SEED, **wishes)).pictures[0].image)


def loop(pipeline: Any, rows: list[list[str]], weights: list[float], guidance: float = GUIDANCE) -> np.ndarray:
    """A picture by diffusers' parts; `rows`: at each step the negative text, then those of the prompt's parts."""
    import torch

    def states(text: str) -> Any:
        ids = pipeline.tokenizer(text, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return pipeline.text_encoder(ids).last_hidden_state

    with torch.no_grad():
        pipeline.scheduler.set_timesteps(STEPS)
        factor = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
        shape = (1, pipeline.unet.config.in_channels, SIZE // factor, SIZE // factor)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(SEED)) * pipeline.scheduler.init_noise_sigma
        for t, texts in zip(pipeline.scheduler.timesteps, rows, strict=True):
            scaled = pipeline.scheduler.scale_model_input(x, t)
            outputs = [pipeline.unet(scaled, t, encoder_hidden_states=states(text)).sample for text in texts]
            parts = (w * (each - outputs[0]) for w, each in zip(weights, outputs[1:], strict=True))
            x = pipeline.scheduler.step(outputs[0] + guidance * sum(parts), t, x).prev_sample
        pixels = pipeline.vae.decode(x / pipeline.vae.config.scaling_factor).sample
    return np.asarray((pixels[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).mul(255).round().to(torch.uint8))


def steps_of(*texts: str) -> list[list[str]]:
    return [list(texts)]


RED, GREEN, DOG = "a red apple", "a green apple", "a dog"
PLANS: dict[str, tuple[list[list[str]], list[float]]] = {
    RED: (steps_of("", RED) * 6, [1.0]),
    "a [red:green:3] apple": (steps_of("", RED) * 3 + steps_of("", GREEN) * 3, [1.0]),
    "a [red:green:0.34] apple": (steps_of("", RED) * 2 + steps_of("", GREEN) * 4, [1.0]),
    "a [red|green] apple": ((steps_of("", RED) + steps_of("", GREEN)) * 3, [1.0]),
    "a red apple :1.5 AND a dog": (steps_of("", RED, DOG) * 6, [1.5, 1.0]),
    "a red apple AND [a dog:2] :-0.5": (steps_of("", RED, "") * 2 + steps_of("", RED, DOG) * 4, [1.0, -0.5]),
}


@pytest.mark.parametrize("prompt", PLANS)
def test_prompts_that_change_or_have_parts_are_a_loop_with_swapped_embeddings(
    theirs: Any, ours: Pipeline, prompt: str
) -> None:
    found = draw(ours, prompt)
    assert psnr(found, loop(theirs, *PLANS[prompt]), peak=255) >= 40
    if prompt != RED:
        assert psnr(found, loop(theirs, *PLANS[RED]), peak=255) < 35


def test_a_negative_prompt_changes_too(theirs: Any, ours: Pipeline) -> None:
    found = draw(ours, RED, "[red:green:2]")
    assert psnr(found, loop(theirs, steps_of("red", RED) * 2 + steps_of("green", RED) * 4, [1.0]), peak=255) >= 40
    assert psnr(found, loop(theirs, steps_of("red", RED) * 6, [1.0]), peak=255) < 35


def test_parts_are_composed_where_guidance_is_one(theirs: Any, ours: Pipeline) -> None:
    found = draw(ours, "a red apple AND a dog", guidance=1.0)
    assert psnr(found, loop(theirs, steps_of("", RED, DOG) * 6, [1.0, 1.0], guidance=1.0), peak=255) >= 40


def test_with_a_strength_the_steps_that_are_taken_are_counted(ours: Pipeline) -> None:
    start = draw(ours, DOG)
    from PIL import Image

    wishes = {"image": Image.fromarray(start), "strength": 0.5}
    changed = draw(ours, "a [red:green:2] apple", **wishes)
    assert psnr(changed, draw(ours, "a [red:green:0.7] apple", **wishes), peak=255) == psnr(changed, changed, peak=255)
    assert psnr(changed, draw(ours, RED, **wishes), peak=255) < 50
