"""Apple's `Resources/`, as Swift programs load them, opened as a model."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_sd import ModelBundle, Pipeline, Request
from edge_sd.bundle.mlpackage.package import Package
from edge_sd.converters.parity import psnr
from edge_sd.errors import DeviceError, InvalidModel, InvalidRequest

REQUEST = Request("a red apple", seed=7, steps=2, sampler="euler", guidance=5.0)


@pytest.fixture
def resources(coreml_bundle: ModelBundle, tmp_path: Path) -> Path:
    """What a conversion wrote, without our manifest."""
    folder = tmp_path / "model/Resources"
    shutil.copytree(coreml_bundle.root / "coreml-ane-fp16", folder)
    return folder


def compiled(folder: Path, name: str) -> None:
    """As `xcrun coremlcompiler compile` leaves a package, as far as its metadata go."""
    package = folder / f"{name}.mlpackage"
    function = Package.open(package).functions["main"]
    inputs = [
        {"name": name, "type": "MultiArray", "dataType": kind.dtype.capitalize(), "shape": str(list(kind.shape))}
        for name, kind in function.inputs.items()
    ]
    operations = {f"Ios16.{each.kind}": 1 for each in function.operations}
    model = {"inputSchema": inputs, "outputSchema": [{"name": name} for name in function.outputs],
             "mlProgramOperationTypeHistogram": operations}  # fmt: skip
    shutil.rmtree(package)
    (folder / f"{name}.mlmodelc").mkdir()
    (folder / f"{name}.mlmodelc/metadata.json").write_text(json.dumps([model]))


def test_they_draw_what_the_bundle_that_they_come_from_draws(coreml_bundle: ModelBundle, resources: Path) -> None:
    opened = ModelBundle.open(resources.parent)
    assert (opened.facts.family, opened.facts.text_width, opened.facts.max_tokens) == ("sd1", 32, 32)
    assert (opened.defaults.width, opened.defaults.height, opened.facts.latents.factor) == (16, 16, 2)
    assert set(opened.variant("coreml-ane").artifacts) == set(coreml_bundle.variant("coreml-ane-fp16").artifacts)
    latents = []
    for model in (coreml_bundle.root, resources):
        with Pipeline.open(model, "coreml-reference") as pipeline:
            latents.append([step.latents for step in pipeline.steps(REQUEST)][-1])
    assert np.array_equal(*latents)


def test_a_tiny_decoder_beside_the_others_decodes_as_torch_does(resources: Path, shallow: Path, tmp_path: Path) -> None:
    """In a variant of 4 bits, where it stays in 16."""
    import torch
    from diffusers import AutoencoderTiny

    from edge_sd.converters.build import _make_part
    from edge_sd.converters.recipes import RECIPES
    from edge_sd.converters.sources.parts import composed
    from edge_sd.converters.sources.source import Source
    from edge_sd.converters.targets import form_named

    torch.manual_seed(1)
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )  # fmt: skip
    tiny.save_pretrained(tmp_path / "taesd")
    with composed(shallow, tmp_path / "x", {"vae_tiny": tmp_path / "taesd"}) as whole:
        source, form = Source.open(whole), form_named("coreml")
        assert "tiny_decoder" in source.parts
        z = np.random.default_rng(0).normal(size=(1, 4, 8, 8)).astype(np.float32)
        row, _ = _make_part(
            source, form, RECIPES["p4"], "tiny_decoder", resources, {}, {"unet": [{"latents": z}]}, lambda *_: None
        )
    assert row["parity"]["psnr"] >= 45
    with Pipeline.open(resources, "coreml-reference") as pipeline:
        *_, last = pipeline.steps(REQUEST)
        found = pipeline.decode(last.latents, "tiny")
    with torch.no_grad():
        expected = tiny.decode(torch.from_numpy(last.latents)).sample[0].permute(1, 2, 0).numpy()
    assert psnr(found, (expected.clip(-1, 1) + 1) * 127.5, peak=255) >= 40


def test_compiled_models_are_for_macs_and_say_so(resources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("Unet", "TextEncoder", "VAEDecoder", "VAEEncoder"):
        compiled(resources, name)
    bundle = ModelBundle.open(resources)
    assert bundle.variant("coreml-ane").artifacts["unet"].graph == "Unet.mlmodelc"
    with (
        Pipeline.open(resources, "coreml-reference") as pipeline,
        pytest.raises(
            DeviceError, match=r"mlmodelc is compiled for Core ML, which is on macOS alone; coreml-reference"
        ),
    ):
        pipeline.generate(REQUEST)
    from ..unit.test_coreml_backend import stand_in

    made: list[str] = []
    module: Any = stand_in(made)
    loaded: list[tuple[str, str]] = []
    module.models.CompiledMLModel = lambda path, units: loaded.append((Path(path).name, units))
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setitem(sys.modules, "coremltools", module)
    from edge_sd.backends import Device, LoadRequest
    from edge_sd.backends.coreml.backend import CoreMLBackend
    from edge_sd.components.edits import Edits

    variant = bundle.variant("coreml-ane")
    unet = {"sample": (2, 4, 8, 8), "timestep": (1,), "encoder_hidden_states": (2, 32, 32)}
    place = Device("ane", "coreml", "")
    component = CoreMLBackend().load(LoadRequest(bundle, variant, "unet", place, unet))
    assert component.program.inputs["sample"].shape == (2, 4, 8, 8)
    assert (loaded, made) == ([("Unet.mlmodelc", "NE")], [])
    words = Edits(key="x", vectors=np.ones((1, 32), np.float32))
    with pytest.raises(InvalidRequest, match=r"TextEncoder\.mlmodelc is compiled: LoRAs, embeddings and CLIP"):
        CoreMLBackend().load(LoadRequest(bundle, variant, "text_encoder", place, {"input_ids": (2, 32)}, words))


def test_what_is_missing_or_of_another_layout_is_one_line(resources: Path) -> None:
    (resources / "merges.txt").rename(resources / "kept")
    with pytest.raises(InvalidModel, match=r"has no merges\.txt, which Apple's layout has"):
        ModelBundle.open(resources)
    (resources / "kept").rename(resources / "merges.txt")
    shutil.move(resources / "VAEDecoder.mlpackage", resources / "kept")
    with pytest.raises(InvalidModel, match=r"has no VAEDecoder\.mlpackage or VAEDecoder\.mlmodelc"):
        ModelBundle.open(resources)
    shutil.copytree(resources / "TextEncoder.mlpackage", resources / "VAEDecoder.mlpackage")
    with pytest.raises(InvalidModel, match="has no input z; it is not in Apple's layout"):
        ModelBundle.open(resources)
