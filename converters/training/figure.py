"""Forward and reverse diffusion in one figure: a picture at ten noise levels, and the way back.

The upper row is q(x_t | x_0), the noising process: latents of a drawing with more and more noise, decoded. The lower
row starts from the last of them, which holds nothing of the drawing any more, and lets the UNet take the noise out
under the drawing's caption: p(x_s | x_t, text), ten DDIM steps.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import text
from .autoencoder import sheet
from .data import BACKGROUNDS, Artwork
from .diffusion import SCHEDULE, alphas_cumprod, diffuse
from .distill import ddim_step

LABEL, STYLE, BACKGROUND = "red apple", "3d", "teal"
LEVELS, GUIDANCE = 10, 4.0


@torch.no_grad()
def draw(unet: Any, encoder: Any, tokenizer: Any, vae: Any, artwork: Artwork, path: Path) -> None:
    """Write the figure as a PNG of two rows."""
    abar = alphas_cumprod()
    scale = vae.config.scaling_factor
    x_0 = torch.from_numpy(artwork.picture(LABEL, STYLE, BACKGROUNDS[BACKGROUND]))[None]
    z_0 = vae.encode(x_0).latent_dist.mean * scale
    eps = torch.randn(z_0.shape, generator=torch.Generator().manual_seed(0))
    times = torch.linspace(0, SCHEDULE["num_train_timesteps"] - 1, LEVELS).round().long()
    noised = [diffuse(z_0, eps, abar[t][None])[0] for t in times]

    caption = f"{LABEL}, {STYLE} style, {BACKGROUND} background"
    context = encoder(text.tokenize(tokenizer, [caption, ""])).last_hidden_state
    x = noised[-1]
    back = [x]
    for t, s in zip(times.flip(0), times.flip(0)[1:], strict=False):
        v, v_empty = unet(torch.cat([x, x]), t, context).sample.chunk(2)
        x = ddim_step(x, v_empty + GUIDANCE * (v - v_empty), abar[t][None], abar[s][None])
        back.append(x)

    def decoded(latents: list[Tensor]) -> Tensor:
        pixels: Tensor = vae.decode(torch.cat(latents) / scale).sample
        return pixels

    sheet(path, decoded(noised), decoded(back))


def write(model: Path, artwork: Artwork, path: Path) -> None:
    """The figure of a published model, a diffusers folder."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    f32: dict[str, Any] = {"torch_dtype": torch.float32}
    draw(
        UNet2DConditionModel.from_pretrained(model / "unet", **f32),
        CLIPTextModel.from_pretrained(model / "text_encoder", **f32),
        CLIPTokenizer.from_pretrained(model / "tokenizer"),
        AutoencoderKL.from_pretrained(model / "vae", **f32),
        artwork,
        path,
    )
