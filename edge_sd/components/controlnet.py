"""ControlNet (Zhang et al. 2023, arXiv:2302.05543): lines say where, the prompt says what.

A trainable copy of the UNet's encoder reads the lines; its outputs are added to the locked UNet's skip connections.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ..sampling.windows import within
from .base import Array, Component
from .image_prompt import SCALE, TOKENS


@dataclass(frozen=True)
class Net:
    """A ControlNet in a picture.

    weight   factor of its residuals
    active   the timesteps at which it runs
    pooled   its residuals are means over the picture, and the row of the negative prompt is given none of them
    """

    component: Component
    weight: float
    active: frozenset[float]
    pooled: bool = False


@dataclass
class ControlledUNet:
    """A UNet and its ControlNets as one Component: sample and timestep in, out_sample out. Residuals add up.

    channels   of the sample that a net takes: the latents', which come first
    """

    unet: Component
    nets: Sequence[Net]
    channels: int
    _lines: Array | None = None
    _silent: dict[str, Array] = field(default_factory=dict)

    def bind(self, **constants: Array) -> None:
        """Text goes to all; controlnet_cond is what the nets follow, three channels for each of them.

        What an IP-Adapter attends to is the UNet's alone.
        """
        self._lines = constants.pop("controlnet_cond", self._lines)
        self.unet.bind(**constants)
        for net in self.nets:
            net.component.bind(**{name: value for name, value in constants.items() if name not in (TOKENS, SCALE)})

    def __call__(self, **inputs: Array) -> dict[str, Array]:
        lines = inputs.pop("controlnet_cond", self._lines)
        assert lines is not None
        residuals: dict[str, Array] = {}
        given = {**inputs, "sample": inputs["sample"][:, : self.channels]}
        for n, net in enumerate(self.nets):
            if within(net.active, float(inputs["timestep"][0])):
                weights = np.full((len(given["sample"]), 1, 1, 1), net.weight, np.float32)
                if net.pooled and len(weights) > 1:
                    weights[0] = 0
                for name, value in net.component(**given, controlnet_cond=lines[:, 3 * n : 3 * n + 3]).items():
                    residuals[name] = residuals.get(name, 0) + value * weights
        if not residuals:
            if not self._silent:
                # Only a ControlNet knows the shapes of its residuals.
                first = self.nets[0].component(**given, controlnet_cond=lines[:, :3])
                self._silent = {name: np.zeros_like(value) for name, value in first.items()}
            residuals = self._silent
        return self.unet(**inputs, **residuals)

    def close(self) -> None:
        for net in self.nets:
            net.component.close()
        self.unet.close()
