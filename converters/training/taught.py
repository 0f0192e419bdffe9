"""The words that the embedded model was taught, as its folder says them (edge_sd/text/known_words.py reads them)."""

from __future__ import annotations

import json
from pathlib import Path

from edge_sd.text.known_words import TAUGHT, WORDS

from .data import BACKGROUNDS, STYLES, Artwork, core_vocabulary, spoken_names


def save_words(work: Path, target: Path) -> None:
    """Write `target`/words.json and taught.json of what was trained in `work`."""
    labels = core_vocabulary()
    words = {
        "concepts": labels, "styles": list(STYLES), "backgrounds": list(BACKGROUNDS),
        "pattern": "{concept}, {style} style, {background} background",
    }  # fmt: skip
    (target / WORDS).write_text(json.dumps(words, indent=1, ensure_ascii=False) + "\n", "utf-8")
    keywords = Artwork(work).keywords
    names = (name for label in labels for name in (*spoken_names(label), *keywords.get(label, ())))
    captions = sorted({word for name in names for word in name.lower().replace("-", " ").split()})
    kinds: dict[str, list[str]] = {}
    if (work / "words.json").is_file():
        for word, label in sorted(json.loads((work / "words.json").read_text("utf-8")).items()):
            kinds.setdefault(label, []).append(word)
    (target / TAUGHT).write_text(json.dumps({"captions": captions, "kinds": kinds}, ensure_ascii=False) + "\n", "utf-8")
