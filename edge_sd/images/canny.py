"""Edges of a picture, the condition that a ControlNet draws by: Canny's detector (1986) in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.floating[Any]]


def canny(pixels: NDArray[np.uint8], low: float = 0.08, high: float = 0.2, blur: float = 1.0) -> NDArray[np.bool_]:
    """One-pixel lines where the picture changes most; bool [H, W] of uint8 [H, W, 3].

    `low` and `high` are slopes per pixel, as shares of the full range: a line starts where the slope is above `high`
    and goes on while it is above `low`. `blur` is the standard deviation of the smoothing, in pixels. The slope is the
    steepest of the three channels', so that two colours of one brightness have an edge between them.
    """
    smooth = _blurred(pixels.astype(np.float32) / 255, blur)
    padded = np.pad(smooth, ((1, 1), (1, 1), (0, 0)), mode="edge")
    dy = (padded[2:, 1:-1] - padded[:-2, 1:-1]) / 2
    dx = (padded[1:-1, 2:] - padded[1:-1, :-2]) / 2
    steepest = np.argmax(dx**2 + dy**2, axis=2)[..., None]
    dy, dx = np.take_along_axis(dy, steepest, 2)[..., 0], np.take_along_axis(dx, steepest, 2)[..., 0]
    slope = np.hypot(dx, dy)
    thin = slope * _is_ridge(slope, dx, dy)
    return _connected(thin > high, thin > low)


def _blurred(image: Float, sigma: float) -> Float:
    radius = max(1, round(3 * sigma))
    kernel = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * sigma**2)).astype(np.float32)
    kernel /= kernel.sum()
    for axis in (0, 1):
        margin = [(radius, radius) if a == axis else (0, 0) for a in range(3)]
        padded = np.pad(image, margin, mode="edge")
        length = image.shape[axis]
        shifted = [k * padded.take(range(n, n + length), axis) for n, k in enumerate(kernel)]
        image = np.sum(shifted, axis=0)
    return image


def _is_ridge(slope: Float, dx: Float, dy: Float) -> NDArray[np.bool_]:
    """Whether no neighbour along the gradient is steeper; directions are rounded to eighths of a turn."""
    padded = np.pad(slope, 1)
    eighth = np.round(np.arctan2(dy, dx) / (np.pi / 4)).astype(int) % 4
    ridge = np.zeros(slope.shape, bool)
    height, width = slope.shape
    for n, (y, x) in enumerate(((0, 1), (1, 1), (1, 0), (1, -1))):
        ahead = padded[1 + y : 1 + y + height, 1 + x : 1 + x + width]
        behind = padded[1 - y : 1 - y + height, 1 - x : 1 - x + width]
        # One side may be equal, or a symmetric edge would lose both of its pixels.
        ridge |= (eighth == n) & (slope >= ahead) & (slope > behind)
    return ridge


def _connected(sure: NDArray[np.bool_], possible: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The pixels of `possible` that a path in it connects to `sure`."""
    while True:
        grown = dilate(sure, 1) & possible
        if (grown == sure).all():
            return sure
        sure = grown


def dilate(mask: NDArray[np.bool_], radius: int) -> NDArray[np.bool_]:
    """Every pixel within `radius` of one in `mask`, counted along rows, columns and diagonals; bool [H, W]."""
    padded = np.pad(mask, radius)
    height, width = mask.shape
    grown = np.zeros_like(mask)
    for y in range(2 * radius + 1):
        for x in range(2 * radius + 1):
            grown |= padded[y : y + height, x : x + width]
    return grown


def edge_f1(found: NDArray[np.bool_], wanted: NDArray[np.bool_], within: int = 2) -> float:
    """How well two drawings of edges agree, 0 to 1: F1 where a pixel counts if the other has one `within` pixels."""
    if not found.any() or not wanted.any():
        return float(found.any() == wanted.any())
    precision = float((found & dilate(wanted, within)).sum() / found.sum())
    recall = float((wanted & dilate(found, within)).sum() / wanted.sum())
    return 2 * precision * recall / max(precision + recall, 1e-9)
