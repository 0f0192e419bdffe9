"""The judge: a small network on pixels that names what a picture shows, trained on the artwork alone.

It never sees a generated picture, so it can grade them. It gives the concept, the style and the background, and a
vector in the text encoder's space, trained by contrast as CLIP's image side is (Radford et al. 2021): the cosine with a
prompt's vector is an offline CLIP score.

It learns all four styles of every concept, the held-out pairs included, or it could not name them. Drawings are moved,
turned, scaled, blurred and tinted, so that a soft or shifted picture is still known for what it shows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from edge_sd.errors import InvalidRequest

from . import text
from .data import BACKGROUNDS, STYLES, Artwork, core_vocabulary
from .hardware import autocast
from .loop import Budget, Run

SIDE = 64
WIDTHS = (32, 64, 128, 256)
EMBEDDING = 128
BATCH = 64
TEMPERATURE = 0.07


class Evaluator(nn.Module):
    """[B, 3, 128, 128] in [-1, 1] -> logits of concept, style, background, and a unit vector [B, 128]."""

    def __init__(self, concepts: int, styles: int, backgrounds: int, text_width: int) -> None:
        super().__init__()
        self.sizes = {"concepts": concepts, "styles": styles, "backgrounds": backgrounds, "text_width": text_width}
        layers: list[nn.Module] = [nn.Conv2d(3, WIDTHS[0], 3, padding=1)]
        for before, width in zip((WIDTHS[0], *WIDTHS), WIDTHS, strict=False):
            layers += [
                nn.GroupNorm(8, before), nn.ReLU(), nn.Conv2d(before, width, 3, padding=1, stride=2),
                nn.GroupNorm(8, width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1),
            ]  # fmt: skip
        self.trunk = nn.Sequential(*layers, nn.GroupNorm(8, WIDTHS[-1]), nn.ReLU())
        features = WIDTHS[-1] * 2
        self.concept = nn.Linear(features, concepts)
        self.style = nn.Linear(features, styles)
        self.background = nn.Linear(features, backgrounds)
        self.image_projection = nn.Linear(features, EMBEDDING, bias=False)
        self.text_projection = nn.Linear(text_width, EMBEDDING, bias=False)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        h = self.trunk(F.avg_pool2d(pixels, 2))
        # The mean covers the whole picture, the maximum any place in it.
        h = torch.cat([h.mean(dim=(2, 3)), h.amax(dim=(2, 3))], dim=1)
        return self.concept(h), self.style(h), self.background(h), F.normalize(self.image_projection(h), dim=-1)

    def embed_text(self, pooled: Tensor) -> Tensor:
        """Unit vectors [B, 128] of the text encoder's pooled outputs [B, C]."""
        return F.normalize(self.text_projection(pooled), dim=-1)


def augmented(pixels: Tensor, backgrounds: Tensor, alpha: Tensor) -> Tensor:
    """Drawings ([B, 3 and 1, 128, 128]) moved, turned, scaled, mirrored, on colours [B, 3], blurred and tinted."""
    count = len(pixels)
    angle, scale = (torch.rand(2, count) - 0.5) * torch.tensor([[0.5], [0.5]]) + torch.tensor([[0.0], [1.0]])
    flip = torch.where(torch.rand(count) < 0.5, -1.0, 1.0)
    theta = torch.stack(
        [
            torch.stack([flip * scale * angle.cos(), -scale * angle.sin(), torch.rand(count) * 0.3 - 0.15], 1),
            torch.stack([flip * scale * angle.sin(), scale * angle.cos(), torch.rand(count) * 0.3 - 0.15], 1),
        ],
        1,
    )
    grid = F.affine_grid(theta, [count, 4, 128, 128], align_corners=False)
    moved = F.grid_sample(torch.cat([pixels * alpha, alpha], 1), grid, align_corners=False)
    x = moved[:, :3] + (1 - moved[:, 3:]) * backgrounds[:, :, None, None]
    # Soft like an autoencoder's pictures: half of the batch loses what a smaller picture cannot hold.
    side = int(torch.randint(32, 100, ()))
    soft = F.interpolate(F.interpolate(x, size=side, mode="area"), size=128, mode="bilinear", align_corners=False)
    x = torch.where((torch.rand(count) < 0.5)[:, None, None, None], soft, x)
    tint = 1 + 0.15 * (torch.rand(count, 3, 1, 1) - 0.5)
    return (x * tint + 0.03 * torch.randn_like(x)).clamp(-1, 1)


def train(work: Path, budget: Budget, *, device: str = "cpu", seed: int = 0) -> None:
    """Train into `work`/evaluator, on from one that is there; resumes from `work`/evaluator.checkpoint.pt."""
    torch.manual_seed(seed)
    artwork = Artwork(work)
    tokenizer = text.load_tokenizer(work)
    encoder = text.load_final(work).to(device).requires_grad_(False)
    labels, names = core_vocabulary(), list(BACKGROUNDS)
    colours = torch.tensor(list(BACKGROUNDS.values())) / 127.5 - 1
    drawings = torch.from_numpy(artwork.pixels[[artwork.index[label] for label in labels]])
    sizes = len(labels), len(STYLES), len(names), encoder.config.hidden_size
    published = work / "evaluator"
    judge = (load(published)[0].train() if published.is_dir() else Evaluator(*sizes)).to(device)
    run = Run("evaluator", work, {"evaluator": judge}, budget, peak=1e-3, ema_decay=0.998)
    rng = run.rng(seed)

    def loss_of(_: int) -> tuple[Tensor, dict[str, float]]:
        # Every concept once before any twice, so that a batch's captions are of different things.
        concept = torch.from_numpy(rng.permutation(len(labels))[:BATCH])
        style = torch.from_numpy(rng.integers(len(STYLES), size=len(concept)))
        background = torch.from_numpy(rng.integers(len(names), size=len(concept)))
        rgba = drawings[concept, style].permute(0, 3, 1, 2).float()
        x = augmented(rgba[:, :3] / 127.5 - 1, colours[background], rgba[:, 3:] / 255).to(device)
        captions = [
            artwork.caption(labels[c], list(STYLES)[s], names[b], rng) or labels[c]
            for c, s, b in zip(concept, style, background, strict=True)
        ]
        pooled = encoder(text.tokenize(tokenizer, captions).to(device)).pooler_output
        with autocast(device):
            says_concept, says_style, says_background, image = judge(x)
            similarity = image.float() @ judge.embed_text(pooled).float().T / TEMPERATURE
        own = torch.arange(len(concept), device=device)
        named = F.cross_entropy(says_concept.float(), concept.to(device))
        # The style loss is small beside that of 256 concepts, and styles are learned last.
        loss = named + 2.0 * F.cross_entropy(says_style.float(), style.to(device))
        loss = loss + 0.5 * F.cross_entropy(says_background.float(), background.to(device))
        contrast = (F.cross_entropy(similarity, own) + F.cross_entropy(similarity.T, own)) / 2
        right = (says_concept.argmax(1).cpu() == concept).float().mean()
        style_right = float((says_style.argmax(1).cpu() == style).float().mean())
        return loss + contrast, {"top1": float(right), "style": style_right, "contrast": float(contrast.detach())}

    run.train(loss_of)
    if not run.is_main:
        return
    run.use_average()
    save(judge, work / "evaluator")
    (work / "evaluator.log.json").write_text(json.dumps(run.log))


def save(judge: Evaluator, folder: Path) -> None:
    """Write config.json and model.safetensors (float16)."""
    folder.mkdir(exist_ok=True)
    tables = {"labels": core_vocabulary(), "style_names": list(STYLES), "background_names": list(BACKGROUNDS)}
    (folder / "config.json").write_text(json.dumps({**judge.sizes, **tables}, indent=1) + "\n", "utf-8")
    save_file({name: p.half().contiguous() for name, p in judge.state_dict().items()}, folder / "model.safetensors")


def load(folder: Path) -> tuple[Evaluator, dict[str, Any]]:
    """The judge of a folder and what its numbers stand for. Raises InvalidRequest where there is none."""
    if not (folder / "config.json").is_file():
        raise InvalidRequest(f"{folder} holds no evaluator; train it first: edge-sd train evaluator")
    config: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
    judge = Evaluator(*(config[name] for name in ("concepts", "styles", "backgrounds", "text_width")))
    state = load_file(folder / "model.safetensors")
    judge.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return judge.eval(), config


def as_tensor(images: list[Any]) -> Tensor:
    """PIL pictures as float32 [N, 3, 128, 128] in [-1, 1]."""
    pixels = np.stack([np.asarray(image.convert("RGB").resize((128, 128))) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
