"""Latents <-> pixels. Latent scaling and the conversion from float to uint8 are done here only."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ..bundle.facts import LatentSpace
from ..bundle.parts import LATENTS
from ..errors import NumericalError
from .base import Component

Latents = NDArray[np.float32]
# Decoders overshoot [-1, 1] a little where a picture is black or white; an overflow does by orders of magnitude.
FAR = 100.0


def encode(
    encoder: Component, space: LatentSpace, pixels: NDArray[np.uint8], draw: Callable[[], NDArray[np.float32]],
    hidden: NDArray[np.bool_] | None = None,
) -> NDArray[np.float32]:  # fmt: skip
    """Pixels [H, W, 3] to latents [1, C, h, w], a sample of q(z | x) made of the normal noise of that shape in `draw`.

    An encoder without a distribution (DC-AE, Chen et al. 2024, arXiv:2410.10733) draws none. Where `hidden` [H, W] is
    set, the encoder sees the middle of its range instead, as inpainting models expect. The bounds of log variance are
    those of diffusers' DiagonalGaussianDistribution. Raises NumericalError.
    """
    sample = np.ascontiguousarray(pixels.transpose(2, 0, 1)[None], np.float32) / np.float32(127.5) - 1
    if hidden is not None:
        sample[:, :, hidden] = 0
    found = encoder(sample=sample)
    if LATENTS in found:
        z = found[LATENTS]
    else:
        mean, log_variance = np.split(found["latent_parameters"], 2, axis=1)
        z = mean + np.exp(0.5 * np.clip(log_variance, -30, 20)) * space.unfolded(draw())
    if not np.isfinite(z).all():
        raise NumericalError("the encoder returned NaN or infinity; try a variant in fp32")
    return space.normalized(z)


def encode_mean(encoder: Component, pixels: NDArray[np.uint8]) -> Latents:
    """Pixels [H, W, 3] to the mean of their latents [1, C, h, w], without a model's scale. Raises NumericalError."""
    sample = np.ascontiguousarray(pixels.transpose(2, 0, 1)[None], np.float32) / np.float32(127.5) - 1
    found = encoder(sample=sample)
    mean = found[LATENTS] if LATENTS in found else np.split(found["latent_parameters"], 2, axis=1)[0]
    if not np.isfinite(mean).all():
        raise NumericalError("the encoder returned NaN or infinity; try a variant in fp32")
    return np.asarray(mean, np.float32)


def decode(decoder: Component, space: LatentSpace, latents: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Decode latents [1, C, h, w] to pixels [H, W, 3]. Raises NumericalError for what is no picture."""
    z = space.restored(latents)
    image = decoder(latent_sample=z)["sample"][0]
    pixels = to_pixels(image)
    if why := no_picture(image, pixels):
        raise NumericalError(f"the decoder returned {why}; try a variant in fp32")
    return pixels


def no_picture(image: NDArray[np.float32], pixels: NDArray[np.uint8]) -> str:
    """Why a decoder's output [3, H, W], and its pixels, can't be a picture; "" where they can.

    It is the pixels that are saved: values far below -1 that differ are all black. A pixel or two are any colours.
    """
    if not np.isfinite(image).all():
        return "NaN or infinity"
    if (largest := float(np.abs(image).max())) > FAR:
        return f"values up to {largest:.3g}, where a picture lies in [-1, 1]"
    flat = pixels.reshape(-1, pixels.shape[-1])
    others = flat[(flat != flat[0]).any(axis=1)]
    if len(flat) > 1 and not len(others):
        return f"one flat colour, {tuple(map(int, flat[0]))}"
    # A decoder computes each pixel by itself, so that even a drawing in ink has greys at its edges.
    if len(flat) > 2 and (others == others[0]).all():
        return f"two flat colours, {tuple(map(int, flat[0]))} and {tuple(map(int, others[0]))}"
    if len(flat) > 1 and ((flat == 0) | (flat == 255)).all():
        return "values beyond a picture's range everywhere"
    return ""


def to_pixels(image: NDArray[np.float32]) -> NDArray[np.uint8]:
    """[3, H, W] in [-1, 1] -> [H, W, 3]."""
    with np.errstate(invalid="ignore"):
        pixels = np.clip(np.nan_to_num(image) / 2 + 0.5, 0, 1) * 255
    return np.ascontiguousarray(pixels.round().astype(np.uint8).transpose(1, 2, 0))
