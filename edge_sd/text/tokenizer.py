"""Prompt -> chunks of weighted token ids, by the byte-pair encoding of CLIP, and chunks -> what the UNet attends to.

The tokenizer's files are vocab.json and merges.txt; transformers 5 writes the same as one tokenizer.json. A prompt
becomes as many chunks as it needs, each of what a text encoder takes at once, cut as AUTOMATIC1111 cuts them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidModel, InvalidRequest
from .prompt import parse

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from ..components.base import Array, Component

START, END = "<|startoftext|>", "<|endoftext|>"
# OpenAI's pattern: contractions, runs of letters, single digits, runs of anything else.
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
# Where a chunk is full, what follows its last comma goes into the next, if that is no more than this many tokens.
BACKTRACK = 20
# Ids are at most as many as the largest vocabularies have; the library sets aside memory for the largest.
MOST_TOKENS = 1 << 20
# The mask beside a text encoder's outputs.
MASK = "mask"
# Largest factor that restores the mean of states where some weights are 0 or negative.
MOST_RESCALED = 10.0


@dataclass(frozen=True)
class Chunk:
    """What a text encoder takes at once: ids int64 [S], and the weight of each, float32 [S].

    count   of ids that are no padding; 0 where the encoder takes no mask
    kept    which of the states the denoiser attends to, in order; None for all
    """

    ids: NDArray[np.int64]
    weights: NDArray[np.float32]
    count: int = 0
    kept: NDArray[np.int64] | None = None

    @property
    def mask(self) -> NDArray[np.int64]:
        """1 for what is no padding, int64 [S]."""
        return (np.arange(len(self.ids)) < self.count).astype(np.int64)


@dataclass(frozen=True)
class Tokens:
    """int64 [1, S], and the words at the end of the prompt that the text encoder's window has no room for."""

    ids: NDArray[np.int64]
    dropped: str


class TextTokenizer:
    """CLIP's tokenizer out of a `tokenizer/` folder; sequences are filled up to `length` as diffusers does."""

    def __init__(self, folder: Path, length: int) -> None:
        self.length = length
        self._bpe = _load(folder)
        self._start, self.end = self._id(START, folder), self._id(END, folder)
        self.pad = self._pad_id(folder)

    def _id(self, token: str, folder: Path) -> int:
        number = self._bpe.token_to_id(token)
        if number is None:
            raise InvalidModel(f"the vocabulary in {folder} has no {token}")
        return int(number)

    def _pad_id(self, folder: Path) -> int:
        """SD 1 fills up with the end token, SD 2 with "!"; tokenizer_config.json or special_tokens_map.json says."""
        from ..files import read_json

        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            if (folder / name).is_file():
                pad = read_json(folder / name).get("pad_token")
                token = pad.get("content") if isinstance(pad, dict) else pad
                if token:
                    return self._id(token, folder)
        return self.end

    def __call__(self, prompt: str) -> Tokens:
        encoding = self._bpe.encode(prompt, add_special_tokens=False)
        room = self.length - 2
        ids = [self._start, *encoding.ids[:room], self.end]
        ids += [self.pad] * (self.length - len(ids))
        dropped = ""
        if len(encoding.ids) > room:
            dropped = self._bpe.decode(encoding.ids[room:]).strip()
        return Tokens(np.array([ids], np.int64), dropped)

    def chunks(
        self, prompt: str, words: Mapping[str, tuple[int, ...]] | None = None, negative: bool = False
    ) -> list[Chunk]:
        """The chunks of a prompt in the language of prompt.py, at least one.

        words   ids of words that the vocabulary does not have (textual inversion); those of one word stay together
        Raises InvalidRequest for a weight beyond its limits, or a word of more ids than a chunk has room for.
        """
        room = self.length - 2
        comma = self._bpe.token_to_id(",</w>")
        chunks: list[Chunk] = []
        parts = parse(prompt)
        for n, spans in enumerate(parts, 1):
            current: list[tuple[int, float]] = []
            # The length of `current` just after its last comma.
            after_comma = 0
            for ids, weight in ((ids, span.weight) for span in spans for ids in self._units(span.text, words or {})):
                if len(ids) > room:
                    raise InvalidRequest(f"a word of the prompt stands for {len(ids)} tokens; a chunk takes {room}")
                if len(current) + len(ids) > room:
                    near = after_comma > 0 and len(current) - after_comma < BACKTRACK
                    cut = after_comma if near and len(ids) == 1 and ids != (comma,) else len(current)
                    chunks.append(self._chunk(current[:cut]))
                    current, after_comma = current[cut:], 0
                current += [(id_, weight) for id_ in ids]
                if ids == (comma,):
                    after_comma = len(current)
            if current or not chunks or n < len(parts):
                chunks.append(self._chunk(current))
        return chunks

    def filled(self, chunks: Sequence[Chunk], count: int) -> list[Chunk]:
        """`chunks` and as many empty ones as make `count`."""
        return [*chunks, *[self._chunk([])] * (count - len(chunks))]

    def words(self, chunks: Sequence[Chunk]) -> str:
        """The text of chunks, as far as the vocabulary has it."""
        special = {self._start, self.end, self.pad}
        return str(self._bpe.decode([int(n) for chunk in chunks for n in chunk.ids if n not in special])).strip()

    def _units(self, text: str, words: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[int, ...]]:
        """Ids that may not be parted: one by one, and those of each of `words`."""
        # The longest first, where one begins as another does.
        known = sorted(words, key=len, reverse=True)
        end = 0
        for match in _any_of(known).finditer(text) if known else ():
            yield from self._tokens(text[end : match.start()])
            yield words[known[(match.lastindex or 1) - 1]]
            end = match.end()
        yield from self._tokens(text[end:])

    def _tokens(self, text: str) -> list[tuple[int]]:
        return [(int(id_),) for id_ in self._bpe.encode(text, add_special_tokens=False).ids]

    def _chunk(self, tokens: Sequence[tuple[int, float]]) -> Chunk:
        tail = self.length - 2 - len(tokens)
        ids = [self._start, *(id_ for id_, _ in tokens), self.end, *[self.pad] * tail]
        weights = [1.0, *(weight for _, weight in tokens), *[1.0] * (tail + 1)]
        return Chunk(np.array(ids, np.int64), np.array(weights, np.float32))


def inputs_of(chunks: Sequence[Chunk]) -> dict[str, Array]:
    """What a text encoder takes for a chunk of each of several prompts."""
    masks = {"attention_mask": np.stack([chunk.mask for chunk in chunks])} if chunks[0].count else {}
    return {"input_ids": np.stack([chunk.ids for chunk in chunks]), **masks}


def states_in(outputs: Mapping[str, Array], hidden: str) -> Array:
    """The states of a text encoder that a denoiser attends to, [B, S, C]: one output, or several side by side."""
    names = hidden.split(",")
    return outputs[hidden] if len(names) == 1 else np.concatenate([outputs[name] for name in names], axis=2)


def attended(outputs: Mapping[str, Array], chunks: Sequence[Chunk], hidden: str) -> dict[str, Array]:
    """What a denoiser attends to of an encoder's outputs for a chunk of each of several prompts.

    `hidden` [B, S, C], the states that are kept, weighted; and MASK [B, S], 1 for what is no padding, where the encoder
    takes a mask.
    """
    states, weights = states_in(outputs, hidden), np.stack([chunk.weights for chunk in chunks])
    masks = np.stack([chunk.mask for chunk in chunks]).astype(np.float32)
    if chunks[0].kept is not None:
        kept = np.stack([chunk.kept for chunk in chunks if chunk.kept is not None])
        states = np.take_along_axis(states, kept[..., None], axis=1)
        weights, masks = (np.take_along_axis(each, kept, axis=1) for each in (weights, masks))
    return {hidden: weighted(states, weights), MASK: masks}


def encode(encoder: Component, rows: Sequence[Sequence[Chunk]], hidden: str = "last_hidden_state") -> dict[str, Array]:
    """A text encoder's outputs for prompts of n chunks each; `hidden`, one of them, is [B, n S, C], weighted.

    Beside them is MASK [B, n S], 1 for what is no padding, where the encoder takes a mask.

    The chunks are encoded one by one and stand side by side; the other outputs are those of the first. Several outputs,
    with "," between their names, are one of all their channels.
    """
    runs, told = [], []
    for column in zip(*rows, strict=True):
        runs.append(encoder(**inputs_of(column)))
        told.append(attended(runs[-1], column, hidden))
    return {**runs[0], **{name: np.concatenate([each[name] for each in told], axis=1) for name in told[0]}}


def weighted(states: NDArray[np.float32], weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """States [B, S, C] times weights [B, S], each row then scaled back to the mean that it had: AUTOMATIC1111's way.

    A factor beyond what the weights themselves can ask for comes of a mean near zero; such a row keeps its scale. With
    weights of 0 and less they can ask for any, and MOST_RESCALED is the bound.
    """
    scaled = states * weights[..., None]
    before, after = (each.mean(axis=(1, 2), dtype=np.float64) for each in (states, scaled))
    ratio = np.divide(before, after, out=np.ones_like(before), where=after != 0)
    least = np.minimum(weights.min(axis=1), 1)
    highest = np.divide(1, least, out=np.full_like(before, MOST_RESCALED), where=least > 0)
    lowest = 1 / np.maximum(weights.max(axis=1), 1)
    ratio = np.where((lowest <= ratio) & (ratio <= highest), ratio, 1.0)
    return np.asarray(scaled * ratio[:, None, None], np.float32)


def _any_of(words: Sequence[str]) -> re.Pattern[str]:
    """A pattern for any of `words` that is no part of a longer one; group n + 1 is the one that was found."""
    patterns = []
    for word in words:
        before, after = (r"\b" if re.match(r"\w", edge) else "" for edge in (word[0], word[-1]))
        patterns.append(f"({before}{re.escape(word)}{after})")
    return re.compile("|".join(patterns), re.IGNORECASE)


def read_vocabulary(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token -> id, and the merges in order, from either form. Raises InvalidModel."""
    from ..files import read_json, refuse_pointer

    try:
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            vocabulary = read_json(folder / "vocab.json")
            refuse_pointer(folder / "merges.txt")
            lines = (folder / "merges.txt").read_text("utf-8").split("\n")
            merges = [line.split(" ") for line in lines if line.strip() and not line.startswith("#version")]
        elif (folder / "tokenizer.json").is_file():
            model = read_json(folder / "tokenizer.json")["model"]
            vocabulary, merges = model["vocab"], [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        else:
            raise InvalidModel(f"{folder} has neither vocab.json and merges.txt nor tokenizer.json")
        _check(vocabulary, merges)
        return dict(vocabulary), [(left, right) for left, right in merges]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidModel(f"{folder} is no CLIP tokenizer: {error}") from error


def _check(vocabulary: Any, merges: Any) -> None:
    """Raise ValueError or TypeError for what the library would panic at, or make up: it adds missing special tokens."""
    if not isinstance(vocabulary, dict) or not isinstance(merges, list):
        raise TypeError("its vocabulary is no object, or its merges are no list")
    for token, number in vocabulary.items():
        if type(number) is not int or not 0 <= number < MOST_TOKENS:
            raise ValueError(f"token {token[:40]!r} has the id {number!r}, no number below {MOST_TOKENS}")
    if len(set(vocabulary.values())) != len(vocabulary):
        raise ValueError("two tokens have one id")
    for token in (START, END):
        if token not in vocabulary:
            raise ValueError(f"its vocabulary has no {token}")
    if len(merges) > len(vocabulary):
        # Each makes a token of its own.
        raise ValueError(f"it has {len(merges)} merges and {len(vocabulary)} tokens")
    for merge in merges:
        if not isinstance(merge, list | tuple) or len(merge) != 2 or not all(isinstance(each, str) for each in merge):
            raise TypeError(f"the merge {str(merge)[:40]!r} is no pair")
        for each in (*merge, "".join(merge)):
            if each not in vocabulary:
                raise ValueError(f"it merges {each[:40]!r}, which its vocabulary does not have")


def _load(folder: Path) -> Tokenizer:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocabulary, merges = read_vocabulary(folder)
    try:
        bpe = models.BPE(vocabulary, merges, unk_token=END, end_of_word_suffix="</w>")
    except Exception as error:  # The library raises bare Exceptions.
        raise InvalidModel(f"{folder} is no CLIP tokenizer: {error}") from error
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("</w>", " "), decoders.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.add_special_tokens([AddedToken(START, normalized=False), AddedToken(END, normalized=False)])
    return tokenizer
