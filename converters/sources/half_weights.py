"""Layers that keep weights of 16 bits and compute in float32: half the memory, and weight files stay mapped.

Each layer converts its weights to float32 at every call. A trace contains that step too, so an exported graph has the
weights as they are stored, float16 or bfloat16.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def _wide(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float()


class _Product(torch.autograd.Function):
    """x W^T, whose gradient widens W again instead of keeping it in float32."""

    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor) -> Tensor:
        context.save_for_backward(weight)
        return functional.linear(x, weight.float())

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (weight,) = context.saved_tensors
        return gradients[0] @ weight.float(), None


class HalfLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            y: Tensor = _Product.apply(x, self.weight)  # type: ignore[no-untyped-call]
            return y if self.bias is None else y + self.bias.float()
        return functional.linear(x, self.weight.float(), _wide(self.bias))


class HalfConv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self._conv_forward(x, self.weight.float(), _wide(self.bias))
        return y


class HalfEmbedding(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        # As the table is widened in a trace, it is compressed with the other weights.
        return functional.embedding(input, self.weight.float(), self.padding_idx)


KINDS = {nn.Linear: HalfLinear, nn.Conv2d: HalfConv2d, nn.Embedding: HalfEmbedding}
# As safetensors calls them.
HALVES = {"F16": torch.float16, "BF16": torch.bfloat16}
# CLIP rounds pixels to the type of this layer's weights before it.
READ = "patch_embedding"


def type_of_halves(paths: list[Path]) -> torch.dtype | None:
    """The type of 16 bits that all weights in these files have; None where they have several, or another."""
    from safetensors import safe_open

    types = set()
    for path in paths:
        with safe_open(path, "np") as file:
            types |= {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118 - not a mapping
    return HALVES.get(types.pop()) if len(types) == 1 else None


def compute_in_float32(module: nn.Module) -> Any:
    """Let a module of 16 bits compute in float32; linear layers, convolutions and embeddings keep their weights."""
    for name, each in module.named_modules():
        kind = KINDS.get(type(each))
        if kind is not None and not name.endswith(READ):
            each.__class__ = kind
        else:
            for key, value in each._parameters.items():
                if value is not None:
                    each._parameters[key] = nn.Parameter(value.float(), requires_grad=False)
    return module
