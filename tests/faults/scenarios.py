"""A command that is killed, or whose disk fails, at each of its calls, and what may be there afterwards."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from .account import Tally
from .interrupted import KILL, Commands, Ended, Fault, points

# At most so many points of a command in full, and calls that write pieces of large files in between.
MOST = 100


@dataclass
class Scenario:
    """A command, and what may be there when it was stopped.

    prepare  makes the old state in an empty folder
    state    what a reader finds, with asserts that it is whole; None is nothing
    watched  the folder below which calls count; others, such as caches, may be anything
    goes_on  a failure leaves what is done so far, hidden, from which the next run goes on
    """

    words: tuple[str, ...]
    prepare: Callable[[Path], None]
    state: Callable[[Path], Any]
    watched: str = "."
    goes_on: bool = False
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
            # Things that are there, of which each is an old or a new one.
            assert set(found or ()) <= {*(old or ()), *new}, found
        else:
            # A folder is exchanged in two renames; between them the next start finds the old one aside.
            assert found in (old, new) or (found is None and list(at.rglob(".*.old"))), found

    def fail(self, tally: Tally, mode: int, most: int = MOST) -> None:
        calls, old, new = self.whole(Fault(error=errno.EIO))
        assert calls > 0
        for nth in points(calls, tally.count(min(calls, most))):
            at = self.fresh()
            fault = Fault(mode, nth, errno.ENOSPC if nth % 2 else errno.EIO)
            with tally.trial(fault):
                done = self.scenario.run(self.commands, at, fault)
                found = self.scenario.state(at)
                assert self.scenario.goes_on or debris(at) == []
                if done.code == 0:
                    assert found == new
                else:
                    assert done.code in (1, 2)
                    last = done.said.strip().splitlines()[-1]
                    assert last.startswith(("edge-sd: ", "edge_sd.errors.")), done.said[-500:]
                    if self.scenario.goes_on:
                        self.check_between(at, old, new)
                    else:
                        assert found == old, found
                if self.scenario.goes_on:
                    again = self.scenario.run(self.commands, at)
                    assert again.code == 0, again.said
                    assert self.scenario.state(at) == new
                    assert debris(at) == []
