"""Inpainting: what keeps the picture outside a mask, for UNets that know no mask and for those that do."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..sampling.samplers import Denoise, Latents
from ..sampling.schedule import Level
from .base import Array, Component


@dataclass(frozen=True)
class Inpainting:
    """A denoiser that knows the picture outside the mask: its x_0 is replaced there by the picture's latents.

    The samplers then keep  x = x_0 + sigma eps  there, with the noise that it began with, at every level.

    known   latents of the picture [1, C, h, w]
    mask    1 where the model draws, [1, 1, h, w]
    """

    denoise: Denoise
    known: Latents
    mask: Latents

    def __call__(self, x: Latents, level: Level) -> Latents:
        x_0: Latents = self.mask * self.denoise(x, level) + (1 - self.mask) * self.known
        return x_0


@dataclass(frozen=True)
class Masked:
    """A UNet for inpainting, of 2 C + 1 channels: it sees where it is to draw, and the picture around that.

    mask     1 where it draws, [1, 1, h, w]
    visible  latents of the picture without what is under the mask [1, C, h, w]
    """

    unet: Component
    mask: Latents
    visible: Latents

    def bind(self, **constants: Array) -> None:
        self.unet.bind(**constants)

    def __call__(self, **inputs: Array) -> dict[str, Array]:
        sample = inputs.pop("sample")
        seen = np.concatenate([self.mask, self.visible], axis=1).repeat(len(sample), axis=0)
        return self.unet(sample=np.concatenate([sample, seen], axis=1), **inputs)

    def close(self) -> None:
        self.unet.close()
