"""A table of measurements: what a command prints as Markdown, or as JSON for other programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Column:
    """A value of each row: its key, what stands above it, and how it is written."""

    key: str
    head: str
    show: Callable[[Any], str] = str


@dataclass(frozen=True)
class Table:
    """`name` of rows in `columns`; `rows` may hold more than is shown. `notes` are lines in Markdown, after the table.

    `facts` are figures that have no row.
    """

    name: str
    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Any]]
    notes: Sequence[str] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    def markdown(self) -> str:
        lines = [_line(column.head for column in self.columns), _line("---" for _ in self.columns)]
        lines += [_line(self._cell(row, column) for column in self.columns) for row in self.rows]
        return "\n".join([*(lines if self.rows else ()), *(f"\n{note}" for note in self.notes)]).strip()

    def record(self) -> dict[str, Any]:
        """The same for a program: seconds and bytes as they were measured."""
        return {"name": self.name, **self.facts, "rows": [dict(row) for row in self.rows]}

    @staticmethod
    def _cell(row: Mapping[str, Any], column: Column) -> str:
        value = row.get(column.key)
        return "" if value is None else column.show(value)


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def seconds(digits: int) -> Callable[[float], str]:
    return lambda value: f"{value:.{digits}f} s"


def gibibytes(digits: int) -> Callable[[float], str]:
    return lambda value: f"{value / 2**30:.{digits}f} GiB"


def decibels(value: float) -> str:
    return f"{value:.1f} dB"


def share(value: float) -> str:
    return f"{value:.0%}"


def beside(show: Callable[[float], str]) -> Callable[[Any], str]:
    """A value, and in brackets its ratio to the first row's where there is one: (value, ratio)."""
    return lambda pair: show(pair[0]) + ("" if pair[1] is None else f" ({pair[1]:.2f} ×)")
