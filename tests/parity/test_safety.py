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
from edge_sd.backends.coreml.backend import REFERENCE
from edge_sd.bundle.mlpackage.package import Package
from edge_sd.components.safety_checker import is_flagged
from edge_sd.errors import InvalidRequest
from edge_sd.images.clip import view
from edge_sd.pipeline.recorded import read_recorded

from ..conftest import convert

PROMPT, STEPS = "a red apple", 2
# The first seed's picture is near the checker's only concept, the second's is not.
BAD, GOOD = 1, 2


def draw(folder: Path, seed: int, device: str = "auto", **wishes: Any) -> Any:
    with Pipeline.open(folder, device) as pipeline:
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


def random_checker() -> Any:
    """Of random weights, and of concepts that no picture is near."""
    import torch
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    torch.manual_seed(0)
    vision = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
              "num_attention_heads": 2}  # fmt: skip
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=16))
    torch.nn.init.normal_(checker.visual_projection.weight)
    checker.concept_embeds.data = torch.nn.functional.normalize(torch.randn(17, 16))
    checker.concept_embeds_weights.data[:] = 1.0
    checker.special_care_embeds.data = torch.nn.functional.normalize(torch.randn(3, 16))
    return checker.eval()


def with_checker(source: Path, folder: Path, checker: Any) -> Path:
    """A copy of a diffusers folder that has this checker."""
    from transformers import CLIPImageProcessor

    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("controlnet"))
    checker.save_pretrained(folder / "safety_checker", safe_serialization=True)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessor(**size).save_pretrained(folder / "feature_extractor")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
              "feature_extractor": ["transformers", "CLIPImageProcessor"]}  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def checked(miniature: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature with a random checker whose concept is made to tell two of its pictures apart."""
    import torch

    checker = random_checker()
    bad, good = (seen(checker, draw(miniature, seed).pictures[0].image) for seed in (BAD, GOOD))
    concept = torch.nn.functional.normalize((bad - good)[None])[0]
    checker.concept_embeds.data[5] = concept
    checker.concept_embeds_weights.data[5] = (bad @ concept + good @ concept) / 2
    return with_checker(miniature, tmp_path_factory.mktemp("checked") / "checked", checker)


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


def test_on_core_ml_it_is_a_package_of_apples_layout_and_says_the_same(
    coreml_bundle: ModelBundle, shallow: Path, tmp_path: Path
) -> None:
    """In a variant of 4 bits; what it flags is near enough to the concept by special care alone."""
    import torch

    from edge_sd.converters.build import _make_part
    from edge_sd.converters.recipes import RECIPES
    from edge_sd.converters.sources.source import Source
    from edge_sd.converters.targets import form_named

    folder = tmp_path / "Resources"
    shutil.copytree(coreml_bundle.root / "coreml-ane-fp16", folder)
    pictures = [draw(folder, seed, REFERENCE).pictures[0].image for seed in (BAD, GOOD)]
    checker = random_checker()
    bad, good = (seen(checker, picture) for picture in pictures)
    concept = torch.nn.functional.normalize((bad - good)[None])[0]
    checker.concept_embeds.data[5], checker.special_care_embeds.data[1] = concept, bad
    checker.concept_embeds_weights.data[5] = bad @ concept + 0.005
    checker.special_care_embeds_weights.data[:] = torch.tensor([1.0, 0.5, 1.0])
    assert bad @ concept - good @ concept > 0.02
    source = Source.open(with_checker(shallow, tmp_path / "source", checker))

    picture = np.asarray(pictures[0], np.float32).transpose(2, 0, 1)[None] / 127.5 - 1
    row, _ = _make_part(
        source, form_named("coreml"), RECIPES["p4"], "safety_checker", folder, {},
        {"vae_decoder": [{"picture": picture}]}, lambda *_: None,
    )  # fmt: skip
    assert row["parity"]["psnr"] >= 45
    package = Package.open(folder / "SafetyChecker.mlpackage").functions["main"]
    assert {name: (kind.dtype, kind.shape) for name, kind in package.inputs.items()} == {
        "clip_input": ("float32", (1, 3, 32, 32)), "images": ("float32", (1, 16, 16, 3)),
        "adjustment": ("float32", (1,)),
    }  # fmt: skip
    assert package.outputs == ["filtered_images", "has_nsfw_concepts", "concept_scores"]

    for seed, flagged in ((BAD, True), (GOOD, False)):
        result = draw(folder, seed, REFERENCE)
        assert bool(np.asarray(result.pictures[0].image).any()) is not flagged
        assert result.pictures[0].settings.safety is True
        with torch.no_grad():
            _, theirs = checker(processed(pictures[seed == GOOD]), [np.ones((16, 16, 3), np.float32)])
        assert theirs == [flagged]
    assert np.asarray(draw(folder, BAD, REFERENCE, safety=False).pictures[0].image).any()
    rng = np.random.default_rng(1)
    with Pipeline.open(folder, REFERENCE) as pipeline:
        pipeline.prepare(pipeline.resolve(Request(PROMPT, seed=1, steps=1)))
        component = pipeline.components["safety_checker"]
        for _ in range(4):
            pixels = rng.integers(0, 256, (64, 64, 3), np.uint8)
            with torch.no_grad():
                near = seen(checker, Image.fromarray(pixels))
            special = float(near @ bad) > 0.5
            scores = near @ checker.concept_embeds.T - checker.concept_embeds_weights + 0.01 * special
            found = component(clip_input=view(pixels, 32))["adjusted_scores"][0]
            assert np.abs(found - scores.numpy()).max() < 3e-3
