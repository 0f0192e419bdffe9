"""Presets: named trade-offs between speed and likeness.

A preset sets options of the request; an option that the request gives itself goes first. `make bench` measures what
each preset costs, in dB and in pictures that the judge still recognises.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from ..bundle.bundle import ModelBundle
from ..errors import InvalidRequest, choices
from .request import Request


@dataclass(frozen=True)
class Preset:
    """A named set of changes.

    precisions   variants to try, best first; empty leaves the choice to the plan
    changes      values for fields that a Request leaves open
    """

    precisions: tuple[str, ...] = ()
    changes: dict[str, Any] = field(default_factory=dict)

    def variant(self, bundle: ModelBundle, backends: set[str]) -> str | None:
        """The variant of `bundle` to draw with, of those that one of `backends` runs."""
        for precision in self.precisions:
            for name, variant in bundle.variants.items():
                if variant.precision == precision and variant.backend in backends:
                    return name
        return None

    def applied(self, request: Request) -> Request:
        """`request` with this preset's changes of what it leaves open."""
        return replace(request, **{name: each for name, each in self.changes.items() if getattr(request, name) is None})


EXACT = Preset()
PRESETS = {
    "exact": EXACT,
    "balanced": Preset(("w8a8",)),
    # No guidance interval: both rows side by side take little longer than one that has the cores for itself.
    "fast": Preset(("w8a8",), {"deep_every": 3, "merge_tokens": True}),
    "turbo": Preset(("w8a8-lcm", "fp16-lcm", "w8a8"), {"merge_tokens": True, "decoder": "auto"}),
}


def preset_named(name: str) -> Preset:
    """Raises InvalidRequest listing the valid names."""
    if name not in PRESETS:
        raise InvalidRequest(f"unknown preset {name!r}; valid: {choices(PRESETS)}")
    return PRESETS[name]
