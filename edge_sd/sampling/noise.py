"""Gaussian noise that repeats PyTorch's CPU generator, so a seed gives the same picture as in torch pipelines.

Source: PyTorch's ``aten/src/ATen/native/cpu/DistributionTemplates.h`` (``normal_fill``, ``normal_fill_16``) and
``ATen/core/DistributionsHelper.h`` (``normal_distribution``, ``random64``); the words come from MT19937
(Matsumoto and Nishimura 1998), which NumPy implements too.
"""

from __future__ import annotations

import math
import operator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

_MAX_SEED = 2**64 - 1
_VECTOR_SIZE = 16  # torch draws fewer values than this one by one, more in blocks of this many


class TorchNoise:
    """The stream of ``torch.randn(shape, generator=torch.Generator().manual_seed(seed))``, float32 on the CPU.

    Args:
        seed: 0 to 2**64 - 1. Torch seeds MT19937 with the low 32 bits only, so seeds 2**32 apart are equal.

    Raises:
        TypeError: the seed is not an integer.
        ValueError: the seed is out of range. (Torch wraps negative seeds around; we refuse to guess.)
    """

    def __init__(self, seed: int) -> None:
        seed = operator.index(seed)
        if not 0 <= seed <= _MAX_SEED:
            raise ValueError(f"seed {seed} is out of range: it must lie between 0 and {_MAX_SEED} (2**64 - 1)")
        self._bits = np.random.MT19937()
        self._bits._legacy_seeding(seed & 0xFFFFFFFF)  # init_genrand; the public seeding hashes the seed first
        self._spare: float | None = None

    def normal(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Draw the next standard normal values.

        Args:
            shape: of the result, for instance (1, 4, 64, 64); () and empty shapes are allowed.

        Returns:
            float32 array, within 1e-6 of torch's vectorised (AVX2) kernel. Torch without AVX2 differs from both
            by about 2e-6, because it rounds its logarithm and sine differently.

        Raises:
            ValueError: the shape has a negative dimension.
        """
        if any(n < 0 for n in shape):
            raise ValueError(f"shape {shape} has a negative dimension")
        size = math.prod(shape)
        if size < _VECTOR_SIZE:
            return np.array([self._draw_one() for _ in range(size)], dtype=np.float32).reshape(shape)
        return self._draw_many(size).reshape(shape)

    def _draw_one(self) -> float:
        """One value by Box-Muller in double precision; its twin is kept, across larger draws too, as torch does."""
        if self._spare is not None:
            value, self._spare = self._spare, None
            return value
        u1, u2 = self._draw_uniform_double(), self._draw_uniform_double()
        radius, theta = math.sqrt(-2.0 * math.log1p(-u2)), 2.0 * math.pi * u1
        self._spare = radius * math.sin(theta)
        return radius * math.cos(theta)

    def _draw_uniform_double(self) -> float:
        high, low = (int(word) for word in self._bits.random_raw(2))
        return ((high << 32 | low) & (2**53 - 1)) * 2.0**-53

    def _draw_many(self, size: int) -> NDArray[np.float32]:
        uniforms = self._draw_uniforms(size)
        whole = size - size % _VECTOR_SIZE
        values = np.empty(size, dtype=np.float32)
        values[:whole] = _box_muller(uniforms[:whole])
        if whole != size:  # torch draws the last 16 anew, overwriting part of the block before
            values[-_VECTOR_SIZE:] = _box_muller(self._draw_uniforms(_VECTOR_SIZE))
        return values

    def _draw_uniforms(self, size: int) -> NDArray[np.float32]:
        words = self._bits.random_raw(size) & 0xFFFFFF  # a float32 holds 24 random bits
        uniforms: NDArray[np.float32] = words.astype(np.float32) * np.float32(2.0**-24)
        return uniforms


class NoiseSource(Protocol):
    """Source of a picture's first noise and of what its sampler adds; TorchNoise draws as torch's CPU generator does.

    `generate(noise=)` takes a function that makes one from a picture's seed.

    Example:
        class Philox:
            def __init__(self, seed):
                self.random = np.random.Generator(np.random.Philox(seed))

            def normal(self, shape):
                return self.random.standard_normal(shape, np.float32)

        pipeline.generate("a red apple", noise=Philox)
    """

    def normal(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """The next standard normal values, float32 of that shape."""


def first_noise(
    noise: NoiseSource, shape: tuple[int, ...], second: NoiseSource | None = None, share: float = 0.0
) -> NDArray[np.float32]:
    """What a picture begins with: the next of `noise`, `share` of the way to the next of `second`."""
    eps = noise.normal(shape)
    return eps if second is None else slerp(share, eps, second.normal(shape))


def slerp(share: float, low: NDArray[np.float32], high: NDArray[np.float32]) -> NDArray[np.float32]:
    """`share` of the way from `low` to `high`, [1, C, h, w], along arcs, so that noise stays as large as noise is.

    As AUTOMATIC1111's variation seeds: the angle is taken between columns of each channel; a straight line where they
    are nearly parallel.
    """
    unit_low, unit_high = (x / np.linalg.norm(x, axis=2, keepdims=True) for x in (low, high))
    dot = (unit_low * unit_high).sum(axis=2, keepdims=True)
    if dot.mean() > 0.9995:
        return np.asarray(low * np.float32(1 - share) + high * np.float32(share))
    omega = np.arccos(np.clip(dot, -1, 1))
    so = np.maximum(np.sin(omega), np.float32(1e-6))
    mixed = np.sin((1 - share) * omega) / so * low + np.sin(share * omega) / so * high
    return np.asarray(mixed, np.float32)


def _box_muller(uniforms: NDArray[np.float32]) -> NDArray[np.float32]:
    """Box-Muller on blocks of 16: the first 8 give the radius, the last 8 the angle. float32 throughout, as torch."""
    u1, u2 = np.float32(1.0) - uniforms.reshape(-1, 2, 8)[:, 0], uniforms.reshape(-1, 2, 8)[:, 1]
    radius = np.sqrt(np.float32(-2.0) * np.log(u1))
    theta = np.float32(2.0 * math.pi) * u2
    pairs: NDArray[np.float32] = np.stack([radius * np.cos(theta), radius * np.sin(theta)], axis=1)
    return pairs.reshape(-1)
