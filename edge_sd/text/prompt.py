r"""The language of prompts, AUTOMATIC1111's: how much attention each word gets, and where a chunk ends.

    (word)        1.1 times the attention; ((word)) is 1.21
    (word:1.3)    1.3 times; 0 and negative numbers are weights, too
    [word]        1.1 times less
    \( \) \[ \]   the character itself; \\ is a backslash, and a lone one before other characters is left out
    BREAK         what follows begins a new chunk of tokens
    <lora:NAME:0.8>   a file of differences of the weights, and how much of it (components/lora.py); not text
    <lora:NAME:1:0>   the same for the text encoders and for the UNet, also as te=1 and unet=0; <lyco:…> is the same

Brackets that are never closed count to the end, and closing ones that were never opened are text, as there. What
changes from step to step, and AND, is in schedule.py. Reading takes time linear in the length of the text.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import InvalidRequest

STEP = 1.1
HIGHEST = 100.0
DEEPEST = 64
# No part of a pattern can match what the part after it matches: a failed attempt does not try its lengths in turn.
_NUMBER = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)"
_TOKEN = re.compile(
    r"\\(?P<escaped>[\\()\[\]]?)"
    rf"|:\s*(?P<weight>{_NUMBER})\s*\)"
    r"|\s*\b(?P<end>BREAK)\b\s*"
    r"|\s+"
    r"|(?P<bracket>[()\[\]])"
    r"|(?P<hypernet><hypernet:[^<>]*>)"
    r"|(?P<text>[^\\()\[\]:B<\s]+|.)",
    re.DOTALL,
)
_LORA = re.compile(r"<(?:lora|lyco):([^<>]*)>")
# compel's weights stand behind a word or a bracket, and its functions behind a bracket.
_COMPEL = re.compile(
    r"(?<=[^\W\d_]{2})(?:\+{2,}|-{2,}|\+(?=[\s,)]|$))"
    r"|\)(?:[+-]+|\d+\.\d+)(?=[\s,)]|$)"
    r"|\)\.(?:and|blend|swap)\("
)


class LoraWeight(NamedTuple):
    """How much of a LoRA is added to the text encoders and to the UNet; 1 is all of it."""

    text: float = 1.0
    unet: float = 1.0


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
        if match["hypernet"]:
            continue  # Named by `notes`.
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
            add(match[0] if match["escaped"] is None else match["escaped"])
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
    if not -HIGHEST <= weight <= HIGHEST:
        raise InvalidRequest(
            f"the weight {weight:g} at {where[:40]!r} is not a number from {-HIGHEST:g} to {HIGHEST:g}"
        )
    return weight


def take_loras(prompt: str) -> tuple[str, dict[str, LoraWeight]]:
    """The prompt without its <lora:…>, and the weights of each name; of one that is named twice, their sum.

    Raises InvalidRequest for a weight that is no number.
    """
    found: dict[str, LoraWeight] = {}
    for match in _LORA.finditer(prompt):
        name, weight = _lora_weight(match)
        before = found.get(name, LoraWeight(0.0, 0.0))
        found[name] = LoraWeight(before.text + weight.text, before.unet + weight.unet)
    return _LORA.sub("", prompt), found


def _lora_weight(match: re.Match[str]) -> tuple[str, LoraWeight]:
    """NAME, and `text:unet`, `text` alone for both, or `te=…` and `unet=…`, which go before those."""
    name, *given = (piece.strip() for piece in match[1].split(":"))
    named = dict(piece.split("=", 1) for piece in given if "=" in piece)
    placed = [piece for piece in given if "=" not in piece]
    if not name or set(named) - {"te", "unet"} or len(placed) > 2:
        raise InvalidRequest(f"{match[0][:80]!r} is no LoRA; valid: <lora:NAME:0.8>, <lora:NAME:0.8:1>, te=0.8, unet=1")
    values = {"te": placed[0] if placed else "1"}
    values["unet"] = placed[1] if len(placed) > 1 else values["te"]
    numbers = {}
    for key, text in {**values, **named}.items():
        try:
            numbers[key] = float(text)
        except ValueError:
            numbers[key] = math.nan
        if not math.isfinite(numbers[key]):
            raise InvalidRequest(f"the weight {text[:40]!r} of {match[0][:80]!r} is no number, such as 0.8")
    return name, LoraWeight(numbers["te"], numbers["unet"])


def notes(prompt: str) -> list[str]:
    """What of a prompt is in a language that is not this one, or is not to be had."""
    found = []
    for match in _TOKEN.finditer(prompt):
        if match["hypernet"]:
            found.append(f"{match[0][:80]} has no effect: hypernetworks are not offered")
    if foreign := _COMPEL.search(prompt):
        near = prompt[max(0, foreign.start() - 20) : foreign.end()].split()[-1]
        found.append(f"{near!r} looks like compel's weights, which are words here; (word:1.1) weighs a word")
    return found
