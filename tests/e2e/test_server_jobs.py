"""The queue of jobs: events, history, cancelling, limits, and what survives a stop or a kill."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from edge_sd import Pipeline, Request
from edge_sd.apps.server.engines import Engines
from edge_sd.apps.server.failure import describe, public
from edge_sd.apps.server.recall import recall
from edge_sd.apps.server.service import Service
from edge_sd.apps.server.store import Store
from edge_sd.apps.server.wish import Wish
from edge_sd.errors import InvalidRequest

from ..serving import served

LONG = {"prompt": "a long job", "steps": 900}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Service]]:
    with served(tmp_path_factory.mktemp("server"), limit=3) as running:
        yield running


@pytest.fixture
def http(server: tuple[str, Service]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"{server[0]}/api", timeout=60) as client:
        yield client
    for job in server[1].jobs():
        if server[1].cancel(job):
            job.ended.result(timeout=20)


def done(http: httpx.Client, id_: str, seconds: float = 60) -> dict[str, Any]:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        job: dict[str, Any] = http.get(f"/jobs/{id_}").json()
        if job["state"] in ("done", "failed", "cancelled"):
            return job
        time.sleep(0.02)
    raise AssertionError(job)


def opened(http: httpx.Client, id_: str, n: int = 0) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(http.get(f"/jobs/{id_}/pictures/{n}").raise_for_status().content)))


def fresh(request: Request) -> np.ndarray:
    with Pipeline.open("emoji") as pipeline:
        return np.asarray(pipeline.generate(request).pictures[0].image)


def test_a_job_is_drawn_told_of_and_kept(http: httpx.Client) -> None:
    kinds: list[str] = []
    previews: list[Image.Image] = []
    listening = threading.Event()

    def listen() -> None:
        kind = ""
        with http.stream("GET", "/events?previews=true") as stream:
            for line in stream.iter_lines():
                listening.set()
                if line.startswith("event: "):
                    kind = line[7:]
                elif line.startswith("data: "):
                    data = json.loads(line[6:])
                    kinds.append(kind)
                    if kind == "preview":
                        previews.append(Image.open(BytesIO(base64.b64decode(data["jpeg"]))))
                    elif data["job"]["state"] == "done":
                        return

    thread = threading.Thread(target=listen)
    thread.start()
    assert listening.wait(10)
    wish = {"prompt": "a red apple", "seed": 7, "steps": 8, "count": 2}
    accepted = http.post("/jobs", json=wish)
    assert accepted.status_code == 202
    job = done(http, accepted.json()["id"])
    thread.join(timeout=10)
    assert (job["state"], job["pictures"], job["wish"]["prompt"]) == ("done", [0, 1], "a red apple")
    assert "openvino" in job["plan"]
    assert np.array_equal(opened(http, job["id"], 1), fresh(Request("a red apple", seed=8, steps=8)))
    assert kinds.count("step") == 16
    assert kinds.count("picture") == 2
    assert previews[0].size == (128, 128)
    assert [each["id"] for each in http.get("/jobs", params={"search": "APPLE red"}).json()["jobs"]] == [job["id"]]
    assert http.get("/jobs", params={"search": "pear"}).json()["jobs"] == []
    assert "attachment" in http.get(f"/jobs/{job['id']}/pictures/0?download=true").headers["content-disposition"]


def test_a_deleted_job_comes_back(http: httpx.Client) -> None:
    id_ = http.post("/jobs", json={"prompt": "a tree", "steps": 1, "width": 64, "height": 64}).json()["id"]
    done(http, id_)
    assert http.delete(f"/jobs/{id_}").json()["deleted"]
    assert id_ not in [job["id"] for job in http.get("/jobs").json()["jobs"]]
    assert not http.post(f"/jobs/{id_}/restore").json()["deleted"]
    assert id_ in [job["id"] for job in http.get("/jobs").json()["jobs"]]
    assert opened(http, id_).shape == (64, 64, 3)


def test_a_full_queue_says_so_and_a_place_in_line(http: httpx.Client) -> None:
    first = http.post("/jobs", json=LONG).json()
    while http.get(f"/jobs/{first['id']}").json()["state"] != "drawing":
        time.sleep(0.02)
    # They can't be drawn together with the first, or with each other.
    waiting = [
        http.post("/jobs", json={"prompt": "x", "steps": 2, "preset": p}).json() for p in ("fast", "turbo", "fast")
    ]
    assert [job["place"] for job in waiting] == [1, 2, 3]
    refused = http.post("/jobs", json={"prompt": "x"})
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) > 0
    assert http.get("/jobs", params={"open_only": True}).json()["jobs"][-1]["id"] == first["id"]
    assert http.post(f"/jobs/{waiting[1]['id']}/cancel").json()["state"] == "cancelled"
    assert http.get(f"/jobs/{waiting[2]['id']}").json()["place"] == 2


def test_a_cancelled_job_leaves_no_trace_in_the_next(http: httpx.Client) -> None:
    job = http.post("/jobs", json=LONG).json()
    while http.get(f"/jobs/{job['id']}").json()["step"] < 3:
        time.sleep(0.01)
    http.post(f"/jobs/{job['id']}/cancel")
    step = http.get(f"/jobs/{job['id']}").json()["step"]
    ended = done(http, job["id"], 10)
    assert ended["state"] == "cancelled"
    assert ended["step"] <= step + 2
    after = done(http, http.post("/jobs", json={"prompt": "a cat", "seed": 3, "steps": 4}).json()["id"])
    assert np.array_equal(opened(http, after["id"]), fresh(Request("a cat", seed=3, steps=4)))


def test_what_a_picture_says_can_be_asked_for_again(http: httpx.Client) -> None:
    wish = {"prompt": "a fish", "seed": 5, "steps": 2, "sampler": "euler_a", "width": 64, "height": 64}
    job = done(http, http.post("/jobs", json=wish).json()["id"])
    data = base64.b64encode(http.get(f"/jobs/{job['id']}/pictures/0").content).decode()
    found = http.post("/recorded", json={"image": data}).json()
    assert {name: found["wish"][name] for name in wish} == wish
    again = done(http, http.post("/jobs", json=found["wish"]).json()["id"])
    assert np.array_equal(opened(http, again["id"]), opened(http, job["id"]))


def test_pictures_that_have_to_be_given_anew_are_named() -> None:
    made = {"prompt": "a fish", "image": "01", "controls": [{"image": "23"}], "references": [{"image": "45"}]}
    chunks = PngInfo()
    chunks.add_text("edge_sd", json.dumps({"request": made}))
    data = BytesIO()
    Image.new("RGB", (8, 8)).save(data, "PNG", pnginfo=chunks)
    assert recall(data.getvalue())["left_out"] == ["image", "references", "control"]


def test_offer_and_plan(http: httpx.Client) -> None:
    offer = http.get("/offer").json()
    assert offer["models"][0]["defaults"]["width"] == 128
    assert "fast" in offer["presets"]
    assert "cpu" in [device["name"] for device in offer["devices"]]
    assert "openvino-fp16 on cpu" in http.get("/plan").json()["summary"]
    assert http.get("/plan", params={"device": "gpu.9"}).status_code in (400, 404, 500)


def test_the_words_of_the_embedded_model_are_those_it_was_taught(http: httpx.Client) -> None:
    from edge_sd.converters.training import data

    words = http.get("/words").json()
    assert words["concepts"] == data.core_vocabulary()
    assert (words["styles"], words["backgrounds"]) == (list(data.STYLES), list(data.BACKGROUNDS))


def test_health_and_metrics(server: tuple[str, Service]) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    assert httpx.get(f"{server[0]}/health").json() == {"status": "ok"}
    families = {each.name: each for each in text_string_to_metric_families(httpx.get(f"{server[0]}/metrics").text)}
    assert families["edge_sd_pictures"].samples[0].value >= 1
    assert {"edge_sd_queue_depth", "edge_sd_jobs", "edge_sd_models_loaded"} <= set(families)


def test_an_unused_model_is_released_and_loaded_again(tmp_path: Path, emoji: Path) -> None:
    with Service(Store(tmp_path), Engines({"emoji": emoji}, idle=0.3)) as service:
        for _ in range(2):
            service.submit(Wish(prompt="a cat", steps=1)).ended.result(timeout=30)
            assert len(service.engines.loaded()) == 1
            until = time.monotonic() + 20
            while service.engines.loaded() and time.monotonic() < until:
                time.sleep(0.05)
            assert not service.engines.loaded()


def test_another_model_makes_room_where_memory_is_short(tmp_path: Path, emoji: Path) -> None:
    with Service(Store(tmp_path), Engines({"emoji": emoji, "other": emoji}, free=lambda: 1)) as service:
        for name in ("emoji", "other"):
            service.submit(Wish(prompt="a cat", steps=1, model=name)).ended.result(timeout=30)
            assert [engine.key[0] for engine in service.engines.loaded()] == [name]


def test_jobs_that_differ_in_words_are_drawn_together(tmp_path: Path, emoji: Path) -> None:
    with Service(Store(tmp_path), Engines({"emoji": emoji})) as service:
        alone = {n: fresh(Request(f"{n} cats", seed=n, steps=4)) for n in range(4)}
        jobs = [service.submit(Wish(prompt=f"{n} cats", seed=n, steps=4), keep=False) for n in range(4)]
        for n, job in enumerate(jobs):
            job.ended.result(timeout=60)
            assert np.abs(np.asarray(job.drawn[0].image).astype(int) - alone[n]).max() <= 8
        # The first may have been drawn alone, before the others came.
        assert max(job.started for job in jobs[1:]) < min(job.finished for job in jobs[1:])


@pytest.mark.fault(25, "serve stopped and killed while it draws")
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_the_queue_survives(how: signal.Signals, tmp_path: Path) -> None:
    home = {**os.environ, "EDGE_SD_MODELS": str(tmp_path / "models")}

    def start() -> tuple[subprocess.Popen[str], str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "edge_sd", "serve", "--port", "0", "--folder", str(tmp_path / "state")],
            stderr=subprocess.PIPE, text=True, env=home,
        )  # fmt: skip
        assert process.stderr is not None
        line = process.stderr.readline()
        address = re.search(r"http://\S+", line)
        assert address, line
        return process, f"{address[0]}/api"

    process, address = start()
    running = httpx.post(f"{address}/jobs", json={"prompt": "a cat", "seed": 1, "steps": 16, "count": 3}).json()
    waiting = httpx.post(f"{address}/jobs", json={"prompt": "a dog", "seed": 2, "steps": 2}).json()
    while not (found := httpx.get(f"{address}/jobs/{running['id']}").json())["pictures"]:
        time.sleep(0.05)
    assert found["state"] == "drawing"
    process.send_signal(how)
    assert process.wait(timeout=20) == (0 if how == signal.SIGTERM else -9)
    process, address = start()
    try:
        with httpx.Client(base_url=address) as http:
            for job, count in ((running, 3), (waiting, 1)):
                ended = done(http, job["id"])
                assert (ended["state"], ended["pictures"]) == ("done", list(range(count)))
            assert np.array_equal(opened(http, running["id"], 2), fresh(Request("a cat", seed=3, steps=16)))
    finally:
        process.terminate()
        assert process.wait(timeout=20) == 0


DOORS: dict[str, tuple[str, dict[str, Any]]] = {
    "openai": ("/v1/images/generations", {}),
    "an address": ("/v1/images/generations", {"response_format": "url"}),
    "a stream": ("/v1/images/generations", {"stream": True}),
    "a1111": ("/sdapi/v1/txt2img", {}),
    "saved": ("/sdapi/v1/txt2img", {"save_images": True}),
}


def test_a_stop_is_told_to_all_who_wait_in_the_words_of_their_api(tmp_path: Path) -> None:
    answers: dict[str, httpx.Response] = {}

    def draw(door: str) -> None:
        path, more = DOORS[door]
        body = {"prompt": "a cat", "steps": 900, **more}
        answers[door] = httpx.post(address + path, json=body, timeout=60)

    threads = [threading.Thread(target=draw, args=(door,)) for door in DOORS]
    with served(tmp_path) as (address, service):
        for thread in threads:
            thread.start()
        until = time.monotonic() + 60
        while len(service.jobs()) < len(DOORS) or not any(job.step for job in service.jobs()):
            assert time.monotonic() < until
            time.sleep(0.02)
        stopping = time.monotonic()
    for thread in threads:
        thread.join()
    assert time.monotonic() - stopping < 9, "uvicorn's patience is ten seconds"
    streamed = answers.pop("a stream")
    assert "the server is stopping" in streamed.text
    assert "completed" not in streamed.text
    assert {door: answer.status_code for door, answer in answers.items()} == dict.fromkeys(answers, 503)
    assert all("the server is stopping" in answer.text for answer in answers.values())
    # Those of which the pictures are kept are drawn by the next server.
    assert sorted(job.state for job in Store(tmp_path).read()) == ["waiting"] * 2


def test_a_picture_that_is_saved_is_drawn_though_its_client_goes(server: tuple[str, Service]) -> None:
    before = {job.id for job in server[1].jobs()}
    body = {"prompt": "a cat", "steps": 150, "size": "64x64", "response_format": "url"}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server[0]}/v1/images/generations", json=body, timeout=1)
    (job,) = [job for job in server[1].jobs() if job.id not in before]
    job.ended.result(timeout=60)
    assert (job.state, job.saved) == ("done", [0])


def test_a_damaged_record_hides_nothing_else(tmp_path: Path, emoji: Path) -> None:
    with Service(Store(tmp_path), Engines({"emoji": emoji})) as service:
        ids = [service.submit(Wish(prompt="a cat", steps=1)).id for _ in range(3)]
        for id_ in ids:
            job = service.get(id_)
            assert job is not None
            job.ended.result(timeout=30)
    (tmp_path / "jobs" / ids[0] / "job.json").write_text("{")
    (tmp_path / "jobs" / ids[1] / "job.json").unlink()
    (tmp_path / "jobs" / ids[2] / ".9.png.1.partial").write_bytes(b"x")
    assert [job.id for job in Store(tmp_path).read()] == [ids[2]]
    assert not list(tmp_path.rglob("*.partial"))
    assert (tmp_path / "jobs" / ids[0]).is_dir()


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("no /home/someone/models/x.json here", "no (a path of the server) here"),
        ("C:\\Users\\someone\\x is gone", "(a path of the server) is gone"),
        ("image/png and 3/4 and http://x/y/z", "image/png and 3/4 and http://x/y/z"),
        ("red\x1b[31m\u202eabc", "red [31m abc"),
    ],
)
def test_no_path_of_the_server_is_told(message: str, expected: str) -> None:
    assert public(message) == expected


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("larger ones need --tile", "larger ones need the field tile"),
        ("or give --mask-padding, once", "or give the field mask_padding, once"),
        ("a--b and -- stay", "a--b and -- stay"),
    ],
)
def test_an_option_of_the_command_line_is_a_field_here(message: str, expected: str) -> None:
    assert describe(InvalidRequest(message)).message == expected
