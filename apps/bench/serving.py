"""The server beside the pipeline: what HTTP costs a picture, several clients at once, cancelling, and a steady load.

With R rounds it draws 27 R + 11 pictures and then a load of 8 R seconds: under a minute for three rounds where a
picture takes 0.3 s.
"""

from __future__ import annotations

import base64
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
from contextlib import closing, contextmanager
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from edge_sd import Pipeline, Request
from edge_sd.errors import DeviceError

from .report import Column, Table

CLIENTS = 8
PROMPT = "a red apple, glossy style"
# Seconds of the steady load, for each round; `--rounds 75` is ten minutes.
LOAD_SECONDS = 8
# How each API is told to stop a picture that it draws; clients of OpenAI's close their connection.
DOORS = ("jobs", "openai", "a1111")
BARS = {
    "latency": "≤ 1.15", "throughput": "≥ 1.4", "health": "< 100", "cancel": "≤ 1", "fresh": "all", "page": "≤ 150",
    "errors": "0",
}  # fmt: skip


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
        self.picture(seed)
        return time.perf_counter() - started

    def picture(self, seed: int) -> str:
        """One picture over the OpenAI API, in base64."""
        status, answer = self.ask("/v1/images/generations", {"prompt": PROMPT, "seed": seed})
        if status != 200:
            raise DeviceError(f"the server answered {status}: {answer}")
        return str(answer["data"][0]["b64_json"])


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
    with serving() as (port, pid), Pipeline.open("emoji") as pipeline:
        client = Client(port)
        client.draw(0)
        pipeline.generate(Request(PROMPT, seed=0))
        rows = [_latency(client, pipeline, rounds), _throughput(port, rounds)]
        rows += [*_cancel(port, pipeline, rounds), *_load(port, pid, rounds)]
    rows.append({"what": "page: kB in all", "value": _page_bytes() / 1e3, "bar": BARS["page"]})
    columns = (
        Column("what", "embedded model, 20 guided steps, over HTTP"),
        Column("value", "measured", lambda value: f"{value:.3g}"),
        Column("bar", "bar"),
    )
    return Table("serving", columns, rows)


def _latency(client: Client, pipeline: Pipeline, rounds: int) -> dict[str, Any]:
    """A picture over HTTP and one of the pipeline itself, in turns, each as often the first of the two."""
    ratios = []
    for seed in range(4 * rounds):
        times = {}
        for way in ("http", "pipeline") if seed % 2 else ("pipeline", "http"):
            started = time.perf_counter()
            if way == "http":
                client.draw(seed)
            else:
                pipeline.generate(Request(PROMPT, seed=seed))
            times[way] = time.perf_counter() - started
        ratios.append(times["http"] / times["pipeline"])
    return {
        "what": "a picture, times Pipeline.generate",
        "value": statistics.median(ratios),
        "bar": BARS["latency"],
        "ratios": ratios,
    }


def _throughput(port: int, rounds: int) -> dict[str, Any]:
    """Eight clients at once and the same pictures one after the other, in turns. What loads is drawn before."""
    ratios = []
    clients = [Client(port) for _ in range(CLIENTS)]
    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(Client.draw, clients, range(CLIENTS)))
        for _ in range(rounds):
            started = time.perf_counter()
            list(pool.map(Client.draw, clients, range(CLIENTS)))
            together = time.perf_counter() - started
            started = time.perf_counter()
            for seed in range(CLIENTS):
                clients[0].draw(seed)
            ratios.append((time.perf_counter() - started) / together)
    return {
        "what": f"{CLIENTS} clients at once, times the pictures a second",
        "value": statistics.median(ratios),
        "bar": BARS["throughput"],
        "ratios": ratios,
    }


def _cancel(port: int, pipeline: Pipeline, rounds: int) -> list[dict[str, Any]]:
    """Steps that a picture still takes after its client stopped it, by each API, and whether the next is as ever."""
    client, more, same = Client(port), [], []
    fresh = np.asarray(pipeline.generate(Request(PROMPT, seed=0)).pictures[0].image)
    for _ in range(rounds):
        for door in DOORS:
            more.append((door, _steps_after(client, port, door)))
            drawn = Image.open(BytesIO(base64.b64decode(client.picture(0))))
            same.append(np.array_equal(np.asarray(drawn), fresh))
    return [
        {"what": "steps after a cancel by any API, at most", "value": max(steps for _, steps in more),
         "bar": BARS["cancel"], "all": more},
        {"what": f"pictures after a cancel that are the pipeline's bit for bit, of {len(same)}", "value": sum(same),
         "bar": BARS["fresh"]},
    ]  # fmt: skip


def _steps_after(client: Client, port: int, door: str) -> int:
    """Start a long picture by an API, stop it in its midst, and count the steps from the server's answer to its end.

    A closed connection has no answer: there the step is asked for at once.
    """
    body = {"prompt": PROMPT, "steps": 500, "seed": 1}
    path = {"jobs": "/api/jobs", "openai": "/v1/images/generations", "a1111": "/sdapi/v1/txt2img"}[door]
    with _events(port) as events, closing(http.client.HTTPConnection("127.0.0.1", port, timeout=120)) as connection:
        connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
        job = next(each for each in events if each["total"] == body["steps"] and each["step"] >= 5)
        where = f"/api/jobs/{job['id']}"
        if door == "a1111":
            client.ask("/sdapi/v1/interrupt", {})
        elif door == "openai":
            connection.close()
        told = client.ask(f"{where}/cancel", {})[1] if door == "jobs" else client.ask(where)[1]
        ended = told if told["state"] == "cancelled" else next(each for each in events if each["state"] == "cancelled")
    return int(ended["step"] - told["step"])


@contextmanager
def _events(port: int) -> Iterator[Iterator[dict[str, Any]]]:
    """Jobs as the server tells of them, at each of their steps."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=120)) as connection:
        connection.request("GET", "/api/events")
        answer = connection.getresponse()
        lines = (answer.readline().decode() for _ in count())
        told = (json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: "))
        yield (each["job"] for each in told)


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
