"""An option of a request: its help, its range and its group, kept as metadata of the field that holds it.

The command line, the API's schema and the table in docs/ are made from these, so that an option is described once.
Nothing heavy is imported here: `edge-sd --help` reads it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, field, fields
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

from ..errors import InvalidRequest, choices


class Kind(Protocol):
    """What an option holds."""

    @property
    def type(self) -> type:
        """Of one value, as a command line reads it."""

    @property
    def range(self) -> str:
        """The valid values in words; "" where `help` says all."""

    def check(self, title: str, value: Any) -> Any:
        """`value` as it is kept. Raises InvalidRequest unless it is one."""


@dataclass(frozen=True)
class Whole:
    """A whole number, a multiple of `step`."""

    low: int
    high: int
    step: int = 1
    type = int

    @property
    def range(self) -> str:
        return f"{self.low} to {self.high}" + (f", multiples of {self.step}" if self.step > 1 else "")

    def check(self, title: str, value: Any) -> int:
        # NumPy's integers are whole numbers, too; JSON takes Python's alone.
        whole = isinstance(value, Integral) and not isinstance(value, bool)
        if not whole or value % self.step or not self.low <= value <= self.high:
            kind = f"a multiple of {self.step}" if self.step > 1 else "a whole number"
            raise InvalidRequest(f"{title} {_shown(value)} is not {kind} from {self.low} to {self.high}")
        return int(value)


@dataclass(frozen=True)
class Number:
    """A number from `low` to `high`; with `above`, `low` itself is not valid."""

    low: float
    high: float
    above: bool = False
    type = float

    @property
    def range(self) -> str:
        return f"{'above ' if self.above else ''}{self.low:g} to {self.high:g}"

    def check(self, title: str, value: Any) -> float:
        real = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
        if not real or not self.low <= value <= self.high or (self.above and value == self.low):
            words = f"above {self.low:g}, up to {self.high:g}" if self.above else f"from {self.low:g} to {self.high:g}"
            raise InvalidRequest(f"{title} {_shown(value)} is not a number {words}")
        return value if isinstance(value, int) else float(value)


@dataclass(frozen=True)
class Choice:
    """One of some words."""

    names: Sequence[str]
    type = str

    @property
    def range(self) -> str:
        return ", ".join(self.names)

    def check(self, title: str, value: Any) -> Any:
        if not isinstance(value, str) or value not in self.names:
            raise InvalidRequest(f"unknown {title} {_shown(value)}; valid: {choices(self.names)}")
        return value


@dataclass(frozen=True)
class Text:
    """Words: valid UTF-8 without NUL, at most `most` characters."""

    most: int = 20_000
    type = str
    range = ""

    def check(self, title: str, value: Any) -> str:
        if not isinstance(value, str):
            raise InvalidRequest(f"the {title} is {_shown(value)}, not a text")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            # A byte that is no UTF-8 reaches Python's argv as a lone surrogate.
            raise InvalidRequest(f"the {title} is not valid UTF-8") from None
        if "\0" in value:
            raise InvalidRequest(f"the {title} holds a NUL character")
        if len(value) > self.most:
            raise InvalidRequest(f"the {title} has {len(value)} characters; at most {self.most} are taken")
        return value


@dataclass(frozen=True)
class Flag:
    """Yes or no."""

    type = bool
    range = ""

    def check(self, title: str, value: Any) -> bool:
        if not isinstance(value, bool):
            raise InvalidRequest(f"{title} {_shown(value)} is neither True nor False")
        return value


@dataclass(frozen=True)
class Place:
    """A path; with `picture` also a PIL picture that is open. What lies there is read where it is used."""

    picture: bool = False
    type: type = Path
    range = ""

    def check(self, title: str, value: Any) -> Any:
        # Pillow's own class, told by what it alone has: nothing heavy is imported here.
        opened = self.picture and hasattr(value, "getbands")
        if not opened and (not isinstance(value, str | PathLike) or not str(value)):
            valid = "a path, or a picture of PIL" if self.picture else "a path"
            found = _shown(value) if isinstance(value, str | int | float) else value.__class__.__name__
            raise InvalidRequest(f"the {title} is {found}, not {valid}")
        return value


@dataclass(frozen=True)
class Other:
    """A value that its owner checks; `type` is how a command line reads it."""

    type: type = str
    range = ""

    def check(self, title: str, value: Any) -> Any:
        return value


@dataclass(frozen=True)
class Option:
    """What is said of one field.

    title    the option's name in messages
    group    the heading that it stands under in help pages
    default  in words, where the field's own default is None
    """

    help: str
    kind: Kind
    group: str
    title: str = ""
    default: str = ""


def option(
    kind: Kind, text: str, default: Any = None, *, group: str, title: str = "", says: str = "", factory: Any = MISSING
) -> Any:
    """A dataclass's field that carries its description."""
    metadata = {"option": Option(text, kind, group, title, says)}
    if factory is not MISSING:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


def options(owner: Any) -> Iterator[tuple[str, Option, Any]]:
    """Name, description and default of each described field of a dataclass."""
    for each in fields(owner):
        if "option" in each.metadata:
            yield each.name, each.metadata["option"], None if each.default is MISSING else each.default


def check(owner: Any) -> None:
    """Check the described fields of a frozen dataclass, and keep each value as its kind does. Raises InvalidRequest."""
    for name, described, default in options(owner):
        value = getattr(owner, name)
        if value is not None or default is not None:
            object.__setattr__(owner, name, described.kind.check(described.title or name, value))


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 80 else text[:80] + "…"
