"""Few steps: the guided UNet distilled to a consistency model (Song et al. 2023), as a LoRA (Luo et al. 2023).

The guided teacher's pictures lie on curves from noise to picture (the probability-flow ODE). The student
f(x_t, t) answers with the curve's end from anywhere on it, which holds when neighbours on one curve agree:

    minimise  E |f(x_t, t) - f_ema(x_s, s)|_huber         s: one of the teacher's DDIM steps below t

with x_s reached from x_t by one DDIM step of the teacher under guidance. `f` is read off the network as the scheduler
called LCM reads it,

    f(x_t, t) = c_skip(t) x_t + c_out(t) x_0(x_t, t, v)       c_skip = s_d^2 / (s_d^2 + (10 t)^2),   s_d = 0.5

so that f(x_0, 0) = x_0 by construction. Only low-rank differences of the weights are learned (LoRA, Hu et al. 2022), a
file of a few MB beside the UNet; the student needs no guidance, so a picture of four steps costs a tenth of one of
twenty.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import autoencoder, latents, text, unet
from .autoencoder import sheet
from .diffusion import alphas_cumprod, diffuse
from .hardware import autocast, plain_attention
from .loop import Budget, Run

# Layers that get a low-rank difference: all of the UNet's matrices but its first and last.
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
           "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv"]  # fmt: skip
RANK = 16
STEPS, GUIDANCE = 20, 4.0
BATCH = 16
TARGET_DECAY = 0.95


def consistency(x_t: Tensor, t: Tensor, v: Tensor, abar: Tensor) -> Tensor:
    """f(x_t, t) of the header; x_t, v: [B, 4, h, w], t: int64 [B]."""
    abar_t = abar[t].view(-1, 1, 1, 1)
    x_0 = abar_t.sqrt() * x_t - (1 - abar_t).sqrt() * v
    scaled = 10.0 * t.view(-1, 1, 1, 1).float()
    c_skip, c_out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25).sqrt()
    return c_skip * x_t + c_out * x_0


def ddim_step(x_t: Tensor, v: Tensor, abar_t: Tensor, abar_s: Tensor) -> Tensor:
    """One deterministic step from noise level t to s (Song et al. 2021, eq. 12 with eta = 0)."""
    abar_t, abar_s = abar_t.view(-1, 1, 1, 1), abar_s.view(-1, 1, 1, 1)
    x_0 = abar_t.sqrt() * x_t - (1 - abar_t).sqrt() * v
    eps = (1 - abar_t).sqrt() * x_t + abar_t.sqrt() * v
    return abar_s.sqrt() * x_0 + (1 - abar_s).sqrt() * eps


def add_lora(model: Any) -> None:
    """Put zero differences of rank RANK beside the target layers, and let nothing else be trained."""
    from peft import LoraConfig

    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS, init_lora_weights="gaussian"))


def train(work: Path, budget: Budget, *, device: str = "cpu", seed: int = 0) -> None:
    """Train into `work`/lcm/pytorch_lora_weights.safetensors; resumes from `work`/lcm.checkpoint.pt."""
    torch.manual_seed(seed)
    tokenizer = text.load_tokenizer(work)
    teacher, encoder = (module.to(device).requires_grad_(False) for module in unet.load(work))
    vae = autoencoder.load(work).to(device)
    kept = latents.load(work, vae, device, seed)
    student = plain_attention(unet.build(work), device).to(device)
    add_lora(student)
    differences = torch.nn.ParameterDict(
        {name.replace(".", "/"): p for name, p in student.named_parameters() if p.requires_grad}
    )
    run = Run("lcm", work, {"lora": differences}, budget, peak=1e-3, ema_decay=TARGET_DECAY, ema_every=1)
    rng = run.rng(seed)
    abar = alphas_cumprod().to(device)
    # The teacher's timesteps from 999 down ("trailing"), with the picture itself at the end.
    grid = torch.arange(1000, 0, -1000 // STEPS, device=device) - 1
    with torch.no_grad():
        empty = encoder(text.tokenize(tokenizer, [""]).to(device)).last_hidden_state

    def loss_of(_: int) -> tuple[Tensor, dict[str, float]]:
        x_0, captions, _chosen = kept.batch(BATCH, rng)
        x_0 = x_0.to(device)
        n = torch.randint(0, STEPS, (BATCH,), device=device)
        t = grid[n]
        s = torch.where(n + 1 < STEPS, grid[(n + 1) % STEPS], 0)
        abar_s = torch.where(n + 1 < STEPS, abar[s], 1.0)
        x_t, _v = diffuse(x_0, torch.randn_like(x_0), abar[t])
        x_t = x_t.contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), autocast(device):
            context = encoder(text.tokenize(tokenizer, captions).to(device)).last_hidden_state
            v, v_empty = teacher(
                torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([context, empty.expand_as(context)])
            ).sample.float().chunk(2)  # fmt: skip
            x_s = ddim_step(x_t, v_empty + GUIDANCE * (v - v_empty), abar[t], abar_s)
            with run.averaged():
                target = consistency(x_s, s, student(x_s, s, context).sample.float(), abar)
            # The last step of the teacher ends on the picture; there is nothing beyond to agree with.
            target = torch.where((n + 1 < STEPS).view(-1, 1, 1, 1), target, x_s)
        with autocast(device):
            v = student(x_t, t, context).sample
        error = consistency(x_t, t, v.float(), abar) - target
        return (error.square() + 1e-6).sqrt().mean(), {}

    def sample() -> None:
        with run.averaged():
            for steps in (1, 4):
                pictures = draw(unet.PROMPTS, student, encoder, tokenizer, vae, device, steps=steps)
                sheet(work / f"lcm_{steps}.png", *pictures.split(6))

    run.train(loss_of, sample=sample)
    if not run.is_main:
        return
    run.use_average()
    save(student, work / "lcm")
    (work / "lcm.log.json").write_text(json.dumps(run.log))


def save(student: Any, folder: Path) -> None:
    """Write the differences as pytorch_lora_weights.safetensors, which diffusers' load_lora_weights reads."""
    from diffusers import StableDiffusionPipeline
    from peft.utils import get_peft_model_state_dict

    state = {name: tensor.half().cpu() for name, tensor in get_peft_model_state_dict(student).items()}
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=state)


@torch.no_grad()
def draw(prompts: list[str], student: Any, encoder: Any, tokenizer: Any, vae: Any, device: str,
         *, steps: int, seed: int = 1) -> Tensor:  # fmt: skip
    """Pictures of `prompts` in a few steps without guidance, float32 [N, 3, 128, 128] in [-1, 1]."""
    abar = alphas_cumprod().to(device)
    generator = torch.Generator().manual_seed(seed)
    context = encoder(text.tokenize(tokenizer, prompts).to(device)).last_hidden_state
    x = torch.randn((len(prompts), 4, 16, 16), generator=generator).to(device)
    times = [999 - n * 1000 // steps for n in range(steps)]
    for n, time in enumerate(times):
        t = torch.full((len(prompts),), time, device=device)
        x_0 = consistency(x, t, student(x, t, context).sample, abar)
        if n + 1 < steps:
            noise = torch.randn(x.shape, generator=generator).to(device)
            x, _v = diffuse(x_0, noise, abar[torch.full_like(t, times[n + 1])])
    pictures: Tensor = vae.decode(x_0 / vae.config.scaling_factor).sample
    return pictures.cpu()
