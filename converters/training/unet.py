"""The UNet: it learns to see the picture in the noise, told by the caption through cross-attention.

    minimise  E[ w(t) |v(x_t, t, text) - v_t|^2 ]         t uniform, one caption in ten empty

The text encoder learns with it from the same loss. Latents are computed once, from several variants (background,
mirroring, shift) of each picture; captions are worded anew at every step.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import autoencoder, text
from .autoencoder import sheet
from .data import BACKGROUNDS, Artwork
from .diffusion import SCHEDULE, alphas_cumprod, diffuse, loss_weight
from .loop import Budget, Run

CONFIG: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [64, 128, 224],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    # In UNet2DConditionModel this counts heads (its name is a known slip); 32 channels each.
    "attention_head_dim": [2, 4, 7],
    "cross_attention_dim": text.CONFIG["hidden_size"],
    "norm_num_groups": 16,
}
PROMPTS = """\
a slice of pizza, 3d style
cat face, flat style
a red apple, glossy style
rocket, cartoon style
cactus, 3d style, yellow background
grinning face, glossy style
umbrella, flat style, blue background
mushroom, cartoon style
hamburger, 3d style
red heart, glossy style, black background
dog face, cartoon style
snowman, 3d style, teal background
""".splitlines()
BATCH, VARIANTS = 32, 16


@dataclass
class Latents:
    """Cached latents: z float16 [N, 4, 16, 16], already scaled, with what each one shows."""

    z: NDArray[np.float16]
    pair: NDArray[np.int32]
    background: NDArray[np.int32]
    pairs: list[tuple[str, str]]


def encode_artwork(work: Path, vae: Any, device: str, seed: int) -> Latents:
    """Encode VARIANTS of each trained pair, once; kept in `work`/latents.npz."""
    artwork = Artwork(work)
    pairs = list(artwork.pairs())
    path = work / "latents.npz"
    if path.is_file():
        kept = np.load(path)
        return Latents(kept["z"], kept["pair"], kept["background"], pairs)
    rng = np.random.default_rng(seed)
    names = list(BACKGROUNDS)
    chance = np.array([0.35] + [0.65 / (len(names) - 1)] * (len(names) - 1))
    pair = np.repeat(np.arange(len(pairs), dtype=np.int32), VARIANTS)
    background = rng.choice(len(names), len(pair), p=chance).astype(np.int32)
    z = np.empty((len(pair), 4, 16, 16), np.float16)
    for start in range(0, len(pair), 64):
        pictures = []
        for n in range(start, min(start + 64, len(pair))):
            base = np.array(BACKGROUNDS[names[background[n]]], float)
            colour = list(np.clip(base + rng.normal(0, 4, 3), 0, 255))
            shift = (int(rng.integers(-5, 6)), int(rng.integers(-5, 6)))
            mirror = bool(rng.random() < 0.3)
            label, style = pairs[int(pair[n])]
            pictures.append(artwork.picture(label, style, colour, mirror=mirror, shift=shift))
        x = torch.from_numpy(np.stack(pictures)).to(device, memory_format=torch.channels_last)
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            mean = vae.encode(x).latent_dist.mean.float() * vae.config.scaling_factor
        z[start : start + len(pictures)] = mean.cpu().numpy()
    np.savez(path, z=z, pair=pair, background=background)
    return Latents(z, pair, background, pairs)


def build() -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**CONFIG).to(memory_format=torch.channels_last)


def train(work: Path, budget: Budget, *, device: str = "cpu", seed: int = 0) -> None:
    """Train into `work`/unet and `work`/text_encoder; resumes from `work`/unet.checkpoint.pt."""
    torch.manual_seed(seed)
    vae = autoencoder.load(work).to(device, memory_format=torch.channels_last).eval()
    if not (work / "tokenizer/vocab.json").is_file():
        text.train_tokenizer(work)
    tokenizer = text.load_tokenizer(work)
    latents = encode_artwork(work, vae, device, seed)
    artwork = Artwork(work)
    unet, encoder = build().to(device), text.build(tokenizer).to(device)
    run = Run("unet", work, {"unet": unet, "text_encoder": encoder}, budget, peak=6e-4, ema_decay=0.9995)
    rng = np.random.default_rng([seed, run.step])
    abar = alphas_cumprod().to(device)
    names = list(BACKGROUNDS)

    def loss_of(_: int) -> tuple[Tensor, dict[str, float]]:
        chosen = rng.integers(len(latents.z), size=BATCH)
        captions = []
        for n in chosen:
            label, style = latents.pairs[int(latents.pair[n])]
            captions.append(artwork.caption(label, style, names[int(latents.background[n])], rng))
        x_0 = torch.from_numpy(latents.z[chosen].astype(np.float32)).to(device)
        t = torch.randint(0, 1000, (BATCH,), device=device)
        x_t, v_t = diffuse(x_0, torch.randn_like(x_0), abar[t])
        with torch.autocast(device, torch.bfloat16):
            context = encoder(text.tokenize(tokenizer, captions).to(device)).last_hidden_state
            v = unet(x_t.contiguous(memory_format=torch.channels_last), t, context).sample
        error = (v.float() - v_t).square().mean(dim=(1, 2, 3))
        return (loss_weight(abar[t]) * error).mean(), {"v_error": float(error.detach().mean())}

    def sample() -> None:
        with run.averaged():
            sheet(work / "unet.png", *draw(PROMPTS, unet, encoder, tokenizer, vae, device).split(6))

    run.train(loss_of, sample=sample)
    run.use_average()
    unet.to("cpu", memory_format=torch.contiguous_format).save_pretrained(work / "unet")
    encoder.to("cpu").save_pretrained(work / "text_encoder")


@torch.no_grad()
def draw(prompts: list[str], unet: Any, encoder: Any, tokenizer: Any, vae: Any, device: str,
         *, steps: int = 20, guidance: float = 4.0, seed: int = 1) -> Tensor:  # fmt: skip
    """Pictures of `prompts` by DDIM, float32 [N, 3, 128, 128] in [-1, 1]; for a look during training."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(**SCHEDULE, clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    context = encoder(text.tokenize(tokenizer, [*prompts, *[""] * len(prompts)]).to(device)).last_hidden_state
    x = torch.randn((len(prompts), 4, 16, 16), generator=torch.Generator().manual_seed(seed)).to(device)
    for t in scheduler.timesteps:
        v, v_empty = unet(torch.cat([x, x]), t, context).sample.chunk(2)
        x = scheduler.step(v_empty + guidance * (v - v_empty), t, x).prev_sample
    pictures: Tensor = vae.decode(x / vae.config.scaling_factor).sample
    return pictures.cpu()
