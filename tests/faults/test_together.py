"""Many processes and threads at the same thing at once: one valid result, and all succeed."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edge_sd import Pipeline, Request
from edge_sd.backends.openvino import cache
from edge_sd.bundle.bundle import ModelBundle
from edge_sd.files import write_atomically

from .account import Tally

CONVERT = "import sys; from tests.faults.actions import convert; convert(*sys.argv[1:])"


def together(count: int, work: Callable[[int], None]) -> list[BaseException]:
    """Run `work` in so many threads that begin at once; what they raised."""
    gate, raised = threading.Barrier(count), []

    def run(n: int) -> None:
        try:
            gate.wait()
            work(n)
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    raised += [TimeoutError("a thread hangs") for thread in threads if thread.is_alive()]
    return raised


@pytest.mark.fault(7, "processes that convert the same variant at once")
def test_processes_that_convert_at_once_make_one_variant(weights: Path, tmp_path: Path, tally: Tally) -> None:
    command = [sys.executable, "-c", CONVERT, str(weights), str(tmp_path / "b")]
    root = Path(__file__).parents[2]
    for _ in range(tally.count(10)):
        shutil.rmtree(tmp_path / "b", ignore_errors=True)
        started = [subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, text=True)
                   for _ in range(8 if tally.everything else 3)]  # fmt: skip
        for each in started:
            with tally.trial():
                _, said = each.communicate(timeout=300)
                assert each.returncode == 0, said
        with tally.trial("the bundle"):
            assert ModelBundle.open(tmp_path / "b").verify() == []
            assert not [name for name in os.listdir(tmp_path / "b") if name.startswith(".")]


@pytest.mark.fault(7, "50 threads that write and read one file, and one entry of a cold cache")
def test_threads_that_write_one_file_leave_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tally: Tally
) -> None:
    monkeypatch.setenv("EDGE_SD_CACHE", str(tmp_path / "cache"))
    blobs = {n: {"whole": bytes([n]) * (400_000 + 1000 * n)} for n in range(50)}
    path = tmp_path / "x.json"

    def work(n: int) -> None:
        write_atomically(path, blobs[n]["whole"])
        data = path.read_bytes()
        assert data == blobs[data[0]]["whole"], "half of a file"
        cache.write("a" * 24, blobs[n])
        found = cache.read("a" * 24)
        assert found is not None, "a damaged entry"
        assert bytes(found["whole"]) == blobs[int(found["whole"][0])]["whole"]

    for _ in range(tally.count(20)):
        for error in together(50, work):
            with tally.trial("a thread"):
                raise error
        tally.held(50)
    assert os.listdir(tmp_path / "cache/openvino") == ["a" * 24 + ".blob"]
    assert sorted(os.listdir(tmp_path)) == ["cache", "x.json"]


@pytest.mark.fault(7, "pipelines that open one cold cache in threads, and draw the same")
def test_pipelines_that_open_one_cold_cache_draw_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tally: Tally
) -> None:
    monkeypatch.setenv("EDGE_SD_CACHE", str(tmp_path / "cache"))
    drawn: dict[int, np.ndarray] = {}

    def work(n: int) -> None:
        with Pipeline.open("emoji", "cpu", "openvino-fp16") as pipeline:
            result = pipeline.generate(Request("a red apple", seed=1, steps=1, width=64, height=64))
            drawn[n] = np.asarray(result.pictures[0].image)

    raised = together(50 if tally.everything else 4, work)
    for n in range(len(drawn) + len(raised)):
        with tally.trial(n):
            assert not raised, raised[0]
            # A compiled graph may sum in another order than one that was read.
            assert np.abs(drawn[n].astype(int) - drawn[0]).max() <= 1
    assert not [name for name in os.listdir(tmp_path / "cache/openvino") if name.startswith(".")]


@pytest.mark.fault(14, "threads that draw with one server's queue and cancel at random: every one ends")
def test_random_cancels_leave_no_thread_waiting(tally: Tally) -> None:
    from edge_sd.pipeline.queue import Queue

    from .test_numbers import FakeBackend, opened

    rng = random.Random(0)
    with opened(FakeBackend()) as pipeline, Queue(pipeline) as queue:
        futures = [queue.submit(Request("a cat", seed=n, steps=rng.randrange(1, 8))) for n in range(tally.count(500))]
        for n, future in enumerate(futures):
            if n % 3 == 0:
                future.cancel()
        for n, future in enumerate(futures):
            with tally.trial(n):
                assert future.cancelled() or future.result(timeout=60).pictures


@pytest.mark.skipif(sys.platform == "win32", reason="timers of POSIX")
@pytest.mark.fault(14, "Ctrl-C at any moment of drawing: no crash, and the next picture is as if made fresh")
def test_a_picture_after_ctrl_c_is_as_if_made_fresh(tally: Tally) -> None:
    count = tally.count(300)
    command = [sys.executable, "-X", "faulthandler", "-m", "tests.faults.ctrl_c", str(count)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    said = done.stdout.split()
    for n in range(count):
        with tally.trial(n):
            assert said[n : n + 1] == ["same"], done.stderr.strip().splitlines()[:1]
    assert done.returncode == 0, done.stderr
