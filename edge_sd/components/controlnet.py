"""ControlNet (Zhang et al. 2023, arXiv:2302.05543): lines say where, the prompt says what.

A trainable copy of the UNet's encoder reads the lines; its outputs are added to the locked UNet's skip connections.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ..sampling.windows import within
from .base import Array, Component


@dataclass
class ControlledUNet:
    """A UNet and its ControlNets as one Component: sample and timestep in, out_sample out. Residuals add up.

    nets   each with the weight of its residuals and the timesteps at which it runs
    """

    unet: Component
    nets: Sequence[tuple[Component, float, frozenset[float]]]
    _lines: Array | None = None
    _silent: dict[str, Array] = field(default_factory=dict)

    def bind(self, **constants: Array) -> None:
        """Text goes to all; controlnet_cond is what the nets follow, three channels for each of them."""
        self._lines = constants.pop("controlnet_cond", self._lines)
        for net in (self.unet, *(net for net, _, _ in self.nets)):
            net.bind(**constants)

    def __call__(self, **inputs: Array) -> dict[str, Array]:
        lines = inputs.pop("controlnet_cond", self._lines)
        assert lines is not None
        heard: dict[str, Array] = {}
        for n, (net, weight, active) in enumerate(self.nets):
            if within(active, float(inputs["timestep"][0])):
                for name, value in net(**inputs, controlnet_cond=lines[:, 3 * n : 3 * n + 3]).items():
                    heard[name] = heard.get(name, 0) + value * np.float32(weight)
        if not heard:
            if not self._silent:
                # Only a ControlNet knows the shapes of its residuals.
                first = self.nets[0][0](**inputs, controlnet_cond=lines[:, :3])
                self._silent = {name: np.zeros_like(value) for name, value in first.items()}
            heard = self._silent
        return self.unet(**inputs, **heard)

    def close(self) -> None:
        for net, _, _ in self.nets:
            net.close()
        self.unet.close()
