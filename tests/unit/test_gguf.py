"""GGUF files beside the library that writes them, and what a stranger can make of one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_sd.converters.sources.gguf_file import KINDS, block, open_gguf
from edge_sd.converters.sources.plain import opened
from edge_sd.errors import InvalidModel, MissingExtra

# Where the float16 scales of a block are; all other bytes may be anything.
SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,),
          "IQ4_XS": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,)}  # fmt: skip


def blocks(kind: str, rows: int, columns: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """Rows of a type as bytes, of random numbers whose scales are small."""
    rng = np.random.default_rng(seed)
    if kind in ("F32", "F16"):
        return rng.normal(size=(rows, columns)).astype(np.float32 if kind == "F32" else np.float16)
    if kind == "BF16":
        return gguf.quantize(rng.normal(size=(rows, columns)).astype(np.float32), Kind.BF16)
    values, size = block(kind)
    made = rng.integers(0, 256, (rows, columns // values, size), np.uint8)
    for place in SCALES[kind]:
        scale = rng.uniform(0.001, 0.01, made.shape[:2]).astype(np.float16)
        made[..., place : place + 2] = scale[..., None].view(np.uint8)
    return made.reshape(rows, -1)


def write(path: Path, tensors: dict[str, tuple[str, Any]], arch: str = "flux", **keys: Any) -> Path:
    """A file as the library writes it; tensors are name -> (type, rows of blocks)."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_array("tokens", ["a", "b", "c"])
    writer.add_float32("scale", 0.5)
    for key, value in keys.items():
        writer.add_array(key, value)
    for name, (kind, data) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=None if kind in ("F32", "F16") else Kind[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_every_type_is_what_the_library_makes_of_it(tmp_path: Path, kind: str) -> None:
    data = blocks(kind, 3, 512)
    path = write(tmp_path / "x.gguf", {"a.weight": (kind, data), "b": ("F32", np.ones((2, 3), np.float32))})
    expected = gguf.dequantize(data, Kind[kind]).reshape(3, 512)
    found = open_gguf(path)
    assert found.metadata["general.architecture"] == "flux"
    assert (found.tensors["a.weight"].kind, found.tensors["a.weight"].shape) == (kind, (3, 512))
    np.testing.assert_array_equal(np.concatenate(list(found.read("a.weight"))), expected.reshape(-1))


def test_large_tensors_are_decoded_some_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = blocks("Q4_K", 5, 768)
    path = write(tmp_path / "x.gguf", {"a": ("Q4_K", data)})
    monkeypatch.setattr("edge_sd.converters.sources.gguf_file.CHUNK", 512)
    parts = list(open_gguf(path).read("a"))
    assert max(map(len, parts)) <= 512
    np.testing.assert_array_equal(np.concatenate(parts), gguf.dequantize(data, Kind.Q4_K).reshape(-1))


def test_a_shape_from_before_its_blocks_is_taken(tmp_path: Path) -> None:
    key = "comfy.gguf.orig_shape.a"
    path = write(tmp_path / "x.gguf", {"a": ("Q8_0", blocks("Q8_0", 4, 64))}, **{key: [8, 2, 16]})
    assert open_gguf(path).tensors["a"].shape == (8, 2, 16)
    path = write(tmp_path / "y.gguf", {"a": ("Q8_0", blocks("Q8_0", 4, 64))}, **{key: [8, 2, 15]})
    with pytest.raises(InvalidModel, match=r"'a' is said to have had the shape \[8, 2, 15\], and has \[4, 64\]"):
        open_gguf(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    tensors = {"a.weight": ("Q4_K", blocks("Q4_K", 2, 256)), "b.weight": ("Q8_0", blocks("Q8_0", 3, 64)),
               "c": ("F32", np.ones(5, np.float32)), "d": ("BF16", blocks("BF16", 2, 8))}  # fmt: skip
    return write(tmp_path_factory.mktemp("gguf") / "x.gguf", tensors).read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d[:3], "damaged"),
        (lambda d: b"GGUF" + (1).to_bytes(4, "little") + d[8:], "version 1; supported, in little-endian order: 2, 3"),
        (lambda d: b"GGUF" + (3).to_bytes(4, "big") + d[8:], "version 50331648"),
        (lambda d: d[:8] + (1 << 60).to_bytes(8, "little") + d[16:], "keys and .* tensors in"),
        (lambda d: d[:16] + (1 << 60).to_bytes(8, "little") + d[24:], "keys and .* tensors in"),
        (lambda d: d[:24] + (1 << 63).to_bytes(8, "little") + d[32:], "bytes are wanted at"),
        (lambda d: d[:-40], "has no place in"),
        (lambda d: d.replace(b"a.weight", b"b.weight"), "a tensor is there twice"),
        (lambda d: d.replace(b"tokens\x09\0\0\0\x08", b"tokens\x09\0\0\0\x09"), "a list of lists"),
        (lambda d: d.replace(b"tokens\x09\0\0\0\x08\0\0\0\x03", b"tokens\x09\0\0\0\x08\0\0\0\xff"), "a list of 255"),
        (lambda d: d.replace(b"tokens\x09", b"tokens\x4d"), "a value of type 77"),
        (lambda d: d.replace(b"c" + (1).to_bytes(4, "little"), b"c" + (9).to_bytes(4, "little")), "has 9 dimensions"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(
    whole: bytes, tmp_path: Path, change: Callable[[bytes], bytes], message: str
) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(change(whole))
    with pytest.raises(InvalidModel, match=message) as raised:
        open_gguf(path)
    assert "\n" not in str(raised.value)


def outcome(path: Path, folder: Path) -> tuple[str, int]:
    """In which line a file is refused, or how many bytes its numbers are; anything else that it does is an error."""
    try:
        with opened(path, folder / "beside") as weights:
            return "", weights.file().stat().st_size
    except InvalidModel as error:
        return str(error), 0


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 3000), flips=st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 7)), max_size=4))
def test_cut_and_flipped_files_are_read_or_refused(
    whole: bytes, tmp_path: Path, cut: int, flips: list[tuple[int, int]]
) -> None:
    data = bytearray(whole if cut >= len(whole) or not cut else whole[:cut])
    for place, bit in flips:
        data[place % len(data)] ^= 1 << bit
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    said, size = outcome(path, tmp_path)
    assert "\n" not in said
    # Two bits a number at the least, and what is written has 32 at the most.
    assert size < 16 * len(data) + 2000


def test_without_the_library_the_line_that_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "x.gguf", {"a": ("F32", np.ones(5, np.float32))})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r'reading x.gguf, a GGUF file, needs the "gguf" extra.*pip install'):
        open_gguf(path)
