"""The edge detector and the measure of two drawings' agreement."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from edge_sd.images.canny import canny, dilate, edge_f1


def picture_of_a_square(side: int = 64, inner: int = 32) -> np.ndarray:
    pixels = np.full((side, side, 3), 255, np.uint8)
    start = (side - inner) // 2
    pixels[start : start + inner, start : start + inner] = (200, 30, 30)
    return pixels


def test_a_square_has_one_thin_closed_line_at_its_border() -> None:
    edges = canny(picture_of_a_square())
    rows, columns = np.nonzero(edges)
    distance = np.maximum(np.abs(rows - 31.5), np.abs(columns - 31.5))
    assert np.abs(distance - 16).max() <= 1.5, "nothing but the border"
    assert 4 * 28 <= edges.sum() <= 4 * 34, "one pixel wide, all the way round"


def test_colours_of_one_brightness_have_an_edge_between_them() -> None:
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:, :16], pixels[:, 16:] = (220, 40, 40), (40, 40, 220)
    assert canny(pixels)[:, 14:18].any(axis=1).all()


def test_a_line_goes_on_where_it_fades_but_a_faint_one_alone_is_none() -> None:
    pixels = np.full((64, 64, 3), 128, np.uint8)
    pixels[:, 32:] = np.linspace(255, 165, 64)[:, None, None]
    assert canny(pixels, low=0.03, high=0.15)[:, 30:34].any(axis=1).all(), "the faint end hangs on the strong one"
    pixels[:, 32:] = 165
    assert not canny(pixels, low=0.03, high=0.15).any()


@given(npst.arrays(np.uint8, st.tuples(st.integers(1, 12), st.integers(1, 12), st.just(3))))
def test_any_picture_gives_a_mask_of_its_size_and_a_plain_one_nothing(pixels: np.ndarray) -> None:
    assert canny(pixels).shape == pixels.shape[:2]
    assert not canny(np.full_like(pixels, pixels[0, 0, 0])).any()


@given(npst.arrays(bool, (9, 11)), npst.arrays(bool, (9, 11)))
def test_the_measure_is_symmetric_and_between_0_and_1(a: np.ndarray, b: np.ndarray) -> None:
    assert 0 <= edge_f1(a, b) <= 1
    assert edge_f1(a, b) == pytest.approx(edge_f1(b, a))
    assert edge_f1(a, a) == 1
    assert (dilate(a, 1) >= a).all()


def test_a_line_two_pixels_off_counts_and_one_three_off_does_not() -> None:
    line = np.zeros((20, 20), bool)
    line[:, 8] = True
    assert edge_f1(line, np.roll(line, 2, axis=1)) == 1
    assert edge_f1(line, np.roll(line, 3, axis=1)) == 0
    assert edge_f1(line, np.zeros_like(line)) == 0
