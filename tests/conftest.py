"""Models for the tests: the embedded one, and a miniature of SD 1 with random weights, converted once a session."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from edge_sd.bundle.bundle import ModelBundle
from edge_sd.paths import embedded_models

# Before any Hugging Face library is imported: nothing here may look for a hub.
os.environ["HF_HUB_OFFLINE"] = "1"
warnings.filterwarnings("ignore")
pytest_plugins = ["tests.faults.account"]
# A shared machine may stand still for a second.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


@pytest.fixture(scope="session")
def emoji() -> Path:
    return embedded_models() / "emoji"


@pytest.fixture(scope="session")
def plain_emoji(emoji: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model without what is trained beside it: a ControlNet and its UNet take half of a conversion."""
    target = tmp_path_factory.mktemp("plain") / "emoji"
    ignored = shutil.ignore_patterns("controlnet", "vae_tiny", "openvino-*", "coreml-*", "lcm", "evaluator", "*.png")
    shutil.copytree(emoji, target, ignore=ignored)
    return target


def save_miniature(
    folder: Path,
    tokenizer_from: Path,
    prediction_type: str = "epsilon",
    shallow: bool = False,
    factor: int | None = None,
) -> Path:
    """A diffusers folder of SD 1's architecture, all widths cut down, with random weights.

    A `shallow` one attends in its first block alone and has an autoencoder of factor 2: it converts in a third of the
    time. `factor` is another of the autoencoder, a power of two.
    """
    import torch
    from diffusers import (
        AutoencoderKL,
        ControlNetModel,
        PNDMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_from / "tokenizer")
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
           "pad_token_id": tokenizer.pad_token_id}  # fmt: skip
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            projection_dim=32,
            max_position_embeddings=tokenizer.model_max_length,
            **ids,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        mid_block_type="UNetMidBlock2D" if shallow else "UNetMidBlock2DCrossAttn",
        up_block_types=("UpBlock2D", "UpBlock2D" if shallow else "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    levels = (factor or (2 if shallow else 8)).bit_length()
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 16, 16)[:levels],
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=4,
        scaling_factor=0.7,
    )
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    StableDiffusionPipeline(
        vae=vae, text_encoder=text, unet=unet, tokenizer=tokenizer, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder, safe_serialization=True)  # fmt: skip
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8, 8, 8)[:levels])
    for parameter in net.parameters():
        # Zero convolutions as they are would hide every mistake.
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    net.save_pretrained(folder / "controlnet")
    return folder


@pytest.fixture(scope="session")
def miniature(tmp_path_factory: pytest.TempPathFactory, emoji: Path) -> Path:
    return save_miniature(tmp_path_factory.mktemp("source") / "miniature", emoji)


@pytest.fixture(scope="session")
def shallow(tmp_path_factory: pytest.TempPathFactory, emoji: Path) -> Path:
    """The miniature with fewer layers: it draws 16x16 pixels."""
    return save_miniature(tmp_path_factory.mktemp("source") / "shallow", emoji, shallow=True)


def final_norm(clip: Any) -> Any:
    """The last norm of a CLIP text model, whose inner model transformers has and, in later versions, has not."""
    (norm,) = [each for name, each in clip.named_modules() if name.endswith("final_layer_norm")]
    return norm


def convert(source: Path, target: Path, precision: str, report: Any = None) -> ModelBundle:
    from edge_sd.converters.build import build
    from edge_sd.converters.recipes import recipe_named

    return build(source, target, "openvino", recipe_named(precision), report or (lambda what, share: None))


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory, miniature: Path) -> ModelBundle:
    """The miniature in fp32 and fp16; tests that damage it work on a copy."""
    target = tmp_path_factory.mktemp("bundle") / "miniature"
    convert(miniature, target, "fp32")
    return convert(miniature, target, "fp16")


@pytest.fixture(scope="session")
def coreml_bundle(tmp_path_factory: pytest.TempPathFactory, shallow: Path) -> ModelBundle:
    """The shallow miniature for the Neural Engine in fp16."""
    from edge_sd.converters.build import build
    from edge_sd.converters.recipes import RECIPES
    from edge_sd.converters.targets import form_named

    target = tmp_path_factory.mktemp("coreml") / "shallow"
    return build(shallow, target, form_named("coreml"), RECIPES["fp16"], lambda what, share: None)
