"""What training computes in ways of its own, for speed, beside the plain ways: Muon, attention, group norms."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sd.converters.training import muon
from edge_sd.converters.training.hardware import plain_attention, plain_norms

SIDES = st.integers(1, 96)
WAYS = [muon._in_bfloat16, muon._in_float32]


@given(rows=SIDES, columns=SIDES, scale=st.floats(1e-6, 1e6), fast=st.booleans(), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_it_is_near_the_nearest_orthogonal_matrix(rows: int, columns: int, scale: float, fast: bool, seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(muon, "multiplies_bfloat16", lambda device: fast)
        g = torch.randn(3, rows, columns, generator=torch.Generator().manual_seed(seed))
        found = muon.orthogonalise(scale * g)
    assert found.dtype == torch.float32
    u, values, vt = torch.linalg.svd(g, full_matrices=False)
    # Along each pair of singular vectors its length is near 1, unless there was next to nothing.
    lengths = torch.einsum("nrk,nrc,nkc->nk", u, found, vt)
    there = values > 0.05 * values.norm(dim=-1, keepdim=True)
    assert ((lengths[there] > 0.5) & (lengths[there] < 1.3)).all()
    nearest = (u * there[:, None]) @ vt
    seen = torch.einsum("nrk,nk,nkc->nrc", u, lengths * there, vt)
    assert torch.cosine_similarity(seen.flatten(1), nearest.flatten(1)).min() > 0.9
    # Nothing turns from one direction to another.
    assert torch.linalg.svdvals(found).max() < 1.3


@pytest.mark.parametrize("shape", [(64, 64), (224, 2016), (32, 300)])
def test_both_ways_are_the_same(shape: tuple[int, int]) -> None:
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    x = x / x.norm(dim=(-2, -1), keepdim=True)
    fast, exact = (way(x, 5) for way in WAYS)
    assert torch.cosine_similarity(fast.flatten(1), exact.flatten(1)).min() > 0.999


def gradients(module: torch.nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
    module.zero_grad()
    module(*inputs).sample.square().mean().backward()
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


def test_attention_written_out_gives_what_the_fused_one_does() -> None:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), attention_head_dim=[1, 2], cross_attention_dim=24,
        norm_num_groups=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), torch.randn(2, 7, 24)
    with torch.no_grad():
        fused = unet(*inputs).sample
    wanted = gradients(unet, *inputs)
    plain_attention(unet, "cpu")
    with torch.no_grad():
        torch.testing.assert_close(unet(*inputs).sample, fused, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients(unet, *inputs), wanted, rtol=1e-3, atol=1e-6)


def test_a_norm_in_channels_order_gives_what_it_gives_in_the_other() -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=4, down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
    ).to(memory_format=torch.channels_last)  # fmt: skip
    x = torch.randn(2, 3, 16, 16).to(memory_format=torch.channels_last)
    wanted = gradients(vae, x)
    torch.testing.assert_close(gradients(plain_norms(vae, "cpu"), x), wanted, rtol=1e-3, atol=1e-6)
