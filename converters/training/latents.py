"""The training pictures as latents: each drawing in several variants, encoded once, captioned anew at every step.

A variant differs in its background and now and then in its place or direction. What differs is said in the caption
(non-leaky augmentation, Karras et al. 2020): a picture that is mirrored without a word for it teaches the network the
average of both directions, which is a blur.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .data import BACKGROUNDS, Artwork

VARIANTS = 6
MIRRORED, MOVED = 0.12, 0.12
SIDE = 16


@dataclass
class Latents:
    """N training pictures; the fields are parallel arrays.

    z float16 [N, 4, 16, 16], scaled; pair: which (concept, style); background: which colour's name; colour: RGB of
    exactly this picture; mirrored: 0 or 1; shift: (y, x) in pixels.
    """

    artwork: Artwork
    pairs: list[tuple[str, str]]
    z: NDArray[np.float16]
    pair: NDArray[np.int32]
    background: NDArray[np.int32]
    colour: NDArray[np.float32]
    mirrored: NDArray[np.bool_]
    shift: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.pair)

    def picture(self, n: int) -> NDArray[np.float32]:
        """The picture that z[n] encodes, float32 [3, 128, 128] in [-1, 1]."""
        label, style = self.pairs[int(self.pair[n])]
        shift = (int(self.shift[n, 0]), int(self.shift[n, 1]))
        return self.artwork.picture(label, style, self.colour[n].tolist(), mirror=bool(self.mirrored[n]), shift=shift)

    def silhouette(self, n: int) -> NDArray[np.bool_]:
        """Where picture n is drawing and not background, bool [128, 128]."""
        label, style = self.pairs[int(self.pair[n])]
        shift = (int(self.shift[n, 0]), int(self.shift[n, 1]))
        return self.artwork.silhouette(label, style, mirror=bool(self.mirrored[n]), shift=shift)

    def caption(self, n: int, rng: np.random.Generator) -> str:
        """One wording of what z[n] shows; one in ten is empty."""
        label, style = self.pairs[int(self.pair[n])]
        changes = ["mirrored"] * bool(self.mirrored[n]) + ["off center"] * bool(self.shift[n].any())
        return self.artwork.caption(label, style, list(BACKGROUNDS)[self.background[n]], rng, changes)

    def batch(self, size: int, rng: np.random.Generator) -> tuple[Tensor, list[str], NDArray[np.int64]]:
        """Random latents float32 [size, 4, 16, 16], their captions, and which they are."""
        chosen = rng.integers(len(self), size=size)
        x_0 = torch.from_numpy(self.z[chosen].astype(np.float32))
        return x_0, [self.caption(int(n), rng) for n in chosen], chosen


def load(work: Path, vae: Any, device: str, seed: int) -> Latents:
    """The latents of `work`/latents.npz, which is made first if it is not there, or of another encoder than `vae`'s."""
    artwork = Artwork(work)
    pairs = list(artwork.pairs())
    path, encoder = work / "latents.npz", fingerprint(vae)
    if path.is_file():
        kept = dict(np.load(path))
        if "encoder" in kept and str(kept.pop("encoder")) == encoder:
            return Latents(artwork, pairs, **kept)
    rng = np.random.default_rng(seed)
    names = list(BACKGROUNDS)
    count = len(pairs) * VARIANTS
    chance = np.array([0.35] + [0.65 / (len(names) - 1)] * (len(names) - 1))
    background = rng.choice(len(names), count, p=chance).astype(np.int32)
    base = np.array([BACKGROUNDS[name] for name in names], np.float32)[background]
    moved = rng.random(count) < MOVED
    latents = Latents(
        artwork,
        pairs,
        z=np.empty((count, 4, SIDE, SIDE), np.float16),
        pair=np.repeat(np.arange(len(pairs), dtype=np.int32), VARIANTS),
        background=background,
        colour=np.clip(base + rng.normal(0, 4, (count, 3)), 0, 255).astype(np.float32),
        mirrored=rng.random(count) < MIRRORED,
        shift=np.where(moved[:, None], rng.integers(-12, 13, (count, 2)), 0).astype(np.int32),
    )
    for start in range(0, count, 64):
        rows = range(start, min(start + 64, count))
        x = torch.from_numpy(np.stack([latents.picture(n) for n in rows]))
        with torch.no_grad():
            mean = vae.encode(x.to(device, memory_format=torch.channels_last)).latent_dist.mean
        latents.z[start : start + len(rows)] = (mean.float() * vae.config.scaling_factor).cpu().numpy()
    arrays = ("z", "pair", "background", "colour", "mirrored", "shift")
    np.savez(path, encoder=np.array(encoder), **{name: getattr(latents, name) for name in arrays})
    return latents


def fingerprint(vae: Any) -> str:
    """A hash of all that makes latents: the encoder's weights, and their scale."""
    digest = hashlib.sha256(str(vae.config.scaling_factor).encode())
    for module in (vae.encoder, vae.quant_conv):
        for tensor in module.state_dict().values():
            digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()
