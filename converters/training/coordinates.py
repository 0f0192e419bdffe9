"""Which coordinates to learn in: v on this recipe's schedule, or Stable Diffusion 1's epsilon, measured on a small run.

    v          v_t of diffusion.py, betas 0.00085 to 0.02
    epsilon    the noise itself, betas 0.00085 to 0.012, as every SD 1 program assumes

The two differ by a rotation that depends on t alone: eps = sqrt(abar) v + sqrt(1 - abar) x_t. What a network has
learned of one is no finished network of the other, since no weight of it can undo the rotation; but a graph can, at its
end, and stretch t to the other schedule (`as_epsilon`). So the question is which is learned better in little time. Two
small UNets start from the same weights and see the same pictures in the same noise; then both draw every caption, in 20
steps, in 4 and in 1, and what they draw is compared with the picture that the caption is of. The one of v draws
once more as a program of SD 1 would have it draw: on that schedule, asked for epsilon.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import autoencoder, latents, text
from .diffusion import SCHEDULE, loss_weight
from .hardware import autocast, plain_attention
from .lessons import Shown
from .loop import Budget, Run

PICTURES, BATCH = 48, 16
CONFIG: dict[str, Any] = {
    "sample_size": 16, "block_out_channels": [32, 64], "layers_per_block": 1, "norm_num_groups": 8,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": [1, 2], "cross_attention_dim": text.CONFIG["hidden_size"],
}  # fmt: skip
ENDS = {"v_prediction": SCHEDULE["beta_end"], "epsilon": 0.012}


def schedule(kind: str) -> dict[str, Any]:
    """diffusers' names of the schedule that `kind` is learned on."""
    return {**SCHEDULE, "beta_end": ENDS[kind], "prediction_type": kind}


def as_epsilon(v: Callable[..., Tensor], abar: Tensor, abar_asked: Tensor) -> Callable[..., Tensor]:
    """The epsilon of a network of v, on another schedule: what a program that knows epsilon alone would call.

    `v`(x_t, t, ...) may be asked between whole timesteps; `abar`: [1000], its own schedule's; `abar_asked`: the
    program's, whose whole timesteps the result takes.
    """
    own = np.arange(len(abar), dtype=np.float64)

    def epsilon(x_t: Tensor, t: Tensor, *rest: Any) -> Tensor:
        # Noise levels are matched by the logarithm of their signal-to-noise ratio, which falls evenly with t.
        asked, table = (torch.log(each / (1 - each)).double().numpy() for each in (abar_asked[t], abar))
        at = torch.from_numpy(np.asarray(np.interp(-asked, -table, own))).to(x_t.dtype)
        level = abar_asked[t].view(-1, 1, 1, 1)
        return level.sqrt() * v(x_t, at, *rest) + (1 - level).sqrt() * x_t

    return epsilon


@torch.no_grad()
def drawn(predict: Callable[..., Tensor], kind: str, context: Tensor, steps: int) -> Tensor:
    """Latents by DDIM from fixed noise, unguided: the captions have one picture each, which is all there is to find.

    `predict`(x_t, t, states): what a network of `kind` answers.
    """
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(**schedule(kind), clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    x = torch.randn((len(context), 4, 16, 16), generator=torch.Generator().manual_seed(0))
    for t in scheduler.timesteps:
        x = scheduler.step(predict(x, t, context), t, x).prev_sample
    return x


def measure(work: Path, budget: Budget, folder: Path, *, seed: int = 0) -> dict[str, dict[str, float]]:
    """kind -> steps -> the mean squared error of drawn latents (of variance 1) against their captions' pictures."""
    from diffusers import DDIMScheduler

    kept = latents.load(work, autoencoder.load(work), "cpu", seed)
    # One picture a caption, or there would be no telling what should have been drawn.
    plain: dict[tuple[str, str], int] = {}
    for n, lesson in enumerate(kept.lessons):
        if isinstance(lesson, Shown) and not lesson.adjective:
            plain.setdefault((lesson.label, lesson.style), n)
    chosen = np.random.default_rng(seed).permutation(list(plain.values()))[:PICTURES]
    shown = [kept.lessons[int(n)] for n in chosen]
    x_0 = torch.from_numpy(kept.z[chosen].astype(np.float32))
    captions = [f"{each.label}, {each.style} style" for each in shown if isinstance(each, Shown)]
    with torch.no_grad():
        context = text.load_final(work)(text.tokenize(text.load_tokenizer(work), captions)).last_hidden_state
    rows: dict[str, dict[str, float]] = {}

    def compare(name: str, kind: str, predict: Callable[..., Tensor]) -> None:
        rows[name] = {
            f"{steps} steps": float((drawn(predict, kind, context, steps) - x_0).square().mean())
            for steps in (20, 4, 1)
        }

    for kind in ENDS:
        predict = _answering(_learned(kind, x_0, context, budget, folder, seed))
        compare(kind, kind, predict)
        if kind == "v_prediction":
            levels = (DDIMScheduler(**schedule(each)).alphas_cumprod for each in ENDS)
            compare("v, asked for epsilon", "epsilon", as_epsilon(predict, *levels))
    return rows


def _answering(unet: Any) -> Callable[..., Tensor]:
    def predict(x_t: Tensor, t: Tensor, states: Tensor) -> Tensor:
        answer: Tensor = unet(x_t, t, states).sample
        return answer

    return predict


def _learned(kind: str, x_0: Tensor, context: Tensor, budget: Budget, folder: Path, seed: int) -> Any:
    """A small UNet that has learned `kind` of latents x_0 under their captions' states."""
    from diffusers import DDIMScheduler, UNet2DConditionModel

    torch.manual_seed(seed)
    unet = plain_attention(UNet2DConditionModel(**CONFIG), "cpu")
    scheduler = DDIMScheduler(**schedule(kind))
    abar = scheduler.alphas_cumprod
    run = Run(f"coordinates_{kind}", folder, {"unet": unet}, budget, peak=2e-3, ema_decay=0.995)
    rng = run.rng(seed)

    def loss_of(_: int) -> tuple[Tensor, dict[str, float]]:
        n = torch.from_numpy(rng.integers(len(x_0), size=BATCH))
        t = torch.from_numpy((np.sqrt(rng.random(BATCH)) * 1000).astype(np.int64))
        eps = torch.from_numpy(rng.standard_normal((BATCH, 4, 16, 16)).astype(np.float32))
        x_t = scheduler.add_noise(x_0[n], eps, t)
        wanted = scheduler.get_velocity(x_0[n], eps, t) if kind == "v_prediction" else eps
        with autocast("cpu"):
            found = unet(x_t, t, context[n]).sample
        error = (found.float() - wanted).square().mean(dim=(1, 2, 3))
        # Plain for epsilon, as it was published (Ho et al. 2020).
        weight = loss_weight(abar[t]) if kind == "v_prediction" else torch.ones(BATCH)
        return (weight * error).mean(), {}

    run.train(loss_of)
    run.use_average()
    return unet.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    arguments = parser.parse_args()
    folder = arguments.work / "coordinates"
    for kind, row in measure(arguments.work, Budget(steps=arguments.steps), folder).items():
        print(f"{kind:22} " + "  ".join(f"{name} {error:.3f}" for name, error in row.items()))


if __name__ == "__main__":
    main()
