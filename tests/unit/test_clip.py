"""CLIP for models that the judge does not know: from the disk, as transformers computes it, and never downloaded."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel

from edge_sd.apps.compare import clip
from edge_sd.text.tokenizer import TextTokenizer, read_vocabulary

NAME = clip.NAMES[-1]


@pytest.fixture
def folder(tmp_path: Path, emoji: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small CLIP of random weights as Hugging Face's libraries keep it, with the embedded model's tokenizer."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("EDGE_SD_MODELS", str(tmp_path / "models"))
    cache = tmp_path / f"models--{NAME.replace('/', '--')}"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs/main").write_text("abc")
    folder = cache / "snapshots/abc"
    shutil.copytree(emoji / "tokenizer", folder)
    tokenizer = TextTokenizer(folder, 16)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={**sizes, "max_position_embeddings": 16, "vocab_size": len(read_vocabulary(folder)[0]),
                     "eos_token_id": int(tokenizer("").ids[0, 1])},
        vision_config={**sizes, "image_size": 32, "patch_size": 8}, projection_dim=24,
    )  # fmt: skip
    CLIPModel(config).save_pretrained(folder)
    return folder


def test_it_is_transformers(folder: Path) -> None:
    found, why = clip.open_clip()
    assert found, why
    assert found.name == NAME
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (48, 32, 3), np.uint8))
    cut = np.asarray(picture.crop((0, 8, 32, 40)), np.float64) / 255
    pixels = torch.from_numpy(((cut - clip.MEAN) / clip.SPREAD).transpose(2, 0, 1)[None]).float()
    prompts = ["a cat", "a slice of pizza, 3d style"]
    vectors = found.read(prompts)
    model = CLIPModel.from_pretrained(folder)
    for prompt in prompts:
        ids = torch.from_numpy(TextTokenizer(folder, 16)(prompt).ids)
        with torch.no_grad():
            expected = model(input_ids=ids, pixel_values=pixels)
        np.testing.assert_allclose(found.see(picture), expected.image_embeds[0].numpy(), atol=1e-5)
        np.testing.assert_allclose(vectors[prompt], expected.text_embeds[0].numpy(), atol=1e-5)


def test_what_is_missing_or_damaged_is_a_reason(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    found, why = clip.open_clip()
    assert found is None
    assert why.startswith(f"{NAME} cannot be read (")
    weights.unlink()
    found, why = clip.open_clip()
    assert found is None
    assert why.startswith("edge-sd downloads nothing")
