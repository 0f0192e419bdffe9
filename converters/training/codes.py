"""The value of a learned code: the autoencoder beside PCA with as many numbers per picture, on unseen pictures.

    patch PCA     each 8x8 patch of 192 values as its 4 strongest components: 16 x 16 x 4 numbers, like a latent
    picture PCA   the whole picture of 49,152 values as its 1,024 strongest components
    autoencoder   16 x 16 x 4 latents

PCA is the best linear code there is for the squared error (Eckart and Young 1936), so the distance to it is what the
network's depth is worth. Two round trips show what else a code does: noise that it has no numbers for is left behind,
and a grey picture that is half forgotten (noised to t = 600) and remembered under a caption comes back in colour.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import text
from .autoencoder import Crops, is_held_out_picture, psnr, sheet
from .data import BACKGROUNDS, SIZE, STYLES, Artwork
from .diffusion import alphas_cumprod, diffuse
from .distill import ddim_step

PATCH, PER_PATCH, PER_PICTURE = 8, 4, 1024
# Pictures that the PCAs are fitted on, and pictures that all are measured on.
FITTED, MEASURED = 1500, 48
NOISE = 0.2
COLOURED = [("red apple", "3d"), ("cactus", "flat"), ("cat face", "cartoon"), ("rose", "glossy")]
FROM_T, STEPS, GUIDANCE = 600, 12, 4.0

Code = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class PCA:
    """mean [D] and the strongest directions [K, D] of a set of vectors, orthonormal."""

    mean: Tensor
    directions: Tensor

    @classmethod
    def fit(cls, x: Tensor, count: int) -> PCA:
        """From the rows of x, [N, D]; at most N - 1 directions are there to be found."""
        mean = x.mean(0)
        centred = x - mean
        if len(x) < x.shape[1]:
            # The small Gram matrix has the same eigenvalues: C = X^T X is 49,152 wide, X X^T only N.
            values, vectors = torch.linalg.eigh(centred @ centred.T)
            strongest = vectors[:, -count:]
            directions = (centred.T @ strongest) / values[-count:].clamp_min(1e-9).sqrt()
        else:
            directions = torch.linalg.eigh(centred.T @ centred)[1][:, -count:]
        return cls(mean, directions.T.flip(0))

    def round_trip(self, x: Tensor) -> Tensor:
        """Encoded and decoded, [N, D]."""
        return self.mean + (x - self.mean) @ self.directions.T @ self.directions


def to_patches(x: Tensor) -> Tensor:
    """Pictures [N, 3, H, W] as rows of 8x8 patches [N * H/8 * W/8, 192]."""
    n, c, h, w = x.shape
    patches = x.reshape(n, c, h // PATCH, PATCH, w // PATCH, PATCH).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(-1, c * PATCH * PATCH)


def from_patches(rows: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `to_patches` for pictures of `shape`."""
    n, c, h, w = shape
    patches = rows.reshape(n, h // PATCH, w // PATCH, c, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(n, c, h, w)


def codes(vae: Any, fitted: Tensor) -> dict[str, Code]:
    """Name -> round trip, [N, 3, 128, 128] in [-1, 1] to the same; the PCAs are fitted on `fitted`."""
    patches, pictures = PCA.fit(to_patches(fitted), PER_PATCH), PCA.fit(fitted.flatten(1), PER_PICTURE)
    return {
        "patch PCA": lambda x: from_patches(patches.round_trip(to_patches(x)), x.shape),
        "picture PCA": lambda x: pictures.round_trip(x.flatten(1)).view(x.shape),
        "autoencoder": lambda x: torch.cat(
            [vae.decode(vae.encode(some).latent_dist.mean).sample for some in x.split(8)]
        ),
    }


def training_pictures(artwork: Artwork, count: int, seed: int = 0) -> Tensor:
    """`count` drawings that the autoencoder was trained on, on its backgrounds; float32 [N, 3, 128, 128]."""
    rng = np.random.default_rng(seed)
    seen = [n for n in range(len(artwork.labels) * len(STYLES)) if not is_held_out_picture(n)]
    colours = list(BACKGROUNDS.values())
    chosen = rng.choice(seen, min(count, len(seen)), replace=False)
    found = [
        artwork.picture(artwork.labels[n // 4], list(STYLES)[n % 4], colours[int(rng.integers(len(colours)))])
        for n in chosen
    ]
    return torch.from_numpy(np.stack(found))


@torch.no_grad()
def compare(model: Path, work: Path, output: Path) -> dict[str, dict[str, float]]:
    """PSNR in dB of each code's round trip, of pictures and of noisy pictures against the clean; a sheet of them."""
    from diffusers import AutoencoderKL

    artwork = Artwork(work)
    vae = AutoencoderKL.from_pretrained(model / "vae", torch_dtype=torch.float32).eval()
    x = Crops(artwork, np.random.default_rng(0)).held_out(MEASURED)
    noisy = x + 2 * NOISE * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    rows: dict[str, dict[str, float]] = {"the noisy picture itself": {"picture": float("nan"), "noisy": psnr(noisy, x)}}
    shown = [x]
    for name, code in codes(vae, training_pictures(artwork, FITTED)).items():
        y, cleaned = code(x), code(noisy)
        rows[name] = {"picture": psnr(y, x), "noisy": psnr(cleaned, x)}
        shown.append(y)
        if name == "autoencoder":
            shown += [noisy, cleaned]
    grey, coloured = colour(model, vae, artwork)
    columns = 12
    width = min(columns, len(x))
    bottom = torch.cat([grey, coloured])
    bottom = torch.cat([bottom, -torch.ones(max(0, width - len(bottom)), 3, SIZE, SIZE)])
    sheet(output, *(row[:width] for row in shown), bottom[:width])
    return rows


def colour(model: Path, vae: Any, artwork: Artwork) -> tuple[Tensor, Tensor]:
    """Grey drawings, and what the model makes of them under their captions; [N, 3, 128, 128] each."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    unet = UNet2DConditionModel.from_pretrained(model / "unet", torch_dtype=torch.float32).eval()
    encoder = CLIPTextModel.from_pretrained(model / "text_encoder", torch_dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(model / "tokenizer")
    white = BACKGROUNDS["white"]
    drawings = torch.from_numpy(np.stack([artwork.picture(label, style, white) for label, style in COLOURED]))
    grey = drawings.mean(1, keepdim=True).expand_as(drawings).contiguous()
    captions = [f"{label}, {style} style" for label, style in COLOURED]
    context = encoder(text.tokenize(tokenizer, captions + [""] * len(captions))).last_hidden_state
    abar = alphas_cumprod()
    times = torch.linspace(FROM_T, 0, STEPS + 1).long()
    z = vae.encode(grey).latent_dist.mean * vae.config.scaling_factor
    eps = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    x, _ = diffuse(z, eps, abar[times[0]].expand(len(z)))
    for t, s in pairwise(times):
        v, v_empty = unet(torch.cat([x, x]), t, context).sample.chunk(2)
        x = ddim_step(x, v_empty + GUIDANCE * (v - v_empty), abar[t][None], abar[s][None])
    return grey, vae.decode(x / vae.config.scaling_factor).sample
