"""Files without a hash are hashed at first use; files too large to be hashed at every open are compared by a sample."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from edge_sd import Pipeline, Request
from edge_sd.bundle import bundle as bundles
from edge_sd.bundle.bundle import ModelBundle
from edge_sd.bundle.seen import BLOCK, Seen
from edge_sd.errors import InvalidModel
from edge_sd.files import FileRecord, record_file


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGE_SD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def flip(path: Path, place: int, quietly: bool) -> None:
    """Change a bit; `quietly`, as a disk does that forgets, the time of the last change stays."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    if quietly:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_file_is_compared_with_what_it_was_at_first_use(tmp_path: Path) -> None:
    path = tmp_path / "model/weights.bin"
    path.parent.mkdir()
    path.write_bytes(os.urandom(20 * BLOCK))
    plain = {"weights.bin": FileRecord(path.stat().st_size, "")}
    assert Seen.of(path.parent).open(plain).problems == []
    assert Seen.of(path.parent).records["weights.bin"].sha256 == record_file(path).sha256
    for place in (0, 7 * BLOCK + 5, 20 * BLOCK - 1):
        flip(path, place, quietly=True)
        # Twenty blocks are all read by 64 at random places but for a few bytes; the ends always are.
        if place in (0, 20 * BLOCK - 1):
            (problem,) = Seen.of(path.parent).open(plain).problems
            assert problem == "weights.bin is damaged (it is not as it was when it was first used)"
        flip(path, place, quietly=True)
        assert Seen.of(path.parent).open(plain).problems == []
    flip(path, 3, quietly=False)
    found = Seen.of(path.parent).open(plain)
    assert found.problems == []
    assert found.notes[0].startswith("weights.bin is another file than was used here before: its sha256 was ")
    assert Seen.of(path.parent).open(plain).notes == [], "said once"
    assert Seen.of(path.parent).problems(["weights.bin"]) == []


def test_places_of_a_sample_are_this_machines_own(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(1000 * BLOCK))
    first, second = (Seen.of(tmp_path) for _ in range(2))
    assert first.sample("x") != second.sample("x"), "nothing is recorded yet, so that each has a key of its own"
    first.remember(["x"])
    assert Seen.of(tmp_path).sample("x") == first.sample("x")


def test_a_damaged_record_is_none(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "x").write_bytes(b"x")
    Seen.of(tmp_path).remember(["x"])
    (place,) = (cache / "seen").iterdir()
    for text in (
        "",
        "{",
        "[]",
        '{"key": "zz", "files": {}}',
        '{"key": "ab", "files": {"x": {"bytes": 1}}}',
        "[" * 10**5,
    ):
        place.write_text(text)
        assert Seen.of(tmp_path).records == {}


def test_a_large_variant_is_hashed_once_and_then_sampled(
    emoji: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the embedded model were large."""
    monkeypatch.setattr(bundles, "ALWAYS_HASHED", 0)
    root = tmp_path / "emoji"
    shutil.copytree(emoji, root, ignore=shutil.ignore_patterns("coreml-*"))
    bundle = ModelBundle.open(root)
    weights = root / "vae/diffusion_pytorch_model.safetensors"
    flip(weights, weights.stat().st_size // 2, quietly=True)
    with pytest.raises(InvalidModel, match="its sha256 differs from the manifest"):
        bundle.check("openvino-fp16")
    flip(weights, weights.stat().st_size // 2, quietly=True)
    assert bundle.check("openvino-fp16") == []
    hashed: list[Path] = []
    monkeypatch.setattr("edge_sd.bundle.seen.hash_file", lambda path: hashed.append(path) or "")
    assert bundle.check("openvino-fp16") == []
    assert hashed == []
    flip(weights, weights.stat().st_size - 1, quietly=True)
    with pytest.raises(InvalidModel, match="not as it was when it was first used"):
        bundle.check("openvino-fp16")


def test_a_replaced_file_without_a_hash_is_a_note_of_the_picture(emoji: Path, tmp_path: Path) -> None:
    root = tmp_path / "plain"
    shutil.copytree(emoji, root, ignore=shutil.ignore_patterns("coreml-*"))
    bundle = ModelBundle.open(root)
    variant = bundle.variant("openvino-fp16")
    files = {name: FileRecord(record.bytes, "") for name, record in variant.files.items()}
    replace(bundle, variants={"openvino-fp16": replace(variant, files=files)}).write_manifest()
    request = Request("a cat", seed=1, steps=1, width=64, height=64)

    def notes() -> list[str]:
        with Pipeline.open(root, "cpu", "openvino-fp16") as pipeline:
            return [note for note in pipeline.generate(request).notes if "another file" in note]

    assert notes() == []
    weights = root / "vae/diffusion_pytorch_model.safetensors"
    flip(weights, weights.stat().st_size - 1, quietly=False)
    (note,) = notes()
    assert note.startswith("vae/diffusion_pytorch_model.safetensors is another file than was used here before")
    assert notes() == []
