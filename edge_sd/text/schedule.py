r"""Prompts that change from step to step, and prompts of several parts, in AUTOMATIC1111's language.

    [from:to:0.5]   `from` for the first half of the steps, then `to`; [to:0.5] and [from::0.5] leave one out
    [from:to:5]     the same after 5 steps
    [a|b|c]         one after another, a step each; one may be empty
    a AND b :0.5    two prompts whose predictions are added, the second at half the weight (Liu et al. 2022,
                    arXiv:2206.01714): out = out_negative + guidance sum_i w_i (out_i - out_negative)

Other brackets, and those that do not fit together, are left to prompt.py. A backslash makes the next character a
plain one. Reading takes time linear in the length of the text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ..errors import InvalidRequest

DEEPEST = 64
MAX_PARTS = 8
MAX_WEIGHT = 100.0
_NUMBER = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?"
_TOKEN = re.compile(r"\\.|[\[\]():|]|[^\\\[\]():|]+|\\", re.DOTALL)
_WHEN = re.compile(rf"\s*({_NUMBER})\s*")
AND = re.compile(r"\bAND\b")
_WEIGHTED = re.compile(rf"\s*({_NUMBER})\s*")


@dataclass(frozen=True)
class Stage:
    """The texts of the steps up to step `last`, counted from 1."""

    last: int
    texts: tuple[str, ...]


@dataclass
class _Choice:
    """Text that changes: two `options`, the second after step or share `when`; None: options in turn, a step each."""

    options: list[list[_Piece]]
    when: float | None = None
    share: bool = False

    def switch(self, steps: int) -> int:
        """The last step of the first option."""
        assert self.when is not None
        return int(min(steps, max(0, self.when * steps if self.share else self.when)))

    def at(self, step: int, steps: int) -> list[_Piece]:
        if self.when is None:
            return self.options[(step - 1) % len(self.options)]
        return self.options[0 if step <= self.switch(steps) else 1]


_Piece = str | _Choice


@dataclass
class _Group:
    """A bracket that is open: what is in it, cut at its `|` and `:`."""

    bracket: str
    cells: list[list[_Piece]] = field(default_factory=lambda: [[]])
    marks: list[str] = field(default_factory=list)
    # Brackets inside that do not fit together, which a choice can't hold.
    torn: bool = False

    def cut(self, mark: str) -> None:
        self.marks.append(mark)
        self.cells.append([])

    def plain(self, closing: str) -> Iterator[_Piece]:
        """The pieces with the brackets and marks as text."""
        yield self.bracket
        for mark, cell in zip(["", *self.marks], self.cells, strict=True):
            if mark:
                yield mark
            yield from cell
        if closing:
            yield closing

    def closed(self) -> list[_Piece]:
        """A square bracket as a choice, where it is one; the brackets stay where it is not."""
        if self.bracket == "[" and not self.torn:
            if "|" in self.marks and ":" not in self.marks:
                return [_Choice(self.cells)]
            colons = len(self.marks)
            last = self.cells[-1]
            when = _WHEN.fullmatch(last[0]) if len(last) == 1 and isinstance(last[0], str) else None
            if "|" not in self.marks and colons in (1, 2) and when:
                share = "." in when[1]
                first: list[_Piece] = self.cells[0] if colons == 2 else []
                return [_Choice([first, self.cells[-2]], float(when[1]), share)]
        return list(self.plain("]" if self.bracket == "[" else ")"))


def _pieces(prompt: str) -> list[_Piece]:
    """The prompt as text and choices. Raises InvalidRequest where brackets nest too deep."""
    groups = [_Group("")]
    opening = {"]": "[", ")": "("}
    for match in _TOKEN.finditer(prompt):
        token = match[0]
        if token in ("[", "("):
            if len(groups) > DEEPEST:
                raise InvalidRequest(f"the prompt's brackets nest deeper than {DEEPEST}; \\{token} is the character")
            groups.append(_Group(token))
        elif token in opening:
            at = next((n for n in range(len(groups) - 1, 0, -1) if groups[n].bracket == opening[token]), 0)
            if not at:
                groups[-1].cells[-1].append(token)
                groups[-1].torn = True
                continue
            _flatten(groups, at + 1)
            groups[at - 1].cells[-1] += groups.pop().closed()
        elif token in (":", "|") and len(groups) > 1:
            groups[-1].cut(token)
        else:
            groups[-1].cells[-1].append(token)
    _flatten(groups, 1)
    return groups[0].cells[0]


def _flatten(groups: list[_Group], start: int) -> None:
    """Groups from `start` on were never closed: they are text of the one before."""
    for group in groups[start:]:
        groups[start - 1].cells[-1] += group.plain("")
        groups[start - 1].torn = True
    del groups[start:]


def _choices(pieces: Sequence[_Piece]) -> Iterator[_Choice]:
    for piece in pieces:
        if isinstance(piece, _Choice):
            yield piece
            for option in piece.options:
                yield from _choices(option)


def _text(pieces: Sequence[_Piece], step: int, steps: int) -> str:
    return "".join(piece if isinstance(piece, str) else _text(piece.at(step, steps), step, steps) for piece in pieces)


def stages(prompt: str, steps: int) -> list[Stage]:
    """The texts of a prompt without AND, by the steps that each is for; the last one's `last` is `steps`.

    Example: [(stage.last, *stage.texts) for stage in stages("a [b:c:3]", 10)] is [(3, "a b"), (10, "a c")].
    """
    pieces = _pieces(prompt)
    ends = {steps}
    for choice in _choices(pieces):
        ends |= {choice.switch(steps)} if choice.when is not None else set(range(1, steps + 1))
    found: list[Stage] = []
    for last in sorted(ends - {0}):
        text = _text(pieces, last, steps)
        if found and found[-1].texts == (text,):
            found.pop()
        found.append(Stage(last, (text,)))
    return found


def composed(prompt: str) -> list[tuple[str, float]]:
    """The parts of a prompt between ANDs, and the weight of each, 1 where none is written.

    A number after a colon at a part's end is its weight, where there is an AND; alone it is text, which differs from
    AUTOMATIC1111 ("16:9" would be a weight of 9 there). Raises InvalidRequest for too many, or a weight beyond limits.
    """
    parts = AND.split(prompt)
    if len(parts) == 1:
        return [(prompt, 1.0)]
    if len(parts) > MAX_PARTS:
        raise InvalidRequest(f"the prompt has {len(parts)} parts between ANDs; at most {MAX_PARTS} are drawn")
    found = []
    for part in parts:
        text, colon, number = part.rpartition(":")
        weight = _WEIGHTED.fullmatch(number) if colon else None
        value = float(weight[1]) if weight else 1.0
        if not (math.isfinite(value) and abs(value) <= MAX_WEIGHT):
            raise InvalidRequest(f"the weight {number.strip()[:40]} of a part of the prompt is beyond {MAX_WEIGHT:g}")
        found.append((text.rstrip() if weight else part, value))
    return found


@dataclass(frozen=True)
class Script:
    """What is drawn at which step: a prompt of one or several parts, and a negative one.

    weights   of the prompt's parts
    stages    each with the texts of its steps: the negative prompt, then the parts
    """

    weights: tuple[float, ...]
    stages: tuple[Stage, ...]

    @property
    def texts(self) -> list[str]:
        """Every text, each once."""
        return list(dict.fromkeys(text for stage in self.stages for text in stage.texts))

    def notes(self) -> list[str]:
        """What is drawn when, for those who did not know that brackets, "|" or AND say so."""
        found = []
        if len(self.weights) > 1:
            parts = zip(self.stages[0].texts[1:], self.weights, strict=True)
            found.append("AND adds up " + ", ".join(f"{_short(text)} ({weight:g})" for text, weight in parts))
        if len(self.stages) > 1:
            shown = [f"{_short(' AND '.join(stage.texts[1:]))} to step {stage.last}" for stage in self.stages[:3]]
            more = len(self.stages) - 3
            found.append(f"the prompt changes: {', '.join(shown)}{f', and {more} more' if more > 0 else ''}")
        return found


def _short(text: str) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def script(prompt: str, negative: str, steps: int) -> Script:
    """The Script of two prompts for `steps` steps. Raises InvalidRequest."""
    parts = composed(prompt)
    rows = [stages(text, steps) for text in (negative, *(text for text, _ in parts))]
    ends = sorted({stage.last for row in rows for stage in row})
    made = [Stage(last, tuple(next(s.texts[0] for s in row if last <= s.last) for row in rows)) for last in ends]
    return Script(tuple(weight for _, weight in parts), tuple(made))
