"""The torch backend beside diffusers' own pipelines: the same folder, seed and settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from edge_sd import ModelBundle, Pipeline, Request
from edge_sd.converters.parity import psnr
from edge_sd.errors import InvalidModel, InvalidRequest
from edge_sd.pipeline.control import Control

PROMPT, SEED, STEPS, GUIDANCE = "a red apple, glossy style", 3, 4, 4.0


def drawn(folder: Path, variant: str | None = None, device: str = "auto", **wishes: Any) -> np.ndarray:
    """As decoded, before anything is pasted: diffusers' pipelines paste nothing."""
    given = {"seed": SEED, "steps": STEPS, "guidance": GUIDANCE, "sampler": "euler", **wishes}
    with Pipeline.open(folder, device=device, variant=variant) as pipeline:
        assert {placement.device.backend for placement in pipeline.plan.parts.values()} == {"torch"}
        *_, last = pipeline.steps(Request(PROMPT, **given))
        return pipeline.decode(last.latents)


def theirs(kind: str, folder: Path, **wishes: Any) -> np.ndarray:
    import diffusers
    import torch

    net = wishes.pop("net", {})
    pipe = getattr(diffusers, kind).from_pretrained(folder, torch_dtype=torch.float32, **net)
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    prompt = wishes.pop("prompt", PROMPT)
    result = pipe(
        prompt, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=torch.Generator().manual_seed(SEED),
        **wishes,
    )  # fmt: skip
    return np.asarray(result.images[0])


def sketch(side: int = 64) -> Image.Image:
    image = Image.new("RGB", (side, side), (250, 240, 200))
    ImageDraw.Draw(image).ellipse((side // 5, side // 4, side * 4 // 5, side * 4 // 5), (40, 160, 60))
    return image


def mask(side: int = 64) -> Image.Image:
    image = Image.new("L", (side, side))
    image.paste(255, (side // 2, 0, side, side))
    return image


def write_lora(path: Path) -> Path:
    """One layer of the UNet and one of the text encoder, in kohya's keys, for the miniature."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(1)
    tensors = {}
    for name in (
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_v",
        "lora_te_text_model_encoder_layers_0_self_attn_v_proj",
    ):
        tensors[f"{name}.lora_down.weight"] = rng.normal(size=(4, 32)).astype(np.float32)
        tensors[f"{name}.lora_up.weight"] = rng.normal(size=(32, 4)).astype(np.float32)
    save_file(tensors, path)
    return path


def test_a_folder_of_torch_weights_is_drawn_as_diffusers_draws_it(miniature: Path) -> None:
    expected = theirs("StableDiffusionPipeline", miniature, width=64, height=64)
    assert psnr(drawn(miniature), expected, peak=255) >= 40


def test_the_embedded_models_own_weights_are_drawn_as_diffusers_draws_them(emoji: Path) -> None:
    expected = theirs("StableDiffusionPipeline", emoji)
    assert psnr(drawn(emoji, device="torch-cpu"), expected, peak=255) >= 40


def test_image_to_image_and_inpainting_are_what_diffusers_draws(miniature: Path) -> None:
    size = {"width": 64, "height": 64}
    image = {"image": sketch(), "strength": 0.75}
    expected = theirs("StableDiffusionImg2ImgPipeline", miniature, **image)
    assert psnr(drawn(miniature, **image, **size), expected, peak=255) >= 40
    expected = theirs("StableDiffusionInpaintPipeline", miniature, **image, **size, mask_image=mask())
    assert psnr(drawn(miniature, **image, **size, mask=mask()), expected, peak=255) >= 40


def test_a_controlnet_is_followed_as_in_diffusers(miniature: Path) -> None:
    from diffusers import ControlNetModel

    lines = Image.new("RGB", (64, 64))
    ImageDraw.Draw(lines).ellipse((12, 12, 50, 50), outline="white")
    net = {"controlnet": ControlNetModel.from_pretrained(miniature / "controlnet")}
    expected = theirs("StableDiffusionControlNetPipeline", miniature, net=net, image=lines, width=64, height=64)
    found = drawn(miniature, controls=[Control(lines, reading="lines")], width=64, height=64)
    assert psnr(found, expected, peak=255) >= 40
    assert psnr(found, drawn(miniature), peak=255) < 35, "the lines matter"


def test_edits_are_those_of_the_openvino_backend(miniature: Path, bundle: ModelBundle, tmp_path: Path) -> None:
    """CLIP skip, a LoRA and a word of one's own, held beside the same picture by OpenVINO in float32."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    save_file({"emb_params": rng.normal(size=(2, 32)).astype(np.float32)}, tmp_path / "zog.safetensors")
    wishes: dict[str, Any] = {
        "clip_skip": 2, "loras": {write_lora(tmp_path / "style.safetensors"): 0.8},
        "embeddings": {"apple": tmp_path / "zog.safetensors"},
    }  # fmt: skip
    request = Request(PROMPT, seed=SEED, steps=STEPS, guidance=GUIDANCE, sampler="euler", **wishes)
    with Pipeline.open(bundle.root, variant="openvino-fp32") as pipeline:
        expected = np.asarray(pipeline.generate(request).pictures[0].image)
    found = drawn(miniature, **wishes)
    assert psnr(found, expected, peak=255) >= 40
    assert psnr(found, drawn(miniature), peak=255) < 35, "the edits matter"
    with pytest.raises(InvalidRequest, match="CLIP skip 3 is beyond this model's text encoder; valid: 1 to 2"):
        drawn(miniature, clip_skip=3)


@pytest.mark.parametrize(("variant", "floor"), [("torch-bf16", 20), ("torch-fp16", 35)])
def test_half_precision_is_near(miniature: Path, variant: str, floor: float) -> None:
    found = drawn(miniature, variant)
    assert floor <= psnr(found, drawn(miniature), peak=255) < 90


def test_what_is_left_out_is_said(miniature: Path) -> None:
    with Pipeline.open(miniature) as pipeline:
        result = pipeline.generate(Request(PROMPT, seed=1, steps=2, deep_every=2))
    assert result.notes == ["torch computes everything: deep_every and merge_tokens need a graph that can be changed"]


def test_torch_is_chosen_only_where_it_is_asked_for_or_alone(miniature: Path, emoji: Path) -> None:
    assert "torch" in ModelBundle.open(emoji).variants
    with Pipeline.open(emoji) as pipeline:
        assert all(each.device.backend != "torch" for each in pipeline.plan.parts.values())
        assert all(each.device.backend != "torch" for some in pipeline.plan.spares.values() for each in some)
    with Pipeline.open(emoji, variant="torch") as pipeline:
        assert pipeline.plan.device.name == "torch-cpu"
    with Pipeline.open(miniature) as pipeline:
        assert (pipeline.plan.variant, pipeline.plan.device.name) == ("torch", "torch-cpu")


def test_fine_tunes_of_one_size_have_names_of_their_own(miniature: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.numpy import load_file, save_file

    folder = tmp_path / miniature.name
    shutil.copytree(miniature, folder)
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    save_file({name: value * np.float32(1.01) for name, value in tensors.items()}, path, metadata={"format": "pt"})
    bundles = [ModelBundle.open(each) for each in (miniature, folder)]
    assert bundles[0].variant("torch").size() == bundles[1].variant("torch").size()
    assert bundles[0].fingerprint("torch") != bundles[1].fingerprint("torch")


def test_pickled_weights_are_never_opened(miniature: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "pickled"
    shutil.copytree(miniature, folder)
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(InvalidModel, match="a pickle, which can run code when opened; only safetensors are read"):
        ModelBundle.open(folder)
