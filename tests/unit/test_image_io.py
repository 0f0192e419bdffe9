"""What is written into a picture comes back exactly, and a picture is written whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from edge_sd.errors import InvalidRequest, OutputError
from edge_sd.images.files import check_output
from edge_sd.pipeline.recorded import read_recorded
from edge_sd.pipeline.result import Picture
from edge_sd.pipeline.settings import Settings

from ..faults.account import Tally

PROMPTS = st.text(min_size=1, max_size=200).filter(lambda text: "\0" not in text and not _has_surrogate(text))


def _has_surrogate(text: str) -> bool:
    return any(0xD800 <= ord(letter) < 0xE000 for letter in text)


def picture(prompt: str = "a cat", negative: str = "") -> Picture:
    image = Image.fromarray(np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3))
    wanted = Settings(prompt, negative, 64, 64, 20, 7.5, 4294967295, "dpmpp_2m", sigmas="karras")
    return Picture(image, wanted, "my: model, odd", "openvino-fp16", "cpu", "0123456789")


@pytest.mark.fault(18, "random prompts through PNG, JPEG and WebP")
@pytest.mark.parametrize("ending", [".png", ".jpg", ".jpeg", ".webp", ".PNG"])
def test_every_field_comes_back(tmp_path: Path, tally: Tally, ending: str) -> None:
    @given(prompt=PROMPTS, negative=PROMPTS)
    @settings(max_examples=tally.count(2000), deadline=None, suppress_health_check=[HealthCheck.too_slow])
    def check(prompt: str, negative: str) -> None:
        drawn = picture(prompt, negative)
        recorded = read_recorded(drawn.save(tmp_path / f"x{ending}"))
        tally.held()
        own = {**recorded.settings, "controls": (), "references": ()}
        assert Settings(**own) == drawn.settings
        assert recorded.exact
        assert recorded.model_hash == "0123456789"
        # A mark of byte order that begins the text of EXIF is taken for one; the request itself has it still.
        assert recorded.text.lstrip("\ufeff") == drawn.texts()[0].lstrip("\ufeff")

    check()


def test_pixels_of_a_png_are_what_was_drawn(tmp_path: Path) -> None:
    path = picture("käse 🧀").save(tmp_path / "x.png")
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(image), np.asarray(picture().image))
        assert image.info["parameters"] == picture("käse 🧀").texts()[0]


def test_parameters_are_in_automatic1111s_form() -> None:
    assert picture("a cat", "dogs").texts()[0] == (
        "a cat\nNegative prompt: dogs\nSteps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7.5, Seed: 4294967295, "
        "Size: 64x64, Model hash: 0123456789, Model: my model odd"
    )


def test_exif_user_comment_is_unicode(tmp_path: Path) -> None:
    with Image.open(picture("käse 🧀").save(tmp_path / "x.jpg")) as image:
        comment = image.getexif().get_ifd(0x8769)[0x9286]
    assert comment[:8] == b"UNICODE\0"
    assert comment[8:].decode("utf-16-be") == picture("käse 🧀").texts()[0]


@pytest.mark.parametrize("name", ["x.gif", "x", "x.png.txt", ".png/x.tiff"])
def test_only_picture_names_are_taken(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidRequest):
        check_output(tmp_path / name)


def test_a_missing_folder_and_a_folder_in_the_way_are_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="does not exist"):
        check_output(tmp_path / "no/x.png")
    (tmp_path / "x.png").mkdir()
    with pytest.raises(InvalidRequest, match="is a folder"):
        check_output(tmp_path / "x.png")


@pytest.mark.fault(2, "a picture replaced on a disk that fails")
@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_full_disk_leaves_the_older_picture_and_no_debris(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = picture().save(tmp_path / "x.png")
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, failing, full)
    with pytest.raises(OutputError, match="No space left on device"):
        picture("another").save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["x.png"]
