"""Where caches lie: the platform's place, moved there once, and nothing else of a folder is ever touched."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from edge_sd.apps.cli import app
from edge_sd.backends.openvino import cache
from edge_sd.caches import CACHES, cache_folder
from edge_sd.paths import cache_home, models_home

KEY = "0123456789abcdef"
# An entry of each cache, as its writer names it.
ENTRIES = {
    "openvino": f"{KEY}01234567.blob",
    "compiled": f"Unet-{KEY}.mlmodelc/model.mil",
    "edited": f"{KEY}/Unet.mlpackage/Manifest.json",
    "seen": f"{KEY}{KEY}.json",
    "assembled": f"{KEY}/Unet.mlpackage/Manifest.json",
    "measured": f"{KEY}.json",
    "bench": "sd15-random/source/model_index.json",
}


def fill(folder: Path, name: str) -> Path:
    path = folder / ENTRIES[name]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"1234567")
    return path


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("EDGE_SD_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("EDGE_SD_MODELS", str(tmp_path / "data/models"))
    return tmp_path


def test_every_cache_has_an_entry_here() -> None:
    assert {each.name for each in CACHES} == {*ENTRIES}


@pytest.mark.skipif(sys.platform == "win32", reason="the variable is of XDG")
def test_caches_lie_where_the_platform_wants_them(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_home() == home / "cache/edge-sd"
    cache.write("a", {"whole": b"graph"})
    assert (home / "cache/edge-sd/openvino/a.blob").is_file()
    assert not (home / "data").exists()
    monkeypatch.setenv("EDGE_SD_CACHE", str(home / "own"))
    assert cache_folder("measured") == home / "own/measured"


@pytest.mark.parametrize("name", [*ENTRIES])
def test_what_lay_beside_the_models_is_moved_once(home: Path, name: str) -> None:
    before = home / "data" / name
    fill(before, name)
    assert (cache_folder(name) / ENTRIES[name]).read_bytes() == b"1234567"
    assert not before.exists()
    fill(before, name).write_bytes(b"another")
    assert (cache_folder(name) / ENTRIES[name]).read_bytes() == b"1234567", "once"


def test_a_persons_own_files_beside_the_models_stay(home: Path) -> None:
    fill(home / "data/openvino", "openvino")
    mine = ["bench/press.txt", "bench/source/a.py", "compiled/.git-old/config", "compiled/.my-notes",
            "measured/.a.partial", "openvino/model.xml"]  # fmt: skip
    for own in mine:
        (home / "data" / own).parent.mkdir(parents=True, exist_ok=True)
        (home / "data" / own).write_text("mine")
    for each in CACHES:
        each.folder()
    CliRunner().invoke(app, ["cache", "clear"])
    left = sorted(path.relative_to(home / "data").as_posix() for path in (home / "data").rglob("*") if path.is_file())
    assert left == mine


def test_a_folder_that_was_chosen_takes_nothing_along(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = fill(home / "data/openvino", "openvino")
    monkeypatch.setenv("EDGE_SD_CACHE", str(home / "own"))
    assert not (cache_folder("openvino") / before.name).exists()
    assert "of an earlier version" not in CliRunner().invoke(app, ["cache", "show"]).stdout
    CliRunner().invoke(app, ["cache", "clear", "openvino"])
    assert before.exists()


def test_what_could_not_be_moved_is_shown_and_cleared(home: Path) -> None:
    cache_folder("openvino").mkdir(parents=True)
    before = fill(home / "data/openvino", "openvino")
    shown = CliRunner().invoke(app, ["cache", "show"]).stdout
    assert f"1 entry, 0.0 MB  graphs compiled by OpenVINO; in {before.parent}, of an earlier version" in shown
    CliRunner().invoke(app, ["cache", "clear", "openvino"])
    assert not before.exists()


def shown() -> dict[str, Any]:
    rows = json.loads(CliRunner().invoke(app, ["cache", "show", "--json"]).stdout)["caches"]
    return {row["name"]: (row["entries"], row["bytes"]) for row in rows}


def test_show_counts_and_clear_removes_what_is_named(home: Path) -> None:
    for name in ENTRIES:
        fill(cache_folder(name), name)
    beside = cache_folder("openvino") / f".{KEY}01234567.blob.99.partial"
    beside.write_bytes(b"12")
    models_home().mkdir(parents=True)
    assert shown() == {name: (2, 9) if name == "openvino" else (1, 7) for name in ENTRIES}
    done = CliRunner().invoke(app, ["cache", "clear", "openvino", "measured"])
    assert f"openvino: 2 entries, 0.0 MB removed from {cache_folder('openvino')}" in done.stdout
    assert shown() == {name: (0, 0) if name in ("openvino", "measured") else (1, 7) for name in ENTRIES}
    assert not beside.exists()
    assert len(json.loads(CliRunner().invoke(app, ["cache", "clear", "--json"]).stdout)) == len(ENTRIES)
    assert CliRunner().invoke(app, ["cache", "clear"]).stdout == "there was nothing to remove\n"
    assert models_home().is_dir()


def test_a_cache_that_is_none_is_refused_with_those_there_are() -> None:
    error = CliRunner().invoke(app, ["cache", "clear", "opnvino"]).exception
    assert str(error).startswith("no cache 'opnvino'; valid: ")
    assert all(name in str(error) for name in ENTRIES)
