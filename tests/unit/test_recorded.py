"""What a picture says about how it was made: ours exactly, others' as an independent reader reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from edge_sd import Request
from edge_sd.backends.fake import fake_bundle
from edge_sd.errors import InvalidRequest
from edge_sd.pipeline.recorded import read_recorded
from edge_sd.pipeline.settings import Settings

from .test_canvas import half, picture
from .test_pipeline import pipeline

THEIRS = (
    "masterpiece, (a cat:1.3), Steps: up\nsecond line\nNegative prompt: dogs,\nbirds\n"
    "Steps: 28, Sampler: Euler a, CFG scale: 6.5, Seed: 123, Size: 512x768, Model hash: cc6cb27103, "
    'Model: v1-5, Clip skip: 2, Lora hashes: "a: 1f, b: 2e", Version: v1.9.4'
)


def write(path: Path, text: str, name: str = "parameters") -> Path:
    image = Image.new("RGB", (8, 8))
    if path.suffix == ".png":
        chunks = PngInfo()
        chunks.add_text(name, text)
        image.save(path, pnginfo=chunks)
        return path
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + text.encode("utf-16-be")
    image.save(path, exif=exif)
    return path


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.webp"])
def test_text_of_other_programs_is_read_as_sd_parsers_reads_it(tmp_path: Path, name: str) -> None:
    sd_parsers = pytest.importorskip("sd_parsers")
    path = write(tmp_path / name, THEIRS)
    recorded = read_recorded(path)
    theirs = sd_parsers.ParserManager().parse(path)
    assert not recorded.exact
    assert recorded.settings["prompt"] == theirs.full_prompt
    assert recorded.settings["negative"] == theirs.full_negative_prompt
    (sampler,) = theirs.samplers
    assert str(recorded.settings["seed"]) == sampler.parameters["seed"]
    assert f"{recorded.settings['guidance']:g}" == sampler.parameters["cfg_scale"]
    assert recorded.settings["sampler"] == sampler.name == "Euler a"
    assert Settings.of(recorded.request(), fake_bundle().defaults, 0).sampler == "euler_a"
    (model,) = theirs.models
    assert (recorded.model, recorded.model_hash) == (model.name, model.hash)
    assert (recorded.settings["width"], recorded.settings["height"]) == (512, 768)
    assert recorded.others == {"Lora hashes": "a: 1f, b: 2e", "Version": "v1.9.4"}
    assert recorded.settings["clip_skip"] == 2


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_sd_parsers_reads_what_we_write(tmp_path: Path, ending: str) -> None:
    sd_parsers = pytest.importorskip("sd_parsers")
    with pipeline() as opened:
        drawn = opened.generate(Request("a cat, on a mat", "dogs", seed=7, steps=3)).pictures[0]
    theirs = sd_parsers.ParserManager().parse(drawn.save(tmp_path / f"x.{ending}"))
    assert (theirs.full_prompt, theirs.full_negative_prompt) == ("a cat, on a mat", "dogs")
    assert theirs.samplers[0].parameters["seed"] == "7"


@pytest.mark.parametrize("order", ["be", "le"])
def test_both_orders_of_utf16_are_read(tmp_path: Path, order: str) -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + THEIRS.encode(f"utf-16-{order}")
    Image.new("RGB", (8, 8)).save(tmp_path / "x.jpg", exif=exif)
    assert read_recorded(tmp_path / "x.jpg").settings["steps"] == 28


def test_a_picture_is_made_again_from_its_file_and_options_go_before(tmp_path: Path) -> None:
    asked = {"image": picture(), "mask": half(), "mask_blur": 2.0}
    with pipeline() as opened:
        first = opened.generate(Request("a cat", "a dog", seed=5, steps=3, sampler="euler_a", **asked)).pictures[0]
        recorded = read_recorded(first.save(tmp_path / "x.png"))
        request = recorded.request(image=picture(), mask=half())
        recorded.check(opened.resolve(request))
        again = opened.generate(request).pictures[0]
        assert np.array_equal(np.asarray(first.image), np.asarray(again.image))
        assert again.settings == first.settings
        assert recorded.request(image=picture(), mask=half(), steps=2).steps == 2
        with pytest.raises(InvalidRequest, match=r"made with an image whose pixels hash to [0-9a-f]{10}; give that"):
            recorded.request(mask=half())
        with pytest.raises(InvalidRequest, match="another image: its pixels hash to"):
            recorded.check(opened.resolve(recorded.request(image=picture(seed=9), mask=half())))


def ours(**changes: Any) -> str:
    return json.dumps({"version": "9.9", "request": {"prompt": "a cat", **changes}})


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (ours()[:-3], "parameters that are damaged"),
        ('{"request": 5}', "parameters that are damaged"),
        ('{"request": {"prompt": 5}}', "parameters that are damaged"),
        (ours(steps="ten"), "parameters that are damaged"),
        (ours(steps=0), "steps 0 is not"),
        (ours(references=5), "parameters that are damaged"),
        (ours(references="ab"), "parameters that are damaged"),
        (ours(controls=[{"weight": 1}]), "parameters that are damaged"),
        (ours(references=[{"image": "0123456789"}]), "made with a reference picture whose pixels hash to 0123456789;"),
        (ours(flavour="sweet"), "made by edge-sd 9.9 with 'flavour', which this version lacks"),
    ],
)
def test_what_is_damaged_is_told_in_one_line(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(InvalidRequest, match=told) as caught:
        read_recorded(write(tmp_path / "x.png", text, "edge_sd")).request()
    assert "\n" not in str(caught.value)


def test_a_file_that_says_nothing_or_is_none_is_told(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    (tmp_path / "text.png").write_bytes(b"not a picture")
    picture().save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:200])
    for name, told in (
        ("plain", "no parameters"),
        ("text", "no PNG, JPEG"),
        ("cut", "cannot be read"),
        ("no", "No such"),
    ):
        with pytest.raises(InvalidRequest, match=told):
            read_recorded(tmp_path / f"{name}.png")
    with pytest.raises(InvalidRequest, match="damaged"):
        read_recorded(write(tmp_path / "size.png", "a cat\nSteps: 5, Size: big"))


def test_a_picture_with_a_word_of_ones_own_wants_the_same_file_again(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    for name in ("a", "b"):
        save_file({"emb_params": np.full((1, 16), ord(name), np.float32)}, tmp_path / f"{name}.safetensors")
    with pipeline() as opened:
        request = Request("a zork", seed=1, steps=1, clip_skip=2, embeddings={"zork": tmp_path / "a.safetensors"})
        opened.generate(request).save(tmp_path / "picture.png")
        recorded = read_recorded(tmp_path / "picture.png")
        with pytest.raises(InvalidRequest, match="made with the embedding 'zork'"):
            recorded.request()
        again = recorded.request(embeddings={"zork": tmp_path / "a.safetensors"})
        recorded.check(opened.resolve(again))
        assert opened.resolve(again) == opened.resolve(request)
        with pytest.raises(InvalidRequest, match="made with another embedding 'zork'"):
            recorded.check(opened.resolve(recorded.request(embeddings={"zork": tmp_path / "b.safetensors"})))


def test_a_picture_with_a_lora_wants_the_same_file_again(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        rows = {f"unet.x.lora_{half}.weight": np.full((2, 2), ord(name), np.float32) for half in "AB"}
        save_file(rows, tmp_path / name / "style.safetensors")
    with pipeline() as opened:
        request = Request("a cat <lora:style:0.5>", seed=1, steps=1, lora_folder=tmp_path / "a")
        opened.generate(request).save(tmp_path / "picture.png")
        recorded = read_recorded(tmp_path / "picture.png")
        assert recorded.settings["prompt"].strip() == "a cat"
        with pytest.raises(InvalidRequest, match=r"made with the LoRA 'style' .* with the weight 0\.5"):
            recorded.request()
        again = recorded.request(loras={tmp_path / "a/style.safetensors": 0.5})
        assert opened.resolve(again) == opened.resolve(request)
        with pytest.raises(InvalidRequest, match="made with another LoRA 'style'"):
            recorded.check(opened.resolve(recorded.request(loras={tmp_path / "b/style.safetensors": 0.5})))


@pytest.mark.parametrize("damage", [{"embeddings": [1]}, {"loras": {"a": 3}}, {"loras": {"a": [1]}}, {"loras": "x"}])
def test_damaged_records_of_files_are_no_crash(tmp_path: Path, damage: dict[str, Any]) -> None:
    document = {"request": {"prompt": "a cat", **damage}}
    path = write(tmp_path / "x.png", json.dumps(document), "edge_sd")
    recorded = read_recorded(path)
    assert recorded.request().prompt == "a cat"
