"""Wrong numbers out of components, cancelled pictures, and many pictures in one process."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from edge_sd import Pipeline, Request
from edge_sd.backends.base import LoadRequest
from edge_sd.backends.fake import FakeBackend, fake_bundle
from edge_sd.components.base import Array, Component
from edge_sd.devices.choose import choose
from edge_sd.errors import NumericalError
from edge_sd.pipeline.loader import Components
from edge_sd.sampling.schedule import NoiseSchedule

from .account import Tally

SCHEDULE = NoiseSchedule(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
STEPS = 20


class Poisoned(FakeBackend):
    """A backend whose component `part` returns what `change` makes of it, from its `after`-th call on."""

    def __init__(self, part: str, after: int, change: Callable[[Array], Array]) -> None:
        super().__init__()
        self.part, self.change, self.left = part, change, after

    def load(self, request: LoadRequest) -> Component:
        component = super().load(request)
        return _Changed(component, self) if request.part == self.part else component


class _Changed:
    def __init__(self, component: Component, backend: Poisoned) -> None:
        self.component, self.backend = component, backend
        self.bind, self.close = component.bind, component.close

    def __call__(self, **inputs: Array) -> dict[str, Array]:
        outputs = self.component(**inputs)
        self.backend.left -= 1
        return (
            outputs if self.backend.left >= 0 else {name: self.backend.change(each) for name, each in outputs.items()}
        )


def opened(backend: FakeBackend) -> Pipeline:
    bundle = fake_bundle(SCHEDULE)
    return Pipeline(Components(bundle, choose(bundle, backend.devices()), backend))


def one(value: float) -> Callable[[Array], Array]:
    """Put a value into one place of an output."""

    def change(array: Array) -> Array:
        made = array.copy()
        made.flat[made.size // 2] = value
        return made

    return change


@pytest.mark.fault(13, "one NaN or infinity out of each component at each of 20 steps: an error in one line")
def test_one_wrong_number_is_found_at_its_step(tally: Tally) -> None:
    places = [("text_encoder", 0), ("vae_encoder", 0), ("vae_decoder", 0), *(("unet", step) for step in range(STEPS))]
    image = np.full((64, 64, 3), 128, np.uint8)
    for (part, after), value in product(places, (np.nan, np.inf, -np.inf)):
        seen: list[int] = []
        with tally.trial((part, after, value), refused=True), opened(Poisoned(part, after, one(value))) as pipeline:
            from PIL import Image

            start = {"image": Image.fromarray(image), "strength": 1.0} if part == "vae_encoder" else {}
            request = Request("a cat", seed=1, steps=STEPS, guidance=1.0, sampler="euler", **start)
            with pytest.raises(NumericalError) as raised:
                pipeline.generate(request, lambda n, step: seen.append(step.index))  # noqa: B023
            assert "\n" not in str(raised.value)
            if part == "unet":
                assert seen == list(range(after))


def columns(array: Array, values: list[float]) -> Array:
    """Flat stripes, one for each of these values of all channels."""
    made = np.empty_like(array)
    for n, part in enumerate(np.array_split(np.arange(array.shape[-1]), len(values))):
        made[..., part] = values[n]
    return made


def rows(array: Array, value: float) -> Array:
    made = array.copy()
    made[..., 3::7, :] = value
    return made


POISON: dict[str, Callable[[Array], Array]] = {
    "black": lambda array: array / 10 - 3, "white": lambda array: array / 10 + 3, "grey": lambda array: array * 0,
    "black exactly": lambda array: np.full_like(array, -1),
    "red": lambda array: _channels(3, -3, -3) + 0 * array,
    "a hair beside grey": lambda array: array * 1e-4, "two colours": lambda array: columns(array, [-0.2, 0.4]),
    "black and white": lambda array: columns(array, [-5, 5]),
    "saturated": lambda array: np.sign(array - array.mean()) * 8,
    "saturated channels": lambda array: np.sign(array - array.mean(axis=(2, 3), keepdims=True)) * 8,
    "far": lambda array: array * 1e6, "NaN": lambda array: array * np.nan,
    "rows of NaN": lambda array: rows(array, np.nan),
    "rows of infinity": lambda array: rows(array, -np.inf), "one NaN": one(np.nan),
}  # fmt: skip


def _channels(*values: float) -> Array:
    return np.array(values, np.float32)[None, :, None, None]


@pytest.mark.fault(23, "decoders poisoned to black, white, one and two colours, saturated, rows of NaN")
@pytest.mark.parametrize("kind", POISON)
def test_what_is_no_picture_is_never_a_success(kind: str, tally: Tally) -> None:
    for sampler in ("euler", "dpmpp_2m"):
        with tally.trial(kind, refused=True), opened(Poisoned("vae_decoder", 0, POISON[kind])) as pipeline:
            with pytest.raises(NumericalError) as raised:
                pipeline.generate(Request("a cat", seed=1, steps=2, sampler=sampler))
            assert "\n" not in str(raised.value)


class _Stop(Exception):
    """The client is gone."""


class Stopping(FakeBackend):
    """A component that raises at its `at`-th call from `begin` on, as a client that goes away in the middle does."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.at = "", 0

    def begin(self, part: str, at: int = 0) -> None:
        self.part, self.at = part, at

    def load(self, request: LoadRequest) -> Component:
        return _Stopped(super().load(request), request.part, self)


class _Stopped:
    def __init__(self, component: Component, part: str, backend: Stopping) -> None:
        self.component, self.part, self.backend = component, part, backend
        self.bind, self.close = component.bind, component.close

    def __call__(self, **inputs: Array) -> dict[str, Array]:
        if self.part == self.backend.part:
            self.backend.at -= 1
            if self.backend.at < 0:
                self.backend.part = ""
                raise _Stop
        return self.component(**inputs)


@pytest.mark.fault(14, "pictures cancelled at any step, in encoder and decoder: the next one is as if made fresh")
def test_a_cancelled_picture_leaves_no_trace_in_the_next(tally: Tally) -> None:
    rng = random.Random(0)
    requests = [
        Request("a cat", seed=n, steps=4, sampler=name) for n, name in enumerate(("dpmpp_2m", "euler_a", "lms"))
    ]
    fresh = []
    for request in requests:
        with opened(FakeBackend()) as alone:
            fresh.append(np.asarray(alone.generate(request).pictures[0].image))
    backend = Stopping()
    with opened(backend) as pipeline:
        for n in range(tally.count(500)):
            stop = rng.randrange(STEPS)
            other = Request("a dog", seed=n, steps=STEPS, sampler=rng.choice(["dpmpp_2m", "euler", "heun"]))
            with tally.trial((n, stop)):
                where = rng.choice(["steps", "text_encoder", "unet", "vae_decoder"])
                if where == "steps":
                    last = -1
                    for step in pipeline.steps(other):
                        last = step.index
                        if step.index >= stop:
                            break
                    assert last == stop
                else:
                    backend.begin(where, stop if where == "unet" else 0)
                    with pytest.raises(_Stop):
                        pipeline.generate(other)
                index = n % len(requests)
                found = np.asarray(pipeline.generate(requests[index]).pictures[0].image)
                assert np.array_equal(found, fresh[index])


MANY = """
import gc, json, os, sys, tempfile
from pathlib import Path
count, cores = int(sys.argv[1]), int(sys.argv[2])
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
from edge_sd import Pipeline, Request

def state():
    gc.collect()
    # Pages of files come and go with the system's need of memory.
    rows = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    own = sum(int(rows[name].split()[0]) * 1024 for name in ("RssAnon", "VmSwap"))
    return own, len(os.listdir("/proc/self/fd")), len(os.listdir(tempfile.gettempdir()))

rows = []
with Pipeline.open("emoji", "cpu", "openvino-fp16") as pipeline:
    for n in range(count + 50):
        pipeline.generate(Request(f"{n} apples", seed=n, steps=1, width=64, height=64))
        if n >= 49 and (n - 49) % (count // 10) == 0:
            rows.append(state())
print(json.dumps(rows))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.fault(15, "generations in one process on one core: memory, open and temporary files after the first 50")
def test_many_pictures_take_no_more_memory(tmp_path: Path, tally: Tally) -> None:
    count = tally.count(1000)
    states = drawn_for_long(tmp_path, count, cores=1)
    tally.held(count)
    memory = np.array([row[0] for row in states], float)
    growth = (memory[-1] - memory[0]) / (count / 100)
    with tally.trial(f"{growth / 1e6:.2f} MB more in 100"):
        assert growth < 1e6, memory
    if tally.everything:
        # Each interval is a hundred.
        with tally.trial("every hundred"):
            assert np.diff(memory).max() < 1e6, memory
    with tally.trial("files"):
        assert len({tuple(row[1:]) for row in states}) == 1, states


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.fault(15, "generations in one process on all cores: memory is bounded, open and temporary files are flat")
def test_pools_of_threads_are_all_that_grows(tmp_path: Path, tally: Tally) -> None:
    count = tally.count(300)
    states = drawn_for_long(tmp_path, count, cores=os.cpu_count() or 1)
    tally.held(count)
    # A thread of the runtime that has its first work takes buffers, whenever that is: tens of MB, once.
    with tally.trial("in all"):
        assert states[-1][0] - states[0][0] < 128e6, states
    with tally.trial("files"):
        assert len({tuple(row[1:]) for row in states}) == 1, states


def drawn_for_long(folder: Path, count: int, cores: int) -> list[list[int]]:
    """Draw 50 pictures and so many more; at eleven times bytes in memory, and numbers of open and temporary files."""
    (folder / "tmp").mkdir()
    env = {**os.environ, "TMPDIR": str(folder / "tmp"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MANY, str(count), str(cores)]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    found: list[list[int]] = json.loads(done.stdout)
    return found
