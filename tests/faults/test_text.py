"""Text of strangers: it names no file of this machine, takes time by its length alone, and is shown, not obeyed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from edge_sd.bundle.bundle import checksum
from edge_sd.errors import EdgeSDError
from edge_sd.pipeline.infotext import parse_infotext
from edge_sd.pipeline.recorded import read_recorded
from edge_sd.text.tokenizer import TextTokenizer

from ..timing import check_linear
from .account import Tally

ODD = "a\x1b[31m\x1b]0;title\x07b\rc\x9bd\u202ee\u200bf\u2066g\x08h\x7fi"
ALLOWED = re.compile(r"[^\n\t\x20-\x7e\u00a0-\U0010ffff]|[\u200b\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]")


def command(*words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What a command prints, in this process."""
    from edge_sd.apps.cli import main

    monkeypatch.setattr(sys, "argv", ["edge-sd", *words])
    with pytest.raises(SystemExit):
        main()
    return "".join(capsys.readouterr())


@pytest.fixture
def odd_model(emoji: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The embedded model under names that hold escapes, in a manifest whose checksum is right."""
    folder = tmp_path / "models" / "odd"
    shutil.copytree(emoji, folder, ignore=shutil.ignore_patterns("coreml-*", "*.png", "controlnet", "evaluator"))
    document = json.loads((folder / "edge_sd.json").read_text())
    document |= {"name": ODD, "license": ODD, "others": {}}
    variant = document["variants"]["openvino-fp16"]
    unused = ("controlnet", "control_unet", "unet_control")
    variant["artifacts"] = {part: row for part, row in variant["artifacts"].items() if "control" not in part}
    variant["files"] = {name: row for name, row in variant["files"].items() if (folder / name).is_file()}
    assert not [part for part in unused if part in variant["artifacts"]]
    document["variants"] = {"openvino-fp16": variant, ODD: {**variant, "precision": ODD}}
    document["checksum"] = checksum(document)
    (folder / "edge_sd.json").write_text(json.dumps(document))
    monkeypatch.setenv("EDGE_SD_MODELS", str(folder.parent))
    monkeypatch.setenv("EDGE_SD_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.mark.fault(22, "escapes, bidi and zero-width characters in names, prompts and metadata, through commands")
def test_no_escape_reaches_the_terminal(
    odd_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tally: Tally
) -> None:
    monkeypatch.chdir(tmp_path)
    picture = PngInfo()
    picture.add_itxt("parameters", f"{ODD}\nNegative prompt: {ODD}\nSteps: 3, Sampler: {ODD}, Model: {ODD}, {ODD}: 1")
    Image.new("RGB", (8, 8)).save("theirs.png", pnginfo=picture)
    draw = ("--steps", "1", "--size", "64", "--seed", "1")
    commands = [
        ("models", "list"), ("models", "show", "odd"), ("models", "verify", "odd"), ("devices", "--model", "odd"),
        ("models", "show", ODD), ("generate", "a cat", "--model", "odd", "--variant", "x" + ODD, *draw),
        ("generate", ODD, "--model", "odd", "--verbose", "-o", "x.png", *draw), 
        ("info", "x.png"), ("info", "theirs.png"),
        ("generate", "a cat", "--sampler", ODD), ("generate", "a cat", "--lora", f"{ODD}.safetensors"),
        ("generate", f"a <lora:{ODD}:1>"), ("generate", f"a (b:{ODD})"), ("generate", "--from", "theirs.png", *draw),
        ("cache", "clear", ODD), ("models", "pull", ODD), ("compare", ODD), ("convert", ODD, "x"), ("info", ODD),
        ("generate", ODD, "--model", "odd", *draw),
    ]  # fmt: skip
    for words in commands:
        with tally.trial(words, refused=True):
            said = command(*words, monkeypatch=monkeypatch, capsys=capsys)
            assert said
            assert (found := ALLOWED.search(said)) is None, repr(said[max(0, found.start() - 60) : found.end() + 20])
    for name in os.listdir(tmp_path):
        with tally.trial(name, refused=True):
            assert re.fullmatch(r"[\w.-]+", name), repr(name)


RESERVED = ["con", "CON", "prn", "aux", "nul", "com1", "LPT9", "con.png", "a.", "a ", ".a", "-a", "..", "~", "a" * 300,
            "é" * 200, "a/b", "a\\b", "a:b", 'a"b', "a|b", "a?b*", "<a>", "\u202ea", "\x1b[2J", "\n", "雪",
            ""]  # fmt: skip


@pytest.mark.fault(22, "prompts that are no names of files on Linux, macOS or Windows")
def test_a_prompt_becomes_a_name_everywhere(tally: Tally) -> None:
    from edge_sd.apps.saving import stem_of

    for prompt in RESERVED:
        with tally.trial(repr(prompt), refused=True):
            stem = stem_of(prompt)
            assert re.fullmatch(r"[^\W_][\w-]*", stem), repr(stem)
            assert len(stem.encode()) <= 200
            assert stem.split(".")[0].lower() not in {"con", "prn", "aux", "nul", "com1", "lpt9"}


def recorded(folder: Path, **texts: str) -> Path:
    chunks = PngInfo()
    for name, text in texts.items():
        chunks.add_text(name, text)
    Image.new("RGB", (8, 8)).save(folder / "x.png", pnginfo=chunks)
    return folder / "x.png"


PLACES = ["/etc/passwd", "../secret", "~/secret", "file:///etc/passwd", "\\\\server\\share\\x", "C:\\secret", "secret"]
FIELDS = ["wildcards", "lora_folder", "refiner", "image", "mask", "model", "vae"]


@pytest.mark.fault(20, "strangers' records whose fields and words are places on this machine")
def test_no_place_in_a_record_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tally: Tally) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "colour.txt").write_text("the secret word\n")
    (secret / "hidden-name.safetensors").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    places = [*PLACES, str(secret)]
    rows: list[dict[str, Any]] = [
        {"request": {"prompt": "a __colour__", name: place}} for name in FIELDS for place in places
    ]
    rows += [{"request": {"prompt": f"a <lora:{place}:1>", "loras": {place: ["ab", 1.0]}}} for place in places]
    rows += [{"request": {"prompt": "a", "embeddings": {place: "ab"}}, "model": place} for place in places]
    opened: list[str] = []

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event in ("open", "os.listdir", "os.scandir", "glob.glob"):
            opened.append(str(arguments[0]))

    watching = False
    sys.addaudithook(watch)
    for row in rows:
        path = recorded(tmp_path, edge_sd=json.dumps({"version": "1", **row}))
        opened.clear()
        said, watching = "", True
        with tally.trial(row, refused=True):
            try:
                said = str(read_recorded(path).request())
            except EdgeSDError as error:
                said = str(error)
            finally:
                watching = False
            assert "secret word" not in said
            assert "hidden-name" not in said
            assert not [each for each in opened if "secret" in each or "passwd" in each], opened


GROWING: dict[str, Callable[[int], str]] = {
    "braces": lambda n: '{"request": ' + '{"prompt": "' + "{" * n + '"}}',
    "escapes": lambda n: '{"request": {"prompt": "' + "\\\\" * (n // 2) + '"}}',
    "settings": lambda n: json.dumps({"request": {"prompt": "a", **{f"k{i}": 1 for i in range(n // 10)}}}),
    "colons": lambda n: json.dumps({"request": {"prompt": ":1" * (n // 2)}}),
    "loras": lambda n: json.dumps({"request": {"prompt": "<lora:" * (n // 6)}}),
}


@pytest.mark.fault(21, "JSON records of n and 4n characters, merges.txt and infotext of 1 MB")
@pytest.mark.parametrize("kind", GROWING)
def test_records_take_time_by_their_length_alone(kind: str, tmp_path: Path, tally: Tally) -> None:
    def read(text: str) -> None:
        with contextlib.suppress(EdgeSDError):
            read_recorded(recorded(tmp_path, edge_sd=text)).request()

    with tally.trial(kind):
        check_linear(read, GROWING[kind], 20_000)


@pytest.mark.fault(21, "JSON records of n and 4n characters, merges.txt and infotext of 1 MB")
def test_a_megabyte_takes_less_than_a_second(emoji: Path, tmp_path: Path, tally: Tally) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(emoji / "tokenizer", folder)
    merges = (folder / "merges.txt").read_text()

    def tokenizer(text: str) -> None:
        (folder / "merges.txt").write_text(merges + text)
        with contextlib.suppress(EdgeSDError):
            TextTokenizer(folder, 32)

    for name, text in {"spaces": " ", "pairs": "a b\n", "one line": "a"}.items():
        with tally.trial(name):
            assert check_linear(tokenizer, partial(repeated, text), 1 << 18) < 1
    for name, text in {"steps": "Steps: 3\n", "pairs": "a: b, ", "quotes": 'a: "', "prompt": "(a:1.1) "}.items():
        with tally.trial(name):
            read = partial(repeated, text)
            assert check_linear(lambda each: parse_infotext("a cat\nSteps: 3, " + each), read, 1 << 18) < 1


def repeated(text: str, count: int) -> str:
    return text * (count // len(text))
