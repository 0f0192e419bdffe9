"""A damaged or hostile model folder is refused, whatever is wrong with it."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from edge_sd import Pipeline, Request
from edge_sd.bundle.bundle import ModelBundle, checksum
from edge_sd.errors import EdgeSDError, InvalidModel, ModelNotFound, VariantNotFound
from edge_sd.files import inside

from ..faults.account import Tally

HOSTILE = [
    "../x",
    "a/../../x",
    "/etc/passwd",
    "..",
    "",
    "a\\..\\x",
    "C:/x",
    "a\0b",
    "%2e%2e/../x",
    "./../x",
    "//x",
    "link/x",
    "../",
    "../../../../../../etc/passwd",
    "a/..",
    "a/../..",
    "unet/../../x",
    "..\\x",
    "\\x",
    "\\\\server\\share\\x",
    "c:",
    "C:\\x",
    "file:///etc/passwd",
    "http://127.0.0.1/x",
    "unet/x:stream",
    "/",
    "/dev/zero",
    "/proc/self/environ",
    "\0",
    "x\0.bin",
    "link/../../x",
    "link/link/x",
    "unet/../link/x",
    "./link/x",
    "//server/share/x",
    "a//../../x",
    "...//..//x/../../..",
    "%2e%2e\\x",
    "..%5c..\\x",
    "~:x",
]


@pytest.fixture
def copy(bundle: ModelBundle, tmp_path: Path) -> Path:
    shutil.copytree(bundle.root, tmp_path / "copy")
    return tmp_path / "copy"


def edit(folder: Path, change: Any) -> None:
    document = json.loads((folder / "edge_sd.json").read_text("utf-8"))
    change(document)
    document["checksum"] = checksum(document)
    (folder / "edge_sd.json").write_text(json.dumps(document), "utf-8")


def test_a_manifest_reads_back_as_it_was_written(bundle: ModelBundle, copy: Path) -> None:
    read = ModelBundle.open(copy)
    assert (read.facts, read.variants, read.files) == (bundle.facts, bundle.variants, bundle.files)
    assert read.verify() == []


@pytest.mark.fault(8, "hostile paths in a manifest")
@pytest.mark.parametrize("path", HOSTILE)
def test_a_path_that_leaves_the_folder_is_refused(copy: Path, path: str) -> None:
    (copy / "link").symlink_to(copy.parent)
    with pytest.raises(InvalidModel):
        inside(copy, path)

    def hostile(document: dict[str, Any]) -> None:
        document["variants"]["openvino-fp16"]["artifacts"]["unet"]["graph"] = path

    edit(copy, hostile)
    with pytest.raises(InvalidModel, match="not a path inside"):
        ModelBundle.open(copy)


@pytest.mark.fault(5, "manifests that are none")
@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '"x"',
        "{}",
        '{"format": 2}',
        '{"format": 3}',
        '{"format": 1}',
        "[" * 100_000,
        '{"format": 1, "name": "x"}',
    ],
)
def test_a_manifest_that_is_none_is_refused(copy: Path, text: str) -> None:
    (copy / "edge_sd.json").write_text(text)
    with pytest.raises(InvalidModel):
        ModelBundle.open(copy)


@pytest.mark.fault(5, "values of another type in a manifest")
@pytest.mark.parametrize("key", ["schedule", "latents", "defaults", "variants", "tokenizer", "max_tokens", "files"])
@pytest.mark.parametrize("value", [None, [], "x", -1, {"a": {}}])
def test_a_manifest_with_a_field_of_another_kind_never_crashes(copy: Path, key: str, value: Any) -> None:
    edit(copy, lambda document: document.update({key: value}))
    try:
        ModelBundle.open(copy).check("openvino-fp16")
    except EdgeSDError:
        return
    # A tokenizer's place is any name; what is missing there is told when it is read.
    assert key == "tokenizer"


@pytest.mark.fault(4, "files of a variant cut at every percent")
@pytest.mark.parametrize("file", ["openvino_model.bin", "openvino_model.xml"])
def test_a_file_cut_short_is_named(copy: Path, tally: Tally, file: str) -> None:
    path = copy / "openvino-fp16/unet" / file
    whole = path.read_bytes()
    for share in range(0, 100, 100 // tally.count(100)):
        path.write_bytes(whole[: len(whole) * share // 100])
        with tally.trial(share, refused=True):
            opened = ModelBundle.open(copy)
            with pytest.raises(InvalidModel, match=f"unet/{file} has"):
                opened.check("openvino-fp16")
            assert any(file in problem for problem in opened.verify())
    with (
        pytest.raises(InvalidModel, match=f"unet/{file} has"),
        Pipeline.open(copy, variant="openvino-fp16") as pipeline,
    ):
        pipeline.generate(Request("a cat", seed=1, steps=1))


@pytest.mark.fault(5, "single bits of a variant flipped: verify, and loading")
def test_every_flipped_bit_is_found(copy: Path, tally: Tally) -> None:
    rng = random.Random(0)
    opened = ModelBundle.open(copy)
    files = {**opened.files, **opened.variants["openvino-fp16"].files}
    names = sorted(name for name, record in files.items() if record.bytes)
    for _ in range(tally.count(1000)):
        path = copy / rng.choice(names)
        data = bytearray(path.read_bytes())
        place = rng.randrange(len(data))
        data[place] ^= 1 << rng.randrange(8)
        original = path.read_bytes()
        path.write_bytes(data)
        with tally.trial((path, place), refused=True):
            assert len(opened.verify("openvino-fp16")) == 1
            with pytest.raises(InvalidModel, match="damaged"):
                opened.check("openvino-fp16")
        path.write_bytes(original)
    assert opened.verify() == []


def test_a_missing_file_is_named(copy: Path) -> None:
    (copy / "openvino-fp16/vae_decoder/openvino_model.bin").unlink()
    assert "cannot be read" in ModelBundle.open(copy).verify()[0]


def test_names_that_are_no_model_list_the_models(emoji: Path) -> None:
    for name in ("nothing", "a\0b", "x" * 5000, "../emoji"):
        with pytest.raises(ModelNotFound, match="installed: emoji"):
            ModelBundle.open(name)
    with pytest.raises(VariantNotFound, match=r"it has: .*openvino-fp16"):
        ModelBundle.open("emoji").variant("openvino-fp1")


def test_models_of_ones_own_are_found_by_name(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_SD_MODELS", str(copy.parent))
    assert ModelBundle.open("copy").facts.name == "miniature"
