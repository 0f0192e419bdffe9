"""Compiled graphs on disk: what is kept is what was compiled, and damage costs a compilation, never a picture."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import edge_sd
from edge_sd import Pipeline, Request
from edge_sd.backends import LoadRequest
from edge_sd.backends.openvino import OpenVINOBackend, cache
from edge_sd.backends.openvino.loading import Loading
from edge_sd.caches import code_digest
from edge_sd.components.edits import NONE, Edits

from ..faults.account import Tally

BLOBS = {"whole": bytes(range(256)) * 20, "timestep": b"x" * 5000}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGE_SD_CACHE", str(tmp_path))
    return tmp_path / "openvino"


def kept(key: str) -> dict[str, bytes] | None:
    found = cache.read(key)
    return None if found is None else {name: bytes(blob) for name, blob in found.items()}


def test_what_was_written_is_read(place: Path) -> None:
    assert kept("a") is None
    cache.write("a", BLOBS)
    assert kept("a") == BLOBS
    assert [path.name for path in place.iterdir()] == ["a.blob"]


@pytest.mark.fault(16, "damaged entries of the cache of compiled graphs")
def test_a_damaged_entry_is_none_and_gone(place: Path, tally: Tally) -> None:
    @settings(max_examples=tally.count(1000), deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.data())
    def check(data: st.DataObject) -> None:
        cache.write("a", BLOBS)
        path = place / "a.blob"
        whole = bytearray(path.read_bytes())
        if data.draw(st.booleans()):
            del whole[data.draw(st.integers(0, len(whole) - 1)) :]
        else:
            whole[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(whole)
        found = kept("a")
        tally.held()
        # Bytes between blobs mean nothing; all others are checked, names too.
        assert found in (None, BLOBS)
        assert path.exists() == (found is not None)

    check()


def test_the_least_used_go_first(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "LIMIT", 55_000)
    for n, key in enumerate("abc"):
        cache.write(key, BLOBS)
        os.utime(place / f"{key}.blob", (n, n))
    assert kept("a") == BLOBS
    cache.write("d", BLOBS)
    assert {path.name for path in place.iterdir()} == {"a.blob", "c.blob", "d.blob"}


def test_nothing_is_kept_where_the_disk_is_nearly_full(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage(10**6, 10**6 - 20_000, 20_000))
    cache.write("a", BLOBS)
    assert kept("a") is None
    assert list(place.iterdir()) == []


def test_a_folder_that_cannot_be_made_costs_nothing(place: Path) -> None:
    place.write_text("a file")
    cache.write("a", BLOBS)
    assert kept("a") is None


def draw(**wishes: Any) -> np.ndarray:
    with Pipeline.open("emoji", "cpu", "openvino-fp16") as pipeline:
        return np.asarray(pipeline.generate(Request("a red apple", seed=1, steps=2, **wishes)).pictures[0].image)


def test_the_second_start_compiles_nothing_and_draws_the_same(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import openvino as ov

    first = draw(deep_every=2)
    assert len(list(place.glob("*.blob"))) == 3
    with monkeypatch.context() as patch:
        patch.setattr(ov.Core, "compile_model", None)
        assert (draw(deep_every=2) == first).all()
    # Another wish is another entry.
    plain = draw()
    assert len(list(place.glob("*.blob"))) == 4
    for path in place.glob("*.blob"):
        # Whole by its checksums, but nothing that OpenVINO knows.
        cache.write(path.stem, {"whole": b"no blob" * 1000})
    assert (draw() == plain).all()
    assert (draw() == plain).all()


AT_ONCE = """
import sys, threading
import numpy as np
from edge_sd.backends import LoadRequest
from edge_sd.backends.openvino import OpenVINOBackend
sys.setswitchinterval(1e-6)
OpenVINOBackend()
import openvino as ov
constants = [ov.op.Constant(np.ones(4, np.float32)) for _ in range(8)]
threads = [threading.Thread(target=each.get_data) for each in constants]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


def test_threads_that_read_graphs_at_once_do_not_wait_for_each_other_for_ever() -> None:
    for _ in range(3):
        subprocess.run([sys.executable, "-c", AT_ONCE], check=True, timeout=60)


def test_what_decides_the_bytes_is_in_the_name() -> None:
    backend = OpenVINOBackend()
    with Pipeline.open("emoji", "cpu", "openvino-fp16") as pipeline:
        bundle = pipeline.bundle
    variant, device = bundle.variant("openvino-fp16"), backend.devices()[0]
    shapes = {"sample": (2, 4, 16, 16)}

    def key(part: str = "unet", shapes: Any = shapes, precision: str = "", edits: Edits = NONE, cores: int = 2) -> str:
        changed = replace(variant, artifacts={part: replace(variant.artifacts[part], precision=precision)})
        request = LoadRequest(bundle, changed, part, device, shapes, edits)
        return Loading(backend.core, "1", backend.flags, cores, request).key

    large = {"sample": (2, 4, 64, 64)}
    keys = [key(), key("vae_decoder"), key(shapes={"sample": (1, 4, 16, 16)}), key(precision="fp32"),
            key(shapes=large), key(shapes=large, cores=3), key(edits=Edits(clip_skip=2)), key("unet")]  # fmt: skip
    assert len(set(keys)) == len(keys) - 1
    assert key(edits=Edits("a hash of vectors")) not in keys


def test_a_word_of_ones_own_is_not_kept(place: Path) -> None:
    backend = OpenVINOBackend()
    with Pipeline.open("emoji", "cpu", "openvino-fp16") as pipeline:
        bundle = pipeline.bundle
    variant = bundle.variant("openvino-fp16")
    edits = Edits("a hash of vectors", vectors=np.zeros((1, 192), np.float32))
    shapes = {"input_ids": (1, 32)}
    backend.load(LoadRequest(bundle, variant, "text_encoder", backend.devices()[0], shapes, edits)).close()
    assert not list(place.glob("*.blob"))


@pytest.mark.parametrize(
    "file", ["components/lora.py", "components/edits.py", "_version.py", "backends/openvino/graph.py"]
)
def test_other_code_is_another_key(file: str, tmp_path: Path) -> None:
    """A copy of the package with one more comment in a file that decides graphs."""
    package = Path(edge_sd.__file__).parent
    shutil.copytree(package, tmp_path / "edge_sd", ignore=shutil.ignore_patterns("models", "__pycache__"))
    with (tmp_path / "edge_sd" / file).open("a") as code:
        code.write("# changed\n")
    script = "from edge_sd.caches import code_digest; print(code_digest())"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() not in ("", code_digest())
