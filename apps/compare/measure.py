"""Let all artists of a comparison draw and be timed. Finished work is on disk, so a second run does the rest.

FOLDER/work/ARTIST/STEM.npy, STEM.png    latents of every step, and the picture
FOLDER/work/ARTIST/artist.json           its device and settings
FOLDER/work/ARTIST/times-N.json          what round N measured
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from edge_sd.errors import OutputError

from .plan import Artist, Comparison, Shot

Report = Callable[[str, float], None]


@dataclass
class Work:
    """An artist's folder, its description, its timed rounds, and the reason if it failed."""

    folder: Path
    about: dict[str, Any] = field(default_factory=dict)
    times: list[dict[str, Any]] = field(default_factory=list)
    error: str = ""


def measure(comparison: Comparison, folder: Path, rounds: int, report: Report) -> dict[Artist, Work]:
    """All pictures first, which also reads every file from the disk once; then `rounds` rounds of one fresh process
    each, all artists taking turns, so that a busy minute of the machine hits all of them alike.

    Raises OutputError where `folder` can't be written to. An artist that fails has its reason in `Work.error`.
    """
    work = {artist: Work(folder / "work" / comparison.folder_name(artist)) for artist in comparison.artists()}
    shots = comparison.artists()
    total = sum(len(each) for each in shots.values()) + rounds * len(comparison.timed())
    done = 0
    for artist, its in work.items():
        _make_folder(its.folder)
        missing = [shot for shot in shots[artist] if not (its.folder / f"{shot.stem}.png").is_file()]
        done += len(shots[artist]) - len(missing)
        if missing:
            label = f"{artist.name} draws"

            def one_more(said: dict[str, Any], label: str = label) -> None:
                nonlocal done
                done += "done" in said
                report(label, done / total)

            report(label, done / total)
            its.error = _run(_job(comparison, artist, missing, its.folder), one_more)
        if not its.error:
            its.about = json.loads((its.folder / "artist.json").read_text("utf-8"))
    for n in range(rounds):
        # Forwards and backwards in turn, so that no artist always follows the same one.
        for artist in comparison.timed()[:: -1 if n % 2 else 1]:
            its, path = work[artist], work[artist].folder / f"times-{n}.json"
            report(f"{artist.name} is timed, round {n + 1} of {rounds}", done / total)
            if not its.error and not path.is_file():
                job = _job(comparison, artist, [comparison.shots[0]], its.folder)
                its.error = _run({**job, "timed": True, "output": str(path)}, lambda said: None)
            if not its.error:
                its.times.append(json.loads(path.read_text("utf-8")))
            done += 1
    return work


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be made: {error.strerror or error}") from error


def _job(comparison: Comparison, artist: Artist, shots: list[Shot], folder: Path) -> dict[str, Any]:
    return {
        "artist": asdict(artist),
        "model": str(comparison.bundle.root.absolute()),
        "weights": str(comparison.weights.absolute()) if comparison.weights else None,
        "wishes": asdict(comparison.wishes),
        "shots": [asdict(shot) for shot in shots],
        "folder": str(folder.absolute()),
        "timed": False,
    }


def _run(job: dict[str, Any], hear: Callable[[dict[str, Any]], None]) -> str:
    """Run a worker to its end; the reason of its failure, or "". Raises OutputError where it can't write."""
    command = [sys.executable, "-m", "edge_sd.apps.compare.worker"]
    reason = ""
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, encoding="utf-8"
        ) as worker,
    ):
        assert worker.stdin
        assert worker.stdout
        try:
            # A worker that ended before it read its job says why on stderr.
            with contextlib.suppress(BrokenPipeError), worker.stdin:
                worker.stdin.write(json.dumps({**job, "started": time.time()}))
            for line in worker.stdout:
                said = json.loads(line)
                reason = said.get("error", reason)
                if said.get("unwritable"):
                    raise OutputError(reason)
                hear(said)
            code = worker.wait()
        except BaseException:  # Ctrl-C as well: no worker is left behind.
            worker.kill()
            raise
        return "" if code == 0 else reason or _last_words(code, errors)


def _last_words(code: int, errors: IO[str]) -> str:
    if code < 0:
        return f"its process was ended by {signal.Signals(-code).name}" + (
            ", as systems do that are out of memory" if -code == getattr(signal, "SIGKILL", 9) else ""
        )
    errors.seek(0)
    lines = [line.strip() for line in errors.read().splitlines() if line.strip()]
    return (lines[-1] if lines else f"its process ended with {code}")[:300]
