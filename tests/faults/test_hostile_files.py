"""Pictures, weights and vocabularies that are cut, renamed or made to take memory: refused, or read as they are."""

from __future__ import annotations

import functools
import json
import pickle
import struct
import time
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from edge_sd import Pipeline, Request
from edge_sd.bundle import safetensors
from edge_sd.components.lora import read_lora
from edge_sd.errors import EdgeSDError, InvalidRequest
from edge_sd.images.opening import open_mask, open_picture
from edge_sd.pipeline.recorded import read_recorded
from edge_sd.text.textual_inversion import read_embedding
from edge_sd.text.tokenizer import TextTokenizer

from .account import Tally
from .memory import peak

MB = 1 << 20


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*chunks: bytes, size: tuple[int, int] = (8, 8), pixels: bytes | None = None) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0))
    data = zlib.compress(bytes((size[0] * 3 + 1) * size[1])) if pixels is None else pixels
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def saved(kind: str, mode: str = "RGB", size: tuple[int, int] = (64, 64), **options: Any) -> bytes:
    rng = np.random.default_rng(0)
    if mode == "I;16":
        image = Image.fromarray(rng.integers(0, 65536, size, np.uint16))
    else:
        image = Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).convert(mode)
    data = BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def text_chunks() -> bytes:
    info = PngInfo()
    for n in range(64):
        info.add_text(f"key{n}", "a" * MB)
    return saved("PNG", pnginfo=info)


FRAMES = [Image.new("RGB", (64, 64), (n, 0, 0)) for n in range(64)]
# Name -> its bytes, and whether it is a picture.
PICTURES: dict[str, tuple[Callable[[], bytes], bool]] = {
    "50k x 50k, no pixels": (lambda: png(size=(50_000, 50_000), pixels=b""), False),
    "50k x 50k, packed": (lambda: png(size=(50_000, 50_000), pixels=zlib.compress(bytes(50 * MB), 9)), False),
    "7000 x 7100, packed": (lambda: png(size=(7000, 7100)), True),
    "64 x 1 MB of text": (text_chunks, True),
    "text that unpacks to 300 MB": (lambda: png(chunk(b"zTXt", b"a\0\0" + _packed(300))), False),
    "a profile that unpacks to 300 MB": (lambda: png(chunk(b"iCCP", b"a\0\0" + _packed(300))), False),
    "cut in half": (lambda: saved("PNG")[:6000], False), "cut JPEG": (lambda: saved("JPEG")[:900], False),
    "cut WebP": (lambda: saved("WEBP")[:900], False), "nothing": (lambda: b"", False),
    "CMYK": (lambda: saved("JPEG", "CMYK"), True), "grey of 16 bits": (lambda: saved("PNG", "I;16"), True),
    "palette": (lambda: saved("PNG", "P"), True), "transparent": (lambda: saved("WEBP", "RGBA"), True),
    "one bit": (lambda: saved("PNG", "1"), True),
    "animated PNG": (lambda: saved("PNG", save_all=True, append_images=FRAMES), True),
    "animated WebP": (lambda: saved("WEBP", save_all=True, append_images=FRAMES), True),
    "wrong checksum": (lambda: saved("PNG").replace(b"IDAT", b"IDAU", 1), False),
    **{f"{kind} renamed": ((lambda kind=kind: saved(kind)), False)
       for kind in ("GIF", "BMP", "TIFF", "PPM", "ICO", "TGA", "SGI", "PCX", "JPEG2000", "PDF", "EPS")},
    "SVG renamed": (lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>', False),
    "FITS renamed": (lambda: b"SIMPLE  =                    T".ljust(2880), False),
    "PSD renamed": (lambda: b"8BPS\0\1" + bytes(40), False), "ZIP renamed": (lambda: b"PK\3\4" + bytes(100), False),
}  # fmt: skip


@functools.cache
def _packed(megabytes: int) -> bytes:
    packer, zeros = zlib.compressobj(9), bytes(MB)
    return b"".join([*(packer.compress(zeros) for _ in range(megabytes)), packer.flush()])


@pytest.mark.fault(9, "pictures: huge, packed, cut, renamed, of other depths and colours; at most 256 MB more")
@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_read_or_refused_in_little_memory(name: str, tmp_path: Path, tally: Tally) -> None:
    make, good = PICTURES[name]
    path = tmp_path / "x.png"
    path.write_bytes(make())
    for read in (lambda: open_picture(path, "image"), lambda: open_mask(path)):
        with tally.trial(name, refused=not good), peak() as most:
            if good:
                assert read().mode == "RGB"
            else:
                with pytest.raises(InvalidRequest) as raised:
                    read()
                assert "\n" not in str(raised.value)
        # Six copies of the largest picture that is allowed would be more.
        with tally.trial(f"{name}: memory"):
            assert most.bytes < 256 * MB, most.bytes / MB
    with tally.trial(f"{name}: its record"), pytest.raises(InvalidRequest):
        read_recorded(path)


def header(rows: Any, body: bytes = b"") -> bytes:
    text = rows if isinstance(rows, bytes) else json.dumps(rows).encode()
    return struct.pack("<Q", len(text)) + text + body


@pytest.mark.fault(4, "safetensors cut at every percent, and at bytes 0, 7, 8 and 8 + header")
def test_weights_that_are_cut_are_refused(emoji: Path, tmp_path: Path, tally: Tally) -> None:
    whole = (emoji / "vae_tiny/diffusion_pytorch_model.safetensors").read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    path = tmp_path / "x.safetensors"
    shares = [len(whole) * share // 100 for share in range(0, 100, 100 // tally.count(100))]
    for size in {0, 7, 8, 8 + length, 8 + length - 1, len(whole) - 1, *shares}:
        path.write_bytes(whole[:size])
        for read in (safetensors.read, read_lora, read_embedding):
            with tally.trial(size, refused=True), pytest.raises(EdgeSDError):
                read(path)


class Bomb:
    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return open, (self.mark, "w")


@pytest.mark.fault(6, "headers of 100,000,001 bytes, pickles under every ending, pointers: refused in under 1 s")
def test_no_pickle_is_opened_under_any_name(tmp_path: Path, tally: Tally) -> None:
    mark = tmp_path / "opened"
    files = {
        "pickle": pickle.dumps(Bomb(str(mark))), "old pickle": pickle.dumps(Bomb(str(mark)), 0),
        "zip": b"PK\3\4" + pickle.dumps(Bomb(str(mark))), "pointer": b"version https://git-lfs.github.com/spec/v1\n",
        "long header": struct.pack("<Q", 100_000_001) + b"{" + bytes(1000), "no header": struct.pack("<Q", 1 << 63),
        "shape overflow": header({"a": {"dtype": "F32", "shape": [1 << 32, 1 << 32], "data_offsets": [0, 0]}}),
        "a false end": header({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}, bytes(100)),
        "negative": header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}, bytes(4)),
    }  # fmt: skip
    for name, data in files.items():
        for ending in (".safetensors", ".Safetensors", ".SAFETENSORS", ".bin", ".ckpt", ".pt", ".safetensors.bin", ""):
            path = tmp_path / f"x{ending}"
            path.write_bytes(data)
            for read in (read_lora, read_embedding, safetensors.read):
                started = time.perf_counter()
                with tally.trial((name, ending), refused=True):
                    with pytest.raises(EdgeSDError) as raised:
                        read(path)
                    assert "\n" not in str(raised.value)
                    assert not mark.exists()
                    assert time.perf_counter() - started < 1


def lora(path: Path, up: tuple[int, ...], down: tuple[int, ...]) -> Path:
    from safetensors.numpy import save_file

    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    save_file(
        {f"{name}.lora_A.weight": np.zeros(down, np.float32), f"{name}.lora_B.weight": np.zeros(up, np.float32)}, path
    )
    return path


@pytest.mark.fault(24, "LoRAs, embeddings and vocabularies that ask for more memory than their size x 64")
def test_what_asks_for_memory_is_refused_before_it_is_taken(emoji: Path, tmp_path: Path, tally: Tally) -> None:
    def tokenizer(vocabulary: Any) -> Path:
        folder = tmp_path / "tokenizer"
        folder.mkdir(exist_ok=True)
        (folder / "vocab.json").write_text(json.dumps(vocabulary))
        (folder / "merges.txt").write_text("")
        return folder

    ends = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    with Pipeline.open("emoji", "cpu", "openvino-fp16") as pipeline:
        pipeline.generate(Request("a cat", seed=1, steps=1))

        def draw(up: tuple[int, ...], down: tuple[int, ...]) -> None:
            pipeline.generate(
                Request("a cat", seed=1, steps=1, loras={lora(tmp_path / "x.safetensors", up, down): 1.0})
            )

        cases: dict[str, Callable[[], Any]] = {
            "50,000 x 50,000": lambda: draw((50_000, 1), (1, 50_000)),
            "4 kernels": lambda: draw((20_000, 1, 3, 3), (1, 20_000, 3, 3)),
            "another model's": lambda: draw((1280, 4), (4, 1280)),
            "an id of a billion": lambda: TextTokenizer(tokenizer({**ends, "a": 1 << 30}), 32),
            "an embedding of a million": lambda: read_embedding(_rows(tmp_path / "e.safetensors", (1_000_000, 2))),
        }  # fmt: skip
        for name, run in cases.items():
            with tally.trial(name, refused=True), peak() as most, pytest.raises(EdgeSDError) as raised:
                run()
            with tally.trial(f"{name}: memory"):
                assert "\n" not in str(raised.value)
                assert most.bytes < 100 * MB, most.bytes / MB


def _rows(path: Path, shape: tuple[int, ...]) -> Path:
    from safetensors.numpy import save_file

    save_file({"emb_params": np.zeros(shape, np.float32)}, path)
    return path
