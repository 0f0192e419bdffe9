"""What an instruction edits, as a UNet sees it (Brooks et al. 2023, InstructPix2Pix, arXiv:2211.09800)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .autoencoder import Latents
from .base import Array, Component


@dataclass(frozen=True)
class Instructed:
    """A UNet of 2 C channels: it also sees the picture that it edits.

    Of several rows the first is drawn without it, as without words: guidance leads away from that.

    seen   latents of the picture [1, C, h, w], the mean of the encoder's, without the scale of the UNet's own
    """

    unet: Component
    seen: Latents

    def bind(self, **constants: Array) -> None:
        self.unet.bind(**constants)

    def __call__(self, **inputs: Array) -> dict[str, Array]:
        sample = inputs.pop("sample")
        seen = self.seen.repeat(len(sample), axis=0)
        if len(sample) > 1:
            seen[0] = 0
        return self.unet(sample=np.concatenate([sample, seen], axis=1), **inputs)

    def close(self) -> None:
        self.unet.close()
