"""What commands print fits a terminal."""

from __future__ import annotations

import pytest

from edge_sd.apps.terminal import columns, wrapped


@pytest.mark.parametrize(("width", "blocks"), [(40, 6), (80, 2), (200, 1)])
def test_a_table_is_no_wider_than_the_terminal(monkeypatch: pytest.MonkeyPatch, width: int, blocks: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    titles = ["variant", *(f"figure {n:2}" for n in range(12))]
    lines = [[name, *(f"{n * 1000 + len(name)}.5" for n in range(12))] for name in ("openvino-fp16", "openvino-w8a8x")]
    shown = columns(titles, lines)
    assert max(map(len, shown)) <= width
    assert all(any(cell in line for line in shown) for row in (titles, *lines) for cell in row)
    assert sum(line.startswith("openvino-fp16") for line in shown) == blocks


def test_one_column_wider_than_the_terminal_stands_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    assert columns(["a", "b" * 30], [["x", "1"]]) == ["a  " + "b" * 30, "x  " + "1".rjust(30)]


def test_long_text_is_wrapped_and_words_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    shown = wrapped(", ".join(["jack-o-lantern"] * 9)).splitlines()
    assert max(map(len, shown)) <= 30
    assert all(line.startswith("  jack-o-lantern") for line in shown)
