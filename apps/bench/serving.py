"""The server beside the pipeline: what HTTP costs a picture, several clients at once, cancelling, and a steady load."""

from __future__ import annotations

import http.client
import json
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edge_sd import Pipeline, Request
from edge_sd.errors import DeviceError

from .report import Column, Table

CLIENTS = 8
PROMPT = "a red apple, glossy style"
# Seconds of the steady load, for each round; `--rounds 30` is ten minutes.
LOAD_SECONDS = 20
BARS = {"latency": "≤ 1.15", "throughput": "≥ 1.4", "health": "< 100", "cancel": "≤ 1", "page": "≤ 150", "errors": "0"}


class Client:
    """A client with a connection for each request."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)

    def ask(self, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
        """Status and JSON of an answer."""
        data = None if body is None else json.dumps(body)
        headers = {"content-type": "application/json"}
        self._connection.connect()
        try:
            self._connection.request("GET" if body is None else "POST", path, data, headers)
            answer = self._connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            # The server ends a connection that is idle for long, as one is on a slow machine.
            self._connection.close()

    def draw(self, seed: int) -> float:
        """Seconds of one picture over the OpenAI API."""
        started = time.perf_counter()
        status, answer = self.ask("/v1/images/generations", {"prompt": PROMPT, "seed": seed})
        if status != 200:
            raise DeviceError(f"the server answered {status}: {answer}")
        return time.perf_counter() - started


@contextmanager
def serving() -> Iterator[tuple[int, int]]:
    """Port and process id of `edge-sd serve` on a free port, with a history of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "edge_sd", "serve", "--port", "0", "--folder", folder, "--model", "emoji"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            assert process.stderr is not None, "it was asked for"
            found = re.search(r":(\d+) ", process.stderr.readline())
            if found is None:
                raise DeviceError("the server did not start")
            yield int(found[1]), process.pid
        finally:
            process.terminate()
            process.wait()


def table(rounds: int) -> Table:
    """One row for each promise, with its bar."""
    with serving() as (port, pid):
        client = Client(port)
        client.draw(0)
        rows = [_latency(client, rounds), _throughput(port, rounds), _cancel(client, rounds), *_load(port, pid, rounds)]
    rows.append({"what": "page: kB in all", "value": _page_bytes() / 1e3, "bar": BARS["page"]})
    columns = (
        Column("what", "embedded model, 20 guided steps, over HTTP"),
        Column("value", "measured", lambda value: f"{value:.3g}"),
        Column("bar", "bar"),
    )
    return Table("serving", columns, rows)


def _latency(client: Client, rounds: int) -> dict[str, Any]:
    """A picture over HTTP and one of the pipeline itself, in turns."""
    ratios = []
    with Pipeline.open("emoji") as pipeline:
        pipeline.generate(Request(PROMPT, seed=0))
        for seed in range(4 * rounds):
            over = client.draw(seed)
            started = time.perf_counter()
            pipeline.generate(Request(PROMPT, seed=seed))
            ratios.append(over / (time.perf_counter() - started))
    return {
        "what": "a picture, times Pipeline.generate",
        "value": statistics.median(ratios),
        "bar": BARS["latency"],
        "ratios": ratios,
    }


def _throughput(port: int, rounds: int) -> dict[str, Any]:
    """Eight clients at once and the same pictures one after the other, in turns; the first turn loads."""
    ratios = []
    clients = [Client(port) for _ in range(CLIENTS)]
    with ThreadPoolExecutor(CLIENTS) as pool:
        for n in range(rounds + 1):
            started = time.perf_counter()
            list(pool.map(Client.draw, clients, range(CLIENTS)))
            together = time.perf_counter() - started
            started = time.perf_counter()
            for seed in range(CLIENTS):
                clients[0].draw(seed)
            if n:
                ratios.append((time.perf_counter() - started) / together)
    return {
        "what": f"{CLIENTS} clients at once, times the pictures a second",
        "value": statistics.median(ratios),
        "bar": BARS["throughput"],
        "ratios": ratios,
    }


def _cancel(client: Client, rounds: int) -> dict[str, Any]:
    """Steps that a job still takes after it was told to stop."""
    more = []
    for seed in range(rounds):
        _, job = client.ask("/api/jobs", {"prompt": PROMPT, "steps": 500, "seed": seed})
        while client.ask(f"/api/jobs/{job['id']}")[1]["step"] < 5:
            time.sleep(0.01)
        _, told = client.ask(f"/api/jobs/{job['id']}/cancel", {})
        while (now := client.ask(f"/api/jobs/{job['id']}")[1])["state"] != "cancelled":
            time.sleep(0.005)
        more.append(now["step"] - told["step"])
    return {"what": "steps after a cancel, at most", "value": max(more), "bar": BARS["cancel"], "all": more}


def _load(port: int, pid: int, rounds: int) -> list[dict[str, Any]]:
    """Eight clients that draw all the time while /health is asked."""
    until = time.monotonic() + rounds * LOAD_SECONDS
    drawn, errors = [0] * CLIENTS, [0] * CLIENTS
    memory: list[int] = []

    def draw(n: int) -> None:
        client = Client(port)
        while time.monotonic() < until:
            status, _ = client.ask("/v1/images/generations", {"prompt": f"{n} {drawn[n]} cats", "steps": 10})
            drawn[n] += status == 200
            errors[n] += status not in (200, 429)

    threads = [threading.Thread(target=draw, args=(n,)) for n in range(CLIENTS)]
    for thread in threads:
        thread.start()
    times, client = [], Client(port)
    while time.monotonic() < until:
        started = time.perf_counter()
        client.ask("/health")
        times.append(time.perf_counter() - started)
        memory.append(_resident(pid))
        time.sleep(0.1)
    for thread in threads:
        thread.join()
    half = memory[len(memory) // 2 :]
    p99 = sorted(times)[int(0.99 * (len(times) - 1))]
    seconds = rounds * LOAD_SECONDS
    return [
        {"what": f"p99 of /health, ms, {CLIENTS} clients for {seconds} s", "value": 1e3 * p99, "bar": BARS["health"]},
        {"what": f"answers but 200 and 429, of {sum(drawn)} pictures", "value": sum(errors), "bar": BARS["errors"]},
        {"what": "memory after the second half, MB more", "value": (half[-1] - half[0]) / 1e6, "bar": "none grows"},
    ]  # fmt: skip


def _resident(pid: int) -> int:
    """Bytes of a process in memory; 0 where the system does not say."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * 4096


def _page_bytes() -> int:
    from edge_sd.apps.server.static import page_files

    return sum(map(len, page_files().values()))
