"""Token ids against transformers' CLIPTokenizer, for any text."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sd.bundle import embedded_models
from edge_sd.errors import InvalidModel
from edge_sd.text import TextTokenizer

FOLDER = embedded_models() / "emoji/tokenizer"
TEXTS = st.one_of(
    st.text(),
    st.text("abc AB.,'!?3d\n\t"),
    st.sampled_from(["", "a slice of pizza, 3d style", "It's  the cat's\tface", "ÀÉÎ é 日本語 🍕", "<|endoftext|> x"]),
)


@cache
def ours() -> TextTokenizer:
    return TextTokenizer(FOLDER, 32)


@cache
def theirs() -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(FOLDER)


@given(TEXTS)
@settings(max_examples=300, deadline=None)
def test_ids_equal_transformers(text: str) -> None:
    expected = theirs()(text, padding="max_length", max_length=32, truncation=True, return_tensors="np").input_ids
    assert ours()(text).ids.tolist() == expected.tolist()


def test_words_beyond_the_window_are_named() -> None:
    tokens = ours()("a red apple " + "and a cat " * 12)
    assert tokens.ids.shape == (1, 32)
    assert tokens.dropped.startswith("and a cat")
    assert ours()("a red apple").dropped == ""


def test_tokenizer_json_alone_gives_the_same_ids(tmp_path: Path) -> None:
    """transformers 5 saves nothing but tokenizer.json."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(FOLDER / name, tmp_path)
    for text in ("a slice of pizza, 3d style", "naïve café 🍕"):
        assert TextTokenizer(tmp_path, 32)(text).ids.tolist() == ours()(text).ids.tolist()


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"a": "b"}'])
def test_a_damaged_vocabulary_is_an_invalid_model(tmp_path: Path, damage: str) -> None:
    shutil.copytree(FOLDER, tmp_path / "t")
    (tmp_path / "t/vocab.json").write_text(damage)
    with pytest.raises(InvalidModel):
        TextTokenizer(tmp_path / "t", 32)


def test_the_pad_token_is_the_models_own(tmp_path: Path) -> None:
    """SD 2 fills up with "!" where SD 1 repeats the end token."""
    shutil.copytree(FOLDER, tmp_path / "t")
    config = json.loads((tmp_path / "t/tokenizer_config.json").read_text())
    (tmp_path / "t/tokenizer_config.json").write_text(json.dumps({**config, "pad_token": "!"}))
    vocabulary = json.loads((FOLDER / "vocab.json").read_text())
    assert TextTokenizer(tmp_path / "t", 32)("cat").ids[0, -1] == vocabulary["!"]
