"""LoRAs, words of one's own and CLIP skip on Core ML packages, beside diffusers, which has its own code for each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_sd import ModelBundle, Pipeline, Request
from edge_sd.converters.parity import psnr
from edge_sd.errors import InvalidRequest

from .test_lora import write
from .test_peers import SEED
from .test_prompts import context, draw, open_diffusers

STEPS = 2
WISHES: dict[str, Any] = {"seed": SEED, "steps": STEPS, "sampler": "euler", "width": 16, "height": 16, "guidance": 5.0}


@pytest.fixture(scope="module")
def theirs(shallow: Path) -> Any:
    return open_diffusers(shallow)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGE_SD_CACHE", str(tmp_path / "home"))
    return tmp_path / "home"


def ours(pipeline: Pipeline, prompt: str, **more: Any) -> np.ndarray:
    return np.asarray(pipeline.generate(Request(prompt, **WISHES | more)).pictures[0].image)


def test_a_lora_is_what_diffusers_draws_with_it(
    theirs: Any, coreml_bundle: ModelBundle, tmp_path: Path, home: Path
) -> None:
    """Queries of the Neural Engine's form have the softmax scale in them, and linear layers are convolutions."""
    path = write(tmp_path / "style.safetensors", theirs, "kohya")
    wishes = {"prompt": "a red apple", "num_inference_steps": STEPS, "guidance_scale": 5.0, "width": 16, "height": 16}
    plain = draw(theirs, **wishes)
    theirs.load_lora_weights(str(tmp_path), weight_name=path.name, adapter_name="style")
    theirs.set_adapters("style", 0.7)
    expected = draw(theirs, **wishes)
    theirs.unload_lora_weights()
    before = coreml_bundle.verify()
    with Pipeline.open(coreml_bundle.root, "coreml-reference") as pipeline:
        found = ours(pipeline, "a red apple", loras={path: 0.7})
        copies = sorted((home / "edited").iterdir())
        assert psnr(found, expected, peak=255) > 35
        assert psnr(ours(pipeline, "a red apple"), plain, peak=255) > 35
        assert psnr(plain, expected, peak=255) < 30
    assert len(copies) == 2, "the UNet and the text encoder"
    assert coreml_bundle.verify() == before == [], "the model's own files are as they were"


def test_a_word_is_what_diffusers_draws_with_it(theirs: Any, coreml_bundle: ModelBundle, tmp_path: Path) -> None:
    """With much guidance, as below."""
    import torch
    from safetensors.torch import save_file

    path = tmp_path / "thing.safetensors"
    vectors = torch.randn(2, 32, generator=torch.Generator().manual_seed(3)) * 2
    save_file({"emb_params": vectors}, path)
    theirs.load_textual_inversion(str(path), token="thing")
    wishes = {"prompt": "a thing", "num_inference_steps": STEPS, "guidance_scale": 30.0, "width": 16, "height": 16}
    expected = draw(theirs, **wishes)
    theirs.unload_textual_inversion()
    with Pipeline.open(coreml_bundle.root, "coreml-reference") as pipeline:
        found = ours(pipeline, "a thing", embeddings={"thing": path}, guidance=30.0)
    assert psnr(found, expected, peak=255) > 35
    assert psnr(draw(theirs, **wishes | {"prompt": "a"}), expected, peak=255) < 30


def test_clip_skip_is_what_diffusers_draws_of_the_earlier_states(
    theirs: Any, coreml_bundle: ModelBundle, home: Path
) -> None:
    """With much guidance: the miniature's last layer changes little."""
    sides = {"num_inference_steps": STEPS, "guidance_scale": 30.0, "width": 16, "height": 16}
    prompt, negative = [[("a red apple", 1.0)]], [[]]
    plain, expected = (
        draw(
            theirs,
            prompt_embeds=context(theirs, prompt, skip),
            negative_prompt_embeds=context(theirs, negative, skip),
            **sides,
        )
        for skip in (1, 2)
    )
    request = Request("a red apple", **WISHES | {"guidance": 30.0})
    with Pipeline.open(coreml_bundle.root, "coreml-reference") as pipeline:
        found, whole = (
            np.asarray(pipeline.generate(replace(request, clip_skip=skip)).pictures[0].image) for skip in (2, 1)
        )
        assert psnr(found, expected, peak=255) >= 40
        assert psnr(whole, plain, peak=255) >= 40
        assert psnr(plain, expected, peak=255) < 30
        (copy,) = (home / "edited").iterdir()
        assert (copy / "TextEncoder.mlpackage").is_dir(), "the text encoder alone"
        with pytest.raises(InvalidRequest, match="CLIP skip 3 is beyond this model's text encoder; valid: 1 to 2"):
            pipeline.generate(replace(request, clip_skip=3))
