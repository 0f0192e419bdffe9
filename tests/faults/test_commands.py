"""Commands that are killed, or whose disk fails, at each of their calls: the old state or the new one, and no debris
after the next start."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from .account import Tally
from .interrupted import FAIL_FROM, FAIL_ONCE, Commands
from .scenarios import Scenario, Trials, pixels


def old_picture(folder: Path) -> None:
    Image.new("RGB", (8, 8)).save(folder / "cat.png")


GENERATE = Scenario(
    ("generate", "a cat", "--steps", "1", "--size", "64", "--seed", "1", "-o", "cat.png", "--overwrite", "--quiet"),
    old_picture,
    lambda folder: pixels(folder / "cat.png"),
)


def full_cache(folder: Path) -> None:
    for name in ("openvino/" + "a" * 24 + ".blob", "openvino/" + "b" * 24 + ".blob", "measured/" + "c" * 16 + ".json",
                 "assembled/" + "d" * 16 + "/weights.bin", "openvino/." + "e" * 24 + ".blob.7.1.partial"):  # fmt: skip
        path = folder / "cache" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 1000)
    (folder / "cache/openvino/notes.txt").write_text("of a person")


def cleared(folder: Path) -> Any:
    assert (folder / "cache/openvino/notes.txt").read_text() == "of a person"
    return sum(path.is_file() for path in (folder / "cache").rglob("*")) - 1


CLEAR = Scenario(("cache", "clear"), full_cache, cleared, environment={"EDGE_SD_CACHE": "{at}/cache"})


def measured(folder: Path) -> Any:
    files = list((folder / "cache/measured").glob("*.json"))
    assert all(json.loads(path.read_text())["rows"] for path in files)
    return len(files) or None


TUNE = Scenario(
    (), lambda folder: None, measured, call="remember", arguments=("emoji",),
    environment={"EDGE_SD_CACHE": "{at}/cache"},
)  # fmt: skip
# The command itself measures for seconds before it writes.
TUNE_WHOLE = Scenario(
    ("tune", "emoji", "--seconds", "15"), lambda folder: None, measured, "cache/measured",
    environment={"EDGE_SD_CACHE": "{at}/cache"},
)  # fmt: skip


def installed(folder: Path) -> Any:
    command, workflow = (
        folder / "Desktop/Draw with edge-sd.command",
        folder / "Library/Services/Draw with edge-sd.workflow",
    )
    found = []
    if command.exists():
        assert "macos draw" in command.read_text()
        assert os.access(command, os.X_OK)
        found.append("command")
    if workflow.exists():
        assert {each.name for each in (workflow / "Contents").iterdir()} == {"Info.plist", "document.wflow"}
        found.append("workflow")
    return found


def install_before(folder: Path) -> None:
    from edge_sd.apps.macos.install import install

    install(folder, "/usr/bin/python2")


INSTALL = Scenario((), lambda folder: None, installed, call="install", arguments=("{at}",))
INSTALL_AGAIN = Scenario((), install_before, installed, call="install", arguments=("{at}",))


def published(folder: Path) -> Any:
    """The word that every file of the model says."""
    model = folder / "emoji"
    if not model.exists():
        return None
    words = {path.read_text() for path in model.rglob("*") if path.is_file()}
    assert len(words) == 1, words
    assert len(list(model.rglob("weights"))) == 2
    return words.pop()


def published_before(folder: Path) -> None:
    for name in ("unet/weights", "vae/weights", "edge_sd.json"):
        (folder / "emoji" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "emoji" / name).write_text("old")


PUBLISH = Scenario((), published_before, published, call="publish", arguments=("{at}/work", "{at}/emoji", "new"))


def cold(folder: Path) -> Any:
    """The pixels that were drawn, whatever the cache of compiled graphs has."""
    path = folder / "cat.png"
    if not path.exists():
        return None
    with Image.open(path) as image:
        return hashlib.sha256(image.tobytes()).hexdigest()


COLD = Scenario(
    ("generate", "a cat", "--steps", "1", "--size", "64", "--seed", "1", "-o", "cat.png", "--overwrite", "--quiet"),
    lambda folder: None, cold, "cache/openvino", environment={"EDGE_SD_CACHE": "{at}/cache"},
)  # fmt: skip


def compared(folder: Path) -> Any:
    """Whether there is a report; pictures and latents that are there are whole."""
    for path in folder.rglob("[!.]*.png"):
        pixels(path)
    for path in folder.rglob("[!.]*.npy"):
        np.load(path)
    report = folder / "R/report.json"
    return None if not report.exists() else sorted(json.loads(report.read_text()))


COMPARE = Scenario(
    ("compare", "emoji", "--variants", "openvino-fp16,openvino-fp16-lcm", "--reference", "openvino-fp16", "--prompts",
     "prompts.txt", "--steps", "1", "--rounds", "0", "--swap", "0", "--report", "R", "--quiet"),
    lambda folder: (folder / "prompts.txt").write_text("a cat") and None, compared, "R", goes_on=True,
)  # fmt: skip

SCENARIOS = {
    "generate": GENERATE, "cache clear": CLEAR, "tune": TUNE, "macos install": INSTALL,
    "macos install again": INSTALL_AGAIN, "train publish": PUBLISH,
}  # fmt: skip
# Those in which a call that fails is the whole command's end: the old state stays.
WRITERS = ("generate", "tune", "macos install again", "train publish")


@pytest.mark.fault(25, "SIGKILL at calls of generate, cache clear, tune, macos install, train publish; then again")
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_kill_leaves_the_old_state_or_the_new(name: str, commands: Commands, tmp_path: Path, tally: Tally) -> None:
    Trials(commands, SCENARIOS[name], tmp_path).kill(tally)


@pytest.mark.fault(25, "calls of generate, tune, macos install, train publish that fail, once and for good")
@pytest.mark.parametrize("mode", [FAIL_ONCE, FAIL_FROM], ids=["once", "for good"])
@pytest.mark.parametrize("name", WRITERS)
def test_a_call_that_fails_leaves_the_old_state(
    name: str, mode: int, commands: Commands, tmp_path: Path, tally: Tally
) -> None:
    Trials(commands, SCENARIOS[name], tmp_path).fail(tally, mode)


@pytest.mark.fault(16, "SIGKILL at calls that keep compiled graphs: the second start draws the same")
def test_a_kill_while_graphs_are_kept_costs_a_compilation(commands: Commands, tmp_path: Path, tally: Tally) -> None:
    Trials(commands, COLD, tmp_path).kill(tally, 40)


@pytest.mark.fault(25, "SIGKILL at calls of compare; then again")
def test_a_kill_of_a_comparison_loses_nothing_that_was_drawn(commands: Commands, tmp_path: Path, tally: Tally) -> None:
    if not tally.everything:
        pytest.skip("minutes: in full numbers only")
    Trials(commands, COMPARE, tmp_path).kill(tally, 8)


@pytest.mark.fault(25, "calls of compare that fail, once and for good; then again")
@pytest.mark.parametrize("mode", [FAIL_ONCE, FAIL_FROM], ids=["once", "for good"])
def test_a_full_disk_under_a_comparison_is_one_line(
    mode: int, commands: Commands, tmp_path: Path, tally: Tally
) -> None:
    if not tally.everything:
        pytest.skip("minutes: in full numbers only")
    Trials(commands, COMPARE, tmp_path).fail(tally, mode, 8)


@pytest.mark.fault(25, "calls of tune as a whole that fail, or are the last before SIGKILL")
def test_a_disk_that_fails_under_tune(commands: Commands, tmp_path: Path, tally: Tally) -> None:
    if not tally.everything:
        pytest.skip("minutes: in full numbers only")
    trials = Trials(commands, TUNE_WHOLE, tmp_path)
    trials.fail(tally, FAIL_ONCE, 4)
    trials.kill(tally, 4)
