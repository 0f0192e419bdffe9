"""The language of prompts: what AUTOMATIC1111's documentation says, and for any text what must be true of it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sd import Request
from edge_sd.errors import InvalidRequest
from edge_sd.text.prompt import Span, notes, parse, take_loras
from edge_sd.text.schedule import Stage, composed, script, stages
from edge_sd.text.wildcards import expand

from ..timing import check_linear

WORDS = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0"), min_size=1).filter(
    lambda text: "BREAK" not in text
)
WEIGHTS = st.floats(-100, 100, allow_nan=False).map(lambda weight: round(weight, 3))


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
        (r"back\slash re\:zero", [("backslash re:zero", 1.0)]),
        ("a (cat:0) b", [("a ", 1.0), ("cat", 0.0), (" b", 1.0)]),
        ("(cat:-1.5) b", [("cat", -1.5), (" b", 1.0)]),
        ("a <hypernet:h:1> b", [("a  b", 1.0)]),
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
        assert re.search(r"not a number from -100 to 100|nest deeper", str(error))  # noqa: PT017
        return
    assert all(-100 <= span.weight <= 100 for spans in parts for span in spans)
    kept = "".join(span.text for spans in parts for span in spans)
    assert set(kept) <= set(prompt)
    if not set(prompt) & set("()[]\\:B<"):
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


@pytest.mark.parametrize("prompt", ["(a:-101)", "(a:101)", "(" * 60 + "a", "[" * 65 + "a", "(" * 20_000])
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
        ("__colour__", None, "give a folder"),
        ("a", folder / "none", "does not exist"),
        ("a {b", folder, "is no template"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            expand(template, 0, folder_)


@pytest.mark.fault(21, "templates that grow beyond measure")
def test_templates_that_grow_beyond_measure_or_miss_a_name_are_refused_at_once(tmp_path: Path) -> None:
    doubled = "${v0={a|b}}" + "".join(f"${{v{n + 1}=${{v{n}}}${{v{n}}}}}" for n in range(16)) + "${v16}"
    for template, message in ((doubled, "at most 32"), ("a ${x}", "Variable x is not defined")):
        with pytest.raises(InvalidRequest, match=message):
            expand(template, 1)
    for n in range(500):
        (tmp_path / f"colour{n}.txt").write_text("red")
    with pytest.raises(InvalidRequest, match="no wildcard 'colours'; valid: colour") as caught:
        expand("__colours__", 1, tmp_path)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("prompt", "text", "weights"),
    [
        ("a <lora:x:0.5> b", "a  b", {"x": (0.5, 0.5)}),
        ("<lora:x>", "", {"x": (1, 1)}),
        ("<lora:x:1:0>", "", {"x": (1, 0)}),
        ("<lora:x:te=0:unet=1>", "", {"x": (0, 1)}),
        ("<lora:x:0.5:unet=1>", "", {"x": (0.5, 1)}),
        ("<lyco: x : -0.5 >", "", {"x": (-0.5, -0.5)}),
        ("<lora:x:0.5><lora:x:0.25><lora:y>", "", {"x": (0.75, 0.75), "y": (1, 1)}),
        ("a < b <lora: > c", None, "is no LoRA"),
        ("<lora:x:0,8>", None, "'0,8' of '<lora:x:0,8>' is no number"),
        ("<lora:x:nan>", None, "is no number"),
        ("<lora:x:1:2:3>", None, "is no LoRA"),
        ("<lora:x:dyn=4>", None, "is no LoRA"),
    ],
)
def test_loras_have_weights_for_text_encoders_and_for_the_unet(prompt: str, text: str | None, weights: Any) -> None:
    if text is None:
        with pytest.raises(InvalidRequest, match=re.escape(weights)):
            Request(prompt)
    else:
        assert take_loras(prompt) == (text, weights)


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ("a dog++ x", "dog++"),
        ("a cat+, b", "cat+"),
        ("(a b)1.3 c", "b)1.3"),
        ('("a", "b").blend(1, 1)', ".blend("),
        ("<hypernet:h:1> a", "hypernetworks"),
        ("well-known -- fine, 1+1, c++, :-)", ""),
        ("(a cat:1.2) (b)", ""),
    ],
)
def test_other_languages_are_named(prompt: str, named: str) -> None:
    found = notes(prompt)
    assert len(found) == bool(named)
    assert named in "".join(found)


SLOW: dict[str, Callable[[int], str]] = {
    "digits": lambda n: "<lora:a:" + "1" * n,
    "weight": lambda n: "(a:" + "1" * n,
    "colons": lambda n: ":1" * n,
    "spaces": lambda n: "a:" + " " * n + "b",
    "tags": lambda n: "<lora:" * n,
    "brackets": lambda n: "(a)" * n,
    "choices": lambda n: "[a|b]" * n,
    "torn": lambda n: "[a)(b]" * n,
    "pluses": lambda n: "a" + "+" * n + "b",
    "ands": lambda n: "a" + " AN" * n,
}


@pytest.mark.fault(21, "adversarial prompts")
@pytest.mark.parametrize("kind", SLOW)
def test_prompts_take_time_that_grows_with_their_length_alone(kind: str) -> None:
    def read(text: str) -> None:
        with contextlib.suppress(InvalidRequest):
            prompt = take_loras(text)[0]
            notes(prompt)
            parse(prompt)
            stages(prompt, 3)

    check_linear(read, SLOW[kind], 4_000)


# AUTOMATIC1111's published examples, at 10 steps: text after which step.
SCHEDULES = [
    ("test", [(10, "test")]),
    ("a [b:3]", [(3, "a "), (10, "a b")]),
    ("a [b: 3]", [(3, "a "), (10, "a b")]),
    ("a [[[b]]:2]", [(2, "a "), (10, "a [[b]]")]),
    ("[(a:2):3]", [(3, ""), (10, "(a:2)")]),
    ("a [b : c : 1] d", [(1, "a b  d"), (10, "a  c  d")]),
    ("a[b:[c:d:2]:1]e", [(1, "abe"), (2, "ace"), (10, "ade")]),
    ("a [unbalanced", [(10, "a [unbalanced")]),
    ("a [b:.5] c", [(5, "a  c"), (10, "a b c")]),
    ("a [{b|d{:.5] c", [(10, "a [{b|d{:.5] c")]),
    ("((a][:b:c [d:3]", [(3, "((a][:b:c "), (10, "((a][:b:c d")]),
    ("[a|(b:1.1)]", [(n, "(b:1.1)" if n % 2 == 0 else "a") for n in range(1, 11)]),
    ("[fe|]male", [(n, "male" if n % 2 == 0 else "female") for n in range(1, 11)]),
    ("[fe|||]male", [(1, "female"), (4, "male"), (5, "female"), (8, "male"), (9, "female"), (10, "male")]),
    # Their rule for numbers with a point: a share of the steps.
    ("a [b:1.0]", [(10, "a ")]),
    ("a [b::0.25]", [(2, "a b"), (10, "a ")]),
    (r"a \[b:c:3\] [d\:e:3]", [(3, r"a \[b:c:3\] "), (10, r"a \[b:c:3\] d\:e")]),
    ("(a [b:c:3]:1.2)", [(3, "(a b:1.2)"), (10, "(a c:1.2)")]),
    ("a | b [c:d:3]", [(3, "a | b c"), (10, "a | b d")]),
    ("[a:b:c:3]", [(10, "[a:b:c:3]")]),
    ("[a:b:50]", [(10, "a")]),
    ("[a:b:0]", [(10, "b")]),
    ("[a:b:1e999]", [(10, "a")]),
    ("[a:b:0.1e999]", [(10, "a")]),
    ("[a:b:-3]", [(10, "b")]),
]


@pytest.mark.parametrize(("prompt", "expected"), SCHEDULES)
def test_prompt_editing_and_alternation(prompt: str, expected: list[tuple[int, str]]) -> None:
    assert [(stage.last, *stage.texts) for stage in stages(prompt, 10)] == expected


def test_the_example_of_the_field() -> None:
    prompt = (
        "fantasy landscape with a [mountain:lake:0.25] and [an oak:a christmas tree:0.75][ in foreground::0.6]"
        "[ in background:0.25] [shoddy:masterful:0.5]"
    )
    assert [(stage.last, *stage.texts) for stage in stages(prompt, 100)] == [
        (25, "fantasy landscape with a mountain and an oak in foreground shoddy"),
        (50, "fantasy landscape with a lake and an oak in foreground in background shoddy"),
        (60, "fantasy landscape with a lake and an oak in foreground in background masterful"),
        (75, "fantasy landscape with a lake and an oak in background masterful"),
        (100, "fantasy landscape with a lake and a christmas tree in background masterful"),
    ]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a cat", [("a cat", 1.0)]),
        ("a cat AND a dog", [("a cat ", 1.0), (" a dog", 1.0)]),
        ("a cat :1.2 AND a dog AND a bee:-0.5", [("a cat", 1.2), (" a dog ", 1.0), (" a bee", -0.5)]),
        ("16:9", [("16:9", 1.0)]),
        ("SAND AND HAND", [("SAND ", 1.0), (" HAND", 1.0)]),
        ("(a:1.2) AND b", [("(a:1.2) ", 1.0), (" b", 1.0)]),
    ],
)
def test_parts_of_a_prompt(prompt: str, expected: list[tuple[str, float]]) -> None:
    assert composed(prompt) == expected


@pytest.mark.parametrize("prompt", ["a AND b:101", "a AND b:1e999", " AND ".join("abcdefghi")])
def test_parts_beyond_limits_are_refused(prompt: str) -> None:
    with pytest.raises(InvalidRequest):
        Request(prompt)


def test_a_script_joins_the_stages_of_all_its_texts() -> None:
    made = script("[a:b:2] AND c", "[x:y:3]", 4)
    assert made.weights == (1.0, 1.0)
    assert made.stages == (
        Stage(2, ("x", "a ", " c")), Stage(3, ("x", "b ", " c")), Stage(4, ("y", "b ", " c")),
    )  # fmt: skip
