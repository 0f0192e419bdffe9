"""A steady load on the server, and a stop in its midst.

Eight clients draw without pause: half of them over the OpenAI API, half as jobs, which the server keeps. Then a server
is told to stop while it draws, and another goes on with its folder.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any

from edge_sd.errors import DeviceError

from .served import Client, Served, serving

CLIENTS = 8
BARS = {
    "health": "< 100",
    "errors": "0",
    "memory": "none grows",
    "unended": "0",
    "lost": "0",
    "exit": "0",
    "silent": "0",
}
ENDED = ("done", "failed", "cancelled")
# Seconds between looks at a job, and those that a job may take once the load is over.
LOOK, PATIENCE = 0.05, 120.0
# Jobs that are open when the server is stopped, and pictures of each.
OPEN, EACH = 4, 2


@dataclass
class Told:
    """What one client was told: pictures, refusals (429), other answers, and the jobs that were accepted."""

    drawn: int = 0
    refused: int = 0
    errors: list[str] = field(default_factory=list)
    accepted: int = 0
    unended: int = 0


def steady(server: Served, seconds: float) -> list[dict[str, Any]]:
    """The rows of a load of so many seconds: /health, answers, memory, and how accepted jobs ended."""
    until = time.monotonic() + seconds
    told = [Told() for _ in range(CLIENTS)]
    threads = [
        threading.Thread(target=_as_job if n % 2 else _over_openai, args=(server.port, n, each, until))
        for n, each in enumerate(told)
    ]
    for thread in threads:
        thread.start()
    times, memory, client = [], [], Client(server.port)
    while time.monotonic() < until:
        started = time.perf_counter()
        client.ask("/health")
        times.append(time.perf_counter() - started)
        memory.append(server.resident())
        time.sleep(0.1)
    for thread in threads:
        thread.join()
    p99 = sorted(times)[int(0.99 * (len(times) - 1))]
    drawn, accepted = sum(each.drawn for each in told), sum(each.accepted for each in told)
    errors = [error for each in told for error in each.errors]
    return [
        {"what": f"p99 of /health, ms, {CLIENTS} clients for {seconds:g} s", "value": 1e3 * p99, "bar": BARS["health"]},
        {"what": f"answers that are errors, but 429, of {drawn} pictures", "value": len(errors), "bar": BARS["errors"],
         "errors": errors, "refused": sum(each.refused for each in told)},
        {"what": "memory over the second half, MB more", "value": grown(memory[len(memory) // 2 :]) / 1e6,
         "bar": BARS["memory"], "resident": memory},
        {"what": f"jobs that ended with neither pictures nor a reason, of {accepted}",
         "value": sum(each.unended for each in told), "bar": BARS["unended"]},
    ]  # fmt: skip


def grown(memory: list[int]) -> float:
    """Bytes from the first tenth of a row of measurements to its last, by their medians."""
    tenth = max(1, len(memory) // 10)
    return statistics.median(memory[-tenth:]) - statistics.median(memory[:tenth])


def _over_openai(port: int, n: int, told: Told, until: float) -> None:
    client = Client(port)
    while time.monotonic() < until:
        with _counted(told):
            body = {"prompt": f"{n} {told.drawn} cats", "steps": 10}
            _count(told, *client.ask("/v1/images/generations", body))


def _as_job(port: int, n: int, told: Told, until: float) -> None:
    """Submit a job, look after it until it has ended, and so on."""
    client = Client(port)
    while time.monotonic() < until:
        with _counted(told):
            status, job = client.ask("/api/jobs", {"prompt": f"{n} {told.accepted} dogs", "steps": 10})
            if status != 202:
                _count(told, status, job)
                continue
            told.accepted += 1
            found = ended(client, [job["id"]])[job["id"]]
            told.drawn += len(found["pictures"])
            told.unended += not is_accounted(found)


@contextmanager
def _counted(told: Told) -> Iterator[None]:
    """A connection that breaks off is an error, too."""
    try:
        yield
    except (OSError, HTTPException, ValueError) as error:
        told.errors.append(f"{type(error).__name__}: {error}"[:200])


def _count(told: Told, status: int, answer: Any) -> None:
    if status == 200:
        told.drawn += 1
    elif status == 429:
        told.refused += 1
        time.sleep(LOOK)
    else:
        told.errors.append(f"{status}: {answer}"[:200])


def is_accounted(job: dict[str, Any]) -> bool:
    """Whether a job has all its pictures, or says why it has not."""
    if job["state"] == "done":
        return bool(len(job["pictures"]) == job["count"])
    return job["state"] == "cancelled" or (job["state"] == "failed" and bool(job["error"]))


def ended(client: Client, ids: list[str]) -> dict[str, dict[str, Any]]:
    """These jobs once they have ended, or as they are when PATIENCE is over; {} stands for one that is not there."""
    found: dict[str, dict[str, Any]] = {}
    until = time.monotonic() + PATIENCE
    for id_ in ids:
        while True:
            status, job = client.ask(f"/api/jobs/{id_}")
            found[id_] = job if status == 200 else {"state": "gone", "pictures": [], "count": 1, "error": ""}
            if status != 200 or job["state"] in ENDED or time.monotonic() > until:
                break
            time.sleep(LOOK)
    return found


def stopped() -> list[dict[str, Any]]:
    """The rows of a server that is told to stop (SIGTERM) while it draws and eight clients wait, and of the next one.

    What was asked for over the OpenAI API is not kept: its clients are told why there is no picture.
    """
    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(CLIENTS) as pool:
        with serving(Path(place)) as server:
            client = Client(server.port)
            # Steps of their own: jobs that could be drawn together would all be drawn at once.
            wishes = [{"prompt": f"{n} apples", "steps": 16 + n, "count": EACH, "seed": n} for n in range(OPEN)]
            ids = [str(client.ask("/api/jobs", wish)[1]["id"]) for wish in wishes]
            body = {"prompt": "a cat", "steps": 400}
            asked = [pool.submit(Client(server.port).ask, "/v1/images/generations", body) for _ in range(CLIENTS)]
            before = _in_the_midst(client, ids)
            server.process.terminate()
            code = server.process.wait()
        silent = [reason for each in asked if (reason := _no_reason(each))]
        with serving(Path(place)) as server:
            found = ended(Client(server.port), ids)
    kept = [job for job in before if job["state"] not in ENDED]
    lost = [job["id"] for job in kept if found[job["id"]]["state"] != "done" or not is_accounted(found[job["id"]])]
    drawing = sum(job["state"] == "drawing" for job in kept)
    return [
        {"what": "SIGTERM while it draws: exit code", "value": code, "bar": BARS["exit"]},
        {"what": f"open jobs that the next server did not draw, of {len(kept)} ({drawing} in the midst)",
         "value": len(lost), "bar": BARS["lost"], "lost": lost},
        {"what": f"clients that were told no reason, of {CLIENTS}", "value": len(silent), "bar": BARS["silent"],
         "answers": silent},
    ]  # fmt: skip


def _in_the_midst(client: Client, ids: list[str]) -> list[dict[str, Any]]:
    """The jobs at a moment when one of them is being drawn and has pictures. Raises DeviceError."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        jobs: list[dict[str, Any]] = [client.ask(f"/api/jobs/{id_}")[1] for id_ in ids]
        if any(job["state"] == "drawing" and job["pictures"] for job in jobs):
            return jobs
        time.sleep(LOOK)
    raise DeviceError("the server draws nothing")


def _no_reason(asked: Future[tuple[int, Any]]) -> str:
    """What a client was told that got neither a picture nor a reason; "" where it got one of them."""
    try:
        status, answer = asked.result()
    except (OSError, HTTPException, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "" if status == 200 or answer.get("error", {}).get("message") else f"{status}: {answer}"[:200]
