"""CLIP's vocabulary out of an installed package: OpenAI's list of merges, bpe_simple_vocab_16e6.txt.gz.

The format is that of OpenAI's CLIP (simple_tokenizer.py): a line of version, then the merges in order. A vocabulary is
the 256 bytes as characters, the same at the end of a word, what the first 48,894 merges make, and two marks.
"""

from __future__ import annotations

import gzip
from importlib.util import find_spec
from pathlib import Path

from edge_sd.errors import InvalidModel
from edge_sd.text.tokenizer import END, START

# Packages that carry the file; none is imported.
PACKAGES = ("open_clip", "clip")
FILE = "bpe_simple_vocab_16e6.txt.gz"
SIZE = 49_408


def installed_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]] | None:
    """Token -> id, and the merges, where a package that has them is installed. Raises InvalidModel if damaged."""
    for name in PACKAGES:
        spec = find_spec(name)
        for place in (spec.submodule_search_locations or []) if spec else []:
            if (Path(place) / FILE).is_file():
                return read_merges(Path(place) / FILE)
    return None


def read_merges(path: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The vocabulary of a list of merges. Raises InvalidModel."""
    try:
        lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InvalidModel(f"{path} is damaged: {error}") from error
    letters = _bytes_as_characters()
    rows = [line.split() for line in lines[1 : SIZE - 2 * len(letters) - 2 + 1]]
    if any(len(row) != 2 for row in rows) or 2 * len(letters) + len(rows) + 2 != SIZE:
        raise InvalidModel(f"{path} is not CLIP's list of merges")
    merges = [(left, right) for left, right in rows]
    tokens = [*letters, *(f"{each}</w>" for each in letters), *map("".join, merges), START, END]
    return {token: n for n, token in enumerate(tokens)}, merges


def _bytes_as_characters() -> list[str]:
    """GPT-2's 256 visible characters for bytes: those that are visible stand for themselves, and come first."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [*map(chr, visible), *(chr(256 + n) for n in range(256 - len(visible)))]
