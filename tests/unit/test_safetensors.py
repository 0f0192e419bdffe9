"""Safetensors files beside the library of that name: every type, and everything that makes a file no such file."""

from __future__ import annotations

import json
import os
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_sd.bundle.safetensors import parse, read
from edge_sd.errors import InvalidModel, InvalidRequest

torch = pytest.importorskip("torch")
from safetensors import SafetensorError  # noqa: E402
from safetensors.torch import load, save  # noqa: E402


def packed(header: Any, body: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def row(start: int, stop: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def ours(data: bytes) -> Any:
    return parse(np.frombuffer(data, np.uint8), "x.safetensors")


@pytest.mark.parametrize(
    "kind",
    ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int64", "int32", "int16", "int8",
     "uint64", "uint32", "uint16", "uint8", "bool"],
)  # fmt: skip
def test_every_type_is_what_the_library_reads(kind: str) -> None:
    dtype = getattr(torch, kind)
    bits = torch.arange(512, dtype=torch.int32).to(torch.uint8)
    tensor = bits.bool() if kind == "bool" else bits.view(dtype)
    data = save({"a": tensor.reshape(2, -1), "none": torch.zeros(0, 3), "b": torch.ones(3)}, {"title": "é"})
    found, expected = ours(data), load(data)
    assert found.metadata == {"title": "é"}
    for name, each in expected.items():
        wide = each.float() if kind.startswith(("bf", "float8")) and name == "a" else each
        np.testing.assert_array_equal(found.tensors[name], wide.numpy())


WHOLE = {"a": row(0, 8, [2]), "b": row(8, 16, [2])}


@pytest.mark.fault(6, "safetensors with overlaps, holes, duplicates, false shapes")
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (packed({"a": row(0, 8, [2]), "b": row(4, 12, [2])}, bytes(12)), "b overlaps another tensor"),
        (packed({"a": row(0, 8, [2]), "b": row(12, 20, [2])}, bytes(20)), "a hole before b"),
        (packed({"a": row(4, 12, [2])}, bytes(12)), "a hole before a"),
        (packed(WHOLE, bytes(17)), "1 bytes after its last tensor"),
        (packed(WHOLE, bytes(15)), "1 bytes too few"),
        (packed(b'{"a":%b,"a":%b}' % ((json.dumps(WHOLE["a"]).encode(),) * 2), bytes(8)), "'a' is there twice"),
        (packed({"a": row(0, 8, [3])}, bytes(8)), r"a has 8 bytes, not those of F32 \[3\]"),
        (packed({"a": row(0, 8, [-2])}, bytes(8)), "shape"),
        (packed({"a": row(0, 8, [2.0])}, bytes(8)), "shape"),  # type: ignore[list-item]
        (packed({"a": row(0, 8, 2)}, bytes(8)), "shape"),  # type: ignore[arg-type]
        (packed({"a": row(0, 4, [8], "F4")}, bytes(4)), "a is of type F4; supported: BF16, .*F8_E4M3"),
        (packed({"a": row(0, 4, [1], ["F32"])}, bytes(4)), "damaged"),  # type: ignore[arg-type]
        (packed({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)), "data_offsets. is missing"),
        (packed({"a": 3}, bytes(4)), "damaged"),
        (packed([]), "no JSON object"),
        (packed({"__metadata__": {"a": 3}}), "__metadata__"),
        (packed({"__metadata__": []}), "__metadata__"),
        (packed(b"{" * 100_000), "damaged"),
        (packed(b"[" * 100_000), "damaged"),
        (packed(b"\xff{}"), "damaged"),
        (packed({}, length=1 << 62), "a header of"),
        (packed({}, length=3), "a header of 3 bytes in a file of 10|damaged"),
        (b"\x10", "damaged"),
        (b"", "damaged"),
    ],
)
def test_what_is_no_such_file_is_refused_with_its_fault(data: bytes, message: str) -> None:
    with pytest.raises(InvalidModel, match=message):
        ours(data)
    if "twice" not in message and "F4" not in message:  # The library takes the last of two, and has numbers of 4 bits.
        with pytest.raises(SafetensorError):
            load(data)


@pytest.mark.fault(6, "100,000 tensors")
def test_a_hundred_thousand_tensors_are_read_in_the_time_of_their_json() -> None:
    count = 100_000
    header = {f"lora_unet_{n:06}.lora_down.weight": row(4 * n, 4 * n + 4, [1, 1]) for n in range(count)}
    data = packed(header, bytes(4 * count))
    started = time.perf_counter()
    json.loads(data[8 : -4 * count])
    plain = time.perf_counter() - started
    assert len(ours(data).tensors) == count
    assert time.perf_counter() - started < 12 * plain + 1


@pytest.mark.fault(6, "pipes, pickles and Git LFS pointers")
def test_what_is_no_file_of_weights_is_refused_before_it_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.safetensors")
    for name, error, message in (
        ("fifo", InvalidRequest, "is not a file"), ("none", InvalidRequest, "No such file"),
        ("pickle", InvalidModel, "a pickle"), ("pointer", InvalidModel, "a Git LFS pointer.*git lfs pull"),
    ):  # fmt: skip
        path = tmp_path / f"{name}.safetensors"
        if name == "pickle":
            path.write_bytes(b"PK\x03\x04")
        if name == "pointer":
            path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
        with pytest.raises(error, match=message):
            read(path)
