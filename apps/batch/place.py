"""Place: which model draws, and where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..drawing import parse_device

if TYPE_CHECKING:
    from edge_sd.pipeline.pipeline import Pipeline


@dataclass(frozen=True)
class Place:
    """The arguments of Pipeline.open, as the command line has them."""

    model: str
    variant: str | None
    device: str
    prefer: str
    preset: str
    low_memory: bool

    def open(self, tell: Callable[[str], None], measure: bool = True) -> Pipeline:
        """The pipeline; `tell` gets lines on measuring at first use."""
        from edge_sd.pipeline.pipeline import Pipeline

        placed = parse_device(self.device)
        return Pipeline.open(
            self.model, placed, self.variant, self.prefer, tell, self.preset, self.low_memory, measure=measure
        )
