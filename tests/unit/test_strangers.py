"""Pictures of strangers: what is read of them is bounded, shown escaped, and names nothing of this machine."""

from __future__ import annotations

import gzip
import json
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import pytest

from edge_sd.apps.terminal import plain
from edge_sd.errors import InvalidRequest
from edge_sd.images.metadata import MAX_TEXT, read_texts
from edge_sd.pipeline.infotext import parse_infotext
from edge_sd.pipeline.recorded import read_recorded

from ..timing import check_linear
from .test_canvas import picture
from .test_programs import read


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def raw_png(*chunks: bytes, size: tuple[int, int] = (8, 8)) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IEND", b"")


def test_utf8_in_a_latin_chunk_and_text_after_the_pixels_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    text = "雪の家\nSteps: 3, Seed: 1, Size: 64x64"
    path.write_bytes(raw_png(chunk(b"IDAT", b"pixels"), chunk(b"tEXt", b"parameters\0" + text.encode())))
    assert read_recorded(path).settings["prompt"] == "雪の家"
    path.write_bytes(raw_png(chunk(b"tEXt", b"parameters\0" + "un été\nSteps: 3".encode("latin-1"))))
    assert read_recorded(path).settings["prompt"] == "un été"


@pytest.mark.fault(9, "text chunks that unpack to more than their limit")
def test_no_pixel_is_decoded_and_limits_come_before_memory(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    packed = b"parameters\0\0" + zlib.compress(b"a" * (MAX_TEXT + 100))
    for chunks, said in (
        ((chunk(b"zTXt", packed),), "unpacks to more than"),
        (tuple(chunk(b"tEXt", b"a\0" + b"b" * (3 << 20)) for _ in range(6)), "MiB of text"),
    ):
        path.write_bytes(raw_png(*chunks))
        with pytest.raises(InvalidRequest, match=said):
            read_recorded(path)
    # 13,300 x 13,300 pixels of which none are there.
    text = chunk(b"tEXt", b"parameters\0a cat\nSteps: 3")
    path.write_bytes(raw_png(text, chunk(b"IDAT", b"no pixels"), size=(13300, 13300)))
    assert read_texts(path).size == (13300, 13300)
    assert read_recorded(path).settings["steps"] == 3


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(InvalidRequest, match="no file"):
        read_recorded(tmp_path / "x.png")


HOSTILE = {
    "pairs": lambda n: "Steps: 3, " + "a" * n,
    "colons": lambda n: "Steps: 3, " + "a:" * n,
    "no key": lambda n: "Steps: 3, x," + ":,x," * n,
    "quotes": lambda n: "Steps: 3, " + 'a:"b,' * n,
    "brackets": lambda n: "Steps: 3, a:" + "[" * n,
    "arrays": lambda n: "Steps: 3, " + 'a:["b",' * n,
    "lines": lambda n: "Negative prompt:\n" * n,
    "steps": lambda n: "Steps: 3\n" * n,
    "spaces": lambda n: "a" + " " * n + "\nSteps: 3",
}


@pytest.mark.fault(21, "adversarial infotexts")
@pytest.mark.parametrize("kind", HOSTILE)
def test_reading_takes_time_that_grows_with_length_alone(kind: str) -> None:
    check_linear(parse_infotext, HOSTILE[kind], 20_000)


@pytest.mark.fault(21, "adversarial graphs of ComfyUI")
def test_a_graph_costs_a_bounded_time(tmp_path: Path) -> None:
    nodes = {
        str(n): {"class_type": "SaveImage", "inputs": {"images": [str(n + 1), 0], "text": [str(n + 1), 0], "clip": 1}}
        for n in range(9000)
    }
    nodes["9001"] = {"class_type": "KSampler", "inputs": {"latent_image": ["0", 0], "steps": 3, "positive": ["0", 0]}}
    started = time.thread_time()
    with pytest.raises(InvalidRequest, match="looks at nodes"):
        read(tmp_path, prompt=json.dumps(nodes))
    assert time.thread_time() - started < 5


def ours(**request: Any) -> str:
    return json.dumps({"version": "1", "model": "emoji", "request": {"prompt": "a cat", **request}})


@pytest.mark.fault(20, "strangers' pictures that name files, folders and models")
@pytest.mark.parametrize(
    "request_",
    [
        {"wildcards": "/etc", "prompt": "__passwd__"},
        {"lora_folder": "/etc"},
        {"dynamic": True, "prompt": "{a|b}"},
        {"refiner": "/etc"},
        {"refiner": "../models/x"},
        {"refiner": ["a"]},
    ],
)
def test_a_strangers_picture_names_no_file_or_folder_of_this_machine(tmp_path: Path, request_: dict[str, Any]) -> None:
    recorded = read(tmp_path, edge_sd=ours(**request_))
    with pytest.raises(InvalidRequest) as caught:
        recorded.request()
    assert "passwd" not in str(caught.value)


@pytest.mark.fault(20, "strangers' pictures that name files, folders and models")
@pytest.mark.parametrize("name", ["image", "mask", "control"])
def test_a_strangers_picture_is_not_drawn_from_a_path_in_it(tmp_path: Path, name: str) -> None:
    picture().save(tmp_path / "secret.png")
    with pytest.raises(InvalidRequest, match=r"give (it|that|them) again"):
        read(tmp_path, edge_sd=ours(**{name: str(tmp_path / "secret.png")})).request()


@pytest.mark.fault(22, "escapes in metadata")
def test_escapes_of_a_strangers_text_are_shown_and_not_obeyed() -> None:
    assert plain("a\x1b[2J\x9bb\u202ec\r\nd\te") == "a\\x1b[2J\\x9bb\\u202ec\\r\nd\te"
    assert plain("👩\u200d🚀 é 雪") == "👩\u200d🚀 é 雪"


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_user_comment_has_the_type_of_the_standard(tmp_path: Path, kind: str) -> None:
    from edge_sd import Request

    from .test_pipeline import pipeline

    with pipeline() as opened:
        drawn = opened.generate(Request("a cat é", seed=7, steps=1)).pictures[0]
    data = drawn.save(tmp_path / f"x.{kind.lower()}").read_bytes()
    assert struct.pack(">HH", 0x9286, 7) in data or struct.pack("<HH", 0x9286, 7) in data
    assert struct.pack(">HH", 0x9286, 1) not in data


def test_the_compressed_form_of_text_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    text = "a cat\nSteps: 3"
    path.write_bytes(raw_png(chunk(b"zTXt", b"parameters\0\0" + zlib.compress(text.encode()))))
    assert read_recorded(path).settings["steps"] == 3
    path.write_bytes(raw_png(chunk(b"iTXt", b"parameters\0\1\0\0\0" + zlib.compress(text.encode()))))
    assert read_recorded(path).settings["steps"] == 3
    path.write_bytes(raw_png(chunk(b"zTXt", b"parameters\0\0" + gzip.compress(text.encode()))))
    with pytest.raises(InvalidRequest, match="cannot be read"):
        read_recorded(path)
