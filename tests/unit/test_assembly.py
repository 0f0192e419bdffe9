"""Core ML weights put together of files that are there anyway: the same bytes or an error, here and as on a Mac."""

from __future__ import annotations

import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sd.backends import LoadRequest
from edge_sd.backends.coreml.backend import CoreMLBackend
from edge_sd.bundle.assembly import Assembly, whole_package
from edge_sd.bundle.bundle import ModelBundle
from edge_sd.bundle.variants import Artifact, Variant
from edge_sd.errors import ConversionError, InvalidModel, OutputError
from edge_sd.files import FileRecord, record_file

from .test_coreml_backend import stand_in

WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"


def write_package(folder: Path, tensors: list[Any]) -> Path:
    """A package whose weight file is written by coremltools' own writer."""
    from coremltools.libmilstoragepython import _BlobStorageWriter

    package = folder / "Unet.mlpackage"
    (package / WEIGHTS).parent.mkdir(parents=True)
    (package / "Manifest.json").write_text("{}")
    (package / WEIGHTS).parent.with_name("model.mlmodel").write_bytes(b"graph")
    writer = _BlobStorageWriter(str(package / WEIGHTS))
    for each in tensors:
        if each.dtype == np.float16:
            writer.write_fp16_data(each.view(np.uint16).ravel())
        else:
            writer.write_float_data(each.ravel())
    del writer
    return package


def write_safetensors(path: Path, tensors: dict[str, Any]) -> Path:
    from safetensors.numpy import save_file

    save_file(tensors, path)
    return path


def linked_bundle(root: Path, emoji: Path) -> tuple[ModelBundle, Artifact, bytes]:
    """A bundle of one linked package with two shards, one of its tensors scaled and one in neither; and its weights."""
    from edge_sd.converters.coreml.link import link

    rng = np.random.default_rng(0)
    a, b, c, q = (rng.normal(size=(n, 24)).astype(np.float16) for n in (5, 7, 3, 9))
    scaled = (q.astype(np.float32) * np.float32(32**-0.5)).astype(np.float16)
    root.mkdir()
    shards = [
        write_safetensors(root / "1.safetensors", {"a": a, "b": b}),
        write_safetensors(root / "2.safetensors", {"to_q": q}),
    ]
    package = write_package(root.parent / f"{root.name}-made", [b, scaled, c.astype(np.float32), a, c, a])
    pieces, rest = root / "v/Unet.pieces.json", root / "v/Unet.constants"
    (root / "v").mkdir()
    link(package, shards, root / "v/Unet.mlpackage", rest, pieces)
    names = tuple(path.relative_to(root).as_posix() for path in (*shards, rest))
    artifact = Artifact("v/Unet.mlpackage", names, (), (), pieces="v/Unet.pieces.json")
    used = [path for path in root.rglob("*") if path.is_file()]
    files = {path.relative_to(root).as_posix(): record_file(path) for path in used}
    variant = Variant("coreml", "fp16", {"unet": artifact}, files)
    bundle = replace(ModelBundle.open(emoji), root=root, variants={"v": variant}, files={})
    return bundle, artifact, (package / WEIGHTS).read_bytes()


@pytest.fixture
def linked(tmp_path: Path, emoji: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[ModelBundle, Artifact, bytes]:
    monkeypatch.setenv("EDGE_SD_CACHE", str(tmp_path / "home"))
    return linked_bundle(tmp_path / "bundle", emoji)


def test_the_weight_file_is_the_one_that_coremltools_wrote(linked: tuple[ModelBundle, Artifact, bytes]) -> None:
    bundle, artifact, wanted = linked
    package = whole_package(bundle, artifact)
    assert (package / WEIGHTS).read_bytes() == wanted
    assert sorted(path.name for path in package.rglob("*.*")) == ["Manifest.json", "com.apple.CoreML", "model.mlmodel", "weight.bin"]  # fmt: skip  # noqa: E501
    assert not list(bundle.root.rglob("weight.bin"))
    # Records of 64 bytes, and the tensor that no shard holds, in both types.
    assert bundle.path("v/Unet.constants").stat().st_size < 64 * 12 + 2 * 72 + 4 * 72
    document = json.loads(bundle.path("v/Unet.pieces.json").read_text())
    assert [piece[2] for piece in document["pieces"] if len(piece) == 3] == [pytest.approx(32**-0.5)]
    # The folder holds the one variant alone.
    replace(bundle, others={}).write_manifest()
    read = ModelBundle.open(bundle.root)
    assert read.variants == bundle.variants
    assert read.verify() == []


def test_it_is_kept_and_made_again_where_it_was_damaged(linked: tuple[ModelBundle, Artifact, bytes]) -> None:
    bundle, artifact, wanted = linked
    weights = whole_package(bundle, artifact) / WEIGHTS
    made = weights.stat().st_mtime_ns
    assert (whole_package(bundle, artifact) / WEIGHTS).stat().st_mtime_ns == made
    weights.write_bytes(wanted[:-1] + b"?")
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: whole_package(bundle, artifact), range(8)))
    assert {path / WEIGHTS for path in found} == {weights}
    assert weights.read_bytes() == wanted
    home = weights.parents[5]
    assert home.name == "assembled"
    assert len(list(home.iterdir())) == 1, "nothing half made stays"


@pytest.mark.parametrize("name", ["1.safetensors", "2.safetensors", "v/Unet.constants"])
def test_other_weights_than_the_graphs_are_refused(linked: tuple[ModelBundle, Artifact, bytes], name: str) -> None:
    bundle, artifact, _ = linked
    path = bundle.path(name)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(InvalidModel, match=r"Unet\.mlpackage are not those that its graph was made with"):
        whole_package(bundle, artifact)
    path.write_bytes(content[:-200])
    with pytest.raises(InvalidModel):
        whole_package(bundle, artifact)
    path.unlink()
    with pytest.raises(InvalidModel, match=f"{path.name} cannot be read"):
        whole_package(bundle, artifact)
    assert list((bundle.root.parent / "home/assembled").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_one_line(linked: tuple[ModelBundle, Artifact, bytes]) -> None:
    bundle, artifact, _ = linked
    (bundle.root.parent / "home").write_bytes(b"a file")
    with pytest.raises(OutputError, match=r"cannot keep Unet\.mlpackage"):
        whole_package(bundle, artifact)


def test_weights_of_another_model_are_not_linked(tmp_path: Path) -> None:
    from edge_sd.converters.coreml.link import link

    package = write_package(tmp_path / "p", [np.arange(1 << 18, dtype=np.float32), np.ones(9, np.float16)])
    other = write_safetensors(tmp_path / "o.safetensors", {"a": np.zeros((2, 3), np.float16)})
    with pytest.raises(ConversionError, match=r"bytes of its weights are not in o\.safetensors"):
        link(package, [other], tmp_path / "l", tmp_path / "c", tmp_path / "j")
    assert not any((tmp_path / name).exists() for name in "lcj")
    (package / WEIGHTS).write_bytes((package / WEIGHTS).read_bytes()[:100])
    with pytest.raises(ConversionError, match="no blob at 64"):
        link(package, [other], tmp_path / "l", tmp_path / "c", tmp_path / "j")


GOOD = {"file": "weights/w.bin", "bytes": 6, "sha256": "0" * 64, "pieces": [[0, 4], [4, 2, 0.5]]}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(sorted(GOOD)), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(GOOD)), JSON)
def test_whatever_stands_in_the_file_is_pieces_or_one_error(
    tmp_path_factory: pytest.TempPathFactory, key: str, value: Any
) -> None:
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "source").write_bytes(bytes(6))
    (folder / "p.json").write_text(json.dumps({**GOOD, key: value}))
    package = folder / "package"
    package.mkdir()
    with pytest.raises(InvalidModel) as caught:  # The hash is never right.
        Assembly.read(folder / "p.json").write([folder / "source"], package)
    assert "\n" not in str(caught.value)
    assert all(path.is_relative_to(package) or path.parent == folder for path in folder.rglob("*") if path.is_file())
    shutil.rmtree(folder)


def test_on_a_mac_the_whole_package_is_compiled_and_kept_for_these_weights(
    tmp_path: Path, emoji: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setenv("EDGE_SD_CACHE", str(tmp_path / "home"))
    root = tmp_path / "bundle"
    (root / "v/Unet.mlpackage").mkdir(parents=True)
    (root / "v/Unet.mlpackage/Manifest.json").write_text("{}")
    artifact = Artifact("v/Unet.mlpackage", ("w",), (), (), pieces="v/p.json")
    shapes = {"sample": (2, 4, 8, 8), "timestep": (1,), "encoder_hidden_states": (2, 9, 6)}

    def load(content: bytes) -> list[str]:
        compiled: list[str] = []
        monkeypatch.setitem(sys.modules, "coremltools", stand_in(compiled))
        (root / "w").write_bytes(content)
        record = record_file(root / "w")
        # The stand-in looks for a weights.bin, as for a file that compiling needs.
        Assembly("weights.bin", record, ((0, record.bytes),)).save(root / "v/p.json")
        files = {name: FileRecord(1, "ab") for name in ("v/Unet.mlpackage/Manifest.json", "w")}
        variant = Variant("coreml", "fp16", {"unet": artifact}, files | {"v/p.json": record_file(root / "v/p.json")})
        bundle = replace(ModelBundle.open(emoji), root=root, variants={"v": variant})
        backend = CoreMLBackend()
        backend.load(LoadRequest(bundle, variant, "unet", backend.devices()[0], shapes))
        return compiled

    (first,) = load(b"weights")
    assert Path(first).is_relative_to(tmp_path / "home/assembled")
    assert (Path(first) / "weights.bin").read_bytes() == b"weights"
    assert load(b"weights") == []
    assert len(load(b"others!")) == 1
