"""Muon: momentum, orthogonalised (Jordan et al. 2024), for the matrices inside a network.

    M <- mu M + G,    W <- W - lr * 0.2 sqrt(max(rows, columns)) * NS5(G + mu M)

NS5 is five Newton-Schulz steps towards the nearest orthogonal matrix; the factor makes the update as large as AdamW's
(Liu et al. 2025, arXiv:2502.16982), so that both take one learning rate. A convolution is the matrix [out, in * k * k].
Embeddings, first and last layers, norms and biases are left to AdamW.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .hardware import multiplies_bfloat16

# a, b, c of Jordan et al.: as steep at zero as five steps allow.
NEWTON_SCHULZ = 3.4445, -4.7750, 2.0315


def hidden_matrices(module: nn.Module) -> list[Tensor]:
    """The weights that Muon is for: of linear layers and convolutions other than those at the ends."""
    return [
        layer.weight
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
        and name not in ("conv_in", "conv_out")
        and layer.weight.requires_grad
    ]


def orthogonalise(g: Tensor, steps: int = 5) -> Tensor:
    """The nearest (semi-)orthogonal matrices of a batch [N, rows, columns], roughly: singular values in 0.7 to 1.2.

    A step is x <- a x + (b S + c S^2) x with S = x x^T, along the short side of x.
    """
    wide = g.shape[-2] <= g.shape[-1]
    x = g.float() if wide else g.float().mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    x = _in_bfloat16(x, steps) if multiplies_bfloat16(x.device.type) else _in_float32(x, steps)
    result: Tensor = x if wide else x.mT
    return result


def _in_bfloat16(x: Tensor, steps: int) -> Tensor:
    """The steps as they stand: each begins with the rounded x of the one before, so roundings don't add up."""
    a, b, c = NEWTON_SCHULZ
    x = x.bfloat16()
    for _ in range(steps):
        s = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(s, s, s, beta=b, alpha=c), x, beta=a)
    return x.float()


def _in_float32(x: Tensor, steps: int) -> Tensor:
    """The same with the long side of x met twice in all instead of twice a step, 2.5 times less work for convolutions.

    A step is x <- P x with P = a + b S + c S^2. All P are polynomials of the first S, so they commute and S <- P S P.
    The Gram matrix squares the condition number: in bfloat16 this would lose the small singular values.
    """
    a, b, c = NEWTON_SCHULZ
    s = x @ x.mT
    unit = torch.eye(s.shape[-1], device=s.device)
    product = unit
    for step in range(steps):
        p = a * unit + s @ (b * unit + c * s)
        product = p @ product
        if step < steps - 1:
            s = p @ s @ p
    return product @ x


class Muon(torch.optim.Optimizer):
    """The optimizer above; parameters of two dimensions or more."""

    def __init__(self, parameters: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            same: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    same[tuple(p.flatten(1).shape)].append(p)
            for (rows, columns), parameters in same.items():
                updates = []
                for p in parameters:
                    state = self.state[p]
                    if not state:
                        state["momentum"] = torch.zeros_like(p)
                    assert p.grad is not None
                    state["momentum"].mul_(group["momentum"]).add_(p.grad)
                    updates.append(p.grad.add(state["momentum"], alpha=group["momentum"]).flatten(1))
                steps = orthogonalise(torch.stack(updates))
                scale = group["lr"] * 0.2 * max(rows, columns) ** 0.5
                for p, update in zip(parameters, steps, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update.reshape(p.shape), alpha=-scale)
