"""The server beside the pipeline: what HTTP costs a picture, several clients at once, cancelling, and a steady load.

With R rounds it draws 27 R + 11 pictures, then a load of 8 R seconds (`--load 600` is ten minutes), and stops a server
in its midst: a minute for three rounds where a picture takes 0.3 s.
"""

from __future__ import annotations

import base64
import http.client
import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from edge_sd import Pipeline, Request

from . import load
from .load import CLIENTS
from .report import Column, Table
from .served import PROMPT, Client, events, serving

# Seconds of the steady load, for each round.
LOAD_SECONDS = 8
# How each API is told to stop a picture that it draws; clients of OpenAI's close their connection.
DOORS = ("jobs", "openai", "a1111")
BARS = {
    "latency": "≤ 1.15", "throughput": "≥ 1.4", "cancel": "≤ 1", "fresh": "all", "page": "≤ 150",
}  # fmt: skip


def table(rounds: int, seconds: float | None = None) -> Table:
    """One row for each promise, with its bar. The load takes so many `seconds`, by default LOAD_SECONDS a round."""
    with serving() as server, Pipeline.open("emoji") as pipeline:
        client, port = Client(server.port), server.port
        client.draw(0)
        pipeline.generate(Request(PROMPT, seed=0))
        rows = [_latency(client, pipeline, rounds), _throughput(port, rounds)]
        rows += [*_cancel(port, pipeline, rounds), *load.steady(server, seconds or rounds * LOAD_SECONDS)]
    rows += load.stopped()
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
    with events(port) as told_of, closing(http.client.HTTPConnection("127.0.0.1", port, timeout=120)) as connection:
        connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
        job = next(each for each in told_of if each["total"] == body["steps"] and each["step"] >= 5)
        where = f"/api/jobs/{job['id']}"
        if door == "a1111":
            client.ask("/sdapi/v1/interrupt", {})
        elif door == "openai":
            connection.close()
        told = client.ask(f"{where}/cancel", {})[1] if door == "jobs" else client.ask(where)[1]
        ended = told if told["state"] == "cancelled" else next(each for each in told_of if each["state"] == "cancelled")
    return int(ended["step"] - told["step"])


def _page_bytes() -> int:
    from edge_sd.apps.server.static import page_files

    return sum(map(len, page_files().values()))
