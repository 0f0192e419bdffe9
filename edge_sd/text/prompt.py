r"""The language of prompts, AUTOMATIC1111's: how much attention each word gets, and where a chunk ends.

    (word)        1.1 times the attention; ((word)) is 1.21
    (word:1.3)    1.3 times
    [word]        1.1 times less
    \( \) \[ \]   the character itself; \\ is a backslash
    BREAK         what follows begins a new chunk of tokens
    <lora:NAME:0.8>   a file of differences of the weights, and how much of it (see lora.py); no part of the text

Brackets that are never closed count to the end, and closing ones that were never opened are text, as there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import InvalidRequest

STEP = 1.1
LOWEST, HIGHEST = 0.01, 100.0
DEEPEST = 64
_TOKEN = re.compile(
    r"\\(?P<escaped>[\\()\[\]])"
    r"|:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)"
    r"|\s*\b(?P<end>BREAK)\b\s*"
    r"|\s+"
    r"|(?P<bracket>[()\[\]])"
    r"|(?P<text>[^\\()\[\]:B\s]+|.)",
    re.DOTALL,
)


_LORA = re.compile(r"<lora:([^:<>]+)(?::\s*([+-]?(?:\d+\.?\d*|\.\d+))[^<>]*)?>")


@dataclass(frozen=True)
class Span:
    """Words that share a weight."""

    text: str
    weight: float = 1.0


def parse(prompt: str) -> list[list[Span]]:
    """The spans of a prompt, a list for each part between BREAKs. Raises InvalidRequest for weights beyond limits."""
    parts: list[list[str]] = [[]]
    weights: list[list[float]] = [[]]
    # Where each bracket that is still open began: (part, piece).
    opened: dict[str, list[tuple[int, int]]] = {"(": [], "[": []}

    def multiply(start: tuple[int, int], factor: float) -> None:
        part, piece = start
        for n in range(part, len(weights)):
            first = piece if n == part else 0
            weights[n][first:] = [weight * factor for weight in weights[n][first:]]

    def add(text: str) -> None:
        parts[-1].append(text)
        weights[-1].append(1.0)

    for match in _TOKEN.finditer(prompt):
        bracket, weight = match["bracket"], match["weight"]
        if match["end"]:
            parts.append([])
            weights.append([])
        elif bracket in ("(", "["):
            opened[bracket].append((len(parts) - 1, len(parts[-1])))
            if len(opened[bracket]) > DEEPEST:
                raise InvalidRequest(f"the prompt's brackets nest deeper than {DEEPEST}; \\{bracket} is the character")
        elif weight and opened["("]:
            multiply(opened["("].pop(), _checked(float(weight), match[0]))
        elif bracket == ")" and opened["("]:
            multiply(opened["("].pop(), STEP)
        elif bracket == "]" and opened["["]:
            multiply(opened["["].pop(), 1 / STEP)
        else:
            add(match["escaped"] or match[0])
    for kind, factor in (("(", STEP), ("[", 1 / STEP)):
        for start in opened[kind]:
            multiply(start, factor)
    return [_merged(texts, row) for texts, row in zip(parts, weights, strict=True)]


def _merged(texts: list[str], weights: list[float]) -> list[Span]:
    """Neighbours of one weight as one span: words are split into tokens across what stood between them."""
    runs: list[tuple[list[str], float]] = []
    for text, weight in zip(texts, weights, strict=True):
        if runs and runs[-1][1] == weight:
            runs[-1][0].append(text)
        else:
            runs.append(([text], weight))
    return [Span("".join(run), _checked(weight, "".join(run))) for run, weight in runs]


def _checked(weight: float, where: str) -> float:
    if not LOWEST <= weight <= HIGHEST:
        raise InvalidRequest(f"the weight {weight:g} at {where[:40]!r} is not a number from {LOWEST:g} to {HIGHEST:g}")
    return weight


def take_loras(prompt: str) -> tuple[str, dict[str, float]]:
    """The prompt without its <lora:NAME:WEIGHT>, and the weight of each name, 1 where none is said."""
    return _LORA.sub("", prompt), {match[1].strip(): float(match[2] or 1) for match in _LORA.finditer(prompt)}
