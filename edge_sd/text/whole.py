"""Tokenizers that take a prompt whole, out of a tokenizer.json: those of T5 and of language models.

A prompt, with its template, is one chunk, and what is beyond is cut.

The language of prompts (prompt.py) holds all the same: weights go to the tokens of their words, BREAK is a space.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ..bundle.facts import Facts, TextPart
from ..errors import InvalidModel
from .prompt import parse
from .tokenizer import Chunk, TextTokenizer, Tokens

FILE = "tokenizer.json"


class Marks(NamedTuple):
    """What a kind of encoder has before and after a text, and in place of one.

    masked   it takes a mask of what is no padding
    small    it was trained with prompts in small letters, without space around them
    """

    start: tuple[str, ...]
    end: tuple[str, ...]
    pad: str
    masked: bool
    small: bool = False


MARKS = {
    "t5": Marks((), ("</s>",), "<pad>", False),
    "qwen3": Marks((), (), "<|endoftext|>", True),
    "gemma2": Marks(("<bos>",), (), "<pad>", True, small=True),
}


class PromptTokenizer(Protocol):
    """What turns prompts into what a text encoder takes."""

    def __call__(self, prompt: str) -> Tokens:
        """One chunk of plain text, int64 [1, S]."""

    def chunks(
        self, prompt: str, words: Mapping[str, tuple[int, ...]] | None = None, negative: bool = False
    ) -> list[Chunk]:
        """The chunks of a prompt in the language of prompt.py, at least one; a `negative` one may have no template."""

    def filled(self, chunks: Sequence[Chunk], count: int) -> list[Chunk]:
        """`chunks` and as many empty ones as make `count`."""

    def words(self, chunks: Sequence[Chunk]) -> str:
        """The text of chunks."""


class WholeTokenizer:
    """The tokenizer of `text`, out of its folder; sequences are filled up to its length as diffusers does."""

    def __init__(self, folder: Path, text: TextPart) -> None:
        from tokenizers import Tokenizer

        self.text, self.length = text, text.tokens
        check(folder)
        try:
            self._model = Tokenizer.from_file(str(folder / FILE))
        except Exception as error:  # The library raises bare Exceptions.
            raise InvalidModel(f"{folder / FILE} is no tokenizer: {str(error).splitlines()[0]}") from error
        # A file may carry those of the last call before it was saved.
        self._model.no_truncation()
        self._model.no_padding()
        marks = MARKS[text.kind]
        self._start, self._end = ([self._id(each, folder) for each in some] for some in (marks.start, marks.end))
        self._pad = self._id(marks.pad, folder)

    def _id(self, token: str, folder: Path) -> int:
        number = self._model.token_to_id(token)
        if number is None:
            raise InvalidModel(f"the vocabulary in {folder} has no {token}")
        return int(number)

    def __call__(self, prompt: str) -> Tokens:
        first, *rest = self._cut(prompt, [1.0] * len(prompt))
        return Tokens(first.ids[None], self.words(rest))

    def chunks(
        self, prompt: str, words: Mapping[str, tuple[int, ...]] | None = None, negative: bool = False
    ) -> list[Chunk]:
        """One chunk; a second, of any length, where the prompt is longer: it is not for an encoder.

        Words of one's own have vectors for CLIP alone, and are text here.
        """
        text, weights = "", list[float]()
        for part in parse(prompt):
            for n, span in enumerate(part):
                piece = f" {span.text}" if text and n == 0 else span.text
                piece = piece.lower() if MARKS[self.text.kind].small else piece
                text, weights = text + piece, [*weights, *[span.weight] * len(piece)]
        if MARKS[self.text.kind].small:
            begin = len(text) - len(text.lstrip())
            text = text.strip()
            weights = weights[begin : begin + len(text)]
        return self._cut(text, weights, negative and self.text.bare_negative)

    def filled(self, chunks: Sequence[Chunk], count: int) -> list[Chunk]:
        """`chunks` and as many empty ones as make `count`."""
        return [*chunks, *self._cut("", []) * (count - len(chunks))]

    def words(self, chunks: Sequence[Chunk]) -> str:
        """The text of chunks."""
        return str(self._model.decode([int(n) for chunk in chunks for n in chunk.ids])).strip()

    def _cut(self, text: str, weights: Sequence[float], bare: bool = False) -> list[Chunk]:
        """The chunk of a text whose characters have these weights, and what it has no room for."""
        before, after = ("", "") if bare else (self.text.before, self.text.after)
        encoding = self._model.encode(f"{before}{text}{after}", add_special_tokens=False)
        of_characters = [*[1.0] * len(before), *weights, *[1.0] * len(after)]
        ids = [*self._start, *(int(id_) for id_ in encoding.ids)]
        # A token may begin with the space before its word.
        own = [*[1.0] * len(self._start), *(of_characters[max(0, end - 1)] for _, end in encoding.offsets)]
        room = (self.text.rows if bare and self.text.rows else self.length) - len(self._end)
        first = replace(self._chunk(ids[:room], own[:room]), kept=self._kept(bare))
        return [first] if len(ids) <= room else [first, _rest(ids[room:])]

    def _kept(self, bare: bool) -> NDArray[np.int64] | None:
        """The states that are attended to: with a template before the text, of that the first alone."""
        if not self.text.rows:
            return None
        rows = np.arange(self.text.rows)
        return rows if bare else np.concatenate([rows[:1], rows[1:] + self.length - self.text.rows])

    def _chunk(self, ids: Sequence[int], weights: Sequence[float]) -> Chunk:
        whole = [*ids, *self._end]
        pads = self.length - len(whole)
        weighed = [*weights, *[1.0] * (self.length - len(ids))]
        count = len(whole) if MARKS[self.text.kind].masked else 0
        return Chunk(np.array([*whole, *[self._pad] * pads], np.int64), np.array(weighed, np.float32), count)


def _rest(ids: Sequence[int]) -> Chunk:
    return Chunk(np.array(ids, np.int64), np.ones(len(ids), np.float32))


def check(folder: Path) -> None:
    """Raise InvalidModel where a folder has no tokenizer that can be read."""
    if not (folder / FILE).is_file():
        slow = (
            "; it has spiece.model, which transformers saves anew as one" if (folder / "spiece.model").is_file() else ""
        )
        raise InvalidModel(f"{folder} has no {FILE}{slow}")


def open_tokenizer(folder: Path, text: TextPart, facts: Facts) -> PromptTokenizer:
    """The tokenizer of one of a model's text encoders, in `folder`. Raises InvalidModel."""
    if text.kind == "clip":
        return TextTokenizer(folder, text.tokens or facts.max_tokens)
    return WholeTokenizer(folder, text)
