"""The autoencoder: 128x128 pixels to 16x16x4 latents and back (AutoencoderKL, factor 8).

    loss = |x - y| at four scales + |grad x - grad y| + |f(x) - f(y)| + beta * KL(q(z|x) || N(0, 1)) + a |z - z'|^2

L1 alone lets small shapes drift to the grey between their colours; the same difference on pictures shrunk 2, 4 and 8
times holds the colours, the difference of the gradients holds the edges. f are the judge's first layers (evaluator),
which see edges and textures and name nothing yet; they count where there is a judge. z' are the latents of a finished
autoencoder that is gone on with: a UNet was trained on them, and the nearer they stay, the less it has to learn anew.

The latents are written at Stable Diffusion's scale, 0.18215, so that programs that know no other find them where they
look. Training sees 64x64 crops, four times as many
steps for the same pixels, and whole pictures for the last fifth of the budget.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from edge_sd.errors import InvalidRequest

from .data import BACKGROUNDS, SIZE, STYLES, Artwork
from .hardware import autocast, plain_norms
from .loop import Budget, Run
from .shards import pictures

CONFIG: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [32, 64, 128, 128],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 16,
    "sample_size": SIZE,
}
KL_WEIGHT = 2e-5
FEATURES, ANCHOR = 0.05, 0.1
# The scaling factor that Stable Diffusion 1 was published with.
SCALE = 0.18215
BATCH, CROP = 16, 64


def reconstruction_loss(y: Tensor, x: Tensor) -> Tensor:
    """L1 at scales 1, 1/2, 1/4 and 1/8 plus L1 of the gradients; x, y: [B, 3, H, W] in [-1, 1]."""
    loss = (y - x).abs().mean()
    for k in (2, 4, 8):
        loss = loss + 0.5 * (F.avg_pool2d(y, k) - F.avg_pool2d(x, k)).abs().mean()
    for dim in (2, 3):
        loss = loss + 0.5 * (y.diff(dim=dim) - x.diff(dim=dim)).abs().mean()
    return loss


def kl_from_normal(q: Any, scale: float) -> Tensor:
    """KL(scale z || N(0, 1)) of diagonal Gaussian latents z ~ q, mean over all of their numbers."""
    variance = q.var * scale**2
    kl: Tensor = 0.5 * ((q.mean * scale).square() + variance - 1 - variance.log()).mean()
    return kl


@torch.no_grad()
def rescale(vae: Any, scale: float) -> None:
    """Give the autoencoder another scaling factor and its latents another size, so that their product stays.

    The first and last linear maps of the latents take the change: pictures and a UNet's latents are what they were.
    """
    grow = vae.config.scaling_factor / scale
    channels = vae.config.latent_channels
    for tensor in (vae.quant_conv.weight, vae.quant_conv.bias):
        tensor[:channels] *= grow
    vae.quant_conv.bias[channels:] += 2 * math.log(grow)
    vae.post_quant_conv.weight /= grow
    vae.register_to_config(scaling_factor=scale)


def psnr(y: Tensor, x: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [-1, 1]."""
    mse = (y.clamp(-1, 1) - x).square().mean(dim=(1, 2, 3))
    return float((10 * torch.log10(4 / mse.clamp_min(1e-10))).mean())


def is_held_out_picture(n: int) -> bool:
    """Every 50th drawing is kept from the autoencoder's training, to measure it on."""
    return n % 50 == 7


class Features:
    """What the judge's first layers see, at half the pictures' resolution; nothing where there is no judge."""

    def __init__(self, work: Path, device: str) -> None:
        from . import evaluator

        published = work / "evaluator"
        self.trunk = evaluator.load(published)[0].trunk[:7].to(device) if published.is_dir() else None
        if self.trunk is not None:
            self.trunk.requires_grad_(False)

    def distance(self, y: Tensor, x: Tensor) -> Tensor:
        """The mean absolute difference of the features of y and x, [B, 3, H, W] in [-1, 1]."""
        if self.trunk is None:
            return y.new_zeros(())
        found, wanted = self.trunk(torch.cat([y, x.to(y.dtype)])).float().chunk(2)
        mean: Tensor = (found - wanted).abs().mean()
        return mean


class Crops:
    """Random drawings of the whole artwork on random backgrounds."""

    def __init__(self, artwork: Artwork, rng: np.random.Generator, shards: str | None = None) -> None:
        self.artwork, self.rng = artwork, rng
        self.shards = pictures(shards, int(rng.integers(1 << 30))) if shards else None
        count = len(artwork.labels) * len(STYLES)
        self.train = [n for n in range(count) if not is_held_out_picture(n)]
        core = {4 * artwork.index[label] + list(STYLES).index(style) for label, style in artwork.pairs()}
        self.core = [n for n in self.train if n in core]
        self.test = [n for n in range(count) if is_held_out_picture(n)]

    def background(self) -> tuple[float, ...]:
        if self.rng.random() < 0.6:
            base = np.array(list(BACKGROUNDS.values())[self.rng.integers(len(BACKGROUNDS))], float)
            return tuple(np.clip(base + self.rng.normal(0, 6, 3), 0, 255))
        return tuple(self.rng.uniform(0, 255, 3))

    def batch(self, size: int, crop: int, *, core: bool = False) -> Tensor:
        """Float32 [size, 3, crop, crop] in [-1, 1]; with `core` only pictures that the UNet learns, too."""
        found = []
        for _ in range(size):
            picture = self._picture(core) if self.shards is None else next(self.shards)[0]
            if crop < SIZE:
                # Crops start on the latent grid, where the decoder will meet them.
                y, x = 8 * self.rng.integers(0, (SIZE - crop) // 8 + 1, 2)
                picture = picture[:, y : y + crop, x : x + crop]
            found.append(picture)
        return torch.from_numpy(np.stack(found))

    def _picture(self, core: bool) -> NDArray[np.float32]:
        n = int(self.rng.choice(self.core if core else self.train))
        y, x = (int(v) for v in self.rng.integers(-12, 13, 2))
        mirror = bool(self.rng.random() < 0.5)
        label, style = self.artwork.labels[n // 4], list(STYLES)[n % 4]
        return self.artwork.picture(label, style, self.background(), mirror=mirror, shift=(y, x))

    def held_out(self, limit: int = 48) -> Tensor:
        """The pictures that training never sees, on their backgrounds; float32 [N, 3, 128, 128]."""
        colours = list(BACKGROUNDS.values())
        return torch.from_numpy(
            np.stack(
                [
                    self.artwork.picture(self.artwork.labels[n // 4], list(STYLES)[n % 4], colours[i % len(colours)])
                    for i, n in enumerate(self.test[:limit])
                ]
            )
        )


def build(work: Path) -> Any:
    """The autoencoder of `work`/vae to go on from, or a new one."""
    from diffusers import AutoencoderKL

    finished = (work / "vae/config.json").is_file()
    vae = AutoencoderKL.from_pretrained(work / "vae") if finished else AutoencoderKL(**CONFIG)
    return vae.to(memory_format=torch.channels_last)


def train(work: Path, budget: Budget, *, device: str = "cpu", seed: int = 0, shards: str | None = None) -> None:
    """Train into `work`/vae (a diffusers folder); resumes from `work`/vae.checkpoint.pt.

    `shards`: webdataset tar files to learn from instead of the artwork, which still measures (see shards.py).
    """
    torch.manual_seed(seed)
    finished = (work / "vae/config.json").is_file()
    vae = plain_norms(build(work), device).to(device)
    anchor = plain_norms(build(work), device).to(device).requires_grad_(False) if finished else None
    scale: float = vae.config.scaling_factor if finished else 1.0
    features = Features(work, device)
    run = Run("vae", work, {"vae": vae}, budget, peak=5e-4, ema_decay=0.999)
    crops = Crops(Artwork(work), run.rng(seed), shards)
    held_out = crops.held_out()

    def loss_of(_: int) -> tuple[Tensor, dict[str, float]]:
        whole = budget.used(run.step, run.seconds) > 0.8
        x = crops.batch(BATCH // 4 if whole else BATCH, SIZE if whole else CROP)
        x = x.to(device, memory_format=torch.channels_last)
        with autocast(device):
            q = vae.encode(x).latent_dist
            y = vae.decode(q.sample()).sample
            seen = features.distance(y, x)
            drift = torch.zeros((), device=device)
            if anchor is not None:
                with torch.no_grad():
                    z = anchor.encode(x).latent_dist.mean
                drift = ((q.mean - z).float() * scale).square().mean()
        kl = kl_from_normal(q, scale)
        reconstruction = reconstruction_loss(y.float(), x)
        parts = {"reconstruction": reconstruction, "features": seen, "drift": drift, "kl": kl}
        loss = reconstruction + FEATURES * seen + ANCHOR * drift + KL_WEIGHT * kl
        return loss, {name: float(part.detach()) for name, part in parts.items()}

    def sample() -> None:
        with run.averaged(), torch.no_grad():
            y = torch.cat([vae.decode(vae.encode(x).latent_dist.mean).sample for x in held_out.to(device).split(8)])
        _tell(run, y.cpu(), held_out)

    run.train(loss_of, sample=sample)
    if not run.is_main:
        return
    run.use_average()
    if not finished:
        vae.register_to_config(scaling_factor=scaling_factor(vae, crops, device))
    rescale(vae, SCALE)
    vae.to("cpu", memory_format=torch.contiguous_format).save_pretrained(work / "vae")
    (work / "vae.log.json").write_text(json.dumps(run.log))


def _tell(run: Run, y: Tensor, x: Tensor) -> None:
    """Log how near the reconstructions y are to the held-out pictures x, and show some of them."""
    run.log.append({"step": run.step, "minutes": run.seconds / 60, "psnr": psnr(y, x)})
    print(f"held-out PSNR {run.log[-1]['psnr']:.2f} dB", flush=True)
    sheet(run.folder / f"{run.name}.png", x[:16], y[:16])


def load(work: Path) -> Any:
    """The trained autoencoder of a work folder. Raises InvalidRequest where there is none yet."""
    from diffusers import AutoencoderKL

    if not (work / "vae/config.json").is_file():
        raise InvalidRequest(f"{work} holds no autoencoder; train it first: edge-sd train autoencoder --work {work}")
    return AutoencoderKL.from_pretrained(work / "vae")


def load_final(work: Path) -> Any:
    """The autoencoder with its sharpened decoder, if there is one."""
    from diffusers import AutoencoderKL

    sharp = (work / "vae_sharp/config.json").is_file()
    return AutoencoderKL.from_pretrained(work / "vae_sharp") if sharp else load(work)


def train_decoder(work: Path, budget: Budget, *, device: str = "cpu", seed: int = 0) -> None:
    """Go on with the decoder alone, on whole pictures; the encoder, and so every latent, stays what it is.

    The UNet can be trained meanwhile. Every second batch shows the vocabulary that it is taught. A little noise on the
    latents teaches the decoder to forgive a UNet's slips.
    """
    torch.manual_seed(seed)
    vae = plain_norms(load(work), device).to(device, memory_format=torch.channels_last)
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    decoder = torch.nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv})
    run = Run("decoder", work, {"decoder": decoder}, budget, peak=3e-4, ema_decay=0.999)
    crops = Crops(Artwork(work), run.rng(seed + 1))
    held_out = crops.held_out()
    with torch.no_grad():
        held_out_z = torch.cat([vae.encode(x).latent_dist.mean for x in held_out.to(device).split(8)])
    noise = 0.05 / vae.config.scaling_factor

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        x = crops.batch(BATCH // 4, SIZE, core=step % 2 == 0).to(device, memory_format=torch.channels_last)
        with autocast(device):
            with torch.no_grad():
                z = vae.encode(x).latent_dist.mean
            y = vae.decode(z + noise * torch.randn_like(z)).sample
        return reconstruction_loss(y.float(), x), {}

    def sample() -> None:
        with run.averaged(), torch.no_grad():
            y = torch.cat([vae.decode(z).sample for z in held_out_z.split(8)])
        _tell(run, y.cpu(), held_out)

    run.train(loss_of, sample=sample)
    if not run.is_main:
        return
    run.use_average()
    vae.to("cpu", memory_format=torch.contiguous_format).save_pretrained(work / "vae_sharp")
    (work / "decoder.log.json").write_text(json.dumps(run.log))


def scaling_factor(vae: Any, crops: Crops, device: str) -> float:
    """1 / the standard deviation of the latents, so that diffusion starts from unit variance (LDM, section 3.2)."""
    with torch.no_grad():
        z = torch.cat([vae.encode(crops.batch(16, SIZE).to(device)).latent_dist.mean for _ in range(8)])
    return round(1 / float(z.std()), 5)


def sheet(path: Path, *rows: Tensor) -> None:
    """Save rows of pictures ([N, 3, H, W] in [-1, 1] each) as one PNG."""
    from PIL import Image

    grid = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)
    pixels = ((grid.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(path)
