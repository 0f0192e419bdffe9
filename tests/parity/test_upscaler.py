"""Upscalers of ESRGAN's class beside the network written out in torch, by the names of both kinds of files."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F

from edge_sd import Pipeline
from edge_sd.apps.cli import app
from edge_sd.backends import Device, LoadRequest, backend
from edge_sd.bundle.bundle import ModelBundle
from edge_sd.bundle.parts import UPSCALER
from edge_sd.bundle.variants import Artifact, Variant
from edge_sd.components.upscaler import FIXED, MARGIN, WINDOW, enlarge, window_of
from edge_sd.converters.form import Made
from edge_sd.converters.parity import TorchComponent, psnr, record
from edge_sd.converters.recipes import RECIPES
from edge_sd.converters.sources.source import Source
from edge_sd.converters.sources.upscaler import load, sizes_of, unpack
from edge_sd.converters.sources.wrappers import wrap
from edge_sd.converters.targets import form_named
from edge_sd.errors import InvalidModel, InvalidRequest
from edge_sd.files import record_file

FEATURES, GROWTH, BLOCKS = 8, 4, 2


def tensors(channels: int, old: bool) -> dict[str, torch.Tensor]:
    """Random weights under Real-ESRGAN's names, or ESRGAN's first ones."""
    torch.manual_seed(channels)
    names = {"conv_first": "model.0", "conv_body": f"model.1.sub.{BLOCKS}", "conv_up1": "model.3",
             "conv_up2": "model.6", "conv_hr": "model.8", "conv_last": "model.10"}  # fmt: skip
    made: dict[str, torch.Tensor] = {}

    def add(name: str, out: int, into: int) -> None:
        # Weights that keep the size of what goes through, so that errors do not fade.
        made[f"{name}.weight"] = torch.randn(out, into, 3, 3) * (into * 9) ** -0.5
        made[f"{name}.bias"] = torch.randn(out) * 0.05

    for name, old_name in names.items():
        into = channels if name == "conv_first" else FEATURES
        add(old_name if old else name, 3 if name == "conv_last" else FEATURES, into)
    for block in range(BLOCKS):
        for dense in (1, 2, 3):
            for conv in range(1, 6):
                where = f"model.1.sub.{block}.RDB{dense}.conv{conv}.0" if old else f"body.{block}.rdb{dense}.conv{conv}"
                add(where, FEATURES if conv == 5 else GROWTH, FEATURES + (conv - 1) * GROWTH)
    return made


def expected(t: dict[str, torch.Tensor], image: torch.Tensor, scale: int) -> torch.Tensor:
    """The network as the papers and their code have it, one operation after the other."""

    def conv(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, t[f"{name}.weight"], t[f"{name}.bias"], padding=1)

    x = conv("conv_first", F.pixel_unshuffle(image, {4: 1, 2: 2, 1: 4}[scale]))
    first = x
    for block in range(BLOCKS):
        into = x
        for dense in (1, 2, 3):
            start = seen = x
            for n in range(1, 5):
                seen = torch.cat([seen, F.leaky_relu(conv(f"body.{block}.rdb{dense}.conv{n}", seen), 0.2)], 1)
            x = start + 0.2 * conv(f"body.{block}.rdb{dense}.conv5", seen)
        x = into + 0.2 * x
    x = first + conv("conv_body", x)
    for name in ("conv_up1", "conv_up2"):
        x = F.leaky_relu(conv(name, F.interpolate(x, scale_factor=2, mode="nearest")), 0.2)
    return conv("conv_last", F.leaky_relu(conv("conv_hr", x), 0.2))


def photo(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 255, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(("channels", "scale"), [(3, 4), (12, 2), (48, 1)])
@pytest.mark.parametrize("prefix", ["", "params_ema."])
def test_a_file_becomes_the_network(tmp_path: Path, channels: int, scale: int, prefix: str) -> None:
    made = tensors(channels, old=False)
    save_file({prefix + name: value for name, value in made.items()}, tmp_path / "x.safetensors")
    unpack(tmp_path / "x.safetensors", tmp_path / "upscaler")
    image = torch.rand(1, 3, 16, 24)
    with torch.no_grad():
        found = load(tmp_path / "upscaler")(image)
    assert found.shape == (1, 3, 16 * scale, 24 * scale)
    torch.testing.assert_close(found, expected(made, image, scale), atol=1e-5, rtol=1e-4)


def test_the_first_names_are_the_same_network(tmp_path: Path) -> None:
    save_file(tensors(3, old=True), tmp_path / "x.safetensors")
    unpack(tmp_path / "x.safetensors", tmp_path / "upscaler")
    image = torch.rand(1, 3, 12, 12)
    with torch.no_grad():
        found = load(tmp_path / "upscaler")(image)
    torch.testing.assert_close(found, expected(tensors(3, old=False), image, 4), atol=1e-5, rtol=1e-4)


def without(name: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in tensors(3, old=False).items() if key != name}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"a": torch.zeros(2)}, "is no upscaler of ESRGAN's class"),
        (without("conv_up2.weight"), "another network than RRDBNet of 2 blocks: conv_up2.weight differs"),
        ({**tensors(3, old=False), "extra": torch.zeros(1)}, "extra differs"),
        ({**tensors(3, old=False), "conv_first.weight": torch.zeros(FEATURES, 4, 3, 3)}, "takes 4 channels"),
    ],
)
def test_another_network_is_refused_by_name(tmp_path: Path, content: dict[str, torch.Tensor], said: str) -> None:
    save_file(content, tmp_path / "x.safetensors")
    with pytest.raises(InvalidModel, match=said):
        unpack(tmp_path / "x.safetensors", tmp_path / "upscaler")
    assert not (tmp_path / "upscaler").exists()


class Doubling:
    """Twice as large by nearest pixels, plus how far away the window's rim is: seams would show."""

    def bind(self, **constants: Any) -> None: ...

    def __call__(self, **inputs: Any) -> dict[str, Any]:
        assert inputs["image"].shape[2:] == self.sides
        return {"sample": inputs["image"].repeat(2, axis=2).repeat(2, axis=3)}

    def close(self) -> None: ...

    sides: tuple[int, int] = (0, 0)


@pytest.mark.parametrize("size", [(7, 5), (64, 64), (300, 256), (513, 700)])
def test_windows_cover_a_picture_of_any_size(size: tuple[int, int]) -> None:
    pixels = np.asarray(photo(*size))
    net = Doubling()
    net.sides = window_of(*pixels.shape[:2])
    assert max(net.sides) <= WINDOW
    assert not any(side % 4 for side in net.sides)
    assert MARGIN * 2 < WINDOW
    assert np.array_equal(enlarge(net, pixels, net.sides), pixels.repeat(2, axis=0).repeat(2, axis=1))


def in_torch(made: dict[str, torch.Tensor], image: Image.Image, scale: int) -> np.ndarray[Any, Any]:
    """The pixels of the whole picture enlarged in torch float32."""
    scaled = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None] / 255
    return (expected(made, scaled, scale).clamp(0, 1)[0].permute(1, 2, 0) * 255).round().numpy()


def test_a_model_is_given_an_upscaler_and_enlarges_with_it(
    shallow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    made = tensors(12, old=False)
    save_file(made, "x2.safetensors")
    image = photo(40, 24)
    image.save("photo.png")
    app(["convert", str(shallow), "b", "--upscaler", "x2.safetensors", "--quiet"], standalone_mode=False)
    with Pipeline.open("b") as pipeline:
        assert pipeline.upscales
        found = pipeline.enlarge(np.asarray(image))
    assert found.shape == (48, 80, 3)
    assert psnr(found, in_torch(made, image, 2), peak=255) >= 40
    capsys.readouterr()
    app(["upscale", "photo.png", "--model", "b", "--scale", "2"], standalone_mode=False)
    said = capsys.readouterr()
    assert "enlarged by the upscaler of" in said.err
    with Image.open("photo-x2.png") as large:
        assert np.array_equal(large, found)


def converted(source: Source, staging: Path, name: str) -> tuple[Made, float]:
    """The upscaler of a source by one form in float16, and its parity as conversions have it."""
    form, recipe = form_named(name), RECIPES["fp16"]
    wrapped = wrap(UPSCALER, source.load(UPSCALER), source.facts)
    component = TorchComponent(wrapped.module, tuple(wrapped.example), wrapped.outputs)
    picture = {"vae_decoder": {"picture": np.random.default_rng(0).uniform(-1, 1, (1, 3, 48, 200))}}
    record(UPSCALER, component, source.facts, {}, picture, (24, 100))
    recording = replace(component.recording, facts=source.facts)
    made = form.convert(wrapped, source, recipe, staging, recording, lambda what, share: None)
    return made, form.measure(UPSCALER, made, staging, recording).psnr


def with_upscaler(shallow: Path, folder: Path, made: dict[str, torch.Tensor]) -> Source:
    save_file(made, folder / "x.safetensors")
    shutil.copytree(shallow, folder / "source")
    unpack(folder / "x.safetensors", folder / "source/upscaler")
    return Source.open(folder / "source")


@pytest.mark.parametrize(("channels", "scale"), [(3, 4), (12, 2)])
@pytest.mark.parametrize("name", ["coreml", "coreai"])
def test_it_runs_in_graphs_of_fixed_shapes(shallow: Path, tmp_path: Path, name: str, channels: int, scale: int) -> None:
    if name == "coreai":
        pytest.importorskip("coreai_torch", reason="coreai-core and coreai-torch need Python 3.11 to 3.14")
    weights = tensors(channels, old=False)
    source = with_upscaler(shallow, tmp_path, weights)
    made, parity = converted(source, tmp_path, name)
    assert parity >= 40
    variant = Variant(name, "fp16", {UPSCALER: Artifact(made.graph, made.weights, made.inputs, made.outputs)})
    bundle, device = ModelBundle(tmp_path, source.facts, {}), Device(f"{name}-reference", name, "")
    component = backend(name).load(LoadRequest(bundle, variant, UPSCALER, device, {"image": (1, 3, FIXED, FIXED)}))
    image = photo(FIXED + 60, FIXED)
    found = enlarge(component, np.asarray(image), (FIXED, FIXED))
    component.close()
    assert found.shape == (image.height * scale, image.width * scale, 3)
    assert psnr(found, in_torch(weights, image, scale), peak=255) >= 40


def test_a_pipeline_gives_such_a_graph_windows_of_its_own_size(emoji: Path, shallow: Path, tmp_path: Path) -> None:
    weights, root, name = tensors(48, old=False), tmp_path / "b", "coreml-ane-fp16"
    shutil.copytree(emoji, root, ignore=shutil.ignore_patterns("openvino-*", "evaluator"))
    bundle = ModelBundle.open(emoji)
    variant = bundle.variants[name]
    made, _ = converted(with_upscaler(shallow, tmp_path, weights), root / name, "coreml")
    artifact = Artifact(f"{name}/{made.graph}", (), made.inputs, made.outputs)
    paths = [path for path in (root / artifact.graph).rglob("*") if path.is_file()]
    files = {path.relative_to(root).as_posix(): record_file(path) for path in paths}
    variant = replace(variant, artifacts={**variant.artifacts, UPSCALER: artifact}, files={**variant.files, **files})
    replace(bundle, root=root, variants={name: variant}).write_manifest()
    image = photo(FIXED, FIXED)
    with Pipeline.open(root, "coreml-reference") as pipeline:
        found = pipeline.enlarge(np.asarray(image))
        assert pipeline.enlarge(np.asarray(image)[:40, :24]).shape == (40, 24, 3)
    assert psnr(found, in_torch(weights, image, 1), peak=255) >= 40


def test_programs_fold_pixels_in_five_dimensions() -> None:
    """The Neural Engine takes no more; torch's own way has six."""
    pytest.importorskip("coreai_torch", reason="coreai-core and coreai-torch need Python 3.11 to 3.14")
    from edge_sd.converters.coreai import convert
    from edge_sd.converters.coreai.wrappers import AppleComponent, Function

    net = torch.nn.PixelUnshuffle(2)
    folding = AppleComponent("F", (Function("main", net, {"x": torch.zeros(1, 3, 8, 8)}, ("out",)),))
    ranks = [shape.count("x") for shape in re.findall(r"tensor<((?:\d+x)+)", str(convert.convert(folding)))]
    assert ranks
    assert max(ranks) <= 5


@pytest.mark.parametrize("variant", ["torch", "torch-fp16"])
def test_torch_runs_it_as_it_is(shallow: Path, tmp_path: Path, variant: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(shallow, folder)
    made = tensors(3, old=True)
    save_file(made, tmp_path / "x4.safetensors")
    unpack(tmp_path / "x4.safetensors", folder / "upscaler")
    image = photo(40, 24)
    with Pipeline.open(folder, variant=variant) as pipeline:
        assert pipeline.upscales
        found = pipeline.enlarge(np.asarray(image))
    assert psnr(found, in_torch(tensors(3, old=False), image, 4), peak=255) >= 40


def test_a_model_without_one_names_the_way_to_it() -> None:
    with Pipeline.open("emoji") as pipeline:
        assert not pipeline.upscales
        with pytest.raises(InvalidRequest, match="emoji has no upscaler; convert a source with --upscaler FILE"):
            pipeline.enlarge(np.zeros((8, 8, 3), np.uint8))


def test_the_sizes_of_the_published_networks_are_read() -> None:
    """Real-ESRGAN's x4plus has 23 blocks and its anime model 6, all of 64 features that grow by 32."""
    with torch.device("meta"):
        for blocks in (23, 6):
            shapes = {"conv_first.weight": (64, 3, 3, 3)}
            shapes |= {f"body.{n}.rdb1.conv1.weight": (32, 64, 3, 3) for n in range(blocks)}
            with pytest.raises(InvalidModel, match=f"RRDBNet of {blocks} blocks"):
                sizes_of(shapes, "x4")
