"""Large weights of 16 bits, converted without a copy of 32: the same numbers, and the same variant."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch

from edge_sd.converters.build import build
from edge_sd.converters.openvino import convert as openvino
from edge_sd.converters.recipes import RECIPES
from edge_sd.converters.sources import source as sources
from edge_sd.converters.sources.half_weights import compute_in_float32
from edge_sd.converters.sources.source import Source


def test_they_compute_what_float32_does(emoji: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LARGE", 0)
    source = Source.open(emoji)
    kept, wide = source.load("unet", halves=True), source.load("unet")
    assert kept.conv_in.weight.dtype == torch.float16
    assert wide.conv_in.weight.dtype == torch.float32
    width = source.facts.text_width
    inputs = torch.randn(2, 4, 16, 16), torch.tensor([500.0]), torch.randn(2, 77, width)
    with torch.no_grad():
        found, expected = (each(*inputs, return_dict=False)[0] for each in (kept, wide))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_large_model_is_converted_and_measured(
    plain_emoji: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = build(plain_emoji, tmp_path / "plain", "openvino", RECIPES["fp16"], lambda what, share: None)
    monkeypatch.setattr(sources, "LARGE", 0)
    monkeypatch.setattr(openvino, "LARGE", 0)
    large = build(plain_emoji, tmp_path / "large", "openvino", RECIPES["fp16"], lambda what, share: None)
    for part, artifact in plain.variant("openvino-fp16").artifacts.items():
        found = large.variant("openvino-fp16").artifacts[part]
        assert found.parity is not None
        assert artifact.parity is not None
        # As near or nearer: fewer numbers are rounded once more on the way.
        assert found.parity.psnr > artifact.parity.psnr - 3


def test_a_clip_sees_pictures_as_in_float32() -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14,
        projection_dim=24,
    )  # fmt: skip
    stored = CLIPVisionModelWithProjection(config).eval().half()
    wide = deepcopy(stored).float()
    kept = compute_in_float32(stored)
    assert kept.visual_projection.weight.dtype == torch.float16
    picture = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        found, expected = (each(picture).image_embeds for each in (kept, wide))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
