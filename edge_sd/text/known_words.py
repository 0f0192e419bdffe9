"""The words that a small model was taught, as two files in its folder say, and those of a prompt that it was not.

    words.json    concepts, styles, backgrounds: what its pictures were captioned with, and the pattern of a caption
    taught.json   "captions": every word that a caption can hold; "kinds": concept -> other words that mean it

Models without taught.json are taken to know every word.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import InvalidModel
from ..files import read_json

WORDS, TAUGHT = "words.json", "taught.json"
# Words that join others and are no picture's subject, and those of the captions' own form.
JOINING = frozenset(re.findall(r"\w+", """
    a an the of in on at to with without and or by for from is are as it its this that some
    over under above below behind beside near between into onto through around across along
    style background mirrored off center centre break
"""))  # fmt: skip
# Words that together name one thing, at most; phrases that a note names; words offered for each.
LONGEST, MOST, NEAR = 3, 5, 3


@dataclass(frozen=True)
class KnownWords:
    """What a model was taught.

    concepts, styles, backgrounds   as words.json has them
    known                           every word and name, in small letters
    """

    concepts: tuple[str, ...]
    styles: tuple[str, ...]
    backgrounds: tuple[str, ...]
    known: frozenset[str]

    @classmethod
    def read(cls, folder: Path) -> KnownWords | None:
        """Those of the model in `folder`; None where nothing says what it was taught. Raises InvalidModel."""
        if not (folder / WORDS).is_file() or not (folder / TAUGHT).is_file():
            return None
        said, taught = read_json(folder / WORDS), read_json(folder / TAUGHT)
        try:
            concepts, styles, backgrounds = (tuple(said[name]) for name in ("concepts", "styles", "backgrounds"))
            more = [*taught["captions"], *(word for words in taught["kinds"].values() for word in words)]
            names = [" ".join(_words(name)) for name in (*concepts, *styles, *backgrounds, *more)]
        except (KeyError, TypeError, AttributeError) as error:
            raise InvalidModel(f"{folder / TAUGHT} is damaged ({error})") from error
        return cls(concepts, styles, backgrounds, frozenset(names))

    def unknown(self, prompt: str) -> dict[str, tuple[str, ...]]:
        """Phrase of `prompt` with a word that was not taught -> words near it: the known ones in it, or alike ones."""
        found: dict[str, tuple[str, ...]] = {}
        for phrase in _phrases(prompt):
            words = list(self._parts(phrase))
            if all(known for _, known in words):
                continue
            near = [word for word, known in words if known and len(word) > 1]
            alike = near or difflib.get_close_matches(" ".join(phrase), self.known, n=NEAR, cutoff=0.8)
            found[" ".join(phrase)] = tuple(alike)
        return found

    def note(self, name: str, prompt: str) -> str:
        """What is to be said of `prompt` for the model called `name`; "" where it knows all of it."""
        found = self.unknown(prompt)
        if not found:
            return ""
        said = ", ".join(map(repr, list(found)[:MOST])) + (
            f" and {len(found) - MOST} more" if len(found) > MOST else ""
        )
        near = list(dict.fromkeys(word for words in found.values() for word in words))[:MOST]
        offered = f"; near: {', '.join(near)}" if near else f"; `edge-sd models show {name}` lists what it knows"
        return f"{name} knows no {said}{offered}"

    def _parts(self, phrase: list[str]) -> Iterator[tuple[str, bool]]:
        """The longest known names in a phrase, and the words between them."""
        at = 0
        while at < len(phrase):
            for length in range(min(LONGEST, len(phrase) - at), 0, -1):
                name = " ".join(phrase[at : at + length])
                if any(each in self.known for each in _forms(name)):
                    yield name, True
                    break
            else:
                length = 1
                yield phrase[at], False
            at += length


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def _phrases(prompt: str) -> Iterator[list[str]]:
    """Runs of words between punctuation and joining words."""
    for piece in re.split(r"[^\w\s'’-]+|\s-|-\s", prompt.lower()):
        phrase: list[str] = []
        for word in _words(re.sub(r"['’]s\b", "", piece)):
            if word in JOINING or word.isdigit():
                if phrase:
                    yield phrase
                phrase = []
            else:
                phrase.append(word)
        if phrase:
            yield phrase


def _forms(name: str) -> Iterator[str]:
    """A name, and what it may be the plural of."""
    yield name
    for ending, before in (("ies", "y"), ("es", ""), ("s", "")):
        if name.endswith(ending) and len(name) > len(ending) + 2:
            yield name.removesuffix(ending) + before
