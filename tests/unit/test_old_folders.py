"""Folders as people have them: configs of old versions, schedulers that say too little, clones without weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from edge_sd import ModelBundle, Pipeline, Request
from edge_sd.bundle.diffusers import PIPELINES, diffusers_facts
from edge_sd.errors import InvalidModel

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 335544320\n"


def changed(folder: Path, name: str, **values: Any) -> None:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture
def folder(miniature: Path, tmp_path: Path) -> Path:
    return shutil.copytree(miniature, tmp_path / "m")


@pytest.mark.parametrize(
    ("version", "size"), [("0.6.0", 32), ("0.8.1", 8), ("0.9.0", 32), ("0.39.0", 8), ("0.6.0", 96)]
)
def test_sides_of_old_configs_are_what_diffusers_takes(folder: Path, version: str, size: int) -> None:
    from diffusers import StableDiffusionPipeline

    changed(folder, "unet/config.json", _diffusers_version=version, sample_size=size)
    expected = StableDiffusionPipeline.from_pretrained(folder).unet.config.sample_size * 8
    found = ModelBundle.open(folder).defaults
    assert (found.width, found.height) == (expected, expected)


@pytest.mark.parametrize(
    ("kind", "sampler"),
    [("DDPMScheduler", "ddpm"), ("FlaxDDIMScheduler", "ddim"), ("FlaxDPMSolverMultistepScheduler", "dpmpp_2m")],
)
def test_the_sampler_is_that_of_the_scheduler(folder: Path, kind: str, sampler: str) -> None:
    changed(folder, "scheduler/scheduler_config.json", _class_name=kind)
    assert diffusers_facts(folder).defaults.sampler == sampler


@pytest.mark.parametrize(("size", "steps", "guidance"), [(128, 20, 5.0), (64, 4, 1.0)])
def test_sdxl_is_turbo_by_its_scheduler_and_its_size(
    tmp_path: Path, emoji: Path, size: int, steps: int, guidance: float
) -> None:
    from ..families import save_family

    folder = save_family("sdxl", tmp_path / "sdxl", emoji)
    changed(folder, "unet/config.json", sample_size=size)
    changed(
        folder, "scheduler/scheduler_config.json", _class_name="EulerAncestralDiscreteScheduler",
        timestep_spacing="trailing",
    )  # fmt: skip
    found = diffusers_facts(folder).defaults
    assert (found.sampler, found.steps, found.guidance) == ("euler_a", steps, guidance)


def test_every_pipeline_that_is_read_is_one_of_diffusers() -> None:
    import diffusers

    assert not [name for name in PIPELINES if not hasattr(diffusers, name)]


@pytest.mark.parametrize("kind", ["LatentConsistencyModelImg2ImgPipeline", "StableDiffusionControlNetImg2ImgPipeline"])
def test_the_class_of_a_pipeline_is_a_task(folder: Path, kind: str) -> None:
    changed(folder, "model_index.json", _class_name=kind)
    assert diffusers_facts(folder).defaults.steps == (4 if kind.startswith("Latent") else 20)


@pytest.mark.parametrize(
    "name",
    [
        "text_encoder/model.safetensors", "unet/diffusion_pytorch_model.safetensors", "unet/config.json",
        "controlnet/diffusion_pytorch_model.safetensors", "tokenizer/tokenizer.json", "model_index.json",
    ],
)  # fmt: skip
def test_a_pointer_of_git_lfs_is_called_one(folder: Path, name: str) -> None:
    (folder / name).write_text(POINTER)
    with (
        pytest.raises(InvalidModel, match=rf"{name} is a Git LFS pointer.*git lfs pull"),
        Pipeline.open(folder) as opened,
    ):
        opened.generate(Request("a cat", steps=1, seed=1))


@pytest.mark.parametrize("name", ["openvino_model.bin", "openvino_model.xml"])
def test_a_pointer_in_an_export_is_called_one(folder: Path, name: str) -> None:
    for part in ("text_encoder", "unet", "vae_decoder"):
        (folder / part).mkdir(exist_ok=True)
        for each in ("openvino_model.bin", "openvino_model.xml"):
            (folder / part / each).write_bytes(b"<net/>")
    (folder / "unet" / name).write_text(POINTER)
    with pytest.raises(InvalidModel, match=rf"unet/{name} is a Git LFS pointer"):
        ModelBundle.open(folder)


def test_a_pointer_in_a_bundle_is_called_one(emoji: Path, tmp_path: Path) -> None:
    whole = shutil.copytree(emoji, tmp_path / "emoji")
    (whole / "unet/diffusion_pytorch_model-00002-of-00002.safetensors").write_text(POINTER)
    with pytest.raises(InvalidModel, match=r"unet/\S+.safetensors is a Git LFS pointer"):
        ModelBundle.open(whole).check("openvino-fp16")
