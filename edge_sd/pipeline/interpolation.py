"""Linear interpolation between the text conditionings of two prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..components.base import Array, Component
from .settings import Settings


@dataclass
class Told:
    """Stands in for a UNet and records what is bound to it."""

    values: dict[str, Array] = field(default_factory=dict)

    def bind(self, **constants: Array) -> None:
        self.values |= constants


def bind_between(bind: Callable[[Any, Settings], None], unet: Component, settings: Settings) -> None:
    """Bind the text of `settings` to `unet`; if it has a second prompt, a share of the straight way there.

    bind   encodes the prompts of settings and binds them
    """
    if settings.toward is None:
        bind(unet, settings)
        return
    ends = []
    for prompt in (settings.prompt, settings.toward):
        told = Told()
        bind(told, replace(settings, prompt=prompt, toward=None))
        ends.append(told.values)
    share = np.float32(settings.toward_share)
    unet.bind(**{name: value * (1 - share) + ends[1][name] * share for name, value in ends[0].items()})
