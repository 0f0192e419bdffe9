"""AUTOMATIC1111's API: the real webuiapi client, and the calls that Open WebUI and SillyTavern make."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import httpx
import numpy as np
import pytest
import webuiapi
from PIL import Image

from edge_sd import Control, Pipeline, Request
from edge_sd.apps.server.service import Service

from ..serving import served


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Service]]:
    with served(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="module")
def api(server: tuple[str, Service]) -> webuiapi.WebUIApi:
    return webuiapi.WebUIApi(baseurl=f"{server[0]}/sdapi/v1", steps=3)


@pytest.fixture
def http(server: tuple[str, Service]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server[0], timeout=60) as client:
        yield client


def same(image: Image.Image, request: Request) -> bool:
    with Pipeline.open("emoji") as pipeline:
        return np.array_equal(np.asarray(image), np.asarray(pipeline.generate(request).pictures[0].image))


def test_webuiapi_draws(api: webuiapi.WebUIApi) -> None:
    result = api.txt2img(
        prompt="a red apple", negative_prompt="blue", seed=7, cfg_scale=5, width=64, height=128, sampler_name="Euler a",
        scheduler="Karras", n_iter=2,
    )  # fmt: skip
    request = Request("a red apple", "blue", 64, 128, 3, 5.0, 7, "euler_a", "karras")
    assert same(result.images[0], request)
    assert len(result.images) == 2
    assert result.info["all_seeds"] == [7, 8]
    assert result.info["sampler_name"] == "Euler a"
    assert "Steps: 3" in result.info["infotexts"][1]
    assert api.png_info(result.image).info == result.info["infotexts"][0]


def test_webuiapi_draws_from_an_image_under_a_mask(api: webuiapi.WebUIApi) -> None:
    image, mask = Image.effect_noise((128, 128), 90).convert("RGB"), Image.new("L", (128, 128))
    mask.paste(255, (64, 0, 128, 128))
    result = api.img2img(
        images=[image], mask_image=mask, mask_blur=0, inpaint_full_res=False, prompt="a star", seed=1, steps=4,
        width=128, height=128, sampler_name="DDIM", inpainting_fill=1,
    )  # fmt: skip
    drawn, before = np.asarray(result.image), np.asarray(image)
    assert np.array_equal(drawn[:, :64], before[:, :64])
    request = Request(
        "a star", "", 128, 128, 4, 7.0, 1, "ddim", eta=1.0, image=image, mask=mask, strength=0.75, mask_blur=0
    )
    assert same(result.image, request)
    turned = api.img2img(
        images=[image], mask_image=mask, mask_blur=0, inpaint_full_res=False, prompt="a star", seed=1, steps=4,
        width=128, height=128, sampler_name="DDIM", inpainting_mask_invert=1,
    )  # fmt: skip
    assert np.array_equal(np.asarray(turned.image)[:, 64:], before[:, 64:])


def test_webuiapi_follows_a_control_picture(api: webuiapi.WebUIApi) -> None:
    lines = Image.new("RGB", (128, 128), "white")
    lines.paste("black", (30, 30, 34, 100))
    unit = webuiapi.ControlNetUnit(image=lines, module="invert", model="controlnet", weight=0.8)
    result = api.txt2img(prompt="a star", seed=1, width=128, height=128, sampler_name="DDIM", controlnet_units=[unit])
    request = Request(
        "a star", "", 128, 128, 3, 7.0, 1, "ddim", eta=1.0, controls=[Control(lines, weight=0.8, reading="scribble")]
    )
    assert same(result.image, request)


def test_webuiapi_lists_and_sets(api: webuiapi.WebUIApi) -> None:
    assert "emoji" in api.util_get_model_names()
    assert {"Euler a", "DPM++ 2M", "DDIM"} <= set(api.util_get_sampler_names())
    assert "karras" in api.util_get_scheduler_names()
    assert api.get_upscalers()[0]["name"] == "None"
    assert (api.get_latent_upscale_modes(), api.get_sd_vae(), api.get_loras()) == ([], [], [])
    api.util_set_model("emoji:openvino-fp16-lcm")
    assert api.util_get_current_model() == "emoji:openvino-fp16-lcm"
    api.util_wait_for_ready(check_interval=0.1)
    drawn = api.txt2img(prompt="a cat", seed=1, width=64, height=64, sampler_name="LCM")
    assert json.loads(drawn.image.info["edge_sd"])["variant"] == "openvino-fp16-lcm"
    api.util_set_model("emoji")


def test_open_webui(http: httpx.Client) -> None:
    """The calls of its routers/images.py: verify, list, set the model by posting all options back, draw."""
    headers = {"authorization": ""}
    options = http.get("/sdapi/v1/options", headers=headers).raise_for_status().json()
    models = http.get("/sdapi/v1/sd-models", headers=headers).json()
    assert options["sd_model_checkpoint"] in [model["title"] for model in models]
    options["sd_model_checkpoint"] = models[0]["title"]
    http.post("/sdapi/v1/options", json=options, headers=headers).raise_for_status()
    data = {"prompt": "a cat", "batch_size": 1, "width": 64, "height": 64, "steps": 2, "negative_prompt": "blue"}
    answer = http.post("/sdapi/v1/txt2img", json=data, headers=headers).json()
    assert Image.open(BytesIO(base64.b64decode(answer["images"][0]))).size == (64, 64)
    assert json.loads(answer["info"])["steps"] == 2


TAVERN = {
    "url": "http://127.0.0.1:7860", "auth": "", "prompt": "a cat", "negative_prompt": "blue",
    "sampler_name": "DPM++ 2M", "scheduler": "Karras", "steps": 3, "cfg_scale": 7, "width": 64, "height": 64,
    "restore_faces": False, "enable_hr": False, "hr_upscaler": "Latent", "hr_scale": 2, "hr_additional_modules": [],
    "denoising_strength": 0.7, "hr_second_pass_steps": 0, "override_settings": {"CLIP_stop_at_last_layers": 1},
    "override_settings_restore_afterwards": True, "clip_skip": 1, "save_images": True, "send_images": True,
    "do_not_save_grid": False, "do_not_save_samples": False,
}  # fmt: skip


def test_sillytavern(http: httpx.Client, server: tuple[str, Service]) -> None:
    """The calls of its stable-diffusion.js: ping, lists, set the model and poll, draw."""
    basic = {"Authorization": "Basic"}  # What node makes of "Basic " and no name.
    for name in ("options", "samplers", "schedulers", "sd-models", "upscalers", "latent-upscale-modes", "sd-vae"):
        assert http.get(f"/sdapi/v1/{name}", headers=basic).status_code == 200
    http.post("/sdapi/v1/options", json={"sd_model_checkpoint": "emoji"}, headers=basic).raise_for_status()
    progress = http.get("/sdapi/v1/progress", headers=basic).json()
    assert (progress["progress"], progress["state"]["job_count"]) == (0.0, 0)
    answer = http.post("/sdapi/v1/txt2img", json=TAVERN, headers=basic).raise_for_status().json()
    assert len(answer["images"]) == 1
    notes = json.loads(answer["info"])["edge_sd_notes"]
    assert notes == [f"{name} is not known here and had no effect" for name in ("auth", "url")]
    job = server[1].jobs()[-1]
    assert job.keep
    assert job.saved == [0]


def test_progress_and_interrupt(http: httpx.Client, server: tuple[str, Service]) -> None:
    answers: list[dict[str, Any]] = []

    def draw() -> None:
        body = {"prompt": "a cat", "steps": 900, "width": 64, "height": 64}
        answers.append(httpx.post(f"{server[0]}/sdapi/v1/txt2img", json=body, timeout=60).json())

    thread = threading.Thread(target=draw)
    thread.start()
    found: dict[str, Any] = {"current_image": None}
    until = time.monotonic() + 20
    while not found["current_image"] and time.monotonic() < until:
        found = http.get("/sdapi/v1/progress").json()
        time.sleep(0.05)
    assert Image.open(BytesIO(base64.b64decode(found["current_image"]))).size == (64, 64)
    assert 0 < found["progress"] < 1
    assert found["state"]["sampling_steps"] == 900
    assert found["eta_relative"] > 0
    assert http.post("/sdapi/v1/interrupt").json() == {}
    thread.join(timeout=5)
    assert answers[0]["images"] == []
    assert json.loads(answers[0]["info"])["interrupted"]
    assert http.get("/sdapi/v1/progress").json()["state"]["job_count"] == 0


def test_the_noise_that_samplers_add_is_the_pipelines_and_named_where_a_sampler_has_none(http: httpx.Client) -> None:
    asked = {"eta": 0.3, "s_churn": 2.0, "s_noise": 1.1}
    drawn = {}
    for sampler in ("Euler a", "Euler", "DPM++ 2M"):
        body = {"prompt": "a cat", "seed": 7, "steps": 4, "sampler_name": sampler, "cfg_scale": 3, **asked}
        drawn[sampler] = http.post("/sdapi/v1/txt2img", json=body).raise_for_status().json()
    notes = {name: json.loads(answer["info"])["edge_sd_notes"] for name, answer in drawn.items()}
    idle = {name: {note.split()[0] for note in each if "had no effect" in note} for name, each in notes.items()}
    assert idle == {"Euler a": {"s_churn"}, "Euler": {"eta"}, "DPM++ 2M": {"eta", "s_churn", "s_noise"}}
    request = Request("a cat", seed=7, steps=4, sampler="euler_a", guidance=3.0, eta=0.3, s_noise=1.1)
    with Pipeline.open("emoji") as pipeline:
        alone = np.asarray(pipeline.generate(request).pictures[0].image)
    found = Image.open(BytesIO(base64.b64decode(drawn["Euler a"]["images"][0])))
    assert np.array_equal(np.asarray(found), alone)


def test_a_script_that_is_switched_off_is_named(http: httpx.Client) -> None:
    scripts = {"ADetailer": {"args": [False, {"ad_model": "x"}]}, "Refiner": {"args": []}}
    body = {"prompt": "a cat", "steps": 1, "width": 64, "height": 64, "alwayson_scripts": scripts}
    info = json.loads(http.post("/sdapi/v1/txt2img", json=body).raise_for_status().json()["info"])
    assert info["edge_sd_notes"] == ["the script 'ADetailer' is not known here and had no effect"]


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"enable_hr": True}, 400, "enable_hr is not offered"),
        ({"restore_faces": True}, 400, "restore_faces"),
        ({"styles": ["x"]}, 400, "styles"),
        ({"alwayson_scripts": {"ADetailer": {"args": [True, {}]}}}, 400, "ADetailer"),
        ({"sampler_name": "none"}, 400, "valid: "),
        ({"override_settings": {"sd_model_checkpoint": "../x"}}, 400, "valid: emoji"),
        ({"override_settings": {"outdir_samples": "/tmp"}}, 400, "outdir_samples"),
        ({"batch_size": 64, "n_iter": 64}, 400, "at most 64"),
        ({"steps": -1}, 422, "steps"),
        ({"seed": 2**40}, 422, "seed"),
        ({"prompt": ""}, 400, "prompt is empty"),
    ],
)
def test_what_is_not_offered_is_refused_by_name(
    http: httpx.Client, body: dict[str, Any], status: int, words: str
) -> None:
    answer = http.post("/sdapi/v1/txt2img", json={"prompt": "a cat", **body})
    assert answer.status_code == status, answer.text
    assert words in answer.json()["detail"]
    assert set(answer.json()) == {"error", "detail", "body", "errors"}
