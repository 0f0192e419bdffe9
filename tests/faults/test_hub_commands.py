"""`pull` and `run` against a local hub, killed or on a disk that fails at each of their calls: the old model or the new
one, whole, and the next start goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from edge_sd.bundle.bundle import ModelBundle

from ..conftest import convert
from ..hub import Hub, serving
from .account import Tally
from .conftest import CONVERSION
from .interrupted import FAIL_FROM, FAIL_ONCE, Commands
from .scenarios import Scenario, Trials, pixels

NAME = "some-org/tiny.sd"
FOLDER = "models/some-org--tiny.sd"
OLDER = "0" * 40


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
        shutil.copytree(hub.folder, folder / FOLDER)
        target = folder / FOLDER
        rows = {
            row["rfilename"]: row for row in hub.info()["siblings"] if not row["rfilename"].endswith((".md", ".svg"))
        }
        files = {name: {"bytes": row["size"], "sha256": (row.get("lfs") or {}).get("sha256", "")}
                 for name, row in rows.items()}  # fmt: skip
        (target / "hub.json").write_text(json.dumps({"repo": NAME, "revision": OLDER, "form": "torch", "files": files}))
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
            if record["revision"] != OLDER:
                assert ModelBundle.open(root).verify() == []
            return record["revision"]

    environment = {"EDGE_SD_MODELS": "{at}/models", "HF_ENDPOINT": hub.url, "HF_HOME": "{at}/hf", "HF_HUB_OFFLINE": "0"}
    words = ("models", "pull", NAME, "--quiet")
    return Scenario(words, prepare, state, "models", goes_on=True, environment=environment)


@pytest.mark.fault(25, "SIGKILL at calls of pull, new and as an update; then again")
@pytest.mark.parametrize("update", [False, True], ids=["new", "update"])
def test_a_kill_of_a_pull(update: bool, hub: Hub, commands: Commands, tmp_path: Path, tally: Tally) -> None:
    Trials(commands, pulling(hub, update), tmp_path).kill(tally, 50)


@pytest.mark.fault(25, "calls of pull, new and as an update, that fail, once and for good; then again")
@pytest.mark.parametrize("mode", [FAIL_ONCE, FAIL_FROM], ids=["once", "for good"])
@pytest.mark.parametrize("update", [False, True], ids=["new", "update"])
def test_a_full_disk_under_a_pull(
    update: bool, mode: int, hub: Hub, commands: Commands, tmp_path: Path, tally: Tally
) -> None:
    if mode == FAIL_ONCE and not tally.everything:
        pytest.skip("half a minute: in full numbers only")
    Trials(commands, pulling(hub, update), tmp_path).fail(tally, mode, 20)


@dataclass(frozen=True)
class Running:
    """Processes for `edge-sd run`, the hub that they ask, and what converting its model makes."""

    commands: Commands
    hub: Hub
    made: Path


@pytest.fixture(scope="module")
def running(library: Path, shallow: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    root = tmp_path_factory.mktemp("run")
    shutil.copytree(shallow, root / "repository", ignore=shutil.ignore_patterns("controlnet"))
    convert(root / "repository", root / "made", "fp16")
    # What a conversion imports takes longer than all else, and the hub's library reads these when it is imported.
    modules = (*CONVERSION, "huggingface_hub", "diffusers", "transformers", "openvino", "edge_sd.pipeline.pipeline")
    with serving(root / "repository", NAME) as hub:
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(root / "hf"), "HF_HUB_OFFLINE": "0"}
        (root / "commands").mkdir()
        with Commands(root / "commands", library, modules, environment) as commands:
            yield Running(commands, hub, root / "made")


def run_scenario(running: Running, update: bool) -> Scenario:
    """Pull, convert and draw; an `update` replaces what was pulled and converted of an older revision."""

    def prepare(folder: Path) -> None:
        if not update:
            return
        pulled = folder / FOLDER
        shutil.copytree(running.hub.folder, pulled)
        (pulled / "model_index.json").write_bytes((pulled / "model_index.json").read_bytes() + b" ")
        record = json.dumps({"repo": NAME, "revision": OLDER, "form": "torch", "files": {}})
        shutil.copytree(running.made, folder / f"{FOLDER}.converted")
        for each in (pulled, folder / f"{FOLDER}.converted"):
            (each / "hub.json").write_text(record)

    def state(folder: Path) -> Any:
        from edge_sd.bundle.library import find_model
        from edge_sd.errors import ModelNotFound

        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("EDGE_SD_MODELS", str(folder / "models"))
            try:
                assert ModelBundle.open(find_model(NAME)).verify() == []
            except ModelNotFound:
                assert not update, "what was there is gone"
                return []
        found = []
        for kind in ("", ".converted"):
            if (record := folder / f"{FOLDER}{kind}" / "hub.json").is_file():
                found.append(f"{kind} {json.loads(record.read_text())['revision']}")
        return [*found, *(["picture"] if pixels(folder / "cat.png") else [])]

    words = (NAME, "a cat", "--yes", "--revision", "main", "--steps", "2", "-o", "cat.png", "--overwrite", "--quiet")
    return Scenario(
        (), prepare, state, call="run", arguments=(str(running.made), *words), goes_on=True,
        environment={"EDGE_SD_MODELS": "{at}/models"},
    )  # fmt: skip


@pytest.mark.fault(25, "SIGKILL at calls of run: pull, conversion and picture, new and as an update; then again")
@pytest.mark.parametrize("update", [False, True], ids=["new", "update"])
def test_a_kill_of_run(update: bool, running: Running, tmp_path: Path, tally: Tally) -> None:
    Trials(running.commands, run_scenario(running, update), tmp_path).kill(tally, 30)


@pytest.mark.fault(25, "calls of run that fail for good, new and as an update; then again")
@pytest.mark.parametrize("update", [False, True], ids=["new", "update"])
def test_a_full_disk_under_run(update: bool, running: Running, tmp_path: Path, tally: Tally) -> None:
    Trials(running.commands, run_scenario(running, update), tmp_path).fail(tally, FAIL_FROM, 10)
