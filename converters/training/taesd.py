"""The tiny autoencoder (TAESD, O. Bohan's `AutoencoderTiny`): the big one's latents, at a quarter of the work.

    decoder   minimise |tiny(z) - decode(z)| + |grad tiny(z) - grad decode(z)|
    encoder   minimise |tiny(x) - z|^2

Its teacher is the finished decoder, not the artwork: a preview should show what the picture will be. What the teacher
makes of each latent is computed once, before training starts. Both halves are convolutions alone, so crops teach them
as well as whole pictures do, at a quarter of the work; the encoder, which previews do not need, learns on every fourth
step.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edge_sd.errors import InvalidRequest

from . import autoencoder
from .autoencoder import Crops, psnr, reconstruction_loss, sheet
from .data import SIZE, Artwork
from .hardware import autocast
from .loop import Budget, Run

CHANNELS = 32
CONFIG: dict[str, Any] = {
    "encoder_block_out_channels": (CHANNELS,) * 4,
    "decoder_block_out_channels": (CHANNELS,) * 4,
    "num_encoder_blocks": (1, 2, 2, 2),
    "num_decoder_blocks": (2, 2, 2, 1),
}
# Crops, in latents a side, and how many a step.
CROP, BATCH = 8, 12
ENCODER_EVERY = 4
# Drawings that the teacher decodes for training, and more for measuring.
LESSONS, TESTS = 900, 48


def build(work: Path) -> Any:
    """The tiny autoencoder of `work`/vae_tiny to go on from, or a new one."""
    from diffusers import AutoencoderTiny

    finished = (work / "vae_tiny/config.json").is_file()
    return (load(work) if finished else AutoencoderTiny(**CONFIG)).to(memory_format=torch.channels_last)


def load(work: Path) -> Any:
    """The finished tiny autoencoder. Raises InvalidRequest where there is none yet."""
    from diffusers import AutoencoderTiny

    if not (work / "vae_tiny/config.json").is_file():
        raise InvalidRequest(f"{work} holds no tiny autoencoder; train it first: edge-sd train taesd --work {work}")
    return AutoencoderTiny.from_pretrained(work / "vae_tiny")


def train(work: Path, budget: Budget, *, device: str = "cpu", seed: int = 0) -> None:
    """Train into `work`/vae_tiny; resumes from `work`/taesd.checkpoint.pt."""
    torch.manual_seed(seed)
    teacher = autoencoder.load_final(work).to(device, memory_format=torch.channels_last)
    # The artwork's encoder is what sets the latents; a finished decoder may be another.
    pictures = Crops(Artwork(work), np.random.default_rng(seed)).batch(LESSONS + TESTS, SIZE)
    z = _encoded(teacher, pictures, device)
    decoded = _decoded(teacher, z, device)
    factor = SIZE // z.shape[-1]
    tiny = build(work).to(device)
    run = Run("taesd", work, {"taesd": tiny}, budget, peak=1e-3, ema_decay=0.998)
    rng = run.rng(seed)

    def crops(n: int) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, what the teacher makes of them, and the drawing they are of, at one random place."""
        y, x = (int(v) for v in rng.integers(0, z.shape[-1] - CROP + 1, 2))
        latent = z[n, :, y : y + CROP, x : x + CROP]
        rows, columns = slice(factor * y, factor * (y + CROP)), slice(factor * x, factor * (x + CROP))
        return latent, decoded[n, :, rows, columns].float() / 127.5 - 1, pictures[n, :, rows, columns]

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        rows = [crops(int(n)) for n in rng.integers(LESSONS, size=BATCH)]
        wanted_z, wanted, x = (torch.stack(each).to(device) for each in zip(*rows, strict=True))
        with autocast(device):
            # AutoencoderTiny speaks in [0, 1] inside; its forward methods take and give [-1, 1].
            y = tiny.decode(wanted_z).sample
        loss = decoding = reconstruction_loss(y.float(), wanted)
        parts = {"decoding": float(decoding.detach())}
        if step % ENCODER_EVERY == 0:
            with autocast(device):
                found_z = tiny.encode(x).latents
            loss = decoding + 0.2 * (found_z.float() - wanted_z).square().mean()
        return loss, parts

    def sample() -> None:
        with run.averaged(), torch.no_grad():
            y = torch.cat([tiny.decode(some).sample for some in z[LESSONS:].to(device).split(8)]).cpu()
        x = decoded[LESSONS:].float() / 127.5 - 1
        run.log.append({"step": run.step, "minutes": run.seconds / 60, "psnr": psnr(y, x)})
        print(f"PSNR {run.log[-1]['psnr']:.2f} dB against the full decoder, on latents not trained on", flush=True)
        sheet(work / "taesd.png", x[:16], y[:16])

    run.train(loss_of, sample=sample)
    if not run.is_main:
        return
    run.use_average()
    tiny.to("cpu", memory_format=torch.contiguous_format).save_pretrained(work / "vae_tiny")
    (work / "taesd.log.json").write_text(json.dumps(run.log))


@torch.no_grad()
def _encoded(teacher: Any, pictures: Tensor, device: str) -> Tensor:
    """Scaled latents [N, 4, 16, 16] of pictures [N, 3, 128, 128]."""
    means = [teacher.encode(some.to(device)).latent_dist.mean.float().cpu() for some in pictures.split(16)]
    scale: float = teacher.config.scaling_factor
    return torch.cat(means) * scale


@torch.no_grad()
def _decoded(teacher: Any, z: Tensor, device: str) -> Tensor:
    """uint8 [N, 3, 128, 128]: what the full decoder makes of scaled latents."""
    pictures = []
    for some in z.to(device).split(16):
        with autocast(device):
            y = teacher.decode(some / teacher.config.scaling_factor).sample.float()
        pictures.append(((y.clamp(-1, 1) + 1) * 127.5).round().byte().cpu())
    return torch.cat(pictures)
