"""Prompt -> token ids, by the byte-pair encoding of CLIP.

Its files are vocab.json and merges.txt; transformers 5 writes the same as one tokenizer.json.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .errors import InvalidModel

if TYPE_CHECKING:
    from tokenizers import Tokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
# OpenAI's pattern: contractions, runs of letters, single digits, runs of anything else.
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


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
        self._start, self._end = self._id(START, folder), self._id(END, folder)
        self._pad = self._pad_id(folder)

    def _id(self, token: str, folder: Path) -> int:
        number = self._bpe.token_to_id(token)
        if number is None:
            raise InvalidModel(f"the vocabulary in {folder} has no {token}")
        return int(number)

    def _pad_id(self, folder: Path) -> int:
        """SD 1 fills up with the end token, SD 2 with "!"; tokenizer_config.json or special_tokens_map.json says."""
        from .foreign import read_json

        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            if (folder / name).is_file():
                pad = read_json(folder / name).get("pad_token")
                token = pad.get("content") if isinstance(pad, dict) else pad
                if token:
                    return self._id(token, folder)
        return self._end

    def __call__(self, prompt: str) -> Tokens:
        encoding = self._bpe.encode(prompt, add_special_tokens=False)
        room = self.length - 2
        ids = [self._start, *encoding.ids[:room], self._end]
        ids += [self._pad] * (self.length - len(ids))
        dropped = ""
        if len(encoding.ids) > room:
            dropped = self._bpe.decode(encoding.ids[room:]).strip()
        return Tokens(np.array([ids], np.int64), dropped)


def read_vocabulary(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token -> id, and the merges in order, from either form. Raises InvalidModel."""
    from .foreign import read_json

    try:
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            vocabulary = read_json(folder / "vocab.json")
            lines = (folder / "merges.txt").read_text("utf-8").split("\n")
            merges = [line.split(" ") for line in lines if line.strip() and not line.startswith("#version")]
        elif (folder / "tokenizer.json").is_file():
            model = read_json(folder / "tokenizer.json")["model"]
            vocabulary, merges = model["vocab"], [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        else:
            raise InvalidModel(f"{folder} has neither vocab.json and merges.txt nor tokenizer.json")
        return {str(token): int(n) for token, n in vocabulary.items()}, [(left, right) for left, right in merges]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidModel(f"{folder} is no CLIP tokenizer: {error}") from error


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
