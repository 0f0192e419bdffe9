"""Commands that are killed, or whose disk fails, at each of their calls: the old state or the new one, and no debris
after the next start."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edge_sd.bundle.bundle import ModelBundle

from ..hub import Hub, serving
from .account import Tally
from .interrupted import FAIL_FROM, FAIL_ONCE, KILL, Commands, Ended, Fault, points

NAME = "some-org/tiny.sd"
# At most so many points of a command in full, and calls that write pieces of large files in between.
MOST = 100


@dataclass
class Scenario:
    """A command, and what may be there when it was stopped.

    prepare  makes the old state in an empty folder
    state    what a reader finds, with asserts that it is whole; None is nothing
    watched  the folder below which calls count; others, such as caches, may be anything
    """

    words: tuple[str, ...]
    prepare: Callable[[Path], None]
    state: Callable[[Path], Any]
    watched: str = "."
    call: str = ""
    arguments: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)

    def run(self, commands: Commands, at: Path, fault: Fault | None = None) -> Ended:
        def here(text: str) -> str:
            return text.replace("{at}", str(at))

        watched = at if self.watched == "." else at / self.watched
        return commands.run(
            *map(here, self.words), at=at, watched=watched, fault=fault, call=self.call,
            arguments=list(map(here, self.arguments)),
            **{name: here(value) for name, value in self.environment.items()},
        )  # fmt: skip


def debris(folder: Path) -> list[str]:
    """Names of half-written things."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob(".*"))
    return [name for name in found if name.endswith((".partial", ".old")) or "/.edge-sd-" in f"/{name}"]


def pixels(path: Path) -> Any:
    """Whether the picture is there, and its size; an opened one is whole."""
    if not path.exists():
        return None
    with Image.open(path) as image:
        image.load()
        return image.size


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
    lambda folder: (folder / "prompts.txt").write_text("a cat") and None, compared, "R",
)  # fmt: skip

SCENARIOS = {
    "generate": GENERATE, "cache clear": CLEAR, "tune": TUNE, "macos install": INSTALL,
    "macos install again": INSTALL_AGAIN, "train publish": PUBLISH,
}  # fmt: skip
# Those in which a call that fails is the whole command's end: the old state stays.
WRITERS = ("generate", "macos install again", "train publish")


class Trials:
    def __init__(self, commands: Commands, scenario: Scenario, folder: Path) -> None:
        self.commands, self.scenario, self.folder = commands, scenario, folder

    def fresh(self) -> Path:
        at = self.folder / "at"
        shutil.rmtree(at, ignore_errors=True)
        at.mkdir()
        self.scenario.prepare(at)
        return at

    def whole(self, fault: Fault) -> tuple[int, Any, Any]:
        """How many calls the command makes, and its old and new state."""
        at = self.fresh()
        old = self.scenario.state(at)
        done = self.scenario.run(self.commands, at, fault)
        assert done.code == 0, done.said
        return done.calls, old, self.scenario.state(at)

    def kill(self, tally: Tally, most: int = MOST) -> None:
        calls, old, new = self.whole(Fault())
        assert calls > 0
        for nth in points(calls, tally.count(min(calls, most))):
            at = self.fresh()
            fault = Fault(KILL, nth)
            with tally.trial(fault):
                done = self.scenario.run(self.commands, at, fault)
                assert done.code in (-9, 0), done.said
                self.check_between(at, old, new)
                again = self.scenario.run(self.commands, at)
                assert again.code == 0, again.said
                assert self.scenario.state(at) == new
                assert debris(at) == []

    def check_between(self, at: Path, old: Any, new: Any) -> None:
        found = self.scenario.state(at)
        if isinstance(old, int) and isinstance(new, int):
            assert new <= found <= old, found
        elif isinstance(new, list):
            assert set(found or ()) <= {*new}, found
        else:
            # A folder is exchanged in two renames; between them the next start finds the old one aside.
            assert found in (old, new) or (found is None and list(at.rglob(".*.old"))), found

    def fail(self, tally: Tally, mode: int) -> None:
        calls, old, new = self.whole(Fault(error=errno.EIO))
        for nth in points(calls, tally.count(min(calls, MOST))):
            at = self.fresh()
            fault = Fault(mode, nth, errno.ENOSPC if nth % 2 else errno.EIO)
            with tally.trial(fault):
                done = self.scenario.run(self.commands, at, fault)
                found = self.scenario.state(at)
                assert debris(at) == []
                if done.code == 0:
                    assert found == new
                    continue
                assert done.code in (1, 2)
                last = done.said.strip().splitlines()[-1]
                assert last.startswith(("edge-sd: ", "edge_sd.errors.")), done.said[-500:]
                assert found == old, found


@pytest.mark.fault(25, "SIGKILL at calls of generate, cache clear, tune, macos install, train publish; then again")
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_kill_leaves_the_old_state_or_the_new(name: str, commands: Commands, tmp_path: Path, tally: Tally) -> None:
    Trials(commands, SCENARIOS[name], tmp_path).kill(tally)


@pytest.mark.fault(25, "calls of generate, macos install, train publish that fail, once and for good")
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


@pytest.fixture
def hub(weights: Path, tmp_path: Path) -> Iterator[Hub]:
    folder = tmp_path / "repository"
    shutil.copytree(weights, folder)
    with serving(folder, NAME) as hub:
        yield hub


def pulling(hub: Hub, update: bool) -> Scenario:
    def prepare(folder: Path) -> None:
        if not update:
            return
        # An older revision, of which one file was another.
        shutil.copytree(hub.folder, folder / "models/some-org--tiny.sd")
        target = folder / "models/some-org--tiny.sd"
        rows = {
            row["rfilename"]: row for row in hub.info()["siblings"] if not row["rfilename"].endswith((".md", ".svg"))
        }
        files = {name: {"bytes": row["size"], "sha256": (row.get("lfs") or {}).get("sha256", "")}
                 for name, row in rows.items()}  # fmt: skip
        (target / "hub.json").write_text(
            json.dumps({"repo": NAME, "revision": "0" * 40, "form": "torch", "files": files})
        )
        (target / "model_index.json").write_bytes((target / "model_index.json").read_bytes() + b" ")

    def state(folder: Path) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("EDGE_SD_MODELS", str(folder / "models"))
            from edge_sd.bundle.library import find_model
            from edge_sd.errors import ModelNotFound

            try:
                root = find_model(NAME)
            except ModelNotFound:
                return None
            record = json.loads((root / "hub.json").read_text())
            if record["revision"] != "0" * 40:
                assert ModelBundle.open(root).verify() == []
            return record["revision"]

    environment = {"EDGE_SD_MODELS": "{at}/models", "HF_ENDPOINT": hub.url, "HF_HOME": "{at}/hf", "HF_HUB_OFFLINE": "0"}
    return Scenario(("models", "pull", NAME, "--quiet"), prepare, state, "models", environment=environment)


@pytest.mark.fault(25, "SIGKILL at calls of pull, new and as an update; then again")
@pytest.mark.parametrize("update", [False, True], ids=["new", "update"])
def test_a_kill_of_a_pull(update: bool, hub: Hub, commands: Commands, tmp_path: Path, tally: Tally) -> None:
    Trials(commands, pulling(hub, update), tmp_path).kill(tally, 50)
