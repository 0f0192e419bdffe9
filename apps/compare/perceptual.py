"""LPIPS (Zhang et al. 2018, version 0.1 with AlexNet), where both files of weights lie on this disk already.

torchmetrics and lpips bring the linear weights; those of AlexNet are torchvision's, in the cache of torch.hub. The
libraries' own functions download missing files, so only the files are theirs, read without unpickling anything but
tensors. Tests compare the figures with torchmetrics'.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

NETWORK = "alexnet-owt-7be5be79.pth"
LINEAR = {"torchmetrics": "functional/image/lpips_models/alex.pth", "lpips": "weights/v0.1/alex.pth"}
# AlexNet's convolutions by index in torchvision's `features`: stride, padding, and whether a 3 x 3 max pooling of
# stride 2 comes before.
LAYERS = {0: (4, 2, False), 3: (1, 2, True), 6: (1, 1, True), 8: (1, 1, False), 10: (1, 1, False)}
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
EPSILON = 1e-8


class Perceptual:
    """Reads both files. Raises what torch does of files that are damaged, KeyError or OSError."""

    def __init__(self, network: Path, linear: Path) -> None:
        import torch

        features = torch.load(network, map_location="cpu", weights_only=True)
        weights = torch.load(linear, map_location="cpu", weights_only=True)
        self.layers = [
            (features[f"features.{at}.weight"], features[f"features.{at}.bias"], weights[f"lin{n}.model.1.weight"])
            for n, at in enumerate(LAYERS)
        ]
        # A file that is not what its name says fails here and not in the middle of a report.
        self.distance(*[np.zeros((64, 64, 3), np.uint8)] * 2)

    def distance(self, found: NDArray[np.uint8], reference: NDArray[np.uint8]) -> float:
        """LPIPS of two pictures [H, W, 3] of one size; 0 is equal, and less is better."""
        import torch
        from torch.nn.functional import conv2d

        total = 0.0
        with torch.no_grad():
            pairs = zip(self._features(found), self._features(reference), self.layers, strict=True)
            for own, theirs, (_, _, linear) in pairs:
                total += float(conv2d((own - theirs) ** 2, linear).mean())
        return total

    def _features(self, pixels: NDArray[np.uint8]) -> list[Tensor]:
        """What follows each convolution, each position's vector of length 1."""
        import torch
        from torch.nn.functional import conv2d, max_pool2d

        x = torch.from_numpy(np.array(pixels, np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
        x = (x - torch.tensor(SHIFT)[:, None, None]) / torch.tensor(SCALE)[:, None, None]
        found = []
        for (weight, bias, _), (stride, padding, pooled) in zip(self.layers, LAYERS.values(), strict=True):
            x = conv2d(max_pool2d(x, 3, 2) if pooled else x, weight, bias, stride, padding).relu()
            found.append(x / (x.square().sum(1, keepdim=True) + EPSILON).sqrt())
        return found


def open_perceptual() -> tuple[Perceptual | None, str]:
    """LPIPS, or None and why it is not measured. Downloads nothing."""
    network, linear = _checkpoints() / NETWORK, _linear()
    if not find_spec("torch"):
        return None, "LPIPS: not measured, since torch is not installed"
    if linear is None:
        return None, f"LPIPS: not measured, since neither {' nor '.join(LINEAR)} is installed, which bring its weights"
    if not network.is_file():
        return None, f"LPIPS: not measured, since edge-sd downloads nothing and {NETWORK} is not in torch.hub's cache"
    try:
        return Perceptual(network, linear), ""
    # torch raises errors of many types for a damaged file: RuntimeError, UnpicklingError, EOFError …
    except Exception as error:
        return None, f"LPIPS: not measured, since its weights cannot be read ({type(error).__name__})"


def _checkpoints() -> Path:
    """Where torch.hub keeps what it fetched, without importing torch, which takes a second."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(os.environ.get("TORCH_HOME", f"{cache}/torch")).expanduser() / "hub" / "checkpoints"


def _linear() -> Path | None:
    for name, path in LINEAR.items():
        spec = find_spec(name)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            if (Path(folder) / path).is_file():
                return Path(folder) / path
    return None
