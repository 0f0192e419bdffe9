"""`edge-sd batch --dask` on a real cluster of processes: one worker is killed, one falls asleep."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edge_sd import Pipeline, Request, __version__
from edge_sd.apps.batch import cluster
from edge_sd.apps.batch.cluster import portable
from edge_sd.apps.batch.place import Place
from edge_sd.errors import InvalidRequest

from .test_batch import check_complete, kept, lines
from .test_cli import edge_sd

pytest.importorskip("distributed")
ROWS = 14
# Dask runs a preload's text twice.
SLOW = """
import time
from edge_sd.pipeline.pipeline import Pipeline
def slow(draw):
    def slowly(*given, **named):
        time.sleep(600)
        return draw(*given, **named)
    return slowly
if Pipeline.draw.__name__ == "draw":
    Pipeline.draw = slow(Pipeline.draw)
"""


@contextmanager
def started(log: Path, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as said, subprocess.Popen(
        [sys.executable, "-m", "distributed.cli." + words[0], *words[1:]], stderr=said, stdout=said, cwd=log.parent
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.kill()


def worker(folder: Path, address: str, name: str, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    return started(folder / f"{name}.log", "dask_worker", address, "--name", name, "--nthreads", "1", "--no-nanny",
                   "--no-dashboard", "--local-directory", str(folder / name), *words)  # type: ignore[return-value]  # fmt: skip


@contextmanager
def scheduler(folder: Path) -> Iterator[str]:
    words = ("dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--no-show")
    with started(folder / "scheduler.log", *words) as process:
        while process.poll() is None:
            found = re.search(r"Scheduler at:\s+(tcp://\S+)", (folder / "scheduler.log").read_text("utf-8"))
            if found:
                yield found[1]
                return
            threading.Event().wait(0.1)
        pytest.fail((folder / "scheduler.log").read_text("utf-8"))


def test_a_worker_that_is_killed_and_one_that_sleeps_lose_nothing_and_hold_nothing_up(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n} cats", "seed": n, "steps": 2, "size": 64} for n in range(ROWS)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "slow.py").write_text(SLOW)
    with (
        scheduler(tmp_path) as address,
        worker(tmp_path, address, "doomed", "--preload", str(tmp_path / "slow.py")) as doomed,
        worker(tmp_path, address, "slow", "--preload", str(tmp_path / "slow.py")),
        worker(tmp_path, address, "quick"),
        subprocess.Popen(
            [sys.executable, "-m", "edge_sd", "batch", "p.jsonl", "--dask", address], cwd=tmp_path, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "DASK_DISTRIBUTED__LOGGING": ""},
        ) as batch,
    ):  # fmt: skip
        assert batch.stdout is not None
        first = [batch.stdout.readline() for _ in range(3)]
        doomed.send_signal(signal.SIGKILL)
        rest, said = batch.communicate(timeout=100)
    assert batch.returncode == 0, said
    assert len({*first, *rest.splitlines(keepends=True)}) == ROWS, "each picture is said once"
    check_complete(tmp_path / "p", ROWS)
    assert said.count("openvino-fp16 on cpu") == 3, "each worker says which variant it takes"
    assert said.count("is gone; others draw what it had") == 1
    assert len({line["worker"] for line in lines(tmp_path / "p")}) == 1, "one worker drew, also what the others had"
    with Pipeline.open("emoji") as pipeline:
        for line in lines(tmp_path / "p"):
            n = line["row"] - 1
            alone = pipeline.generate(Request(f"{n} cats", seed=n, steps=2, width=64, height=64)).pictures[0].image
            with Image.open(tmp_path / "p" / line["file"]) as image:
                assert np.array_equal(np.asarray(image), np.asarray(alone)), "the pictures of this machine"
    assert len(kept(tmp_path / "p")) == ROWS


def test_without_a_scheduler_it_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a cat")
    done = edge_sd("batch", "p.txt", "--dask", "nonsense://127.0.0.1:1", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "no scheduler of Dask answers at nonsense://127.0.0.1:1" in done.stderr.splitlines()[-1]


def test_a_worker_says_why_it_can_not_draw() -> None:
    place = Place("emoji", None, "auto", "speed", "exact", False)
    assert cluster.settle(place, "0.0.1") == (False, f"it has edge-sd {__version__}, this is 0.0.1")
    able, why = cluster.settle(replace(place, model="best"), __version__)
    assert not able
    assert "installed: emoji" in why


def test_what_a_worker_lacks_is_refused_and_pixels_go_along(tmp_path: Path) -> None:
    Image.effect_noise((64, 64), 80).save(tmp_path / "a.png")
    moved = portable(Request("a cat", seed=1, image=tmp_path / "a.png", mask=tmp_path / "a.png"))
    referring = portable(Request("a cat", seed=1, references=[tmp_path / "a.png"]))
    (tmp_path / "a.png").unlink()
    assert [each.size for each in referring.references] == [(64, 64)]
    with Pipeline.open("emoji") as pipeline:
        assert pipeline.resolve(moved).mask
    with pytest.raises(InvalidRequest, match="loras is a file of this machine"):
        portable(Request("a cat", seed=1, loras={"a.safetensors": 1.0}))
