"""The Neural Engine form computes what the stock diffusers modules do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from edge_sd.converters.coreml import ane
from edge_sd.errors import ConversionError

SMALL: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 24,
}
# SD 1 projects with convolutions and has 8 heads everywhere, SD 2 with linear layers and heads of one width.
FAMILIES: dict[str, dict[str, Any]] = {
    "sd1": {"attention_head_dim": 2},
    "sd2": {"attention_head_dim": (2, 4), "use_linear_projection": True},
    "two transformers a layer": {"attention_head_dim": 2, "transformer_layers_per_block": 2},
}


def randomized(model: Any) -> Any:
    """Norms that do something; a fresh model's are the identity, and a ControlNet's outputs zeros."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 1 or not parameter.any():
            parameter.data = torch.randn_like(parameter) * 0.3 + 0.5
    return model.eval().requires_grad_(False)


def inputs(height: int = 8, width: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(2)
    return torch.randn(2, 4, height, width), torch.tensor([601.0, 3.5]), torch.randn(2, 5, 24)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_unet_in_the_engines_form_is_the_stock_one(family: str) -> None:
    stock = randomized(
        UNet2DConditionModel(up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **SMALL, **FAMILIES[family])
    )
    engine = ane.rewrite(copy.deepcopy(stock))
    sample, timestep, context = inputs()
    wanted = stock(sample, timestep, context, return_dict=False)[0]
    found = engine(sample, timestep, context.transpose(1, 2)[:, :, None], return_dict=False)[0]
    assert torch.allclose(found, wanted, atol=2e-5 * float(wanted.abs().max()))
    left = [name for name, module in engine.named_modules() if isinstance(module, nn.Linear | nn.LayerNorm)]
    assert left == []


def test_a_controlnet_in_the_engines_form_is_the_stock_one() -> None:
    stock = randomized(ControlNetModel(attention_head_dim=2, conditioning_embedding_out_channels=(8, 16), **SMALL))
    engine = ane.rewrite(copy.deepcopy(stock))
    sample, timestep, context = inputs()
    condition = torch.rand(2, 3, 16, 16)
    down, middle = stock(sample, timestep, context, condition, return_dict=False)
    found = engine(sample, timestep, context.transpose(1, 2)[:, :, None], condition, return_dict=False)
    for one, other in zip((*found[0], found[1]), (*down, middle), strict=True):
        assert torch.allclose(one, other, atol=2e-5 * float(other.abs().max()))


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3), st.sampled_from([1, 2, 4]), st.integers(1, 40), st.integers(1, 9), st.integers(2, 40))
def test_split_attention_is_attention(batch: int, heads: int, queries: int, keys: int, chunk: int) -> None:
    """Whatever the number of heads, and however the queries are cut."""
    from diffusers.models.attention_processor import Attention

    torch.manual_seed(queries)
    stock = Attention(query_dim=8, cross_attention_dim=6, heads=heads, dim_head=4).eval().requires_grad_(False)
    x, context = torch.randn(batch, queries, 8), torch.randn(batch, keys, 6)
    wanted = stock(x, context)
    before, ane.QUERIES = ane.QUERIES, chunk
    try:
        found = ane.SplitAttention(stock)(x.mT[:, :, None], context.mT[:, :, None])
    finally:
        ane.QUERIES = before
    assert torch.allclose(found[:, :, 0].mT, wanted, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3), st.integers(2, 16), st.integers(1, 9))
def test_a_channel_norm_is_a_layer_norm(batch: int, channels: int, length: int) -> None:
    torch.manual_seed(length)
    stock = randomized(nn.LayerNorm(channels))
    x = torch.randn(batch, channels, 1, length) * 3 + 1
    found = ane.ChannelNorm(stock)(x)
    assert torch.allclose(found[:, :, 0].mT, stock(x[:, :, 0].mT), atol=1e-5)


def test_what_it_does_not_know_is_refused_by_name() -> None:
    from diffusers.models.attention import BasicTransformerBlock

    with pytest.raises(ConversionError, match="ada_norm"):
        ane.Block(BasicTransformerBlock(16, 2, 8, norm_type="ada_norm", num_embeds_ada_norm=5))
    with pytest.raises(ConversionError, match="GELU"):
        ane.Block(BasicTransformerBlock(16, 2, 8, activation_fn="gelu"))
    with pytest.raises(ConversionError, match="LayerNorm"):
        ane.pointwise(nn.LayerNorm(3))
