"""The safety checker beside diffusers': the same weights, the same pictures, the same verdicts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edge_sd import ModelBundle, Pipeline, Request
from edge_sd.errors import InvalidRequest
from edge_sd.recorded import read_recorded
from edge_sd.safety import is_flagged, view

from ..conftest import convert

PROMPT, STEPS = "a red apple", 2
# The first seed's picture is near the checker's only concept, the second's is not.
BAD, GOOD = 1, 2


def draw(folder: Path, seed: int, variant: str | None = None, **wishes: Any) -> Any:
    with Pipeline.open(folder, variant=variant) as pipeline:
        return pipeline.generate(Request(PROMPT, seed=seed, steps=STEPS, sampler="euler", **wishes))


def checker_of(folder: Path) -> Any:
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    return StableDiffusionSafetyChecker.from_pretrained(folder / "safety_checker")


def seen(checker: Any, picture: Image.Image) -> Any:
    """The direction of a picture in the checker's space, through transformers' own image processor."""
    import torch

    with torch.no_grad():
        embedded = checker.visual_projection(checker.vision_model(processed(picture))[1])
    return torch.nn.functional.normalize(embedded)[0]


def processed(picture: Image.Image) -> Any:
    from transformers import CLIPImageProcessor

    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    return CLIPImageProcessor(**size)(picture, return_tensors="pt").pixel_values


@pytest.fixture(scope="module")
def checked(miniature: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature with a random checker whose concept is made to tell two of its pictures apart."""
    import torch
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    folder = tmp_path_factory.mktemp("checked") / "checked"
    shutil.copytree(miniature, folder)
    shutil.rmtree(folder / "controlnet")
    torch.manual_seed(0)
    vision = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
              "num_attention_heads": 2}  # fmt: skip
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=16))
    torch.nn.init.normal_(checker.visual_projection.weight)
    bad, good = (seen(checker, draw(miniature, seed).pictures[0].image) for seed in (BAD, GOOD))
    concept = torch.nn.functional.normalize((bad - good)[None])[0]
    checker.concept_embeds.data = torch.nn.functional.normalize(torch.randn(17, 16))
    checker.concept_embeds.data[5] = concept
    checker.concept_embeds_weights.data[:] = 1.0
    checker.concept_embeds_weights.data[5] = (bad @ concept + good @ concept) / 2
    checker.special_care_embeds.data = torch.nn.functional.normalize(torch.randn(3, 16))
    checker.save_pretrained(folder / "safety_checker", safe_serialization=True)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessor(**size).save_pretrained(folder / "feature_extractor")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
              "feature_extractor": ["transformers", "CLIPImageProcessor"]}  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_a_picture_is_seen_as_by_clips_own_processor() -> None:
    rng = np.random.default_rng(0)
    for shape in ((64, 64, 3), (72, 96, 3), (50, 33, 3)):
        pixels = rng.integers(0, 256, shape, np.uint8)
        expected = processed(Image.fromarray(pixels)).numpy()
        # One step of a byte, divided by the smallest deviation.
        assert np.abs(view(pixels, 32) - expected).max() <= 1.01 / 255 / 0.2613


@pytest.mark.parametrize(
    ("special", "concepts", "flagged"),
    [
        ([-0.1], [-0.1, -0.01], False),
        ([-0.1], [-0.1, 0.0004], False),
        ([-0.1], [-0.1, 0.0006], True),
        ([0.001], [-0.0094], True),
        ([0.001], [-0.0106], False),
        ([0.0004], [-0.005], False),
    ],
)
def test_verdicts_are_those_of_diffusers_arithmetic(special: list[float], concepts: list[float], flagged: bool) -> None:
    scores = {"special_scores": np.array([special]), "concept_scores": np.array([concepts])}
    assert is_flagged(scores) is flagged


def test_flagged_pictures_are_black_in_both_and_others_are_not(checked: Path) -> None:
    import torch
    from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(checked)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    for seed in (BAD, GOOD):
        generator = torch.Generator().manual_seed(seed)
        theirs = pipe(PROMPT, num_inference_steps=STEPS, generator=generator, width=64, height=64)
        ours = draw(checked, seed)
        black = not np.asarray(ours.pictures[0].image).any()
        assert black is theirs.nsfw_content_detected[0] is (seed == BAD)
        assert ours.pictures[0].settings.safety is True
        said = [f"the safety checker blacked out the picture of seed {seed}; another seed may pass"]
        assert ours.notes == (said if black else [])


def test_off_is_said_and_recorded(checked: Path, miniature: Path, tmp_path: Path) -> None:
    result = draw(checked, BAD, safety=False)
    assert np.asarray(result.pictures[0].image).any()
    assert result.notes == ["the model's safety checker is switched off"]
    (path,) = result.save(tmp_path / "picture.png")
    recorded = read_recorded(path)
    assert recorded.settings["safety"] is False
    assert "Safety checker: off" in recorded.text
    assert recorded.request().safety is False
    assert draw(miniature, BAD).pictures[0].settings.safety is None
    with pytest.raises(InvalidRequest, match="miniature has no safety checker"):
        draw(miniature, BAD, safety=True)


def test_it_is_converted_like_any_component(checked: Path, tmp_path: Path) -> None:
    import torch

    bundle = convert(checked, tmp_path / "bundle", "int8")
    artifact = bundle.variant("openvino-int8").artifacts["safety_checker"]
    # Its verdict is to be that of torch, whatever the others are stored in.
    assert artifact.parity is not None
    assert artifact.parity.psnr >= 45
    index = json.loads((bundle.root / "openvino-int8/model_index.json").read_text())
    assert index["safety_checker"] == [None, None]
    rng = np.random.default_rng(1)
    checker = checker_of(checked)
    opened = ModelBundle.open(bundle.root)
    with Pipeline.open(opened.root) as pipeline:
        pipeline.prepare(pipeline.resolve(Request(PROMPT, seed=1, steps=1)))
        for _ in range(8):
            pixels = rng.integers(0, 256, (64, 64, 3), np.uint8)
            with torch.no_grad():
                _, flagged = checker(processed(Image.fromarray(pixels)), [pixels.astype(np.float32)])
            assert pipeline._flagged(pixels) is bool(flagged[0])
    assert {draw(bundle.root, seed).pictures[0].settings.safety for seed in (BAD,)} == {True}
