"""Conversions: what they measure, what they refuse, and what they leave behind when they are stopped."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from edge_sd import ModelBundle, Pipeline, Request
from edge_sd.converters.openvino import convert as openvino
from edge_sd.converters.parity import psnr
from edge_sd.converters.recipes import RECIPES, QuantRecipe
from edge_sd.converters.sources.source import Source
from edge_sd.errors import ConversionError, EdgeSDError, InvalidModel, InvalidRequest, ParityError
from edge_sd.pipeline.control import Control

from ..conftest import convert

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def source(miniature: Path, tmp_path: Path) -> Path:
    shutil.copytree(miniature, tmp_path / "source")
    return tmp_path / "source"


def left_behind(target: Path) -> list[str]:
    return [path.name for path in target.parent.iterdir() if path.name not in ("source", "pickle")]


def test_the_unet_that_takes_control_stores_no_weights_of_its_own(bundle: ModelBundle) -> None:
    for name in ("openvino-fp32", "openvino-fp16"):
        artifacts = bundle.variant(name).artifacts
        shared, own = artifacts["controlled_unet"].weights
        assert (shared,) == artifacts["unet"].weights
        assert bundle.path(own).stat().st_size < 0.01 * bundle.path(shared).stat().st_size
        assert not bundle.path(own).with_suffix(".bin").exists()


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_integer_weights_reach_their_floor_and_draw(plain_emoji: Path, tmp_path: Path, precision: str) -> None:
    bundle = convert(plain_emoji, tmp_path / "b", precision)
    variant = bundle.variant(f"openvino-{precision}")
    for part, artifact in variant.artifacts.items():
        assert artifact.parity is not None, part
        assert artifact.parity.psnr >= RECIPES[precision].floor
    halves = sum(path.stat().st_size for path in plain_emoji.rglob("*.safetensors"))
    assert variant.size() < halves * 0.75
    with Pipeline.open(tmp_path / "b") as pipeline:
        assert pipeline.generate(Request("a cat", seed=1, steps=2)).pictures[0].image.size == (128, 128)


def test_each_part_has_the_precision_that_it_was_given(shallow: Path, tmp_path: Path) -> None:
    bundle = convert(shallow, tmp_path / "b", "unet=int8,text=fp32,vae=fp16")
    variant = bundle.variant("openvino-int8_text-fp32_vae-fp16")
    assert variant.precision == "int8"
    stored = {"unet": 'element_type="u8"', "text_encoder": 'element_type="f32"', "vae_decoder": 'element_type="f16"'}
    for part, text in stored.items():
        graph = bundle.path(variant.artifacts[part].graph).read_text("utf-8")
        assert text in graph, part
        assert (stored["unet"] in graph) == (part == "unet")
        assert stored["vae_decoder"] not in graph or part != "text_encoder"
    own = {part: variant.precision_of(part) for part in ("unet", "controlnet", "text_encoder", "vae_decoder")}
    assert own == {"unet": "int8", "controlnet": "int8", "text_encoder": "fp32", "vae_decoder": "fp16"}
    for part, artifact in variant.artifacts.items():
        assert artifact.parity is not None
        assert artifact.parity.psnr >= RECIPES[variant.precision_of(part)].floor, part
    with Pipeline.open(tmp_path / "b") as pipeline:
        picture = pipeline.generate(Request("a cat", seed=1, steps=2)).pictures[0]
    assert picture.variant == "openvino-int8_text-fp32_vae-fp16"
    with pytest.raises(InvalidRequest, match="has no upscaler that a precision is for; it has: controlnet, text, "):
        convert(shallow, tmp_path / "c", "int8,upscaler=fp16")
    assert not (tmp_path / "c").exists()


def test_weights_rounded_by_what_layers_see_are_nearer(shallow: Path, tmp_path: Path) -> None:
    """Of the UNet that takes control, too, whose layers see something else: its weights are its own."""
    bundles = [convert(shallow, tmp_path / "b", name) for name in ("int4", "int4gptq")]
    near, nearer = (each.variant(f"openvino-{name}") for each, name in zip(bundles, ("int4", "int4gptq"), strict=True))
    for part in ("unet", "controlled_unet", "text_encoder"):
        before, after = near.artifacts[part].parity, nearer.artifacts[part].parity
        assert before is not None
        assert after is not None
        assert after.psnr > before.psnr + 1, part
    assert "unet/" in near.artifacts["controlled_unet"].weights[0]
    assert all("controlled_unet/" in name for name in nearer.artifacts["controlled_unet"].weights)
    check_control(bundles[1], "openvino-int4gptq", shallow)


def layers_of(source: Path) -> set[str]:
    """All layers of a source's UNet that a LoRA may change."""
    import torch

    modules = Source.open(source).load("unet").named_modules()
    return {name for name, each in modules if isinstance(each, torch.nn.Linear | torch.nn.Conv2d)}


def found_by_loras(graph: Path) -> set[str]:
    import openvino as ov

    from edge_sd.backends.openvino.edits import layers

    return set(layers(ov.Core().read_model(graph)))


def test_w8a8_is_calibrated_measured_and_drawn_with(miniature: Path, tmp_path: Path) -> None:
    """Integers in most products and not in the dearest; the weights of those that stay are float16."""
    bundle = convert(miniature, tmp_path / "b", "w8a8")
    artifacts = bundle.variant("openvino-w8a8").artifacts
    graph = bundle.path(artifacts["unet"].graph).read_text("utf-8")
    assert graph.count('type="FakeQuantize"') > 10
    assert attention_in_integers(bundle.path(artifacts["unet"].graph)) == []
    assert 'element_type="i8"' in graph
    assert not list(bundle.root.rglob("float.*"))
    assert all(artifact.parity is not None and artifact.parity.psnr > 28 for artifact in artifacts.values())
    with Pipeline.open(tmp_path / "b", "cpu", preset="balanced") as pipeline:
        picture = pipeline.generate(Request("a cat", seed=1, steps=2, deep_every=2)).pictures[0]
    assert picture.variant == "openvino-w8a8"
    check_control(bundle, "openvino-w8a8", miniature)
    assert found_by_loras(bundle.path(artifacts["unet"].graph)) == layers_of(miniature)


def test_hybrid_rounds_the_activations_of_the_unets_convolutions_and_all_weights(
    miniature: Path, tmp_path: Path
) -> None:
    import openvino as ov

    bundle = convert(miniature, tmp_path / "b", "hybrid")
    artifacts = bundle.variant("openvino-hybrid").artifacts
    assert all(artifact.parity is not None and artifact.parity.psnr > 30 for artifact in artifacts.values())
    integers = {"text_encoder": 0, "unet": 0, "vae_decoder": 0}
    for part in integers:
        model = ov.Core().read_model(bundle.path(artifacts[part].graph))
        for op in model.get_ops():
            rounded = [port.get_node().get_type_name() == "FakeQuantize" for port in op.input_values()]
            if op.get_type_name() == "MatMul" and stored_in(op.input_value(1)):
                assert stored_in(op.input_value(1)) in ("u8", "i8"), op.get_friendly_name()
                assert not rounded[0], op.get_friendly_name()
            integers[part] += op.get_type_name() == "Convolution" and rounded[0]
    assert integers["unet"] > 5
    assert attention_in_integers(bundle.path(artifacts["unet"].graph)) == []
    assert integers["text_encoder"] == integers["vae_decoder"] == 0
    with Pipeline.open(tmp_path / "b", "cpu") as pipeline:
        picture = pipeline.generate(Request("a cat", seed=1, steps=2, deep_every=2)).pictures[0]
    assert picture.variant == "openvino-hybrid"
    check_control(bundle, "openvino-hybrid", miniature)


def check_control(bundle: ModelBundle, variant: str, source: Path) -> None:
    """The ControlNet and its UNet have 8-bit weights, floating-point activations, and draw as torch's."""
    for part in ("controlnet", "controlled_unet"):
        graph = bundle.path(bundle.variant(variant).artifacts[part].graph).read_text("utf-8")
        assert 'type="FakeQuantize"' not in graph
        assert 'element_type="u8"' in graph
    lines = Image.new("RGB", (64, 64))
    ImageDraw.Draw(lines).ellipse((12, 12, 50, 50), outline="white")
    request = Request("a cat", seed=1, steps=4, width=64, height=64, controls=[Control(lines)])
    drawn = []
    for opened in (Pipeline.open(bundle.root, "cpu", variant), Pipeline.open(source, "torch-cpu")):
        with opened as pipeline:
            drawn.append(np.asarray(pipeline.generate(request).pictures[0].image))
    assert psnr(*drawn, peak=255) >= 25


def attention_in_integers(graph: Path) -> list[str]:
    """Names of the attentions that are given what was rounded: CPUs that compute in bfloat16 make noise of it."""
    import openvino as ov

    found = []
    for op in ov.Core().read_model(graph).get_ops():
        if op.get_type_name() == "ScaledDotProductAttention":
            for port in op.input_values():
                node = port.get_node()
                while node.get_type_name() in ("Transpose", "Reshape"):
                    node = node.input_value(0).get_node()
                if node.get_type_name() == "FakeQuantize":
                    found.append(op.get_friendly_name())
    return found


def stored_in(port: Any) -> str:
    """The type in which the weights that come out of `port` are stored; "" where they are computed."""
    node = port.get_node()
    while node.get_type_name() in ("Convert", "Subtract", "Multiply", "Reshape"):
        node = node.input_value(0).get_node()
    return str(node.get_element_type().get_type_name()) if node.get_type_name() == "Constant" else ""


def test_float_precisions_are_measured_and_near_exact(bundle: ModelBundle) -> None:
    for name, floor in (("openvino-fp32", 80), ("openvino-fp16", 45)):
        for part, artifact in bundle.variant(name).artifacts.items():
            assert artifact.parity is not None, part
            assert artifact.parity.psnr >= floor
            assert artifact.parity.max_error > 0
    assert bundle.verify() == []


def test_a_component_below_its_floor_fails_the_conversion(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RECIPES, "fp16", QuantRecipe("fp16", 16, floor=150.0))
    with pytest.raises(ParityError, match=r"text_encoder in fp16 reaches \d+\.\d dB .* floor is 150"):
        convert(source, tmp_path / "b", "fp16")
    assert left_behind(tmp_path / "b") == []


def test_a_failed_second_variant_leaves_the_first_as_it_was(
    bundle: ModelBundle, miniature: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "b"
    shutil.copytree(bundle.root, target)
    monkeypatch.setitem(RECIPES, "int8", QuantRecipe("int8", 8, floor=199.0))
    with pytest.raises(ParityError):
        convert(miniature, target, "int8")
    assert ModelBundle.open(target).variants == bundle.variants
    assert ModelBundle.open(target).verify() == []
    assert not [name for name in os.listdir(target) if name.startswith(".")]


def test_a_variant_that_is_there_is_not_made_again(miniature: Path, bundle: ModelBundle, tmp_path: Path) -> None:
    target = tmp_path / "b"
    shutil.copytree(bundle.root, target)
    said: list[str] = []
    convert(miniature, target, "fp16", lambda what, share: said.append(what))
    assert said == ["openvino-fp16 is already there"]


def test_other_weights_of_the_same_shape_do_not_pass_for_the_bundles_own(
    source: Path, bundle: ModelBundle, tmp_path: Path
) -> None:
    """Two checkpoints of one family have the same configs; only their weights tell them apart."""
    from safetensors.numpy import load_file, save_file

    target = tmp_path / "b"
    shutil.copytree(bundle.root, target)
    tensors = load_file(source / WEIGHTS)
    tensors["conv_in.bias"] = tensors["conv_in.bias"] + 1
    save_file(tensors, source / WEIGHTS)
    for precision in ("fp16", "int8"):
        with pytest.raises(InvalidRequest, match="other weights"):
            convert(source, target, precision)
    assert ModelBundle.open(target).verify() == []


def truncate(share: float) -> Any:
    return lambda data: data[: int(len(data) * share)]


def header(text: bytes) -> Any:
    return lambda data: struct.pack("<Q", len(text)) + text


@pytest.mark.fault(6, "damaged weights given to convert")
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate(0), "damaged"),
        (truncate(0.0001), "damaged"),
        (truncate(0.5), "damaged"),
        (truncate(0.99), "damaged"),
        (lambda data: data[:-1], "damaged"),
        (lambda data: data + b"x", "damaged"),
        (lambda data: struct.pack("<Q", 100_000_001) + data[8:], "damaged"),
        (header(b"{"), "damaged"),
        (header(b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}'), "damaged"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "damaged"),
        (lambda data: b"PK\x03\x04" + data, "damaged"),
        (lambda data: b"\x80\x02}q\x00." + data, "damaged"),
        (header(b"{}"), "lacks"),
    ],
)
def test_damaged_weights_are_refused(source: Path, tmp_path: Path, damage: Any, message: str) -> None:
    path = source / WEIGHTS
    path.write_bytes(damage(path.read_bytes()))
    started = time.monotonic()
    with pytest.raises(InvalidModel, match=message):
        convert(source, tmp_path / "b", "fp16")
    if message == "damaged":
        assert time.monotonic() - started < 5
    assert left_behind(tmp_path / "b") == []


def test_weights_of_nan_are_refused(source: Path) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(source / WEIGHTS)
    name = sorted(tensors)[0]
    tensors[name].flat[0] = float("nan")
    save_file(tensors, source / WEIGHTS)
    with pytest.raises(InvalidModel, match=f"{name} holds NaN"):
        Source.open(source).load("unet")


@pytest.mark.fault(6, "pickles given to convert")
@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "diffusion_pytorch_model.ckpt", "x.pkl"])
def test_a_pickle_is_never_loaded(source: Path, tmp_path: Path, name: str) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'pickle'}",)

    import pickle

    (source / WEIGHTS).unlink()
    (source / "unet" / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(InvalidModel, match=r"a pickle.*only safetensors"):
        convert(source, tmp_path / "b", "fp16")
    assert not (tmp_path / "pickle").exists()


@pytest.mark.parametrize(
    ("relative", "text"),
    [
        ("model_index.json", None),
        ("model_index.json", "{"),
        ("model_index.json", '{"_class_name": "FluxPipeline"}'),
        ("unet/config.json", None),
        ("unet/config.json", "{}"),
        ("scheduler/scheduler_config.json", '{"beta_schedule": "steep"}'),
        ("vae/config.json", "[]"),
        ("tokenizer/tokenizer.json", None),
        ("tokenizer/tokenizer.json", "{}"),
    ],
)
def test_a_folder_that_is_no_model_is_refused(source: Path, tmp_path: Path, relative: str, text: str | None) -> None:
    if text is None:
        (source / relative).unlink()
    else:
        (source / relative).write_text(text)
    with pytest.raises(InvalidModel) as caught:
        convert(source, tmp_path / "b", "fp16")
    assert "\n" not in str(caught.value)
    assert left_behind(tmp_path / "b") == []


def test_a_target_that_holds_something_else_is_left_alone(source: Path, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b/thesis.txt").write_text("chapter 1")
    with pytest.raises(InvalidRequest, match=r"neither empty nor a bundle .*thesis\.txt"):
        convert(source, tmp_path / "b", "fp16")
    assert os.listdir(tmp_path / "b") == ["thesis.txt"]
    with pytest.raises(InvalidRequest, match="is a file"):
        convert(source, tmp_path / "b/thesis.txt", "fp16")
    with pytest.raises(InvalidRequest, match="does not exist"):
        convert(source, tmp_path / "no/b", "fp16")


def test_a_bundle_of_another_model_is_left_alone(bundle: ModelBundle, emoji: Path) -> None:
    with pytest.raises(InvalidRequest, match="another model"):
        convert(emoji, bundle.root, "fp16")
    assert bundle.verify() == []


@pytest.mark.fault(3, "a disk without room for a conversion")
def test_a_disk_without_room_is_refused_up_front(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ConversionError, match="0 MB free"):
        convert(source, tmp_path / "b", "fp16")
    assert left_behind(tmp_path / "b") == []


@pytest.mark.parametrize("failing", ["replace", "fsync"])
@pytest.mark.parametrize("nth", [1, 3, 6])
def test_a_disk_that_fails_leaves_the_bundle_as_it_was(
    miniature: Path, bundle: ModelBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, nth: int
) -> None:
    """The nth rename or flush fails, and all after it; nothing but these calls is replaced."""
    target = tmp_path / "b"
    shutil.copytree(bundle.root, target)
    _forget(target, "openvino-fp16")
    monkeypatch.setattr(openvino, "convert", _copy_instead_of_converting(bundle))
    real, calls = getattr(os, failing), iter(range(1, 1000))

    def fail(*arguments: Any) -> Any:
        if next(calls) >= nth:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(ConversionError, match="No space left on device"):
        convert(miniature, target, "fp16")
    monkeypatch.undo()
    after = ModelBundle.open(target)
    assert sorted(after.variants) == ["openvino-fp32"]
    assert after.verify() == []
    assert not (target / "openvino-fp16").exists(), "nothing was added"
    monkeypatch.setattr(openvino, "convert", _copy_instead_of_converting(bundle))
    assert sorted(convert(miniature, target, "fp16").variants) == ["openvino-fp16", "openvino-fp32"]


def _forget(target: Path, name: str) -> None:
    from dataclasses import replace

    opened = ModelBundle.open(target)
    replace(opened, variants={k: v for k, v in opened.variants.items() if k != name}).write_manifest()
    shutil.rmtree(target / name)


def _copy_instead_of_converting(bundle: ModelBundle) -> Any:
    """The same files that a conversion writes, without tracing again for each of many faults."""

    def put(wrapped: Any, recipe: QuantRecipe, folder: Path, *_: Any) -> None:
        variant = bundle.variant(f"openvino-{recipe.name}")
        artifact = variant.artifacts[wrapped.part]
        shutil.copyfile(bundle.path(artifact.graph), folder / "openvino_model.xml")
        weights = b"".join(bundle.path(name).read_bytes() for name in artifact.weights)
        (folder / "openvino_model.bin").write_bytes(weights)

    return put


@pytest.mark.slow
def test_a_killed_conversion_lists_nothing_and_goes_on(miniature: Path, tmp_path: Path) -> None:
    target = tmp_path / "b"
    command = [sys.executable, "-m", "edge_sd", "convert", str(miniature), str(target), "--quiet"]
    state = target / ".openvino-fp16.partial/.state.json"
    for wait_for in (target, state):
        process = subprocess.Popen(command)
        deadline = time.monotonic() + 120
        while not wait_for.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        with pytest.raises(EdgeSDError):
            ModelBundle.open(target)
    recorded = state.read_text()
    said: list[str] = []
    bundle = convert(miniature, target, "fp16", lambda what, share: said.append(what))
    assert '"text_encoder"' in recorded
    assert "openvino-fp16: text_encoder" not in said
    assert bundle.verify() == []
    assert not [name for name in os.listdir(target) if name.startswith(".")]


def test_bars_of_other_libraries_are_not_seen(shallow: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What a command prints is its own: nncf would draw a bar for each component."""
    from edge_sd.converters.openvino.convert import convert as write
    from edge_sd.converters.sources.wrappers import wrap

    source = Source.open(shallow)
    write(wrap("vae_decoder", source.load("vae_decoder"), source.facts), RECIPES["int8"], tmp_path, source.facts)
    assert capfd.readouterr() == ("", "")
