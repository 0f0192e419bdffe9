"""All that reads bytes of strangers, as functions that a fuzzer can call: they return, or raise what is typed."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np

from edge_sd.errors import EdgeSDError
from edge_sd.paths import embedded_models

from . import strangers

EMOJI = embedded_models() / "emoji"


@cache
def _folder() -> Path:
    """One of this process, in memory where the system has such a place."""
    place = "/dev/shm" if Path("/dev/shm").is_dir() else None
    return Path(tempfile.mkdtemp(dir=place, prefix="edge-sd-fuzz-"))


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def manifest(data: bytes) -> None:
    from edge_sd.bundle.bundle import checksum, read_manifest

    try:
        document = json.loads(data)
        # A stranger writes a checksum that is right.
        data = json.dumps({**document, "checksum": checksum(document)}).encode()
    except (ValueError, TypeError, RecursionError):
        pass
    (_folder() / "edge_sd.json").write_bytes(data)
    bundle = read_manifest(_folder())
    for name in bundle.variants:
        bundle.fingerprint(name)
        bundle.defaults_of(name)


def prompt(data: bytes) -> None:
    from edge_sd.text import schedule
    from edge_sd.text.prompt import notes, parse, take_loras

    text = take_loras(_text(data))[0]
    notes(text)
    parse(text)
    schedule.stages(text, 5)
    schedule.composed(text)


def template(data: bytes) -> None:
    from edge_sd.text.wildcards import expand

    expand(_text(data)[:2000], 1)


def infotext(data: bytes) -> None:
    from edge_sd.images.metadata import Texts
    from edge_sd.pipeline.infotext import parse_infotext
    from edge_sd.pipeline.recorded import _theirs

    _theirs(Path("x.png"), parse_infotext(_text(data)), Texts("PNG", (8, 8))).request()


def record(data: bytes) -> None:
    from edge_sd.pipeline.recorded import _ours

    _ours(Path("x.png"), _text(data), "").request()


def programs(data: bytes) -> None:
    from edge_sd.images.metadata import Texts
    from edge_sd.pipeline.programs import read_program

    key, _, text = _text(data).partition("\n")
    read_program(Texts("PNG", (8, 8), {key: text, "parameters": text}))


def safetensors(data: bytes) -> None:
    from edge_sd.bundle.safetensors import parse

    parse(np.frombuffer(data, np.uint8), "x.safetensors")


def lora(data: bytes) -> None:
    from edge_sd.components.lora import read_lora

    (_folder() / "x.safetensors").write_bytes(data)
    read_lora(_folder() / "x.safetensors")


def lora_keys(data: bytes) -> None:
    from edge_sd.components.lora_names import refused_form, split

    names = _text(data).split("\n")
    refused_form(names)
    for name in names:
        split(name)


def picture(data: bytes) -> None:
    from edge_sd.images.opening import open_picture
    from edge_sd.pipeline.recorded import read_recorded

    path = _folder() / "x.png"
    path.write_bytes(data)
    with contextlib.suppress(EdgeSDError):
        open_picture(path, "image")
    read_recorded(path)


def merges(data: bytes) -> None:
    from edge_sd.text.tokenizer import read_vocabulary

    vocabulary, _, rest = data.partition(b"\n\n")
    (_folder() / "vocab.json").write_bytes(vocabulary)
    (_folder() / "merges.txt").write_bytes(rest)
    read_vocabulary(_folder())


def package(data: bytes) -> None:
    from edge_sd.bundle.mlpackage.package import Package

    folder = _folder() / "x.mlpackage"
    if not folder.is_dir():
        import shutil

        shutil.copytree(EMOJI / "coreml-ane-fp16/TinyDecoder.mlpackage", folder)
    (folder / "Data/com.apple.CoreML/model.mlmodel").write_bytes(data)
    Package.open(folder)


def openai_request(data: bytes) -> None:
    from pydantic import ValidationError

    from edge_sd.apps.server.openai import Generation

    with contextlib.suppress(ValidationError):
        Generation.model_validate_json(data)


def a1111_request(data: bytes) -> None:
    from pydantic import ValidationError

    from edge_sd.apps.server.a1111_forms import ImageToImage, TextToImage

    for kind in (TextToImage, ImageToImage):
        with contextlib.suppress(ValidationError):
            kind.model_validate_json(data)


def job(data: bytes) -> None:
    from pydantic import ValidationError

    from edge_sd.apps.server.wish import Wish

    with contextlib.suppress(ValidationError):
        Wish.model_validate_json(data)


READERS: dict[str, Callable[[bytes], None]] = {
    each.__name__: each
    for each in (manifest, prompt, template, infotext, record, programs, safetensors, lora, lora_keys, picture, merges,
                 package, openai_request, a1111_request, job)
} | strangers.READERS  # fmt: skip


def read(name: str, data: bytes) -> None:
    """Give bytes to a reader; only what is not typed comes out."""
    with contextlib.suppress(EdgeSDError):
        READERS[name](data)


def seeds(name: str) -> Iterator[bytes]:
    """What a reader takes, to begin with."""
    from io import BytesIO

    from PIL import Image
    from PIL.PngImagePlugin import PngInfo
    from safetensors.numpy import save

    if name in strangers.READERS:
        yield from strangers.seeds(name)
        return
    info = "a (cat:1.2), [a:b:0.5] AND {a|b} <lora:x:0.5>\nNegative prompt: dogs\nSteps: 3, Sampler: Euler a, Seed: 1"
    info += ", Size: 8x8"
    ours = json.dumps({"version": "1", "request": {"prompt": "a cat", "steps": 3, "loras": {"x": ["ab", 1.0]}}})
    rows = {f"lora_unet_down_blocks_0_attentions_0_proj_in.lora_{half}.weight": np.ones((2, 2), np.float32)
            for half in ("down", "up")}  # fmt: skip
    graph = {"3": {"class_type": "KSampler", "inputs": {"seed": 1, "steps": 3, "positive": ["6", 0]}},
             "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat"}}}  # fmt: skip
    request = json.dumps(
        {"prompt": "a cat", "n": 1, "steps": 3, "cfg_scale": 7, "size": "8x8", "sampler_name": "Euler"}
    )
    if name == "manifest":
        document = json.loads((EMOJI / "edge_sd.json").read_bytes())
        document["variants"] = {"openvino-fp16": document["variants"]["openvino-fp16"]}
        yield json.dumps(document).encode()
    elif name in ("prompt", "template", "infotext"):
        yield info.encode()
        yield info.split("\n")[0].encode()
    elif name == "record":
        yield ours.encode()
    elif name == "programs":
        yield f"prompt\n{json.dumps(graph)}".encode()
        for key in ("invokeai_metadata", "Comment", "sd-metadata", "XMP", "fooocus", "negative_prompt"):
            yield f"{key}\n{ours}".encode()
    elif name in ("safetensors", "lora"):
        yield save(rows)
    elif name == "lora_keys":
        yield "\n".join(rows).encode()
    elif name == "picture":
        for kind in ("PNG", "JPEG", "WEBP"):
            data, texts = BytesIO(), PngInfo()
            texts.add_text("parameters", info)
            Image.new("RGB", (8, 8)).save(data, kind, **({"pnginfo": texts} if kind == "PNG" else {}))
            yield data.getvalue()
    elif name == "merges":
        yield b'{"<|startoftext|>": 0, "<|endoftext|>": 1, "a": 2, "b": 3, "ab": 4}\n\n#version: 0.2\na b\n'
    elif name == "package":
        yield (EMOJI / "coreml-ane-fp16/TinyDecoder.mlpackage/Data/com.apple.CoreML/model.mlmodel").read_bytes()[
            :20_000
        ]
    else:
        yield request.encode()
