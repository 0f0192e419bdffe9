"""Layers that keep float16 weights and compute in float32: half the memory, and weight files stay mapped.

Each layer converts its weights to float32 at every call. A trace contains that step too, so an exported graph has the
weights as they are stored.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional


def _wide(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float()


class HalfLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight.float(), _wide(self.bias))


class HalfConv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self._conv_forward(x, self.weight.float(), _wide(self.bias))
        return y


KINDS = {nn.Linear: HalfLinear, nn.Conv2d: HalfConv2d}
# CLIP rounds pixels to the type of this layer's weights before it.
READ = "patch_embedding"


def in_halves(paths: list[Path]) -> bool:
    """Whether all weights in these files are float16."""
    from safetensors import safe_open

    for path in paths:
        with safe_open(path, "np") as file:
            if any(file.get_slice(key).get_dtype() != "F16" for key in file.keys()):  # noqa: SIM118 - not a mapping
                return False
    return True


def compute_in_float32(module: nn.Module) -> Any:
    """Let a module of float16 compute in float32; its linear layers and convolutions keep their weights."""
    for name, each in module.named_modules():
        kind = KINDS.get(type(each))
        if kind is not None and not name.endswith(READ):
            each.__class__ = kind
        else:
            for key, value in each._parameters.items():
                if value is not None:
                    each._parameters[key] = nn.Parameter(value.float(), requires_grad=False)
    return module
