"""PSNR, SSIM and MS-SSIM beside the libraries that people know them from."""

from __future__ import annotations

import math

import numpy as np
import pytest
import pytorch_msssim
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage import metrics as skimage

from edge_sd.images.metrics import SCALES, ms_ssim, psnr, scales_of, ssim


@st.composite
def pairs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """A smooth picture and itself with noise: near, far, or unrelated."""
    height, width = draw(st.integers(22, 40)), draw(st.integers(22, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows, columns = np.indices((height, width))[..., None] / rng.uniform(2, 20, 3)
    picture = 127 + 100 * np.sin(rows) * np.cos(columns)
    noise = draw(st.sampled_from([0.4, 3.0, 30.0, 300.0])) * rng.standard_normal(picture.shape)
    return np.uint8(np.clip(picture + noise, 0, 255)), np.uint8(picture)


@settings(max_examples=25, deadline=None)
@given(pairs())
def test_psnr_is_scikit_images(pair: tuple[np.ndarray, np.ndarray]) -> None:
    found, reference = pair
    if not np.array_equal(found, reference):
        theirs = skimage.peak_signal_noise_ratio(reference, found, data_range=255)
        assert psnr(found, reference, peak=255) == pytest.approx(theirs, abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(pairs())
def test_ssim_is_scikit_images(pair: tuple[np.ndarray, np.ndarray]) -> None:
    found, reference = pair
    theirs = skimage.structural_similarity(
        reference, found, data_range=255, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    assert ssim(found, reference) == pytest.approx(theirs, abs=1e-9)


@settings(max_examples=10, deadline=None)
@given(pairs(), st.sampled_from([4, 5]))
def test_ms_ssim_is_pytorch_msssims(pair: tuple[np.ndarray, np.ndarray], scales: int) -> None:
    # It wants 161 pixels whatever the scales are; odd sides it fills up where ours drop a row.
    found, reference = (np.resize(each, (176, 176, 3)) for each in pair)
    weights = [weight / sum(SCALES[:scales]) for weight in SCALES[:scales]]
    tensors = [torch.from_numpy(each.copy()).permute(2, 0, 1)[None].double() for each in (found, reference)]
    theirs = pytorch_msssim.ms_ssim(*tensors, data_range=255, weights=weights)
    assert ms_ssim(found, reference, scales) == pytest.approx(float(theirs), abs=1e-5)


@settings(max_examples=25, deadline=None)
@given(pairs())
def test_equal_pictures_are_as_near_as_can_be_and_the_order_does_not_matter(
    pair: tuple[np.ndarray, np.ndarray],
) -> None:
    found, reference = pair
    assert psnr(found, found, 255) == math.inf
    for metric in (ssim, ms_ssim):
        assert metric(found, found) == pytest.approx(1)
        assert metric(found, reference) == pytest.approx(metric(reference, found))
        assert metric(found, reference) <= 1 + 1e-12


@settings(max_examples=25, deadline=None)
@given(pairs(), st.integers(1, 4))
def test_more_of_the_same_error_costs_exactly_its_decibels(pair: tuple[np.ndarray, np.ndarray], times: int) -> None:
    _, reference = pair
    reference = reference.astype(np.float64)
    one = psnr(reference + 1, reference, 255)
    assert psnr(reference + times, reference, 255) == pytest.approx(one - 20 * math.log10(times))


def test_the_default_peak_is_the_references_range() -> None:
    reference = np.array([-1.0, 3.0])
    assert psnr(reference + 0.4, reference) == pytest.approx(20.0)


def test_what_is_not_finite_is_infinitely_far() -> None:
    assert psnr(np.array([np.nan, 0.0]), np.array([0.0, 1.0])) == -math.inf


def test_pictures_that_cannot_be_compared_are_refused() -> None:
    small, other = np.zeros((8, 8, 3), np.uint8), np.zeros((8, 9, 3), np.uint8)
    with pytest.raises(ValueError, match="can't be compared"):
        ssim(small, other)
    with pytest.raises(ValueError, match="smaller than the window"):
        ms_ssim(small, small)


@pytest.mark.parametrize(("side", "count"), [(11, 1), (22, 2), (128, 4), (176, 5), (512, 5)])
def test_the_scales_that_fit(side: int, count: int) -> None:
    assert scales_of(side, side) == count
