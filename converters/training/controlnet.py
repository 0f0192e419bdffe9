"""ControlNet (Zhang et al. 2023): the finished UNet is told where the lines are, without being changed.

    locked copy      the UNet as it is; no weight of it moves
    trainable copy   its encoder and middle once more, started from the same weights, which also sees the lines
    zero convolutions  1x1, from each block of the copy to the locked decoder; all zero at the start, so that training
                     begins with the UNet's own pictures and takes only what helps

    minimise E[ w(t) |v(x_t, t, text; residuals of copy(x_t, t, text, lines)) - v_t|^2 ]

The UNet knows one drawing for each caption, in its place: told the caption, it learns next to nothing of that drawing's
lines (tried: after 430 steps they had no effect). So the lessons are drawings that it can't foresee. They are turned,
scaled, moved and mirrored without a word for it, three in four are of things outside its vocabulary, and most captions
say the style and the background alone, or nothing: what is drawn, and where, only the lines say, and a star's outline
makes a star even of a cookie. Half of the conditions are the outline only, as people sketch; the others have the inner
lines, too.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edge_sd.errors import InvalidRequest
from edge_sd.images.canny import canny, dilate

from . import autoencoder, text, unet
from .data import BACKGROUNDS, SIZE, STYLES, Artwork, core_vocabulary
from .diffusion import alphas_cumprod, diffuse, loss_weight, sample_timesteps
from .hardware import autocast, plain_attention
from .loop import Budget, Run

CONDITION_CHANNELS = (8, 16, 32, 64)
BATCH = 16
PEAK, GOING_ON = 6e-4, 2e-4
# Drawings that are made and encoded before training starts, and how many of them only measure it.
LESSONS, TESTS = 2400, 64
# Shares of the captions that name the thing (of those that the UNet knows), and that say nothing at all.
NAMED, EMPTY = 0.4, 0.4


@dataclass
class Lessons:
    """Drawings on backgrounds, each turned in its own way; parallel arrays of N.

    z float16 [N, 4, 16, 16], scaled latents; edges and outlines bool [N, 128, 128]; what: (label, style, background).
    """

    z: Tensor
    edges: NDArray[np.bool_]
    outlines: NDArray[np.bool_]
    what: list[tuple[str, str, str]]

    def lines(self, n: int, rng: np.random.Generator) -> NDArray[np.bool_]:
        """All edges of drawing n, or its outline."""
        drawing: NDArray[np.bool_] = (self.outlines if rng.random() < 0.5 else self.edges)[n]
        return drawing


def make_lessons(artwork: Artwork, vae: Any, count: int, rng: np.random.Generator, device: str) -> Lessons:
    """`count` drawings, a quarter of them of trained pairs, and their latents by `vae`."""
    known = list(artwork.pairs())
    what, pixels, edges, outlines = [], [], [], []
    for _ in range(count):
        label, style = known[int(rng.integers(len(known)))]
        if rng.random() > 0.25:
            label, style = str(rng.choice(artwork.labels)), str(rng.choice(list(STYLES)))
        background = str(rng.choice(list(BACKGROUNDS)))
        rgba = turned(artwork.pixels[artwork.index[label], list(STYLES).index(style)], rng)
        alpha = rgba[..., 3:].astype(np.float32) / 255
        rgb = rgba[..., :3] * alpha + np.asarray(BACKGROUNDS[background], np.float32) * (1 - alpha)
        high = float(rng.uniform(0.1, 0.25))
        what.append((label, style, background))
        pixels.append(rgb.round().astype(np.uint8))
        edges.append(canny(pixels[-1], low=0.4 * high, high=high))
        outlines.append(outline(rgba[..., 3] > 127))
    z = []
    for start in range(0, count, 32):
        x = torch.from_numpy(np.stack(pixels[start : start + 32])).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.no_grad():
            mean = vae.encode(x.to(device)).latent_dist.mean
        z.append((mean.float() * vae.config.scaling_factor).half().cpu())
    return Lessons(torch.cat(z), np.stack(edges), np.stack(outlines), what)


def turned(rgba: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """A drawing turned by up to 30 degrees, scaled, moved, and half of the time mirrored; uint8 [128, 128, 4]."""
    from PIL import Image

    angle, scale = np.deg2rad(rng.uniform(-30, 30)), rng.uniform(0.9, 1.5)
    y, x = rng.uniform(-14, 14, 2)
    flip = rng.choice((-1, 1))
    # Pillow asks for the way back, from where a pixel lands to where it was: a x + b y + c, d x + e y + f.
    a, b = flip * scale * np.cos(angle), -flip * scale * np.sin(angle)
    d, e = scale * np.sin(angle), scale * np.cos(angle)
    half = SIZE / 2
    way = (a, b, half - a * (half + x) - b * (half + y), d, e, half - d * (half + x) - e * (half + y))
    # "RGBa" is premultiplied: what is transparent lends its colour to no edge.
    moved = (
        Image.fromarray(rgba)
        .convert("RGBa")
        .transform((SIZE, SIZE), Image.Transform.AFFINE, way, Image.Resampling.BILINEAR)
    )
    return np.asarray(moved.convert("RGBA"))


def caption_of(artwork: Artwork, what: tuple[str, str, str], known: set[str], rng: np.random.Generator) -> str:
    """A caption that names the thing, or only the style and the background, or nothing."""
    label, style, background = what
    if rng.random() < EMPTY:
        return ""
    if label in known and rng.random() < NAMED / (1 - EMPTY):
        return artwork.caption(label, style, background, rng)
    return f"{style} style, {background} background"


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
    """Train into `work`/controlnet, on from one that is there; resumes from `work`/controlnet.checkpoint.pt."""
    torch.manual_seed(seed)
    tokenizer = text.load_tokenizer(work)
    locked, encoder = (module.to(device).requires_grad_(False) for module in unet.load(work))
    plain_attention(locked, device)
    artwork, known = Artwork(work), set(core_vocabulary())
    vae = autoencoder.load(work).to(device)
    lessons = make_lessons(artwork, vae, LESSONS, np.random.default_rng(seed), device)
    finished = (work / "controlnet/config.json").is_file()
    copy = load(work).to(memory_format=torch.channels_last) if finished else build(locked)
    copy = plain_attention(copy, device).to(device)
    zero = (*copy.controlnet_down_blocks, copy.controlnet_mid_block, copy.controlnet_cond_embedding)
    peak = GOING_ON if finished else PEAK
    run = Run("controlnet", work, {"controlnet": copy}, budget, peak=peak, ema_decay=0.998, eager=zero)
    rng = run.rng(seed)
    abar = alphas_cumprod().to(device)

    def read(captions: list[str]) -> Tensor:
        states: Tensor = encoder(text.tokenize(tokenizer, captions).to(device)).last_hidden_state
        return states

    def loss_of(_: int) -> tuple[Tensor, dict[str, float]]:
        chosen = rng.integers(LESSONS - TESTS, size=BATCH)
        x_0 = lessons.z[chosen].float().to(device)
        captions = [caption_of(artwork, lessons.what[n], known, rng) for n in chosen]
        condition = as_condition([lessons.lines(int(n), rng) for n in chosen]).to(device)
        t = sample_timesteps(BATCH, device)
        x_t, v_t = diffuse(x_0, torch.randn_like(x_0), abar[t])
        with autocast(device):
            v = controlled(
                locked, copy, x_t.contiguous(memory_format=torch.channels_last), t, read(captions), condition
            )
        error = (v.float() - v_t).square().mean(dim=(1, 2, 3))
        return (loss_weight(abar[t]) * error).mean(), {"v_error": float(error.detach().mean())}

    # One fixed batch of drawings that are not trained on, told their style alone: with the lines, and without them.
    tests = range(LESSONS - TESTS, LESSONS)
    fixed = torch.Generator().manual_seed(seed)
    test_x = lessons.z[LESSONS - TESTS :].float()
    test_t = (torch.arange(TESTS) * 1000 // TESTS).to(device)
    test_x_t, test_v = diffuse(test_x.to(device), torch.randn(test_x.shape, generator=fixed).to(device), abar[test_t])
    test_lines = as_condition([lessons.edges[n] for n in tests]).to(device)
    test_captions = [f"{lessons.what[n][1]} style, {lessons.what[n][2]} background" for n in tests]

    @torch.no_grad()
    def sample() -> None:
        with run.averaged():
            context = read(test_captions)
            alone = locked(test_x_t, test_t, context).sample
            led = controlled(locked, copy, test_x_t, test_t, context, test_lines)
        errors = {"without lines": alone, "with lines": led}
        row = {name: float((v - test_v).square().mean()) for name, v in errors.items()}
        run.log.append({"step": run.step, "minutes": run.seconds / 60, **row})
        print("v error on drawings not trained on:", ", ".join(f"{k} {v:.4f}" for k, v in row.items()), flush=True)

    run.train(loss_of, sample=sample)
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
