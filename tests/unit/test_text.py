"""Token ids against transformers' CLIPTokenizer, for any text; chunks and weights as AUTOMATIC1111 makes them."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sd.errors import InvalidModel, InvalidRequest
from edge_sd.paths import embedded_models
from edge_sd.text.tokenizer import TextTokenizer, weighted

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


def rows(prompt: str, words: dict[str, tuple[int, ...]] | None = None) -> list[list[int]]:
    """The ids of each chunk between its start and its end."""
    found = []
    for chunk in ours().chunks(prompt, words):
        ids = chunk.ids.tolist()
        assert len(ids) == 32
        found.append(ids[1 : ids.index(theirs().eos_token_id)])
    return found


def ids_of(text: str) -> list[int]:
    return list(theirs()(text, add_special_tokens=False).input_ids)


@given(TEXTS)
@settings(max_examples=100, deadline=None)
def test_a_plain_prompt_of_one_chunk_is_what_it_was(text: str) -> None:
    if set(text) & set("()[]\\:<") or "BREAK" in text:
        return
    first, *more = ours().chunks(text)
    tokens = ours()(text)
    assert (first.weights == 1).all()
    assert bool(more) == bool(tokens.dropped) or "," in text
    if not more:
        assert first.ids.tolist() == tokens.ids[0].tolist()


def test_a_long_prompt_loses_nothing() -> None:
    text = "and a cat " * 12
    assert rows(text) == [ids_of(text)[:30], ids_of(text)[30:]]


def test_a_full_chunk_ends_after_a_comma_that_is_near() -> None:
    near, far = "a cat " * 10 + ", " + "a dog " * 10, "a cat " * 3 + ", " + "a dog " * 20
    assert rows(near) == [ids_of("a cat " * 10 + ","), ids_of("a dog " * 10)]
    assert rows(far)[0] == ids_of(far)[:30]
    assert rows("a cat " * 15 + ", a")[1] == ids_of(", a")


def test_weights_stand_beside_their_tokens() -> None:
    (chunk,) = ours().chunks("a (red apple:1.5) [x]")
    counts = [len(ids_of(text)) for text in ("a", "red apple", "x")]
    weights = [1.0] * (1 + counts[0]) + [1.5] * counts[1] + [1 / 1.1] * counts[2]
    np.testing.assert_allclose(chunk.weights, weights + [1.0] * (32 - len(weights)), rtol=1e-6)


def test_break_and_empty_chunks() -> None:
    assert rows("a BREAK b") == [ids_of("a"), ids_of("b")]
    assert rows("BREAK b BREAK") == [[], ids_of("b")]
    assert rows("") == [[]]
    filled = ours().filled(ours().chunks("a"), 3)
    assert [chunk.ids.tolist() for chunk in filled[1:]] == [ours()("").ids[0].tolist()] * 2


def test_words_of_ones_own_stay_together_and_are_no_parts_of_others() -> None:
    words = {"cat": (9001, 9002, 9003), "<cat>": (9004,), "cat-7": (9005,)}
    assert rows("a Cat", words) == [[*ids_of("a"), 9001, 9002, 9003]]
    assert rows("catalog x<cat>y cat-7", words) == [[*ids_of("catalog x"), 9004, *ids_of("y"), 9005]]
    assert rows("a dog " * 14 + "cat", words) == [ids_of("a dog " * 14), [9001, 9002, 9003]]
    with pytest.raises(InvalidRequest, match="31 tokens; a chunk takes 30"):
        ours().chunks("cat", {"cat": tuple(range(31))})


def test_a_rows_mean_is_what_it_was_before_its_weights() -> None:
    """AUTOMATIC1111's: z w mean(z) / mean(z w)."""
    z = np.random.default_rng(0).normal(-0.1, 1, (2, 32, 768)).astype(np.float32)
    w = np.ones((2, 32), np.float32)
    w[1, 3:9] = 1.4
    found = weighted(z, w)
    np.testing.assert_array_equal(found[0], z[0])
    expected = z[1] * w[1, :, None]
    np.testing.assert_allclose(found[1], expected * (z[1].mean() / expected.mean()), rtol=1e-4)
    # Where the mean is next to nothing, the quotient could be anything.
    balanced = np.stack([np.tile([1.0, -1.0], 384)] * 32)[None].astype(np.float32)
    balanced[0, 0, 0] += 1e-3
    balanced[0, 3] -= 1e-4
    np.testing.assert_allclose(weighted(balanced, w[1:]), balanced * w[1:, :, None])


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
