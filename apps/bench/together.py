"""Several requests at a time: pictures of the embedded model one after the other, and through a queue."""

from __future__ import annotations

import statistics

from .process import measured
from .report import Column, Table, seconds

COUNT = 8
DRAW = """
from edge_sd import Pipeline, Queue, Request
requests = [Request("a red apple, glossy style", seed=n) for n in range(COUNT)]
ways = {"one after the other": [], "Queue": []}
with Pipeline.open("emoji", "cpu", "openvino-fp16") as pipeline, Queue(pipeline) as queue:
    for n in range(ROUNDS + 1):
        started = time.perf_counter()
        for future in [queue.submit(request) for request in requests]:
            future.result()
        between = time.perf_counter()
        for request in requests:
            pipeline.generate(request)
        if n:
            ways["one after the other"].append(time.perf_counter() - between)
            ways["Queue"].append(between - started)
print(json.dumps(ways))
"""


def table(rounds: int) -> Table:
    """Seconds for all of them, in turns, after a round that is not counted; the ratio is to the first row."""
    ways = measured("the queue", DRAW, COUNT=COUNT, ROUNDS=rounds)
    first = next(iter(ways.values()))
    rows = [
        {
            "way": way,
            "seconds": statistics.median(times),
            "faster": statistics.median(a / b for a, b in zip(first, times, strict=True)),
        }
        for way, times in ways.items()
    ]
    columns = (
        Column("way", f"embedded model, {COUNT} requests of 20 guided steps"),
        Column("seconds", "all", seconds(2)),
        Column("faster", "times faster", lambda value: f"{value:.2f}"),
    )
    return Table("together", columns, rows)
