"""The UNet: it learns to see the picture in the noise, told by the caption through cross-attention.

    minimise  E[ w(t) |v(x_t, t, text) - v_t|^2 ]         t uniform, one caption in ten empty

The text encoder learns with it from the same loss. Where `work` holds words.json, the words that no caption holds
follow what it learns: every other step some of them are taught to mean what their concepts' names mean now (widen). A
finished UNet in the work folder is gone on with; and where the
text encoder was taught more words since (widen), it stays what it is, and the UNet learns alone what is made of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edge_sd.errors import InvalidRequest

from . import autoencoder, latents, text
from .autoencoder import sheet
from .diffusion import SCHEDULE, alphas_cumprod, diffuse, loss_weight, sample_timesteps
from .hardware import autocast, plain_attention
from .loop import Budget, Run
from .shards import ShardLatents
from .widen import Words, meaning

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
BATCH = 48
PEAK, GOING_ON = 6e-4, 3e-4
# How many words follow at a time, on which steps, and how much of the loss that is.
WORDS, WORDS_EVERY, MEANING = 24, 2, 0.5


def build(work: Path) -> Any:
    """The UNet of `work`/unet to go on from, or a new one."""
    from diffusers import UNet2DConditionModel

    finished = (work / "unet/config.json").is_file()
    unet = UNet2DConditionModel.from_pretrained(work / "unet") if finished else UNet2DConditionModel(**CONFIG)
    return unet.to(memory_format=torch.channels_last)


def load(work: Path) -> tuple[Any, Any]:
    """The finished UNet and the text encoder that it is published with. Raises InvalidRequest where there are none."""
    if not (work / "unet/config.json").is_file():
        raise InvalidRequest(f"{work} holds no UNet; train it first: edge-sd train unet --work {work}")
    return build(work), text.load_final(work)


def train(work: Path, budget: Budget, *, device: str = "cpu", seed: int = 0, shards: str | None = None) -> None:
    """Train into `work`/unet and `work`/text_encoder; resumes from `work`/unet.checkpoint.pt.

    With `work`/text_encoder_wide, into `work`/unet alone, from `work`/unet_wide.checkpoint.pt.

    `shards`: webdataset tar files to learn from instead of the artwork (see shards.py).
    """
    torch.manual_seed(seed)
    vae = autoencoder.load(work).to(device, memory_format=torch.channels_last).eval()
    if not (work / "tokenizer/vocab.json").is_file():
        text.train_tokenizer(work)
    tokenizer = text.load_tokenizer(work)
    kept = ShardLatents(shards, vae, device, seed) if shards else latents.load(work, vae, device, seed)
    # Weights that are gone on with have learned at the full rate before; it would throw them back first.
    peak = GOING_ON if (work / "unet/config.json").is_file() else PEAK
    unet = plain_attention(build(work), device).to(device)
    alone = text.is_wide(work)
    encoder = (text.load_final(work).requires_grad_(False) if alone else text.build(work, tokenizer)).to(device)
    modules = {"unet": unet} if alone else {"unet": unet, "text_encoder": encoder}
    run = Run("unet_wide" if alone else "unet", work, modules, budget, peak=peak, ema_decay=0.998)
    rng = run.rng(seed)
    abar = alphas_cumprod().to(device)
    words = Words(work) if not alone and (work / "words.json").is_file() else None

    def following() -> Tensor:
        """How far words are from what their concepts' names mean at this moment."""
        assert words is not None
        rows = [words.lesson(rng) for _ in range(WORDS)]
        known, new = words.ids([row[0] for row in rows], [row[1] for row in rows], whole=False)
        with autocast(device):
            wanted, found = encoder(torch.cat([known, new]).to(device)).last_hidden_state.float().chunk(2)
        return meaning(found, wanted.detach(), new, known)

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        x_0, captions, _chosen = kept.batch(BATCH, rng)
        x_0 = x_0.to(device)
        t = sample_timesteps(BATCH, device)
        x_t, v_t = diffuse(x_0, torch.randn_like(x_0), abar[t])
        with autocast(device):
            context = encoder(text.tokenize(tokenizer, captions).to(device)).last_hidden_state
            v = unet(x_t.contiguous(memory_format=torch.channels_last), t, context).sample
        error = (v.float() - v_t).square().mean(dim=(1, 2, 3))
        loss = (loss_weight(abar[t]) * error).mean()
        if words is not None and step % WORDS_EVERY == 0:
            loss = loss + MEANING * following()
        return loss, {"v_error": float(error.detach().mean())}

    def sample() -> None:
        with run.averaged():
            sheet(work / "unet.png", *draw(PROMPTS, unet, encoder, tokenizer, vae, device).split(6))

    run.train(loss_of, sample=sample)
    if not run.is_main:
        return
    run.use_average()
    unet.to("cpu", memory_format=torch.contiguous_format).save_pretrained(work / "unet")
    if not alone:
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
