"""Commands on pictures, as people type them; in this process, since each would load a backend of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from edge_sd.apps import cli


@pytest.fixture
def edge_sd(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """Runs `edge-sd WORDS` in tmp_path: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["edge-sd", *words])
        with pytest.raises(SystemExit) as done:
            cli.main()
        told = capsys.readouterr()
        return int(done.value.code or 0), told.out, told.err

    return run


def test_a_picture_is_made_again_byte_for_byte(edge_sd, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    assert edge_sd("generate", "a cat", "--seed", "3", "--steps", "2", "--sampler", "euler_a", "-o", "a.png")[0] == 0
    code, out, _ = edge_sd("generate", "--from", "a.png", "-o", "b.png")
    assert (code, out) == (0, "b.png\n")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert edge_sd("generate", "a dog", "--from", "a.png", "--seed", "4", "-o", "c.png")[0] == 0
    code, out, _ = edge_sd("info", "c.png", "--json")
    document = json.loads(out)
    assert (document["request"]["prompt"], document["request"]["seed"]) == ("a dog", 4)
    assert (document["request"]["steps"], document["request"]["sampler"]) == (2, "euler_a")
    code, out, _ = edge_sd("info", "a.png")
    assert "prompt            a cat\n" in out


def test_mistakes_are_one_line(edge_sd, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    for words, told in (
        (["generate"], "no prompt"),
        (["generate", "--from", "plain.png"], "plain.png holds no parameters"),
        (["generate", "--from", "no.png"], "No such file"),
        (["info", "plain.png"], "plain.png holds no parameters"),
    ):
        code, out, error = edge_sd(*words)
        assert (code, out) == (2, "")
        assert told in error
        assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["plain.png"]
