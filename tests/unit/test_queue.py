"""A queue before one pipeline: pictures are what they are alone, whoever they are drawn with."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from edge_sd import Pipeline, Queue, Request, Result
from edge_sd.components.base import Component, Shapes
from edge_sd.components.batching import Gathering
from edge_sd.converters.parity import psnr
from edge_sd.errors import DeviceError, InvalidRequest
from edge_sd.machine import this_machine
from edge_sd.pipeline import queue as queueing
from edge_sd.pipeline.loader import Components

REQUESTS = [
    Request("a red apple, glossy style", seed=1, steps=3),
    Request("a cat, flat style", seed=2, steps=3),
    Request("a rocket", seed=3, steps=3, negative="a blue background"),
    Request("a slice of pizza", seed=4, steps=3),
]


@pytest.fixture(scope="module")
def pipeline() -> Iterator[Pipeline]:
    with Pipeline.open("emoji", "cpu", "openvino-fp16") as opened:
        yield opened


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Whatever is faster: drawn together; how many were is noted."""
    counts: list[int] = []
    of = queueing._Wide.of

    def noted(self: Any, *given: Any) -> Gathering | None:
        found = of(self, *given)
        counts.append(found.count if found else 1)
        return found

    monkeypatch.setattr(queueing._Wide, "of", noted)
    monkeypatch.setattr(queueing, "_seconds", lambda component, shapes: 1.0)
    return counts


def held(queue: Queue) -> threading.Event:
    """Let the queue's thread wait until the event, so that what is submitted meanwhile waits together."""
    free = threading.Event()
    begun = threading.Event()

    def hold(n: int, step: Any) -> None:
        begun.set()
        free.wait()

    queue.submit(Request("a star", seed=0, steps=1), hold)
    begun.wait()
    return free


def pixels(result: Result) -> np.ndarray:
    return np.asarray(result.pictures[0].image)


@pytest.mark.parametrize("changes", [{}, {"sampler": "euler_a"}, {"deep_every": 2}, {"guidance": 1.0}])
def test_pictures_are_what_they_are_alone(pipeline: Pipeline, together: list[int], changes: dict[str, Any]) -> None:
    requests = [replace(request, **changes) for request in REQUESTS]
    alone = [pixels(pipeline.generate(request)) for request in requests]
    steps: list[tuple[int, int]] = []
    with Queue(pipeline) as queue:
        free = held(queue)
        futures = [queue.submit(request, lambda _, step, k=k: steps.append((k, step.index)))
                   for k, request in enumerate(requests)]  # fmt: skip
        free.set()
        found = [future.result() for future in futures]
    assert together == [4]
    for result, request, expected in zip(found, requests, alone, strict=True):
        assert psnr(pixels(result), expected, peak=255) > 45
        assert result.pictures[0].settings.prompt == request.prompt
    assert len(steps) == 12
    assert len(set(steps)) == 12


def test_what_differs_is_drawn_in_its_turn(pipeline: Pipeline, together: list[int]) -> None:
    requests = [REQUESTS[0], replace(REQUESTS[1], steps=2), REQUESTS[2], replace(REQUESTS[3], width=256, height=256)]
    with Queue(pipeline) as queue:
        free = held(queue)
        futures = [queue.submit(request) for request in requests]
        free.set()
        sizes = [pixels(future.result()).shape[0] for future in futures]
    assert sizes == [128, 128, 128, 256]
    assert together == [2]


def test_what_is_slower_together_is_drawn_alone(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queueing, "_seconds", lambda component, shapes: float(shapes["sample"][0]))
    drawn = []
    draw = Pipeline.draw
    monkeypatch.setattr(Pipeline, "draw", lambda self, *given: drawn.append(self) or draw(self, *given))
    with Queue(pipeline) as queue:
        free = held(queue)
        futures = [queue.submit(request) for request in REQUESTS[:2]]
        free.set()
        for future in futures:
            future.result()
    assert [each is pipeline for each in drawn] == [True] * 3


def test_a_request_is_resolved_once_however_long_it_waits(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    resolved = []
    run = Pipeline.run
    monkeypatch.setattr(Pipeline, "run", lambda self, request: resolved.append(request) or run(self, request))
    with Queue(pipeline) as queue:
        free = held(queue)
        futures = [queue.submit(replace(REQUESTS[0], steps=1, seed=n)) for n in range(6)]
        free.set()
        for future in futures:
            future.result()
    assert len(resolved) == 7, "those and the one that held the queue"


def test_one_that_fails_does_not_hold_the_others(pipeline: Pipeline, together: list[int]) -> None:
    def broken(n: int, step: Any) -> None:
        if step.index == 2:
            raise KeyboardInterrupt

    with Queue(pipeline) as queue:
        free = held(queue)
        first, second = queue.submit(REQUESTS[0]), queue.submit(REQUESTS[1], broken)
        with pytest.raises(InvalidRequest):
            queue.submit(Request("a cat", loras={"absent": 1.0}))
        free.set()
        assert pixels(first.result()).shape == (128, 128, 3)
        with pytest.raises(RuntimeError, match="on_step raised KeyboardInterrupt"):
            second.result()
    assert together == [2]


@pytest.mark.parametrize("raised", [ValueError("mine"), KeyboardInterrupt()])
def test_a_start_that_fails_is_that_pictures_error(pipeline: Pipeline, raised: BaseException) -> None:
    def start() -> None:
        raise raised

    with Queue(pipeline) as queue:
        with pytest.raises((ValueError, RuntimeError), match=r"mine|on_start raised KeyboardInterrupt"):
            queue.submit(REQUESTS[0], on_start=start).result(60)
        assert queue.submit(REQUESTS[0]).result(60).pictures


def test_a_bug_where_several_are_drawn_is_told_to_all(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    with Queue(pipeline) as queue:
        free = held(queue)
        monkeypatch.setattr(pipeline, "prepare", lambda settings: 1 / 0)
        futures = [queue.submit(request) for request in REQUESTS[:2]]
        free.set()
        for future in futures:
            with pytest.raises(ZeroDivisionError):
                future.result(60)
        monkeypatch.undo()
        assert queue.submit(REQUESTS[0]).result(60).pictures


@pytest.mark.parametrize(
    ("seconds", "waiting", "expected"),
    [
        # More rows cost nothing: all that wait are seated, and seats stay empty.
        ({2: 1.0, 4: 1.0, 8: 1.0, 16: 1.0}, 7, [8]),
        ({2: 1.0, 4: 1.0, 8: 1.0, 16: 1.0}, 3, [4]),
        # Eight gain nothing over four.
        ({2: 3.0, 4: 4.0, 8: 6.0, 16: 12.0}, 7, [4, 4]),
        # An empty seat costs more than drawing the third one alone.
        ({2: 3.0, 4: 4.0, 8: 7.9, 16: 15.0}, 3, [2]),
        # Whatever costs as much in two ways, the larger part comes first.
        ({2: 3.0, 4: 5.0, 8: 9.0, 16: 17.9}, 5, [4]),
    ],
)  # fmt: skip
def test_those_that_wait_are_seated_as_is_fastest(
    pipeline: Pipeline, together: list[int], monkeypatch: pytest.MonkeyPatch,
    seconds: dict[int, float], waiting: int, expected: list[int],
) -> None:  # fmt: skip
    monkeypatch.setattr(queueing, "_seconds", lambda component, shapes: seconds[shapes["sample"][0]])
    with Queue(pipeline) as queue:
        free = held(queue)
        futures = [queue.submit(Request("a star", seed=n, steps=1)) for n in range(waiting)]
        free.set()
        for n, future in enumerate(futures):
            assert future.result().pictures[0].settings.seed == n
    assert together == expected


def test_where_memory_is_short_each_is_drawn_alone(
    pipeline: Pipeline, together: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    short = replace(this_machine(), free=2 * pipeline.denoiser_bytes)
    monkeypatch.setattr(queueing, "this_machine", lambda: short)
    with Queue(pipeline) as queue:
        free = held(queue)
        futures = [queue.submit(Request("a star", seed=n, steps=1)) for n in range(3)]
        free.set()
        assert [pixels(future.result()).shape for future in futures] == [(128, 128, 3)] * 3
    assert together == [1, 1]


@pytest.mark.parametrize("most", [0, 9, "2", None])
def test_how_many_are_drawn_together_is_checked(pipeline: Pipeline, most: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"most .* is not a whole number from 1 to 8"):
        Queue(pipeline, most)


def test_what_waits_is_cancelled(pipeline: Pipeline) -> None:
    queue = Queue(pipeline)
    free = held(queue)
    cancelled, waits = queue.submit(REQUESTS[0]), queue.submit(REQUESTS[1])
    assert cancelled.cancel()
    closing = threading.Thread(target=queue.close)
    closing.start()
    free.set()
    closing.join()
    for future in (cancelled, waits):
        with pytest.raises(CancelledError):
            future.result()
    with pytest.raises(InvalidRequest, match="closed"):
        queue.submit(REQUESTS[0])


def test_an_error_of_the_network_is_told_to_all() -> None:
    class Broken:
        def bind(self, **constants: Any) -> None: ...

        def __call__(self, **inputs: Any) -> dict[str, Any]:
            raise ValueError("broken")

        def close(self) -> None: ...

    gathering = Gathering(Broken(), {"sample": (2, 1)}, 2, 2)
    futures: list[Future[Any]] = [Future(), Future()]

    def ask(n: int) -> None:
        with gathering.working:
            try:
                gathering.seats()[n](sample=np.zeros((1, 1), np.float32))
            except ValueError as error:
                futures[n].set_result(str(error))

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    assert [future.result(timeout=10) for future in futures] == ["broken", "broken"]


def test_what_cannot_be_loaded_for_several_is_drawn_alone(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    load = Components.load

    def broken(components: Components, part: str, shapes: Shapes) -> Component:
        if part == "unet" and shapes["sample"][0] > 2:
            raise DeviceError("no memory for several")
        return load(components, part, shapes)

    monkeypatch.setattr(Components, "load", broken)
    with Queue(pipeline) as queue:
        free = held(queue)
        futures = [queue.submit(request) for request in REQUESTS[:2]]
        free.set()
        assert [pixels(future.result()).shape for future in futures] == [(128, 128, 3)] * 2
