"""Models of strangers: what fills a disk, hangs, or is another graph than is asked for is refused by name."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from edge_sd.backends.coreai.runtime import HASH, PROGRAM, check_asset
from edge_sd.backends.openvino.edits import LONGEST, chain, layers
from edge_sd.backends.openvino.graph import products_in_convolutions
from edge_sd.backends.openvino.reading import reshape
from edge_sd.bundle.assembly import Assembly
from edge_sd.bundle.bundle import ModelBundle, read_manifest
from edge_sd.errors import InvalidModel
from edge_sd.files import FileRecord, scratch

WEIGHTS = np.ones((4, 4, 3, 3), np.float32)


def test_an_asset_is_its_program_and_the_hash_of_it(tmp_path: Path) -> None:
    (tmp_path / PROGRAM).write_bytes(b"program")
    right = hashlib.sha256(b"program").digest()
    (tmp_path / HASH).write_bytes(right)
    check_asset(tmp_path)
    for wrong in (b"", right[:-1], right + b"\0", bytes(32)):
        (tmp_path / HASH).write_bytes(wrong)
        with pytest.raises(InvalidModel, match="is damaged"):
            check_asset(tmp_path)


@pytest.mark.parametrize("name", [PROGRAM, HASH])
def test_a_pipe_in_an_asset_is_refused_and_not_waited_for(name: str, tmp_path: Path) -> None:
    for each in (PROGRAM, HASH):
        (tmp_path / each).write_bytes(b"x")
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(InvalidModel, match=f"has no file {name}"):
        check_asset(tmp_path)


def test_a_pipe_among_the_files_of_a_bundle_is_a_difference(tmp_path: Path, emoji: Path) -> None:
    os.mkfifo(tmp_path / "x")
    facts = read_manifest(emoji).facts
    assert ModelBundle(tmp_path, facts, {}, {"x": FileRecord(0, "ab")}).verify() == ["x is no file"]


def test_pieces_that_would_fill_the_disk_are_refused_before_a_byte_is_written(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(bytes(1000))
    assembly = Assembly("w.bin", FileRecord(10_000_000, "0" * 64), ((0, 1000),) * 10_000)
    with pytest.raises(InvalidModel, match="asks for 10000000 bytes of 1000"):
        assembly.write([tmp_path / "weights"], tmp_path / "package")
    assert not (tmp_path / "package").exists()


def shared(levels: int) -> ov.Model:
    """A convolution and a matrix product whose weights are squared so many times."""
    sample, text = (ops.parameter([1, 4, 8, 8], name="sample"), ops.parameter([1, 7, 4], name="text"))
    kernel, matrix = ops.constant(WEIGHTS), ops.constant(np.ones((4, 4), np.float32))
    for _ in range(levels):
        kernel, matrix = ops.multiply(kernel, kernel), ops.multiply(matrix, matrix)
    bounds = [ops.constant(np.array(value, np.float32)) for value in (-1, 1, -1, 1)]
    y = ops.convolution(sample, kernel, [1, 1], [1, 1], [1, 1], [1, 1])
    z = ops.matmul(ops.fake_quantize(text, *bounds, 256), matrix, False, True)
    return ov.Model([y, z], [sample, text])


def test_operations_that_share_their_inputs_take_no_time_that_doubles_with_each() -> None:
    started = time.process_time()
    model = shared(60)
    assert layers(model) == {}
    assert products_in_convolutions(model) == 0
    (convolution,) = [op for op in model.get_ops() if op.get_type_name() == "Convolution"]
    assert list(chain(convolution.input_value(1).get_node())) == []
    assert time.process_time() - started < 1
    assert products_in_convolutions(shared(1)) == 1, "a scale is still seen"


def test_a_name_of_a_megabyte_is_searched_in_no_time() -> None:
    sample = ops.parameter([1, 4, 8, 8], name="sample")
    kernel = ops.constant(WEIGHTS)
    kernel.set_friendly_name(".encoder" * 100_000)
    y = ops.convolution(sample, kernel, [1, 1], [1, 1], [1, 1], [1, 1])
    started = time.process_time()
    assert layers(ov.Model([y], [sample])) == {}
    assert time.process_time() - started < 1
    kernel.set_friendly_name("conv_in.weight")
    assert list(layers(ov.Model([y], [sample]))) == ["conv_in"]
    assert len("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight") < LONGEST


@pytest.mark.parametrize(
    ("name", "said"), [("x", "has no input sample"), ("sample", "takes another sample than pictures")]
)
def test_a_graph_with_other_inputs_is_refused(name: str, said: str) -> None:
    port = ops.parameter([-1, 4], name=name)
    port.output(0).set_names({name})
    model = ov.Model([ops.transpose(port, ops.constant([1, 0]))], [port])
    with pytest.raises(InvalidModel, match=said):
        reshape(model, {"sample": (1, 4, 8, 8)}, "unet.xml", 8)


def test_what_a_killed_conversion_unpacked_is_removed_by_the_next_and_a_pull_under_way_is_not(tmp_path: Path) -> None:
    # No process has this number: it is beyond Linux's largest.
    left, pull = tmp_path / ".b.unpacked.1.4194305.partial", tmp_path / ".org--model-1.4194305.partial"
    for each in (left, pull):
        each.mkdir()
        (each / "x").write_bytes(b"x")
    with scratch(tmp_path / "b.unpacked") as folder:
        assert folder.is_dir()
        assert not left.exists()
    assert [each.name for each in tmp_path.iterdir()] == [pull.name]
