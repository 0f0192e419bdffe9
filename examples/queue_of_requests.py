"""Queue: several callers, one pipeline. Each gets a future; requests that are alike are drawn together where faster."""

from edge_sd import Pipeline, Queue, Request

with Pipeline.open("emoji") as pipeline, Queue(pipeline) as queue:
    waiting = [queue.submit(Request(f"a {what}, flat style", seed=7)) for what in ("cat face", "rocket", "cactus")]
    for n, future in enumerate(waiting):
        future.result().save(f"queue_of_requests-{n}.png")
