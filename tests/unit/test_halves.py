"""Large weights of 16 bits, converted without a copy of 32: the same numbers, and the same variant."""

from __future__ import annotations

import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from edge_sd.backends.openvino.mapping import forget
from edge_sd.converters.build import build
from edge_sd.converters.openvino import convert as openvino
from edge_sd.converters.recipes import RECIPES
from edge_sd.converters.sources import source as sources
from edge_sd.converters.sources.half_weights import compute_in_float32
from edge_sd.converters.sources.mapped import places_of_module
from edge_sd.converters.sources.source import Source

from ..conftest import convert
from ..transformers import save_sd3


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


@pytest.fixture(scope="module")
def of_bfloat16(tmp_path_factory: pytest.TempPathFactory, emoji: Path) -> Path:
    """SD 3's miniature in the type that transformers are published in."""
    from safetensors.torch import load_file, save_file

    folder = save_sd3(tmp_path_factory.mktemp("source") / "sd3", emoji, t5=False)
    for path in folder.rglob("*.safetensors"):
        save_file({name: x.bfloat16() for name, x in load_file(path).items()}, path, {"format": "pt"})
    return folder


@pytest.mark.parametrize("recipe", ["fp16", "int8"])
def test_bfloat16_is_converted_as_it_is_stored_and_none_is_left(
    recipe: str, of_bfloat16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "LARGE", 0)
    assert Source.open(of_bfloat16).load("transformer", halves=True).proj_out.weight.dtype == torch.bfloat16
    kept = convert(of_bfloat16, tmp_path / "kept", recipe)
    for artifact in kept.variant(f"openvino-{recipe}").artifacts.values():
        assert artifact.parity is not None
        # Scales that were rounded to bfloat16 would cost 8 bits more than that.
        assert artifact.parity.psnr > {"fp16": 60, "int8": 35}[recipe]
        assert 'element_type="bf16"' not in kept.path(artifact.graph).read_text("utf-8")


def test_pages_of_mapped_weights_are_given_back_and_read_again(
    of_bfloat16: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "LARGE", 0)
    module = Source.open(of_bfloat16).load("transformer", halves=True)
    before = [each.clone() for each in module.parameters()]
    places = places_of_module(module)
    assert len(places) == (1 if sys.platform == "linux" else 0)
    forget(places)
    for found, expected in zip(module.parameters(), before, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_weights_that_were_written_to_are_not_given_back(of_bfloat16: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LARGE", 0)
    module = Source.open(of_bfloat16).load("transformer", halves=True)
    module.proj_out.weight.mul_(2)
    assert places_of_module(module) == ()


def test_gradients_are_those_of_float32() -> None:
    stored = torch.nn.Linear(6, 5).bfloat16()
    wide = deepcopy(stored).float()
    kept = compute_in_float32(torch.nn.Sequential(stored.requires_grad_(False)))
    x, y = torch.randn(3, 6, requires_grad=True), torch.randn(3, 5)
    (found,) = torch.autograd.grad(kept(x), x, y)
    (expected,) = torch.autograd.grad(wide(x), x, y)
    torch.testing.assert_close(found, expected)
