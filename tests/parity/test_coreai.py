"""Core AI models as Apple's Swift package loads them, and as Apple's runtime computes them.

The contract is a table: what each line of the sources reads, and what it must find. Sources: apple/coreai-models at
86b363d, the Swift package CoreAIDiffusionPipeline and the exporter coreai_models.diffusion.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("coreai_torch", reason="coreai-core and coreai-torch need Python 3.11 to 3.14")

import torch
from PIL import Image
from typer.testing import CliRunner

from edge_sd.apps.cli import app
from edge_sd.backends.base import Device, LoadRequest
from edge_sd.backends.coreai import CoreAIBackend
from edge_sd.backends.coreai.runtime import Asset, InputPort, Loop
from edge_sd.bundle.bundle import ModelBundle
from edge_sd.components.edits import Edits
from edge_sd.converters.coreai import bundle as apples
from edge_sd.converters.targets import form_named
from edge_sd.errors import InvalidModel, InvalidRequest
from edge_sd.images import metrics
from edge_sd.text.tokenizer import TextTokenizer

from ..conftest import save_miniature

VARIANT = "coreai-gpu-fp16"
REFERENCE = Device("coreai-reference", "coreai", "")


@pytest.fixture(scope="module")
def source(emoji: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A miniature that Apple's pipeline could draw: 77 tokens, 8 pixels for a latent, squares of 64 pixels."""
    home = tmp_path_factory.mktemp("coreai")
    shutil.copytree(emoji / "tokenizer", home / "tokenizer")
    config = home / "tokenizer/tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_max_length": 77}))
    folder = save_miniature(home / "miniature", home, shallow=True, factor=8)
    shutil.rmtree(folder / "controlnet")
    return folder


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    target = tmp_path_factory.mktemp("made") / "miniature"
    done = CliRunner().invoke(app, ["convert", str(source), str(target), "--to", "coreai", "--quiet"])
    assert done.exit_code == 0, done.output
    return ModelBundle.open(target)


@dataclass(frozen=True)
class Loaded:
    """What Apple's loader would have in its hands."""

    folder: Path
    metadata: dict[str, Any]
    functions: dict[str, list[str]]
    inputs: dict[str, dict[str, InputPort]]
    outputs: dict[str, dict[str, InputPort]]

    @property
    def diffusion(self) -> dict[str, Any]:
        block: dict[str, Any] = self.metadata["diffusion"]
        return block

    def asset(self, part: str) -> str:
        """The file of a part."""
        name: str = self.metadata["assets"][part]
        return name

    def types(self, *assets: str) -> set[str]:
        """The types of inputs of these assets."""
        return {port.dtype for name in assets for port in self.inputs[name].values()}


def read(folder: Path) -> Loaded:
    """What is in a variant's folder."""
    loop = Loop()
    assets = {path.stem: Asset(path, loop) for path in folder.glob("*.aimodel")}
    found = Loaded(
        folder,
        json.loads((folder / "metadata.json").read_text()),
        {name: [*each.functions] for name, each in assets.items()},
        {name: each.functions["main"] for name, each in assets.items()},
        {name: each.outputs("main") for name, each in assets.items()},
    )
    for each in assets.values():
        each.close()
    return found


@pytest.fixture(scope="module")
def loaded(made: ModelBundle) -> Loaded:
    return read(made.root / VARIANT)


def _merges(x: Loaded) -> bool:
    lines = (x.folder / "tokenizer/merges.txt").read_text().splitlines()
    return all(len(line.split(" ")) == 2 for line in lines if line and not line.startswith("#"))


def _vocabulary(x: Loaded) -> bool:
    vocabulary = json.loads((x.folder / "tokenizer/vocab.json").read_text())
    return all(type(key) is str and type(value) is int for key, value in vocabulary.items())


FLOATS = {"float16", "float32"}
BUNDLE = "CoreAIShared/Bundle/ModelBundle.swift"
DESCRIPTOR = "CoreAIDiffusionPipeline/Pipelines/PipelineDescriptor.swift"
LOADER = "CoreAIDiffusionPipeline/Pipelines/PipelineDescriptor+CoreAI.swift"
PIPELINE = "CoreAIDiffusionPipeline/Pipelines/StableDiffusionPipeline.swift"
FUNCTION = "CoreAIDiffusionPipeline/Components/CoreAIDiffusionModelFunction.swift"
ENCODER = "CoreAIDiffusionPipeline/Components/CoreAITextEncoder.swift"
DENOISER = "CoreAIDiffusionPipeline/Components/CoreAIDenoiser.swift"
CODEC = "CoreAIDiffusionPipeline/Components/CoreAILatentCodec.swift"
READING = "CoreAIDiffusionPipeline/Tokenizers/BPETokenizer+Reading.swift"
EXPORTER = "coreai_models/diffusion/components.py"
TESTS = "DiffusionPipelineTests/PipelineDescriptorTests.swift"

CONTRACT: list[tuple[str, str, Callable[[Loaded], bool]]] = [
    (f"{BUNDLE}:179", "metadata_version", lambda x: x.metadata["metadata_version"] == "0.2"),
    (f"{BUNDLE}:210, BundleKind.swift:14", "kind", lambda x: x.metadata["kind"] == "diffusion"),
    (f"{BUNDLE}:211", "name", lambda x: type(x.metadata["name"]) is str),
    (f"{BUNDLE}:212", "user_data", lambda x: {*map(type, x.metadata["user_data"].values())} == {str}),
    (f"{BUNDLE}:213, {DESCRIPTOR}:146", "assets", lambda x: {*map(type, x.metadata["assets"].values())} == {str}),
    (f"{BUNDLE}:82", "all assets exist", lambda x: all((x.folder / n).is_dir() for n in x.metadata["assets"].values())),
    (f"{DESCRIPTOR}:118", "metadata.json, not pipeline.json", lambda x: not (x.folder / "pipeline.json").exists()),
    (f"{DESCRIPTOR}:75, 217", "type", lambda x: x.diffusion["type"] == "stable-diffusion"),
    (f"{DESCRIPTOR}:77, PNDMScheduler.swift:16", "prediction_type",
     lambda x: x.diffusion["prediction_type"] == "epsilon"),
    (f"{DESCRIPTOR}:78", "image_size", lambda x: x.diffusion["image_size"] == 64),
    (f"{DESCRIPTOR}:255", "training_steps", lambda x: x.diffusion["scheduler"]["training_steps"] == 1000),
    (f"{DESCRIPTOR}:256", "beta_start", lambda x: x.diffusion["scheduler"]["beta_start"] == 0.00085),
    (f"{DESCRIPTOR}:257", "beta_end", lambda x: x.diffusion["scheduler"]["beta_end"] == 0.012),
    (f"{DESCRIPTOR}:258", "beta_schedule", lambda x: x.diffusion["scheduler"]["beta_schedule"] == "scaled_linear"),
    (f"{DESCRIPTOR}:81", "encoder_scale_factor", lambda x: x.diffusion["encoder_scale_factor"] == 0.7),
    (f"{DESCRIPTOR}:82", "decoder_scale_factor", lambda x: x.diffusion["decoder_scale_factor"] == 0.7),
    (f"{DESCRIPTOR}:83", "decoder_shift_factor", lambda x: x.diffusion["decoder_shift_factor"] == 0.0),
    (f"{DESCRIPTOR}:87", "default_guidance_scale", lambda x: type(x.diffusion["default_guidance_scale"]) is float),
    (f"{DESCRIPTOR}:88", "default_steps", lambda x: type(x.diffusion["default_steps"]) is int),
    (f"{DESCRIPTOR}:156", "assets.text_encoder", lambda x: x.asset("text_encoder") == "TextEncoder.aimodel"),
    (f"{DESCRIPTOR}:157", "no assets.text_encoder_2", lambda x: "text_encoder_2" not in x.metadata["assets"]),
    (f"{DESCRIPTOR}:158", "assets.unet", lambda x: x.asset("unet") == "Unet.aimodel"),
    (f"{DESCRIPTOR}:159", "assets.vae_decoder", lambda x: x.asset("vae_decoder") == "VAEDecoder.aimodel"),
    (f"{DESCRIPTOR}:160", "assets.vae_encoder", lambda x: x.asset("vae_encoder") == "VAEEncoder.aimodel"),
    (f"{TESTS}:117", "names that a scan of the folder knows",
     lambda x: {"TextEncoder", "Unet", "VAEDecoder"} <= {*x.inputs}),
    (f"{LOADER}:72", "Unet sample", lambda x: x.inputs["Unet"]["sample"].shape == (2, 4, 8, 8)),
    (f"{LOADER}:76", "its side is image_size / 8",
     lambda x: x.inputs["Unet"]["sample"].shape[2] * 8 == x.diffusion["image_size"]),
    (f"{LOADER}:99", "no vocab.json at the top", lambda x: not (x.folder / "vocab.json").exists()),
    (f"{LOADER}:104", "tokenizer/merges.txt", lambda x: (x.folder / "tokenizer/merges.txt").is_file()),
    (f"{READING}:14", "tokenizer/vocab.json: word -> number", _vocabulary),
    (f"{READING}:45", "merges of two words", _merges),
    (f"{LOADER}:117, {FUNCTION}:215", "77 tokens", lambda x: x.inputs["TextEncoder"]["input_ids"].shape == (1, 77)),
    (f"{FUNCTION}:29", "a function main in all", lambda x: all("main" in names for names in x.functions.values())),
    (f"{FUNCTION}:55", "inputs of float16 or float32", lambda x: x.types("Unet", "VAEDecoder", "VAEEncoder") <= FLOATS),
    (f"{FUNCTION}:161", "outputs of float16 or float32",
     lambda x: {port.dtype for each in x.outputs.values() for port in each.values()} <= FLOATS),
    (f"{FUNCTION}:123", "one output",
     lambda x: all(len(x.outputs[name]) == 1 for name in ("Unet", "VAEDecoder", "VAEEncoder"))),
    (f"{ENCODER}:43", "TextEncoder: one input", lambda x: len(x.inputs["TextEncoder"]) == 1),
    (f"{ENCODER}:48", "TextEncoder: int32", lambda x: x.types("TextEncoder") == {"int32"}),
    (f"{ENCODER}:61", "TextEncoder: states of rank 3 once",
     lambda x: sorted(len(port.shape) for port in x.outputs["TextEncoder"].values()) == [3]),
    (f"{DENOISER}:39", "Unet: names", lambda x: {*x.inputs["Unet"]} == {"sample", "timestep", "encoder_hidden_states"}),
    (f"{DENOISER}:33", "Unet: timestep of float32, one for a row",
     lambda x: x.inputs["Unet"]["timestep"] == InputPort("float32", (2,))),
    (f"{DENOISER}:59", "Unet: noise of the sample's shape",
     lambda x: x.outputs["Unet"]["noise_pred"].shape == x.inputs["Unet"]["sample"].shape),
    (f"{PIPELINE}:109", "VAEDecoder: four channels", lambda x: x.inputs["VAEDecoder"]["z"].shape == (1, 4, 8, 8)),
    (f"{PIPELINE}:115", "Unet: text of 77 tokens, two rows",
     lambda x: x.inputs["Unet"]["encoder_hidden_states"].shape == (2, 77, 32)),
    (f"{PIPELINE}:189", "Unet: order of inputs",
     lambda x: [*x.inputs["Unet"]] == ["sample", "timestep", "encoder_hidden_states"]),
    (f"{CODEC}:45", "VAEDecoder: pixels", lambda x: x.outputs["VAEDecoder"]["image"].shape == (1, 3, 64, 64)),
    (f"{CODEC}:105", "VAEEncoder: pixels", lambda x: x.inputs["VAEEncoder"]["image"].shape == (1, 3, 64, 64)),
    (f"{EXPORTER}:285", "VAEEncoder: mean and variance",
     lambda x: x.outputs["VAEEncoder"]["latent_params"].shape == (1, 8, 8, 8)),
    (f"{EXPORTER}:262", "TextEncoder: last_hidden_state",
     lambda x: x.outputs["TextEncoder"]["last_hidden_state"].shape == (1, 77, 32)),
]  # fmt: skip


@pytest.mark.parametrize(("where", "what", "check"), CONTRACT, ids=[f"{where} {what}" for where, what, _ in CONTRACT])
def test_apples_loader_finds_what_it_reads(
    loaded: Loaded, where: str, what: str, check: Callable[[Loaded], bool]
) -> None:
    assert check(loaded), f"{what} ({where})"


@pytest.mark.parametrize(
    ("schedule", "why"),
    [
        ({"beta_schedule": "linear"}, "betas are linear"),
        ({"rescale_betas_zero_snr": True}, "zero terminal SNR"),
    ],
)
def test_what_apples_pipeline_would_draw_wrong_it_is_kept_from_loading(
    made: ModelBundle, schedule: dict[str, Any], why: str
) -> None:
    """PipelineDescriptor.swift:143 refuses a file without the block; StableDiffusionPipeline.swift:210 is why."""
    facts = replace(made.facts, schedule=replace(made.facts.schedule, **schedule))
    found = apples.metadata(facts, {"Unet"}, (64, 64), 2, "x")
    assert "diffusion" not in found
    assert why in found["user_data"]["no_diffusion_block"]


def test_what_apples_pipeline_refuses_is_named(made: ModelBundle) -> None:
    facts = replace(made.facts, max_tokens=32, family="sdxl")
    found = apples.metadata(facts, {"Unet", "TextEncoder2"}, (96, 64), 1, "x")
    assert found["assets"] == {"text_encoder_2": "TextEncoder2.aimodel", "unet": "Unet.aimodel"}
    assert found["diffusion"]["type"] == "stable-diffusion-xl"
    for limit in ("32 tokens", "a UNet of 1 row", "96x64", "SDXL"):
        assert limit in found["user_data"]["limits"]
    assert "limits" not in apples.metadata(made.facts, {"Unet"}, (64, 64), 2, "x")["user_data"]


def test_components_in_float16_keep_55_db(made: ModelBundle) -> None:
    """By Apple's runtime, as the conversion measured them."""
    found = {part: each.parity.psnr for part, each in made.variant(VARIANT).artifacts.items() if each.parity}
    assert set(found) == {"text_encoder", "unet", "vae_decoder", "vae_encoder"}
    assert min(found.values()) >= 55, found


def test_a_picture_is_torchs(made: ModelBundle, source: Path, tmp_path: Path) -> None:
    """Four guided steps from the command line, beside torch float32 on the same weights."""
    pictures = {}
    for model, variant, device in ((made.root, VARIANT, "coreai-reference"), (source, "torch", "torch-cpu")):
        words = ("generate", "a red apple", "--model", str(model), "--variant", variant, "--device", device)
        more = ("--steps", "4", "--seed", "3", "--size", "64", "--output", str(tmp_path / f"{device}.png"))
        done = CliRunner().invoke(app, [*words, *more])
        assert done.exit_code == 0, done.output
        pictures[device] = np.asarray(Image.open(tmp_path / f"{device}.png"), np.float64)
    assert pictures["torch-cpu"].std() > 1
    assert metrics.psnr(*pictures.values(), 255) >= 40


def test_a_text_encoder_gives_the_states_of_every_layer(made: ModelBundle, source: Path) -> None:
    """CLIP skip, by the library's hidden states and its final norm; the batch is one, called with two rows."""
    from transformers import CLIPTextModel

    variant, backend = made.variant(VARIANT), CoreAIBackend()

    def request(**edits: Any) -> LoadRequest:
        return LoadRequest(made, variant, "text_encoder", REFERENCE, {"input_ids": (2, 77)}, Edits(**edits))

    tokenizer = TextTokenizer(source / "tokenizer", 77)
    ids = np.concatenate([tokenizer(text).ids for text in ("", "a red apple")])
    model = CLIPTextModel.from_pretrained(source / "text_encoder", torch_dtype=torch.float32).eval()
    with torch.no_grad():
        out = model(torch.from_numpy(np.asarray(ids, np.int64)), output_hidden_states=True)
        norm = next(each for name, each in model.named_modules() if name.endswith("final_layer_norm"))
        wanted = {1: out.last_hidden_state.numpy(), 2: norm(out.hidden_states[-2]).numpy()}
    for skip, states in wanted.items():
        loaded = backend.load(request(clip_skip=skip))
        found = loaded(input_ids=ids)["last_hidden_state"]
        loaded.close()
        assert found.shape == states.shape
        assert np.abs(found - states).max() < 0.02, skip
    with pytest.raises(InvalidRequest, match=r"no states clip_skip\.9; it has: clip_skip\.2"):
        backend.load(request(clip_skip=9))


def test_what_a_program_has_no_place_for_is_refused_by_name(made: ModelBundle) -> None:
    variant, backend = made.variant(VARIANT), CoreAIBackend()
    with pytest.raises(InvalidRequest, match="takes no embeddings"):
        backend.load(
            LoadRequest(made, variant, "vae_decoder", REFERENCE, {}, Edits(vectors=np.zeros((1, 32), np.float32)))
        )
    with pytest.raises(InvalidRequest, match="draws 64x64 only, not 128x64"):
        backend.load(LoadRequest(made, variant, "vae_decoder", REFERENCE, {"latent_sample": (1, 4, 8, 16)}))


def test_a_damaged_asset_is_refused_before_the_runtime_which_would_abort(made: ModelBundle, tmp_path: Path) -> None:
    copy = tmp_path / "VAEDecoder.aimodel"
    shutil.copytree(made.root / VARIANT / copy.name, copy)
    program = copy / "main.mlirb"
    program.write_bytes(program.read_bytes()[:-1000])
    with pytest.raises(InvalidModel, match=r"VAEDecoder.aimodel is damaged \(main.mlirb differs from main.hash\)"):
        Asset(copy, Loop())
    (copy / "main.hash").unlink()
    with pytest.raises(InvalidModel, match="no Core AI asset"):
        Asset(copy, Loop())


def test_what_the_form_can_not_be_is_refused() -> None:
    for wish, why in (({"target": "iOS18"}, "takes no target"), ({"chunks": True}, "takes no chunks"),
                      ({"compute": "npu"}, "valid: ane, gpu"), ({"batch": 3}, "batch 3")):  # fmt: skip
        with pytest.raises(InvalidRequest, match=why):
            form_named("coreai", **wish)


def test_devices_are_the_macs_where_its_system_has_core_ai(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the system's name and version; nothing runs."""
    import platform
    import sys

    assert [each.name for each in CoreAIBackend().devices()] == ["coreai-reference"]
    monkeypatch.setattr(sys, "platform", "darwin")
    for version, names in (("26.1", ["coreai-reference"]), ("27.0", ["ane", "gpu", "cpu"])):
        monkeypatch.setattr(platform, "mac_ver", lambda version=version: (version, ("", "", ""), "arm64"))
        assert [each.name for each in CoreAIBackend().devices()] == names
    monkeypatch.setenv("USE_LOCAL_COREAI", "1")
    assert [each.name for each in CoreAIBackend().devices()] == ["coreai-reference"]
