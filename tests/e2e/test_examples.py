"""The programs of examples: each runs as it is, is short, writes a picture, and is in the folder's README."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

FOLDER = Path(__file__).parents[2] / "examples"
PROGRAMS = sorted(FOLDER.glob("*.py"))


def test_there_are_ten_short_programs_and_a_list_of_them() -> None:
    assert len(PROGRAMS) >= 10
    assert not [path.name for path in PROGRAMS if len(path.read_text("utf-8").splitlines()) > 40]
    assert not [path.name for path in PROGRAMS if f"({path.name})" not in (FOLDER / "README.md").read_text("utf-8")]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_a_program_runs(program: Path, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(program)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pictures = [*tmp_path.glob("*.png")]
    assert pictures
    for path in pictures:
        with Image.open(path) as picture:
            # One flat colour is no picture.
            assert max(high - low for low, high in picture.convert("RGB").getextrema()) > 50
