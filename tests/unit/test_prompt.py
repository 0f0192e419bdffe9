"""The language of prompts: what AUTOMATIC1111's documentation says, and for any text what must be true of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sd import Request
from edge_sd.errors import InvalidRequest
from edge_sd.text.prompt import Span, parse
from edge_sd.text.wildcards import expand

WORDS = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0"), min_size=1).filter(
    lambda text: "BREAK" not in text
)
WEIGHTS = st.floats(0.01, 100, allow_nan=False).map(lambda weight: round(weight, 3))


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a (red) apple", [("a ", 1.0), ("red", 1.1), (" apple", 1.0)]),
        ("((red))", [("red", 1.21)]),
        ("(red:1.5)", [("red", 1.5)]),
        ("(red: 0.5 )", [("red", 0.5)]),
        ("[red]", [("red", 1 / 1.1)]),
        ("(a [b:1.2)", [("a ", 1.2), ("b", 1.2 / 1.1)]),
        ("((a:1.5) b)", [("a", 1.65), (" b", 1.1)]),
        (r"a \(b\) \[c\] \\", [(r"a (b) [c] " + "\\", 1.0)]),
        (r"back\slash", [("back\\slash", 1.0)]),
        ("a face :) 3:2", [("a face :) 3:2", 1.0)]),
        ("(a b", [("a b", 1.1)]),
        ("a) b]", [("a) b]", 1.0)]),
        ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
        ("BREAKFAST", [("BREAKFAST", 1.0)]),
        ("", []),
    ],
)
def test_weights(prompt: str, expected: list[tuple[str, float]]) -> None:
    (spans,) = parse(prompt)
    assert [span.text for span in spans] == [text for text, _ in expected]
    assert [span.weight for span in spans] == pytest.approx([weight for _, weight in expected])


def test_break_parts_a_prompt_and_brackets_reach_across() -> None:
    first, second, third = parse("a BREAK (b\nBREAK c:2)")
    assert (first, second, third) == ([Span("a")], [Span("b", 2.0)], [Span("c", 2.0)])


@given(st.text() | st.text("()[]:\\.123 aBREAK"))
@settings(max_examples=300, deadline=None)
def test_any_text_is_a_prompt_or_one_clear_error(prompt: str) -> None:
    try:
        parts = parse(prompt)
    except InvalidRequest as error:
        assert re.search(r"not a number from 0.01 to 100|nest deeper", str(error))  # noqa: PT017
        return
    assert all(0.01 <= span.weight <= 100 for spans in parts for span in spans)
    kept = "".join(span.text for spans in parts for span in spans)
    assert set(kept) <= set(prompt)
    if not set(prompt) & set("()[]\\:B"):
        assert kept == prompt


@given(st.lists(st.lists(st.tuples(WORDS, WEIGHTS), min_size=1, max_size=3), min_size=1, max_size=3))
@settings(max_examples=60, deadline=None)
def test_what_is_written_is_read(parts: list[list[tuple[str, float]]]) -> None:
    def escaped(text: str) -> str:
        return re.sub(r"([\\()\[\]])", r"\\\1", text)

    written = " BREAK ".join("".join(f"({escaped(text)}:{weight})" for text, weight in spans) for spans in parts)
    found = [[(char, span.weight) for span in spans for char in span.text] for spans in parse(written)]
    # The space beside a BREAK belongs to it.
    expected = [[(char, weight) for text, weight in spans for char in text] for spans in parts]
    assert found == expected


@pytest.mark.parametrize("prompt", ["(a:0)", "(a:-1)", "(a:101)", "(" * 60 + "a", "[" * 60 + "a", "(" * 20_000])
def test_a_weight_beyond_its_limits_is_refused_at_once(prompt: str) -> None:
    with pytest.raises(InvalidRequest):
        Request(prompt)


def test_a_template_and_a_seed_make_one_prompt() -> None:
    prompts = {expand("a {red|green|blue} (apple:1.2) \\(x\\)", seed) for seed in range(12)}
    assert prompts == {f"a {colour} (apple:1.2) \\(x\\)" for colour in ("red", "green", "blue")}
    assert expand("{a|b|c|d}", 3) == expand("{a|b|c|d}", 3)


def test_wildcards_come_from_a_folder(tmp_path: Path) -> None:
    folder = tmp_path
    (folder / "colour.txt").write_text("mauve\n")
    (folder / "deep").mkdir()
    (folder / "deep/fruit.txt").write_text("{pear|pear}\n")
    assert expand("a __colour__ __deep/fruit__", 0, folder) == "a mauve pear"
    for template, folder_, message in (
        ("__shape__", folder, "no wildcard 'shape'; valid: colour, deep/fruit"),
        ("__colour__", None, "give a folder of wildcards"),
        ("a", folder / "none", "does not exist"),
        ("a {b", folder, "is no template"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            expand(template, 0, folder_)
