"""The same weights in diffusers, optimum-intel and openvino.genai: the same picture from the same seed.

The two OpenVINO programs load the variant's folder as it is, which is the test of its layout.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edge_sd import ModelBundle, Pipeline, Request
from edge_sd.converters.parity import psnr

from ..conftest import convert

PROMPT, SEED, STEPS, GUIDANCE = "a red apple, glossy style", 7, 20, 4.0


@pytest.fixture(scope="module")
def emoji_bundle(plain_emoji: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    return convert(plain_emoji, tmp_path_factory.mktemp("peers") / "emoji", "fp32")


@pytest.fixture(scope="module")
def reference(emoji: Path) -> np.ndarray:
    return draw_with_diffusers(emoji)


def draw_with_diffusers(folder: Path, scheduler: str | None = None, **options: Any) -> np.ndarray:
    import diffusers
    import torch

    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    if scheduler:
        pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config, **options)
    return run(pipeline)


def run(pipeline: Any) -> np.ndarray:
    import torch

    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(SEED)
    result = pipeline(
        PROMPT, num_inference_steps=STEPS, guidance_scale=GUIDANCE, width=128, height=128, generator=generator
    )
    return np.asarray(result.images[0])


def ours(model: Path | str, **request: Any) -> np.ndarray:
    wanted = Request(PROMPT, seed=SEED, steps=STEPS, guidance=GUIDANCE, width=128, height=128, **request)
    with Pipeline.open(model) as pipeline:
        return np.asarray(pipeline.generate(wanted).pictures[0].image)


def test_fp32_draws_what_diffusers_draws(emoji_bundle: ModelBundle, reference: np.ndarray) -> None:
    assert psnr(ours(emoji_bundle.root), reference, peak=255) >= 40


@pytest.mark.parametrize(
    ("sampler", "scheduler", "options"),
    [
        ("euler", "EulerDiscreteScheduler", {}),
        ("dpmpp_2m", "DPMSolverMultistepScheduler", {}),
        ("dpmpp_2m_karras", "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    ],
)
def test_other_samplers_draw_what_diffusers_draws(
    emoji: Path, emoji_bundle: ModelBundle, sampler: str, scheduler: str, options: dict[str, Any]
) -> None:
    expected = draw_with_diffusers(emoji, scheduler, **options)
    assert psnr(ours(emoji_bundle.root, sampler=sampler), expected, peak=255) >= 40


def test_the_embedded_variant_is_close_to_diffusers(reference: np.ndarray) -> None:
    """float16 weights and, on processors that have it, bfloat16 arithmetic."""
    assert psnr(ours("emoji"), reference, peak=255) >= 30


def test_pndm_on_an_epsilon_model_draws_what_diffusers_draws(miniature: Path, bundle: ModelBundle) -> None:
    """Stable Diffusion 1's own scheduler; the miniature names it in its config."""
    assert bundle.defaults.sampler == "pndm"
    with Pipeline.open(bundle.root, variant="openvino-fp32") as pipeline:
        wanted = Request(PROMPT, seed=SEED, steps=STEPS, guidance=GUIDANCE, width=128, height=128)
        found = np.asarray(pipeline.generate(wanted).pictures[0].image)
    assert psnr(found, draw_with_diffusers(miniature), peak=255) >= 40


@pytest.mark.parametrize("repaired", [True, False])
def test_pndm_from_a_picture_draws_what_diffusers_does_once_its_second_call_is_repeated(
    miniature: Path, repaired: bool
) -> None:
    """The first step of PNDM is of two calls, and its list of timesteps names the second one twice. From a picture on,
    diffusers takes the end of that list, and what it computes next is at a noise level that is passed already.
    """
    import torch
    from diffusers import StableDiffusionImg2ImgPipeline

    image = Image.effect_mandelbrot((64, 64), (-2, -1, 1, 1), 20).convert("RGB")
    pipeline = StableDiffusionImg2ImgPipeline.from_pretrained(miniature, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if repaired:
        told = pipeline.get_timesteps

        def timesteps(*wishes: Any) -> tuple[Any, int]:
            first, second, *rest = told(*wishes)[0][-4:].tolist()
            return torch.tensor([first, second, second, *rest]), 5

        pipeline.get_timesteps = timesteps
    theirs = pipeline(
        PROMPT, image=image, strength=0.5, num_inference_steps=8, guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(SEED),
    ).images[0]  # fmt: skip
    request = Request(PROMPT, image=image, strength=0.5, steps=8, guidance=GUIDANCE, width=64, height=64, seed=SEED)
    with Pipeline.open(miniature, "torch-cpu") as ours:
        found = ours.generate(request).pictures[0].image
    assert (psnr(np.asarray(found), np.asarray(theirs), peak=255) >= 40) is repaired


def test_optimum_intel_loads_the_variant_unchanged(emoji_bundle: ModelBundle, reference: np.ndarray) -> None:
    from optimum.intel import OVStableDiffusionPipeline

    pipeline = OVStableDiffusionPipeline.from_pretrained(
        emoji_bundle.root / "openvino-fp32", ov_config={"INFERENCE_PRECISION_HINT": "f32"}
    )
    assert psnr(run(pipeline), reference, peak=255) >= 40


def test_openvino_genai_loads_the_variant_unchanged(emoji_bundle: ModelBundle, reference: np.ndarray) -> None:
    import openvino_genai

    pipeline = openvino_genai.Text2ImagePipeline(
        str(emoji_bundle.root / "openvino-fp32"), "CPU", INFERENCE_PRECISION_HINT="f32"
    )
    found = pipeline.generate(
        PROMPT, num_inference_steps=STEPS, guidance_scale=GUIDANCE, width=128, height=128,
        generator=openvino_genai.TorchGenerator(SEED),
    )  # fmt: skip
    assert psnr(np.asarray(found.data[0]), reference, peak=255) >= 35


def test_openvino_genai_takes_a_step_too_many_where_its_float32_countdown_ends_above_zero(
    emoji_bundle: ModelBundle,
) -> None:
    """With trailing timesteps: 1000 less twelve times 83.333336 is 2e-4 in float32, and it draws that, too."""
    import openvino_genai

    pipeline = openvino_genai.Text2ImagePipeline(str(emoji_bundle.root / "openvino-fp32"), "CPU")
    taken: dict[int, int] = {}
    for steps in (10, 12, 20, 30):
        seen: list[int] = []

        def watch(step: int, total: int, latent: Any, seen: list[int] = seen) -> bool:
            seen.append(total)
            return True  # Stop: the count is known.

        pipeline.generate(PROMPT, num_inference_steps=steps, width=128, height=128, callback=watch)
        taken[steps] = seen[0]
    assert taken == {10: 10, 12: 13, 20: 20, 30: 31}
    with Pipeline.open(emoji_bundle.root) as opened:
        levels = opened.run(Request(PROMPT, steps=12)).levels
    assert [level.t for level in levels[:-1]] == [999, 916, 832, 749, 666, 582, 499, 416, 332, 249, 166, 82]


def test_an_export_of_optimum_intel_opens_as_a_model(miniature: Path, bundle: ModelBundle, tmp_path: Path) -> None:
    """Written by the peer itself, with the names, order and types of ports that ours are compared with."""
    import openvino as ov
    from optimum.intel import OVStableDiffusionPipeline

    OVStableDiffusionPipeline.from_pretrained(miniature, export=True, compile=False).save_pretrained(
        tmp_path / "theirs"
    )
    core = ov.Core()
    for part in ("text_encoder", "unet", "vae_decoder", "vae_encoder"):
        theirs = core.read_model(tmp_path / "theirs" / part / "openvino_model.xml")
        mine = core.read_model(bundle.root / "openvino-fp32" / part / "openvino_model.xml")
        for side in ("inputs", "outputs"):
            ports, theirs_too = getattr(mine, side), getattr(theirs, side)
            # With transformers 5 the peer leaves out what it used to export last; openvino.genai takes it for SDXL.
            assert all("hidden_states." in port.any_name for port in ports[len(theirs_too) :]), part
            for port, peer in zip(ports, theirs_too, strict=False):
                assert port.names <= peer.names, part
                assert (port.element_type, port.partial_shape.rank) == (peer.element_type, peer.partial_shape.rank), (
                    part
                )
    assert psnr(ours(tmp_path / "theirs"), ours(bundle.root), peak=255) >= 30
