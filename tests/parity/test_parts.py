"""Parts from elsewhere, beside diffusers with the same ones: another autoencoder, a tiny one, a ControlNet."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edge_sd import ModelBundle, Pipeline, Request
from edge_sd.bundle.parts import TINY
from edge_sd.converters.parity import psnr
from edge_sd.converters.sources.parts import composed, find_part
from edge_sd.errors import InvalidModel, InvalidRequest, ModelNotFound
from edge_sd.pipeline.control import Control

from ..conftest import convert, save_miniature

PROMPT, SEED, SIDE = "a red apple", 3, 16
WISHES: dict[str, Any] = {"steps": 3, "guidance": 5.0, "width": SIDE, "height": SIDE, "seed": SEED}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of parts that are published alone; their weights are random."""
    import torch
    from diffusers import AutoencoderKL, AutoencoderTiny

    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("parts")
    AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, scaling_factor=0.5,
    ).save_pretrained(folder / "vae")  # fmt: skip
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).save_pretrained(folder / "taesd")  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, emoji: Path) -> Path:
    """A shallow miniature without its ControlNet."""
    folder = save_miniature(tmp_path_factory.mktemp("source") / "model", emoji, shallow=True)
    shutil.rmtree(folder / "controlnet")
    return folder


@pytest.fixture(scope="module")
def net(parts: Path, source: Path) -> Path:
    import torch
    from diffusers import ControlNetModel, UNet2DConditionModel

    torch.manual_seed(2)
    unet = UNet2DConditionModel.from_pretrained(source / "unet")
    made = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8))
    made.save_pretrained(parts / "net/controlnet")
    return parts / "net"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, source: Path, parts: Path) -> ModelBundle:
    target = tmp_path_factory.mktemp("bundle") / "model"
    with composed(source, target, {"vae": parts / "vae", "vae_tiny": parts / "taesd"}) as whole:
        made = convert(Path(whole), target, "fp32")
    assert sorted(path.name for path in target.parent.iterdir()) == ["model"], "the folder of links is gone"
    return made


def theirs(source: Path, vae: Any) -> np.ndarray:
    import torch
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(source, vae=vae, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(SEED)
    wishes = {"num_inference_steps": 3, "guidance_scale": 5.0, "width": SIDE, "height": SIDE}
    return np.asarray(pipeline(PROMPT, generator=generator, **wishes).images[0])


def test_another_autoencoder_decodes_and_brings_its_own_scale(bundle: ModelBundle, source: Path, parts: Path) -> None:
    from diffusers import AutoencoderKL

    assert (bundle.name, bundle.facts.latents.scale) == ("model", 0.5)
    with Pipeline.open(bundle.root) as pipeline:
        found = np.asarray(pipeline.generate(Request(PROMPT, **WISHES)).pictures[0].image)
    assert psnr(found, theirs(source, AutoencoderKL.from_pretrained(parts / "vae")), peak=255) >= 40


@pytest.mark.parametrize("device", ["cpu", "torch-cpu"])
def test_the_tiny_decoder_draws_what_diffusers_does(
    bundle: ModelBundle, source: Path, parts: Path, tmp_path: Path, device: str
) -> None:
    from diffusers import AutoencoderTiny

    with composed(source, tmp_path / "x", {"vae_tiny": parts / "taesd"}) as whole:
        torch = shutil.copytree(whole, tmp_path / "torch")
    with Pipeline.open(bundle.root if device == "cpu" else torch, device) as pipeline:
        result = pipeline.generate(Request(PROMPT, decoder="tiny", **WISHES))
        assert {part for part in (TINY, "vae_decoder") if part in pipeline.components} == {TINY}
    found = np.asarray(result.pictures[0].image)
    assert result.pictures[0].settings.decoder == "tiny"
    assert psnr(found, theirs(source, AutoencoderTiny.from_pretrained(parts / "taesd")), peak=255) >= 40


def sdxs(source: Path, parts: Path, place: Path) -> Path:
    """`source` with a tiny autoencoder as its only one."""
    folder = shutil.copytree(source, place / "sdxs")
    shutil.rmtree(folder / "vae")
    shutil.copytree(parts / "taesd", folder / "vae")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "vae": ["diffusers", "AutoencoderTiny"]}))
    return folder


def test_a_tiny_autoencoder_in_the_large_ones_place_draws_what_diffusers_does(
    source: Path, parts: Path, tmp_path: Path
) -> None:
    """As SDXS is published: its encoder returns latents, for which no noise is drawn."""
    import torch
    from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline

    folder = sdxs(source, parts, tmp_path)
    facts = ModelBundle.open(folder).facts
    assert (facts.latents.factor, facts.latents.scale) == (2, 1.0)
    made = convert(folder, tmp_path / "bundle", "fp32")
    image = Image.effect_mandelbrot((SIDE, SIDE), (-2, -1, 1, 1), 20).convert("RGB")
    pipeline = StableDiffusionImg2ImgPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    changed = pipeline(
        PROMPT, image=image, strength=0.7, num_inference_steps=4, guidance_scale=5.0,
        generator=torch.Generator().manual_seed(SEED),
    ).images[0]  # fmt: skip
    for model, device in ((made.root, "cpu"), (folder, "torch-cpu")):
        with Pipeline.open(model, device) as ours:
            drawn = ours.generate(Request(PROMPT, **WISHES)).pictures[0].image
            again = (
                ours.generate(Request(PROMPT, image=image, strength=0.7, **{**WISHES, "steps": 4})).pictures[0].image
            )
        assert psnr(np.asarray(drawn), theirs(folder, pipeline.vae), peak=255) >= 40, device
        assert psnr(np.asarray(again), np.asarray(changed), peak=255) >= 40, device


@pytest.mark.parametrize("target", ["coreml", "coreai"])
def test_apples_layouts_have_no_place_for_an_encoder_without_a_distribution(
    source: Path, parts: Path, tmp_path: Path, target: str
) -> None:
    from edge_sd.converters.recipes import RECIPES
    from edge_sd.converters.sources.source import Source
    from edge_sd.converters.targets import form_named

    folder = sdxs(source, parts, tmp_path)
    with pytest.raises(InvalidRequest, match=r"sdxs has an AutoencoderTiny, which returns no distribution.*openvino"):
        form_named(target).check(Source.open(folder), RECIPES["fp16"])


def test_a_preview_is_decoded_by_the_tiny_one_beside_the_full(bundle: ModelBundle) -> None:
    with Pipeline.open(bundle.root) as pipeline:
        *_, last = pipeline.steps(Request(PROMPT, **WISHES))
        full, tiny = pipeline.decode(last.latents), pipeline.decode(last.latents, "tiny")
        again = np.asarray(pipeline.generate(Request(PROMPT, decoder="tiny", **WISHES)).pictures[0].image)
    assert full.shape == tiny.shape
    assert (full != tiny).any()
    assert (tiny == again).all()


def test_auto_takes_it_where_there_is_one(bundle: ModelBundle, source: Path, emoji: Path) -> None:
    request = Request(PROMPT, decoder="auto", **WISHES)
    with Pipeline.open(bundle.root) as pipeline:
        assert pipeline.resolve(request).decoder == "tiny"
    with Pipeline.open(source, "torch-cpu") as pipeline:
        assert pipeline.resolve(request).decoder == "full"
        with pytest.raises(InvalidRequest, match="model has no tiny decoder"):
            pipeline.resolve(Request(PROMPT, decoder="tiny"))
    with pytest.raises(InvalidRequest, match="unknown decoder 'small'; valid: auto, full, tiny"):
        Request(PROMPT, decoder="small")


def test_a_controlnet_is_added(source: Path, net: Path, tmp_path: Path) -> None:
    with composed(source, tmp_path / "made", {"controlnet": net}) as whole:
        both = shutil.copytree(whole, tmp_path / "both")
    with Pipeline.open(both, "torch-cpu") as pipeline:
        drawing = Image.new("RGB", (SIDE, SIDE), "white")
        assert pipeline.generate(Request(PROMPT, controls=[Control(drawing)], **WISHES)).pictures
    assert not (source / "controlnet").exists()


def test_a_controlnet_of_another_model_is_refused(source: Path, net: Path, tmp_path: Path) -> None:
    from edge_sd.converters.sources.source import Source

    for key, value, message in (
        ("cross_attention_dim", 768, "controlnet is for text of width 768; this model has 32"),
        ("block_out_channels", [320, 640], "controlnet is for a UNet of widths 320, 640; this model has 32, 64"),
    ):
        other = shutil.copytree(net, tmp_path / key) / "controlnet/config.json"
        other.write_text(json.dumps({**json.loads(other.read_text()), key: value}))
        with (
            composed(source, tmp_path / "x", {"controlnet": other.parent}) as whole,
            pytest.raises(InvalidModel, match=message),
        ):
            Source.open(whole)


def test_what_is_no_such_part_is_said(source: Path, parts: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match="taesd is AutoencoderTiny; a vae is AutoencoderKL"):
        find_part("vae", parts / "taesd")
    with pytest.raises(ModelNotFound, match="no vae 'nobody/nothing': neither a folder nor pulled"):
        find_part("vae", "nobody/nothing")
    with pytest.raises(InvalidRequest, match=r"has neither config\.json nor vae_tiny/config\.json"):
        find_part("vae_tiny", parts)
    with composed(source, tmp_path / "x", {"vae": None}) as whole:
        assert whole == source
