"""Single bits of what is read: each flip is refused by name, or is seen by `verify`; nothing untyped comes through."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_sd import ModelBundle
from edge_sd.bundle.bundle import checksum, read_manifest
from edge_sd.bundle.mlpackage.package import Lazy, Package
from edge_sd.errors import InvalidModel, InvalidRequest
from edge_sd.text.tokenizer import TextTokenizer

from ..e2e.test_cli import edge_sd
from ..faults.account import Tally


def flipped(path: Path, count: int, seed: int = 0) -> Any:
    """Write `path` with one bit flipped, `count` times, and as it was at the end; yields the place of each."""
    data = bytearray(path.read_bytes())
    rng = np.random.default_rng(seed)
    try:
        for at, bit in zip(rng.integers(len(data), size=count), rng.integers(8, size=count), strict=True):
            data[at] ^= 1 << bit
            path.write_bytes(data)
            yield int(at), int(bit)
            data[at] ^= 1 << bit
    finally:
        path.write_bytes(data)


def refusal(read: Callable[[], Any]) -> str:
    """The line in which something is refused; "" where it is not. Any other exception fails the test."""
    try:
        read()
    except (InvalidModel, InvalidRequest) as error:
        return str(error)
    return ""


@pytest.fixture
def copy(emoji: Path, tmp_path: Path) -> Path:
    """The embedded model's small files."""
    target = tmp_path / "emoji"
    ignored = shutil.ignore_patterns("*.safetensors", "openvino-*", "*.png", "lcm")
    shutil.copytree(emoji, target, ignore=ignored)
    return target


@pytest.mark.fault(5, "single bits of a manifest flipped")
def test_every_bit_of_a_manifest_counts(copy: Path, tally: Tally) -> None:
    path = copy / "edge_sd.json"
    whole = json.loads(path.read_bytes())
    for place in flipped(path, tally.count(4000)):
        with tally.trial(place, refused=True):
            # The 17th digit of a number may be another one of the same value.
            assert refusal(lambda: read_manifest(copy)) or json.loads(path.read_bytes()) == whole
    read_manifest(copy)


WRONG = [
    ("latents", "scale", "0.7"), ("latents", "channels", 4.5), ("latents", "channels", True), ("latents", "mean", 1),
    ("defaults", "width", "x"),
    ("defaults", "steps", None), ("defaults", "guidance", "4"), ("defaults", "sampler", 3), ("defaults", "best", 1),
    ("files", "tokenizer/vocab.json", 7), ("others", "model_index.json", {"bytes": "1", "sha256": ""}),
    ("variants", "openvino-fp16", []), ("schedule", "beta_start", "x"), ("files", "../x", {"bytes": 1, "sha256": ""}),
]  # fmt: skip


@pytest.mark.fault(5, "values of another type in a manifest")
@pytest.mark.parametrize(("key", "name", "value"), WRONG, ids=lambda value: str(value)[:20])
def test_a_value_of_another_type_is_refused_by_name(copy: Path, key: str, name: str, value: Any) -> None:
    document = json.loads((copy / "edge_sd.json").read_text())
    document[key][name] = value
    document["checksum"] = checksum(document)
    (copy / "edge_sd.json").write_text(json.dumps(document))
    with pytest.raises(InvalidModel):
        read_manifest(copy)


def test_a_manifest_of_the_first_format_is_read(copy: Path) -> None:
    document = json.loads((copy / "edge_sd.json").read_text())
    del document["checksum"], document["others"]
    (copy / "edge_sd.json").write_text(json.dumps({**document, "format": 1}))
    assert read_manifest(copy).name == "emoji"
    (copy / "edge_sd.json").write_text(json.dumps({**document, "format": 2}))
    with pytest.raises(InvalidModel, match="its checksum differs"):
        read_manifest(copy)


@pytest.mark.fault(5, "single bits of a tokenizer's files flipped")
@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer_config.json"])
def test_a_damaged_tokenizer_is_refused_by_name_or_reads(copy: Path, tally: Tally, name: str) -> None:
    def read() -> None:
        TextTokenizer(copy / "tokenizer", 32).chunks("a red (apple:1.2), glossy style")

    for place in flipped(copy / "tokenizer" / name, tally.count(400)):
        with tally.trial(place):
            assert "\n" not in refusal(read)


SPECIAL = {"<|startoftext|>": 0, "<|endoftext|>": 1}


@pytest.mark.fault(5, "vocabularies that the tokenizers library panics at")
@pytest.mark.parametrize(
    ("vocabulary", "merges"),
    [
        ({"a": 0}, ""), ([], ""), (SPECIAL, "a b\n"), (SPECIAL, "a\n"), (SPECIAL | {"<|endoftext|>": 0}, ""),
        *((SPECIAL | {"<|startoftext|>": wrong}, "") for wrong in (-1, 1 << 40, 0.5, "0", None, True, [])),
    ],
)  # fmt: skip
def test_a_vocabulary_that_the_library_would_panic_at(tmp_path: Path, vocabulary: Any, merges: str) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + merges)
    with pytest.raises(InvalidModel):
        TextTokenizer(tmp_path, 32)


@pytest.mark.fault(5, "single bits of a Core ML package flipped")
def test_a_damaged_package_is_refused_by_name_or_reads(copy: Path, tally: Tally) -> None:
    package = copy / "coreml-ane-fp16/TinyDecoder.mlpackage"

    def read() -> None:
        for function in Package.open(package).functions.values():
            for operation in function.operations:
                for constant in (*operation.attributes.values(), *chain(*operation.inputs.values())):
                    if isinstance(constant, Lazy) and constant.offset is None:
                        constant.read()

    for place in flipped(package / "Data/com.apple.CoreML/model.mlmodel", tally.count(1500)):
        with tally.trial(place):
            assert "\n" not in refusal(read)


@pytest.mark.parametrize("text", ["[" * 200_000, "{}", "[]", '{"itemInfoEntries": 1, "rootModelIdentifier": "x"}'])
def test_a_packages_manifest_that_is_none(copy: Path, text: str) -> None:
    package = copy / "coreml-ane-fp16/TinyDecoder.mlpackage"
    (package / "Manifest.json").write_text(text)
    with pytest.raises(InvalidModel, match="is no package's manifest"):
        Package.open(package)


def test_one_damaged_manifest_hides_no_other_model(copy: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    shutil.copytree(copy, home / "bad")
    shutil.copytree(copy, home / "good")
    (home / "bad/edge_sd.json").write_text("{")
    done = edge_sd("models", "list", "--json", cwd=tmp_path, EDGE_SD_MODELS=str(home))
    assert done.returncode == 0, done.stderr
    assert {row["name"] for row in json.loads(done.stdout)} == {"emoji", "good"}
    assert done.stderr.startswith("note: bad: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.fault(5, "single bits of configs, of an index and of the judge flipped")
@pytest.mark.parametrize(
    "name", ["evaluator/model.safetensors", "unet/config.json", "model_index.json",
             "unet/diffusion_pytorch_model.safetensors.index.json", "scheduler/scheduler_config.json"],
)  # fmt: skip
def test_verify_sees_a_bit_in_what_other_commands_read(emoji: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(emoji, tmp_path / "m")
    path = tmp_path / "m" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    bundle = ModelBundle(tmp_path / "m", *(lambda b: (b.facts, b.variants, b.files, b.others))(read_manifest(emoji)))
    assert bundle.verify() == [f"{name} is damaged (its sha256 differs from the manifest)"]
    if name.startswith("evaluator"):
        from edge_sd.apps.compare.judge import Judge

        with pytest.raises(InvalidModel, match=r"evaluator/model\.safetensors is damaged"):
            Judge(tmp_path / "m/evaluator")


@pytest.mark.fault(5, "an export without hashes changed after it was first verified")
def test_an_export_without_hashes_is_said_to_be_and_then_compared(bundle: ModelBundle, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    shutil.copytree(bundle.root / "openvino-fp16", folder)
    env = {"EDGE_SD_CACHE": str(tmp_path / "cache")}
    first = edge_sd("models", "verify", "export", cwd=tmp_path, **env)
    assert first.returncode == 0, first.stderr
    assert "nothing can be said of" in first.stdout
    assert "as the manifest says" not in first.stdout
    assert (
        "as they were when they were first verified"
        in edge_sd("models", "verify", "export", cwd=tmp_path, **env).stdout
    )
    weights = folder / "unet/openvino_model.bin"
    data = bytearray(weights.read_bytes())
    data[1000] ^= 1
    weights.write_bytes(data)
    third = edge_sd("models", "verify", "export", cwd=tmp_path, **env)
    assert third.returncode == 1
    assert third.stdout == "unet/openvino_model.bin is not as it was when it was first verified (its sha256 differs)\n"


@pytest.mark.fault(25, "debris of killed processes")
def test_what_a_killed_process_left_is_swept_and_never_listed(tmp_path: Path) -> None:
    from edge_sd.converters.build import _files
    from edge_sd.files import write_atomically

    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    left = tmp_path / f".x.json.{gone.stdout.strip()}.partial"
    running = tmp_path / f".x.json.{os.getppid()}.partial"
    other = tmp_path / f".y.json.{gone.stdout.strip()}.partial"
    for each in (left, running, other):
        each.write_bytes(b"half")
    assert _files(tmp_path) == []
    write_atomically(tmp_path / "x.json", b"whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([running.name, other.name, "x.json"])


def test_a_config_without_a_sample_size_draws_as_diffusers_does(miniature: Path, tmp_path: Path) -> None:
    shutil.copytree(miniature, tmp_path / "m")
    config = json.loads((miniature / "unet/config.json").read_text())
    for value in ({"sample_size": None}, {}):
        rest = {key: each for key, each in config.items() if key != "sample_size"}
        (tmp_path / "m/unet/config.json").write_text(json.dumps({**rest, **value}))
        assert ModelBundle.open(tmp_path / "m").defaults.width == 512
