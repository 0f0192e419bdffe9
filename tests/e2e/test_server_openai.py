"""The OpenAI Images API, as the real client speaks it."""

from __future__ import annotations

import base64
import json
import socket
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from edge_sd import Pipeline, Request
from edge_sd.apps.server.service import Service
from edge_sd.apps.server.wish import as_base64

from ..serving import served
from ..transformers import save_klein

SPEED = {"steps": 3, "seed": 7}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Service]]:
    with served(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: tuple[str, Service]) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0)


def opened(b64_json: str | None) -> Image.Image:
    return Image.open(BytesIO(base64.b64decode(b64_json or "")))


def png(image: Image.Image) -> tuple[str, bytes, str]:
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return "picture.png", buffer.getvalue(), "image/png"


def test_a_picture_is_the_pipelines_own(client: openai.OpenAI) -> None:
    answer = client.images.generate(prompt="a red apple", n=2, extra_body=SPEED)
    with Pipeline.open("emoji") as pipeline:
        alone = pipeline.generate(Request("a red apple", count=2, **SPEED)).pictures
    assert answer.data is not None
    for datum, picture in zip(answer.data, alone, strict=True):
        assert np.array_equal(np.asarray(opened(datum.b64_json)), np.asarray(picture.image))
    assert answer.size == "128x128"
    assert answer.usage is not None
    assert answer.usage.input_tokens > 0
    assert opened(answer.data[0].b64_json).info["parameters"].startswith("a red apple")


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_formats(client: openai.OpenAI, kind: Any) -> None:
    sizes = []
    for compression in (10, 95):
        answer = client.images.generate(
            prompt="a cat", output_format=kind, output_compression=compression, size="64x64", extra_body=SPEED
        )
        assert answer.data is not None
        image = opened(answer.data[0].b64_json)
        assert (image.format, image.size, answer.output_format) == (kind.upper(), (64, 64), kind)
        sizes.append(len(answer.data[0].b64_json or ""))
    assert sizes[0] < sizes[1]


def test_a_picture_at_an_address(client: openai.OpenAI, server: tuple[str, Service]) -> None:
    answer = client.images.generate(prompt="a cat", response_format="url", extra_body=SPEED)
    assert answer.data is not None
    found = httpx.get(answer.data[0].url or "")
    assert found.headers["content-type"] == "image/png"
    assert Image.open(BytesIO(found.content)).size == (128, 128)
    job = server[1].jobs()[-1]
    assert 0 < job.expires - time.time() <= 3600


def test_a_stream_has_partial_images_and_an_end(client: openai.OpenAI) -> None:
    stream = client.images.generate(
        prompt="a cat", stream=True, partial_images=2, extra_body={"steps": 6, "seed": 1}, output_format="webp"
    )
    events = list(stream)
    assert [event.type for event in events] == [*["image_generation.partial_image"] * 2, "image_generation.completed"]
    assert [getattr(event, "partial_image_index", None) for event in events] == [0, 1, None]
    assert {opened(event.b64_json).format for event in events} == {"WEBP"}
    assert events[-1].usage.input_tokens > 0


def test_an_edit_draws_where_the_mask_is_transparent(client: openai.OpenAI) -> None:
    image = Image.effect_noise((128, 128), 90).convert("RGB")
    mask = Image.new("RGBA", image.size, (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (64, 0, 128, 128))
    answer = client.images.edit(prompt="a star", image=png(image), mask=png(mask), extra_body=SPEED)
    assert answer.data is not None
    drawn, before = np.asarray(opened(answer.data[0].b64_json)), np.asarray(image)
    assert np.array_equal(drawn[:, :56], before[:, :56])
    assert not np.array_equal(drawn[:, 72:], before[:, 72:])


def test_an_edit_without_a_mask_starts_from_the_image(client: openai.OpenAI) -> None:
    image = Image.new("RGB", (64, 128), "red")
    answer = client.images.edit(prompt="a star", image=[png(image)], extra_body={**SPEED, "strength": 0.5, "steps": 4})
    with Pipeline.open("emoji") as pipeline:
        alone = pipeline.generate(Request("a star", image=image, strength=0.5, steps=4, seed=7)).pictures[0].image
    assert answer.data is not None
    assert np.array_equal(np.asarray(opened(answer.data[0].b64_json)), np.asarray(alone))


def test_the_images_of_an_edit_are_references_of_a_model_that_takes_some(tmp_path: Path) -> None:
    klein = save_klein(tmp_path / "klein")
    images = [Image.radial_gradient("L").resize(size).convert("RGB") for size in ((64, 96), (80, 64))]
    with served(tmp_path / "jobs", others={"klein": klein}) as (address, _):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        asked: dict[str, Any] = {"model": "klein", "prompt": "a table", "extra_body": {"steps": 2, "seed": 7}}
        answer = client.images.edit(image=[png(each) for each in images], **asked)
        with Pipeline.open(klein) as pipeline:
            alone = pipeline.generate(Request("a table", references=images, steps=2, seed=7)).pictures[0].image
        assert answer.data is not None
        assert np.array_equal(np.asarray(opened(answer.data[0].b64_json)), np.asarray(alone))

        wish = {"prompt": "a table", "model": "klein", "references": [as_base64(png(each)[1]) for each in images],
                "steps": 2, "seed": 7}  # fmt: skip
        job = httpx.post(f"{address}/api/jobs", json=wish).json()
        assert (job["given"], "references" in job["wish"]) == (["references"], False)
        until = time.monotonic() + 60
        while httpx.get(f"{address}/api/jobs/{job['id']}").json()["state"] != "done":
            assert time.monotonic() < until
            time.sleep(0.05)
        drawn = httpx.get(f"{address}/api/jobs/{job['id']}/pictures/0").content
        with Image.open(BytesIO(drawn)) as image:
            assert np.array_equal(np.asarray(image), np.asarray(alone))
        found = httpx.post(f"{address}/api/recorded", json={"image": as_base64(drawn)}).json()
        assert (found["left_out"], "references" in found["wish"]) == (["references"], False)

        clear = Image.new("RGBA", (64, 96))
        cases: list[tuple[dict[str, Any], str, str]] = [
            ({"image": png(images[0]), "mask": png(clear)}, "mask", "it takes no mask"),
            ({"image": [png(images[0])] * 5}, "image", "at most 4"),
            ({"image": [png(images[0])] * 2, "model": "emoji"}, "image", "give one image"),
        ]
        for given, param, said in cases:
            with pytest.raises(openai.BadRequestError, match=said) as caught:
                client.images.edit(**{**asked, **given})
            assert caught.value.param == param


def test_models_and_variants(client: openai.OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert {"emoji", "emoji:openvino-fp16", "emoji:openvino-fp16-lcm"} <= set(names)
    assert client.models.retrieve("emoji:openvino-fp16").id == "emoji:openvino-fp16"
    answer = client.images.generate(prompt="a cat", model="emoji:openvino-fp16-lcm", extra_body={"seed": 1})
    assert answer.data is not None
    assert json.loads(opened(answer.data[0].b64_json).info["edge_sd"])["variant"] == "openvino-fp16-lcm"


@pytest.mark.parametrize(
    ("given", "status", "param", "words"),
    [
        ({"n": 11}, 400, "n", "less than or equal to 10"),
        ({"size": "100x100"}, 400, "size", "multiple of 8"),
        ({"size": "1024x1024"}, 400, None, "limit of 512"),
        ({"model": "gpt-image-1"}, 404, None, "valid: emoji"),
        ({"model": "emoji:none"}, 404, None, "openvino-fp16"),
        ({"model": "../../etc"}, 404, None, "valid: emoji"),
        ({"background": "transparent"}, 400, "background", "valid: auto, opaque"),
        ({"output_compression": 50}, 400, "output_compression", "jpeg and webp"),
        ({"extra_body": {"colour": 1}}, 400, "colour", "not a field"),
        ({"extra_body": {"sampler": "none"}}, 400, None, "valid: "),
        ({"prompt": ""}, 400, "prompt", "at least 1"),
        ({"prompt": "x" * 1_000_000}, 400, "prompt", "at most 20000"),
        ({"prompt": "<lora:../../secret:1>"}, 400, None, "none"),
    ],
)
def test_what_is_wrong_is_said_as_openai_does(
    client: openai.OpenAI, given: dict[str, Any], status: int, param: str | None, words: str
) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.images.generate(**{"prompt": "a cat", **given})
    body = caught.value.response.json()["error"]
    assert caught.value.status_code == status
    assert set(body) == {"message", "type", "param", "code"}
    assert body["param"] == param
    assert words in body["message"]
    assert "/" + "root" not in body["message"]


def test_a_client_that_goes_away_stops_the_drawing_within_a_step(server: tuple[str, Service]) -> None:
    body = {"prompt": "a cat", "steps": 900, "size": "64x64", "guidance": 1}
    before = {job.id for job in server[1].jobs()}
    with socket.create_connection(("127.0.0.1", httpx.URL(server[0]).port)) as connection:
        data = json.dumps(body).encode()
        head = f"POST /v1/images/generations HTTP/1.1\r\nHost: {server[0][7:]}\r\nContent-Type: application/json\r\n"
        connection.sendall(head.encode() + f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
        until = time.monotonic() + 30
        while not (found := [job for job in server[1].jobs() if job.id not in before and job.step >= 3]):
            assert time.monotonic() < until
            time.sleep(0.01)
    gone = time.monotonic()
    step = found[0].step
    found[0].ended.result(timeout=5)
    # The one that was begun and, on a busy machine, the one that begins before the closing is seen.
    assert found[0].state == "cancelled"
    assert found[0].step <= step + 2, f"{time.monotonic() - gone:.2f} s"
