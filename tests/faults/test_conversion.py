"""A conversion that is killed, or whose disk fails, at each of its calls: the old bundle or the new one, whole."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edge_sd.bundle.bundle import ModelBundle

from .account import Tally
from .interrupted import FAIL_FROM, FAIL_ONCE, KILL, Commands, Ended, Fault, points

OLD, NEW = ["openvino-fp32"], ["openvino-fp16", "openvino-fp32"]


@pytest.fixture(scope="module")
def base(conversions: Commands, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that has one variant."""
    folder = tmp_path_factory.mktemp("base")
    done = conversions.run(
        call="convert", arguments=[str(weights), str(folder / "b"), "fp32"], at=folder, watched=folder
    )
    assert done.code == 0, done.said
    return folder / "b"


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


class Place:
    """Where a bundle is converted into again and again."""

    def __init__(self, commands: Commands, weights: Path, base: Path, folder: Path) -> None:
        self.commands, self.weights, self.base, self.target = commands, weights, base, folder / "b"

    def fresh(self) -> None:
        shutil.rmtree(self.target, ignore_errors=True)
        shutil.copytree(self.base, self.target)

    def convert(self, fault: Fault | None = None) -> Ended:
        at = self.target.parent
        arguments = [str(self.weights), str(self.target)]
        return self.commands.run(call="convert", arguments=arguments, at=at, watched=at, fault=fault)

    def variants(self) -> list[str]:
        """Names of the variants that are listed, all of them whole."""
        bundle = ModelBundle.open(self.target)
        assert bundle.verify() == []
        return sorted(bundle.variants)

    def calls(self, fault: Fault) -> int:
        self.fresh()
        done = self.convert(fault)
        assert done.code == 0, done.said
        assert self.variants() == NEW
        return done.calls


@pytest.fixture
def place(conversions: Commands, weights: Path, base: Path, tmp_path: Path) -> Place:
    return Place(conversions, weights, base, tmp_path)


@pytest.mark.fault(1, "SIGKILL at calls of a conversion, and the same again")
def test_a_kill_at_any_call_lists_nothing_partial(place: Place, tally: Tally) -> None:
    whole = names(place.base)
    for n, nth in enumerate(points(place.calls(Fault()), tally.count(200))):
        place.fresh()
        fault = Fault(KILL, nth)
        with tally.trial(fault):
            assert place.convert(fault).code == -9
            assert place.variants() in (OLD, NEW)
            # To go on is half of the time.
            if tally.everything or n % 10 == 9:
                again = place.convert()
                assert again.code == 0, again.said
                assert place.variants() == NEW
                assert not [name for name in set(names(place.target)) - set(whole) if "partial" in name]


@pytest.mark.fault(2, "a call of a conversion that fails, once and for good: ENOSPC, EIO")
@pytest.mark.parametrize("mode", [FAIL_ONCE, FAIL_FROM], ids=["once", "for good"])
def test_a_call_that_fails_leaves_the_bundle_as_it_was(place: Place, tally: Tally, mode: int) -> None:
    calls = place.calls(Fault(error=errno.EIO))
    for nth in points(calls, calls if tally.everything else 4):
        place.fresh()
        before = names(place.target)
        fault = Fault(mode, nth, errno.ENOSPC if nth % 2 else errno.EIO)
        with tally.trial(fault):
            done = place.convert(fault)
            if done.code == 0:
                assert place.variants() == NEW
                continue
            said = done.said.strip().splitlines()[-1]
            assert said.startswith("edge_sd.errors.ConversionError: "), done.said[-300:]
            assert "nothing was added to the bundle" in said
            assert place.variants() == OLD
            assert names(place.target) == before


@pytest.mark.fault(3, "a disk that is full at a share of a conversion")
def test_a_disk_that_fills_up_leaves_the_bundle_as_it_was(
    weights: Path, base: Path, tmp_path: Path, tally: Tally
) -> None:
    def convert(size: int) -> dict[str, object] | None:
        (tmp_path / "disk").mkdir(exist_ok=True)
        words = ["unshare", "-rm", sys.executable, "-m", "tests.faults.actions", weights, base, tmp_path / "disk", size]
        done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found: dict[str, object] = json.loads(done.stdout)
        return found

    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no namespaces for mounts")
    old = sum(path.stat().st_size for path in base.rglob("*"))
    # The tokenizer is written before what it replaces is removed.
    new = sum(path.stat().st_size for path in (base / "openvino-fp32").rglob("*"))
    for share in (25, 50, 90, 99) if tally.everything else (50, 99):
        with tally.trial(f"{share} %"):
            found = convert(old + new * share // 100)
            assert found is not None
            assert "nothing was added to the bundle" in str(found["said"])
            assert (found["variants"], found["problems"]) == (OLD, [])
            assert found["names"] == names(base)
