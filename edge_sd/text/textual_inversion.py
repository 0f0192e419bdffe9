"""Textual inversion (Gal et al. 2022, arXiv:2208.01618): a new word that stands for learned vectors.

A word has one or several vectors, each in the place of a token's embedding. Files are safetensors that hold one of

    emb_params [n, C]                       AUTOMATIC1111, diffusers
    clip_l [n, 768], clip_g [n, 1280]       SDXL: one for each text encoder; a lone one is for the only encoder
    text_encoders_0, text_encoders_1        the same two, as diffusers' trainers wrote them at first
    TOKEN [n, C] or [C]                     diffusers: the key is the word

The vectors are no part of the vocabulary: their ids begin at FIRST, beyond any, and a backend gives its text encoder a
second table for those (components/edits.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..bundle.safetensors import read
from ..errors import InvalidModel, InvalidRequest
from ..files import hash_file

FIRST = 1 << 24
MOST = 75
# The part of a pipeline that each key of SDXL's forms is for.
FORMS = (
    {"clip_l": "text_encoder", "clip_g": "text_encoder_2"},
    {"text_encoders_0": "text_encoder", "text_encoders_1": "text_encoder_2"},
)
# Keys of a lone tensor that are no words.
UNNAMED = {"emb_params", *FORMS[0], *FORMS[1]}


@dataclass(frozen=True)
class Embedding:
    """A word, the hash of its file, and its vectors float32 [n, C] by text encoder; "" is the only one."""

    word: str
    sha256: str
    vectors: Mapping[str, NDArray[np.float32]] = field(compare=False)

    def __len__(self) -> int:
        return len(next(iter(self.vectors.values())))

    def check(self, parts: Sequence[str], width: int) -> None:
        """Raise InvalidRequest unless these are vectors for text encoders `parts` of `width` numbers together."""
        found = [each for part in parts if (each := self.for_part(part)) is not None]
        fits = len(found) == len(parts) and (len(parts) == 1 or "" not in self.vectors)
        if not fits or sum(each.shape[1] for each in found) != width:
            widths = " and ".join(str(each.shape[1]) for each in self.vectors.values())
            raise InvalidRequest(
                f"the embedding {self.word!r} has vectors of {widths} numbers, this model's text encoders "
                f"take {width}: it was made for another family"
            )

    def for_part(self, part: str) -> NDArray[np.float32] | None:
        """The vectors for a text encoder."""
        return self.vectors.get(part, self.vectors.get(""))


def read_embedding(path: Path, word: str | None = None) -> Embedding:
    """The embedding in a file; its word is `word`, or the file's own, or its name.

    Raises InvalidRequest (no such file, no possible word) or InvalidModel (not in one of the forms above).
    """
    found = read(path).tensors
    if parts := next((form for form in FORMS if set(found) == set(form)), None):
        vectors, own = {part: _rows(found[key], path) for key, part in parts.items()}, None
    elif len(found) == 1:
        ((key, value),) = found.items()
        vectors, own = {"": _rows(value, path)}, None if key in UNNAMED else key
    else:
        names = ", ".join(sorted(found)[:3]) or "nothing"
        raise InvalidModel(f"{path.name} is no embedding: it holds {names}; expected emb_params, or clip_l and clip_g")
    if len({len(each) for each in vectors.values()}) != 1:
        raise InvalidModel(f"{path.name} is damaged: {' and '.join(found)} have not the same number of vectors")
    return Embedding(check_word(word or own or path.stem), hash_file(path), vectors)


def check_word(word: str) -> str:
    """`word`, if a prompt can hold it. Raises InvalidRequest."""
    if not word.strip() or word != word.strip() or set(word) & set("()[]\\\n"):
        raise InvalidRequest(f"{word!r} is no word for an embedding: it may hold no brackets and no backslash")
    return word


def ids_of(embeddings: Mapping[str, Embedding]) -> dict[str, tuple[int, ...]]:
    """Word -> the ids of its vectors, counted through all `embeddings` in order."""
    ids, start = {}, FIRST
    for word, embedding in embeddings.items():
        ids[word] = tuple(range(start, start + len(embedding)))
        start += len(embedding)
    return ids


def _rows(value: NDArray[np.generic], path: Path) -> NDArray[np.float32]:
    rows = np.atleast_2d(np.asarray(value, np.float32))
    if rows.ndim != 2 or not 1 <= len(rows) <= MOST or not np.isfinite(rows).all():
        raise InvalidModel(f"{path.name} is no embedding of 1 to {MOST} finite vectors: it has the shape {value.shape}")
    return rows
