"""The protocol of a form, the target of a conversion. It is all that `build` needs to know of a backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from edge_sd.bundle.variants import Parity

from .parity import Recording
from .recipes import QuantRecipe
from .sources.source import Source

if TYPE_CHECKING:
    from .sources.wrappers import Wrapped

# report(what, share): what is being done, and how much of all is done, 0 to 1.
Report = Callable[[str, float], None]


@dataclass(frozen=True)
class Made:
    """One written component: paths are relative to the variant's folder; `places`, files or folders, are all of it.

    `chunks` are graphs that follow the first; `precision` is its own where it could not have the recipe's.
    """

    places: tuple[str, ...]
    graph: str
    weights: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    chunks: tuple[str, ...] = ()
    precision: str = ""


class Form(Protocol):
    """Methods raise InvalidRequest (impossible options), MissingExtra or ConversionError."""

    @property
    def backend(self) -> str: ...

    @property
    def name(self) -> str:
        """The variant's name without its recipe."""

    @property
    def compute(self) -> str:
        """The device that the arithmetic is arranged for, or ""."""

    @property
    def lowest(self) -> str:
        """The oldest system that it runs on, such as "iOS18"; "" is any that the backend runs on."""

    @property
    def halves(self) -> bool:
        """Whether it traces modules that keep float16 weights as stored (see sources/half_weights.py)."""

    @property
    def rounding(self) -> bool:
        """Whether it rounds weights of less than 8 bits by what several pictures show of their inputs."""

    @property
    def recipes(self) -> tuple[str, ...]:
        """The names of the recipes that this form can store."""

    def check(self, source: Source, recipe: QuantRecipe) -> None:
        """Refuse impossible combinations before any work."""

    def latents(self, source: Source, recipe: QuantRecipe) -> list[tuple[int, int]]:
        """Heights and widths of the latents on which parity is measured."""

    def convert(
        self, wrapped: Wrapped, source: Source, recipe: QuantRecipe, staging: Path, recording: Recording, report: Report
    ) -> Made:
        """Write one component into `staging`; `wrapped` may be changed on the way.

        `recording` holds the inputs and outputs it is measured on, for choices that depend on them; `report` is told
        how far such a choice is.
        """

    def measure(self, part: str, made: Made, staging: Path, recording: Recording) -> Parity:
        """Parity of a written component, the same on every machine."""

    def finish(self, source: Source, staging: Path) -> None:
        """Write files that other programs need beside the components."""
