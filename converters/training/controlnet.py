"""ControlNet (Zhang et al. 2023): the finished UNet is told where the lines are, without being changed.

    locked copy      the UNet as it is; no weight of it moves
    trainable copy   its encoder and middle once more, started from the same weights, which also sees the lines
    zero convolutions  1x1, from each block of the copy to the locked decoder; all zero at the start, so that training
                     begins with the UNet's own pictures and takes only what helps

    minimise E[ w(t) |v(x_t, t, text; residuals of copy(x_t, t, text, lines)) - v_t|^2 ]

Half of the captions are empty: there the lines alone say what is drawn, and a star's outline makes a star even of a
cookie. Half of the conditions are the outline only, as people sketch; the others have the inner lines, too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edge_sd.edges import canny, dilate
from edge_sd.errors import InvalidRequest

from . import autoencoder, latents, text, unet
from .diffusion import alphas_cumprod, diffuse, loss_weight, sample_timesteps
from .latents import Latents
from .loop import Budget, Run, autocast

CONDITION_CHANNELS = (8, 16, 32, 64)
BATCH = 16


def lines(kept: Latents, n: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """A drawing of picture n's edges, all of them or the outline; bool [128, 128]."""
    if rng.random() < 0.5:
        return outline(kept.silhouette(n))
    pixels = ((kept.picture(n).transpose(1, 2, 0) + 1) * 127.5).round().astype(np.uint8)
    high = float(rng.uniform(0.1, 0.25))
    return canny(pixels, low=0.4 * high, high=high)


def outline(inside: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The border pixels of a shape; bool [H, W]."""
    return inside & dilate(~inside, 1)


def as_condition(drawings: list[NDArray[np.bool_]]) -> Tensor:
    """White lines on black, float32 [B, 3, H, W] in [0, 1], as ControlNets take them."""
    return torch.from_numpy(np.stack(drawings).astype(np.float32))[:, None].repeat(1, 3, 1, 1)


def build(model: Any) -> Any:
    """A trainable copy of the UNet's encoder, its zero convolutions, and a small encoder of the lines."""
    from diffusers import ControlNetModel

    copy = ControlNetModel.from_unet(model, conditioning_embedding_out_channels=CONDITION_CHANNELS)
    # The library's initialisation leaves 2e-5 of thin lines after its eight layers, and then multiplies by zero; behind
    # the zero convolutions nothing of them would ever be heard. He et al. 2015 keeps them at the size they came in.
    for layer in copy.controlnet_cond_embedding.modules():
        if isinstance(layer, torch.nn.Conv2d) and layer.bias is not None:
            torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            torch.nn.init.zeros_(layer.bias)
    return copy.to(memory_format=torch.channels_last)


def load(work: Path) -> Any:
    """The finished ControlNet. Raises InvalidRequest where there is none yet."""
    from diffusers import ControlNetModel

    if not (work / "controlnet/config.json").is_file():
        raise InvalidRequest(f"{work} holds no ControlNet; train it first: edge-sd train controlnet --work {work}")
    return ControlNetModel.from_pretrained(work / "controlnet")


def train(work: Path, budget: Budget, *, device: str = "cpu", seed: int = 0) -> None:
    """Train into `work`/controlnet; resumes from `work`/controlnet.checkpoint.pt."""
    torch.manual_seed(seed)
    tokenizer = text.load_tokenizer(work)
    locked, encoder = (module.to(device).requires_grad_(False) for module in unet.load(work))
    kept = latents.load(work, autoencoder.load(work).to(device), device, seed)
    copy = build(locked).to(device)
    zero = (*copy.controlnet_down_blocks, copy.controlnet_mid_block, copy.controlnet_cond_embedding)
    run = Run("controlnet", work, {"controlnet": copy}, budget, peak=6e-4, ema_decay=0.998, eager=zero)
    rng = run.rng(seed)
    abar = alphas_cumprod().to(device)

    def loss_of(_: int) -> tuple[Tensor, dict[str, float]]:
        x_0, captions, chosen = kept.batch(BATCH, rng)
        captions = [caption if rng.random() < 0.7 else "" for caption in captions]
        condition = as_condition([lines(kept, int(n), rng) for n in chosen]).to(device)
        x_0 = x_0.to(device)
        t = sample_timesteps(BATCH, device)
        x_t, v_t = diffuse(x_0, torch.randn_like(x_0), abar[t])
        with autocast(device):
            context = encoder(text.tokenize(tokenizer, captions).to(device)).last_hidden_state
            v = controlled(locked, copy, x_t.contiguous(memory_format=torch.channels_last), t, context, condition)
        error = (v.float() - v_t).square().mean(dim=(1, 2, 3))
        return (loss_weight(abar[t]) * error).mean(), {"v_error": float(error.detach().mean())}

    run.train(loss_of)
    if not run.is_main:
        return
    run.use_average()
    copy.to("cpu", memory_format=torch.contiguous_format).save_pretrained(work / "controlnet")
    (work / "controlnet.log.json").write_text(json.dumps(run.log))


def controlled(locked: Any, copy: Any, x_t: Tensor, t: Tensor, context: Tensor, condition: Tensor) -> Tensor:
    """The locked UNet's prediction with the copy's residuals added to its skip connections."""
    down, middle = copy(x_t, t, context, condition, return_dict=False)
    v: Tensor = locked(
        x_t, t, context, down_block_additional_residuals=down, mid_block_additional_residual=middle
    ).sample
    return v
