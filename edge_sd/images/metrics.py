"""How near one picture is to another: PSNR, SSIM, MS-SSIM, in numpy.

Tests compare PSNR and SSIM with scikit-image, MS-SSIM with pytorch-msssim.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Image = NDArray[Any]
Float = NDArray[np.float64]

PEAK = 255.0
# Decibels of equal arrays in means and in JSON. One wrong bit in a picture of 128 x 128 is 95 dB.
CEILING = 100.0
# Wang et al. 2004: an 11 x 11 Gaussian window of sigma 1.5; C1 = (K1 peak)^2, C2 = (K2 peak)^2.
WINDOW, SIGMA, K1, K2 = 11, 1.5, 0.01, 0.03
# Wang et al. 2003, section 3.2: the weight of each scale, the finest first.
SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


def psnr(found: NDArray[Any], reference: NDArray[Any], peak: float | None = None) -> float:
    """10 log10(peak^2 / MSE) in dB; `peak` is the reference's range (max - min) unless given.

    Infinity for equal arrays, minus infinity where `found` holds NaN or infinity.
    """
    error = float(np.mean((found.astype(np.float64) - reference.astype(np.float64)) ** 2))
    if not math.isfinite(error):
        return -math.inf
    if error == 0:
        return math.inf
    peak = float(np.ptp(reference)) if peak is None else peak
    return 10 * math.log10(max(peak, 1e-30) ** 2 / error)


def finite(decibels: float, ceiling: float = CEILING) -> float:
    """A PSNR for means and JSON: the ceiling at most, as of equal arrays; 0 where one holds NaN or infinity."""
    if decibels != math.inf and not math.isfinite(decibels):
        return 0.0
    return min(decibels, ceiling)


def ssim(found: Image, reference: Image) -> float:
    """Structural similarity (Wang et al. 2004) of uint8 pictures [H, W, C], at most 1: the mean over windows that lie
    wholly inside, of each channel, then over channels.

    Raises ValueError where the shapes differ or a side is below 11 pixels.
    """
    similarity, _ = _ssim(*_pair(found, reference))
    return float(similarity.mean())


def ms_ssim(found: Image, reference: Image, scales: int | None = None) -> float:
    """Multi-scale structural similarity (Wang et al. 2003) of uint8 pictures [H, W, C], 0 to 1: the mean over channels.

    Its five scales want sides above 160 pixels. Smaller pictures get those of the first that fit an 11 pixel window,
    their weights scaled to a sum of 1: four at 128 pixels. A negative factor counts as 0.

    Raises ValueError as `ssim` does.
    """
    x, y = _pair(found, reference)
    weights = SCALES[: scales or scales_of(*x.shape[:2])]
    result = np.ones(x.shape[2])
    for n, weight in enumerate(weights):
        similarity, contrast = _ssim(x, y)
        factor = similarity if n == len(weights) - 1 else contrast
        result *= np.maximum(factor, 0) ** (weight / sum(weights))
        x, y = _halve(x), _halve(y)
    return float(result.mean())


def scales_of(height: int, width: int) -> int:
    """How many of MS-SSIM's scales fit a picture of that size."""
    side, count = min(height, width), 1
    while count < len(SCALES) and side // 2 >= WINDOW:
        side, count = side // 2, count + 1
    return count


def _pair(found: Image, reference: Image) -> tuple[Float, Float]:
    if found.shape != reference.shape or found.ndim != 3:
        raise ValueError(f"pictures of shapes {found.shape} and {reference.shape} can't be compared")
    if min(found.shape[:2]) < WINDOW:
        raise ValueError(
            f"a picture of {found.shape[1]}x{found.shape[0]} is smaller than the window of {WINDOW} pixels"
        )
    return found.astype(np.float64), reference.astype(np.float64)


def _ssim(x: Float, y: Float) -> tuple[Float, Float]:
    """For each channel the mean of luminance, contrast and structure together, and that of the last two alone."""
    c1, c2 = (K1 * PEAK) ** 2, (K2 * PEAK) ** 2
    mean_x, mean_y = _blur(x), _blur(y)
    covariance = _blur(x * y) - mean_x * mean_y
    variances = _blur(x * x) - mean_x**2 + _blur(y * y) - mean_y**2
    contrast = (2 * covariance + c2) / (variances + c2)
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return (luminance * contrast).mean(axis=(0, 1)), contrast.mean(axis=(0, 1))


def _blur(x: Float) -> Float:
    """[H, W, C] -> [H - 10, W - 10, C], under the Gaussian window."""
    offsets = np.arange(WINDOW) - WINDOW // 2
    kernel = np.exp(-((offsets / SIGMA) ** 2) / 2)
    kernel /= kernel.sum()
    for axis in (0, 1):
        x = np.lib.stride_tricks.sliding_window_view(x, WINDOW, axis=axis) @ kernel
    return x


def _halve(x: Float) -> Float:
    """Means of 2 x 2 pixels; an odd last row or column falls away."""
    height, width = x.shape[0] // 2 * 2, x.shape[1] // 2 * 2
    x = x[:height, :width]
    return np.asarray(x.reshape(height // 2, 2, width // 2, 2, -1).mean(axis=(1, 3)))
