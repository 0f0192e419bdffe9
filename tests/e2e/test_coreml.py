"""Core ML from the command line: convert, draw by the reference, and the mistakes people make."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edge_sd import Pipeline, Request
from edge_sd.bundle.assembly import whole_package
from edge_sd.bundle.bundle import ModelBundle
from edge_sd.errors import DeviceError, InvalidModel, InvalidRequest
from edge_sd.images.metrics import PEAK, psnr
from edge_sd.pipeline.control import Control

from ..conftest import convert
from .test_cli import edge_sd


def picture_psnr(one: Image.Image, other: Image.Image) -> float:
    return psnr(np.asarray(one), np.asarray(other), PEAK)


def test_the_same_seed_draws_the_same_picture_on_both_backends(
    coreml_bundle: ModelBundle, shallow: Path, tmp_path: Path
) -> None:
    """One bundle with a variant of each; OpenVINO in float32, the reference in float16."""
    target = tmp_path / "b"
    shutil.copytree(coreml_bundle.root, target)
    assert sorted(convert(shallow, target, "fp32").variants) == ["coreml-ane-fp16", "openvino-fp32"]
    lines = Image.new("RGB", (16, 16))
    lines.paste("white", (3, 5, 12, 6))
    for guidance, control in ((1.0, None), (5.0, None), (5.0, lines)):
        request = Request(
            "a red apple", seed=7, steps=2, guidance=guidance, controls=[Control(control)] if control else []
        )
        images = []
        for device in ("cpu", "coreml-reference"):
            with Pipeline.open(target, device) as pipeline:
                images.append(pipeline.generate(request).pictures[0].image)
        assert picture_psnr(*images) > 35
    with Pipeline.open(target, "coreml-reference") as pipeline, pytest.raises(InvalidRequest, match="draws 16x16 only"):
        pipeline.generate(Request("a red apple", seed=7, width=32, height=16))


def test_packages_without_weights_draw_the_same_picture(
    coreml_bundle: ModelBundle, shallow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the embedded model ships them: weights are those of the diffusers folder, here the UNet's in two shards."""
    from edge_sd.bundle.variants import Variant
    from edge_sd.converters.sources.source import Source
    from edge_sd.converters.training.publish import COREML, link_packaged, records

    monkeypatch.setenv("EDGE_SD_CACHE", str(tmp_path / "home"))
    target = tmp_path / "model"
    shutil.copytree(shallow, target)
    publish_halves(target)
    source = Source.open(target)
    artifacts = {
        part: link_packaged(coreml_bundle, COREML, part, source) for part in coreml_bundle.variant(COREML).artifacts
    }
    assert sum(name.endswith(".safetensors") for name in artifacts["unet"].weights) == 2
    variant = Variant("coreml", "fp16", artifacts, records(target, artifacts), compute="ane")
    linked = ModelBundle(target, coreml_bundle.facts, {COREML: variant})
    linked.write_manifest()
    assert ModelBundle.open(target).verify() == []
    assert not list(target.rglob("weight.bin"))
    request = Request("a red apple", seed=7, steps=2)
    images = []
    for model in (coreml_bundle.root, target):
        with Pipeline.open(model, "coreml-reference") as pipeline:
            images.append(np.asarray(pipeline.generate(request).pictures[0].image))
    assert np.array_equal(*images)
    for part, artifact in coreml_bundle.variant("coreml-ane-fp16").artifacts.items():
        written = coreml_bundle.path(artifact.weights[0])
        whole = whole_package(linked, artifacts[part]) / written.relative_to(coreml_bundle.path(artifact.graph))
        assert whole.read_bytes() == written.read_bytes()
    (shard,) = target.glob("unet/*-00002-of-00002.safetensors")
    shard.write_bytes(shard.read_bytes()[:-2] + b"??")
    with Pipeline.open(target, "coreml-reference") as pipeline, pytest.raises(InvalidModel, match=f"{shard.name} is"):
        pipeline.generate(request)


def publish_halves(folder: Path) -> None:
    """Round a diffusers folder to float16 in place, and cut its UNet's weights in two."""
    from safetensors.numpy import load_file, save_file

    for path in list(folder.rglob("*.safetensors")):
        tensors = {name: value.astype(np.float16) for name, value in load_file(path).items()}
        if path.parent.name != "unet":
            save_file(tensors, path)
            continue
        path.unlink()
        places = {name: f"{path.stem}-0000{1 + n % 2}-of-00002.safetensors" for n, name in enumerate(tensors)}
        for shard in set(places.values()):
            save_file({name: tensors[name] for name in tensors if places[name] == shard}, path.with_name(shard))
        path.with_name(f"{path.name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def test_a_damaged_or_missing_component_is_an_error(coreml_bundle: ModelBundle, tmp_path: Path) -> None:
    target = tmp_path / "b"
    shutil.copytree(coreml_bundle.root, target)
    weights = target / "coreml-ane-fp16/Unet.mlpackage/Data/com.apple.CoreML/weights/weight.bin"
    weights.write_bytes(weights.read_bytes()[:-1])
    with Pipeline.open(target, "coreml-reference") as pipeline, pytest.raises(InvalidModel, match=r"weight\.bin has"):
        pipeline.generate(Request("a cat", seed=1))
    variant = coreml_bundle.variant("coreml-ane-fp16")
    less = {part: artifact for part, artifact in variant.artifacts.items() if part != "unet"}
    opened = ModelBundle.open(target)
    replace(opened, variants={"coreml-ane-fp16": replace(variant, artifacts=less)}).write_manifest()
    with pytest.raises(InvalidModel, match="has no unet"):
        Pipeline.open(target, "coreml-reference")


def test_real_execution_is_for_macs(coreml_bundle: ModelBundle) -> None:
    with pytest.raises(DeviceError, match=r"no device 'ane' here; valid: .*coreml-reference"):
        Pipeline.open(coreml_bundle.root, "ane")


def test_a_failed_core_ml_variant_leaves_the_bundle_as_it_was(
    bundle: ModelBundle, miniature: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edge_sd.converters.build import build
    from edge_sd.converters.coreml import convert as conversion
    from edge_sd.converters.recipes import RECIPES
    from edge_sd.converters.targets import form_named
    from edge_sd.errors import ConversionError

    target = tmp_path / "b"
    shutil.copytree(bundle.root, target)

    def full(model: object, path: Path) -> None:
        path.mkdir()
        raise ConversionError(f"{path} could not be written: No space left on device")

    monkeypatch.setattr(conversion, "save", full)
    with pytest.raises(ConversionError, match="No space left"):
        build(miniature, target, form_named("coreml"), RECIPES["fp16"], lambda what, share: None)
    assert ModelBundle.open(target).variants == bundle.variants
    assert ModelBundle.open(target).verify() == []
    assert not [name for name in os.listdir(target) if name.startswith(".")]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--to", "coreml", "--compute", "npu"], "valid: ane, gpu"),
        (["--to", "coreml", "--compute", "gpu", "--target", "iOS17"], "needs the target iOS18 (macOS15)"),
        (["--to", "coreml", "--precision", "int4"], "valid: fp16, int8, mixed, p1"),
        (["--to", "coreml", "--size", "100"], "not a multiple of 32"),
        (["--to", "openvino", "--compute", "ane"], "openvino takes no compute"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(tmp_path: Path, options: list[str], said: str) -> None:
    done = edge_sd("convert", "emoji", "b", *options, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_without_coremltools_there_is_the_install_line(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\nreal = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'coremltools' else real(name, *a)\n"
    )
    done = edge_sd("convert", "emoji", "b", "--to", "coreml", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    assert '[coreml]"' in done.stderr


def test_the_curve_of_mixed_bits_is_printed_and_drawn(coreml_bundle: ModelBundle, tmp_path: Path) -> None:
    from edge_sd.converters.coreml.mixed import BitRecipe, Point

    target = tmp_path / "b"
    shutil.copytree(coreml_bundle.root, target)
    points = [Point("p4", 4.0, 1_000_000, 30.5), Point("p6", 6.0, 1_500_000, 42.0)]
    recipe = BitRecipe({"weight": 4}, points, [Point("mixed", 4.6, 1_150_000, 41.0)])
    recipe.save(target / "coreml-ane-fp16/Unet.bits.json")
    wish = ["compare", "bits", "b", "--variant", "coreml-ane-fp16"]
    done = edge_sd(*wish, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "| mixed | 4.60 | 1.15 MB | 41.0 dB |" in done.stdout
    with Image.open(tmp_path / "bits.png") as image:
        assert image.size == (720, 420)
    for more, said in (
        (["--component", "Vae"], "has no bits of 'Vae'; valid: Unet"),
        (["--output", "bits.txt"], "no PNG file"),
        (["--variant", "x"], "no variant 'x'"),
    ):
        done = edge_sd(*wish, *more, cwd=tmp_path)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert said in done.stderr


@pytest.mark.slow
def test_the_packages_that_the_embedded_model_brings_draw_its_picture(emoji: Path) -> None:
    """Through the executor, beside OpenVINO; tests/e2e/test_docs.py converts by the README's own command."""
    request = Request("a red apple, glossy style", seed=7, steps=8)
    images = []
    for device in ("cpu", "coreml-reference"):
        with Pipeline.open(emoji, device) as pipeline:
            images.append(pipeline.generate(request).pictures[0].image)
    assert picture_psnr(*images) > 35
    for part, artifact in ModelBundle.open(emoji).variant("coreml-ane-fp16").artifacts.items():
        assert artifact.parity is not None, part
        assert artifact.parity.psnr >= 45
