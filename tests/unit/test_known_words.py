"""Words that a small model was not taught are said, with words near them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edge_sd import Pipeline, Request
from edge_sd.errors import InvalidModel
from edge_sd.text.known_words import KnownWords


@pytest.fixture(scope="module")
def words(emoji: Path) -> KnownWords:
    found = KnownWords.read(emoji)
    assert found is not None
    return found


@pytest.mark.parametrize(
    "prompt",
    [
        "a red apple, glossy style", "a (red:1.3) apple, [glossy style]",
        "T-Rex, flat style, blue background", "smiling face with heart-eyes", "a t-shirt", "cherries", "beagles",
        "a motorcar on a white background, mirrored", "a snowman BREAK cartoon style", "a [cat|dog]", "",
    ],
)  # fmt: skip
def test_what_was_taught_is_known(words: KnownWords, prompt: str) -> None:
    assert words.note("emoji", prompt) == ""


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("a mountain lake", "emoji knows no 'mountain lake'; near: mountain"),
        ("an aple", "emoji knows no 'aple'; near: maple, apple"),
        ("a lighthouse", "emoji knows no 'lighthouse'; `edge-sd models show emoji` lists what it knows"),
        ("a hovercraft over a dog", "emoji knows no 'hovercraft'; `edge-sd models show emoji` lists what it knows"),
        ("a cat, wearing a tuxedo", "emoji knows no 'wearing', 'tuxedo'"),
        ("un château", "emoji knows no 'un château'"),
    ],
)
def test_what_was_not_taught_is_said(words: KnownWords, prompt: str, said: str) -> None:
    assert words.note("emoji", prompt).startswith(said)


def test_a_note_is_short_whatever_the_prompt(words: KnownWords) -> None:
    note = words.note("emoji", ", ".join(f"qx{letter}zz" for letter in "abcdefghijkl"))
    assert note.startswith("emoji knows no 'qxazz', 'qxbzz'")
    assert "and 7 more" in note


def test_a_picture_notes_its_unknown_words_and_no_word_of_its_own(tmp_path: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    save_file({"emb_params": np.ones((1, 192), np.float32)}, tmp_path / "zorb.safetensors")
    wishes = {"seed": 1, "steps": 1, "width": 64, "height": 64}
    with Pipeline.open("emoji") as pipeline:
        noted = pipeline.generate(
            Request("a zorb, a quokka", **wishes, embeddings={"zorb": tmp_path / "zorb.safetensors"})
        )
        assert [note for note in noted.notes if "knows no" in note] == [
            "emoji knows no 'quokka'; `edge-sd models show emoji` lists what it knows"
        ]


def test_a_damaged_list_is_named_and_none_is_none(emoji: Path, tmp_path: Path) -> None:
    assert KnownWords.read(tmp_path) is None
    (tmp_path / "words.json").write_text((emoji / "words.json").read_text("utf-8"), "utf-8")
    (tmp_path / "taught.json").write_text(json.dumps({"captions": 3}))
    with pytest.raises(InvalidModel, match=r"taught\.json is damaged"):
        KnownWords.read(tmp_path)
