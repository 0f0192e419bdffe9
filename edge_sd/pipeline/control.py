"""Control: what one ControlNet follows, how closely, and when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..bundle.parts import NET
from ..errors import InvalidRequest
from ..images.readings import READINGS
from .options import Choice, Number, Place, Text, check, option

MAX_WEIGHT = 2
GROUP = "Following lines"


@dataclass(frozen=True)
class Control:
    """A picture whose lines a ControlNet follows (Zhang et al. 2023, arXiv:2302.05543).

    Args:
        image: A file, or a PIL picture; in Settings the hash of its pixels.
        weight: Scale of the net's residuals, 0 to 2; 1 is what it was trained for.
        start: Share of the steps after which the net takes part, 0 to 1, below `end`.
        end: Share of the steps up to which it takes part, 0 to 1.
        reading: How the picture becomes what the net follows, one of images.readings.READINGS.
        net: Which of the model's ControlNets; "" is the one called controlnet.

    Raises:
        InvalidRequest: A value out of its range.

    Example:
        Request("a house", controls=[Control("sketch.png", weight=0.8, end=0.6)])
    """

    image: Any = option(
        Place(picture=True),
        "A sketch or picture whose lines are followed. Repeats, with its options.",
        group=GROUP,
        title="control picture",
    )
    weight: float = option(Number(0, MAX_WEIGHT), "How closely.", 1.0, group=GROUP, title="control weight")
    start: float = option(Number(0, 1), "From this share of the steps.", 0.0, group=GROUP, title="control start")
    end: float = option(Number(0, 1), "Up to this share of the steps.", 1.0, group=GROUP, title="control end")
    reading: str = option(
        Choice(READINGS),
        "How lines are read (scribble: dark on light).",
        "auto",
        group=GROUP,
        title="control reading",
    )
    net: str = option(Text(200), "Which of the model's ControlNets.", "", group=GROUP, title="control net")

    def __post_init__(self) -> None:
        check(self)
        if not self.start < self.end:
            raise InvalidRequest(f"control from {self.start} to {self.end} is no part of the steps, such as 0 to 0.6")

    @property
    def part(self) -> str:
        """The name of its component."""
        return f"{NET}_{self.net}" if self.net else NET


def controls_of(
    images: Sequence[Any], recorded: Sequence[Mapping[str, Any]] = (), **each: Sequence[Any] | None
) -> tuple[Control, ...]:
    """One Control for each image; values of its other fields are as many, or one for all. Raises InvalidRequest.

    The flat form of a command line: `--control a.png --control b.png --control-weight 0.5`. `recorded` are the fields
    of as many controls, which hold where `each` does not say otherwise.
    """
    rows: dict[str, Sequence[Any]] = {}
    for name, given in each.items():
        if not given:
            continue
        many = list(given) * len(images) if len(given) == 1 and images else list(given)
        if images and len(many) != len(images):
            raise InvalidRequest(f"{len(images)} control pictures have {len(many)} values of {name}; give one or all")
        rows[name] = many
    if not images:
        # Options beside no picture are checked all the same.
        Control(None, **{name: values[0] for name, values in rows.items()})
    # Fewer pictures than were recorded are refused where the record is known.
    bases = recorded if len(recorded) == len(images) else [{}] * len(images)
    return tuple(
        Control(**{**base, "image": image, **{name: rows[name][n] for name in rows}})
        for n, (image, base) in enumerate(zip(images, bases, strict=True))
    )
