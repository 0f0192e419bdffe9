"""The training pictures as latents: each lesson encoded once, captioned anew at every step."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .data import Artwork
from .hardware import autocast
from .lessons import Lesson, plan

SIDE = 16


@dataclass
class Latents:
    """N lessons and their scaled latents, z: float16 [N, 4, 16, 16]."""

    artwork: Artwork
    lessons: Sequence[Lesson]
    z: NDArray[np.float16]

    def __len__(self) -> int:
        return len(self.lessons)

    def batch(self, size: int, rng: np.random.Generator) -> tuple[Tensor, list[str], NDArray[np.int64]]:
        """Random latents float32 [size, 4, 16, 16], their captions, and which they are."""
        chosen = rng.integers(len(self), size=size)
        x_0 = torch.from_numpy(self.z[chosen].astype(np.float32))
        return x_0, [self.lessons[int(n)].caption(self.artwork, rng) for n in chosen], chosen


def load(work: Path, vae: Any, device: str, seed: int) -> Latents:
    """The latents of `work`/latents.npz, which is made first where it is not there, or not of this encoder and plan."""
    artwork = Artwork(work)
    lessons = plan(artwork, seed)
    path = work / "latents.npz"
    made_of = hashlib.sha256((fingerprint(vae) + repr(lessons)).encode()).hexdigest()
    if path.is_file():
        kept = np.load(path)
        if "made_of" in kept and str(kept["made_of"]) == made_of:
            return Latents(artwork, lessons, kept["z"])
    z = np.empty((len(lessons), 4, SIDE, SIDE), np.float16)
    for start in range(0, len(lessons), 64):
        some = lessons[start : start + 64]
        x = torch.from_numpy(np.stack([lesson.picture(artwork) for lesson in some]))
        with torch.no_grad(), autocast(device):
            mean = vae.encode(x.to(device, memory_format=torch.channels_last)).latent_dist.mean
        z[start : start + len(some)] = (mean.float() * vae.config.scaling_factor).cpu().numpy()
    np.savez(path, made_of=np.array(made_of), z=z)
    return Latents(artwork, lessons, z)


def fingerprint(vae: Any) -> str:
    """A hash of all that makes latents: the encoder's weights, and their scale."""
    digest = hashlib.sha256(str(vae.config.scaling_factor).encode())
    for module in (vae.encoder, vae.quant_conv):
        for tensor in module.state_dict().values():
            digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()
