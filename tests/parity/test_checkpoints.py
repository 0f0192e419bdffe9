"""Single-file checkpoints: miniatures in original names become the diffusers folder that they came from."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_sd import ModelBundle, Pipeline, Request
from edge_sd.converters.parity import psnr
from edge_sd.converters.sources.checkpoint import unpack, unpacked
from edge_sd.converters.sources.plain import opened
from edge_sd.converters.sources.single_file import Checkpoint
from edge_sd.converters.sources.vocabulary import FILE, installed_vocabulary
from edge_sd.errors import InvalidModel, InvalidRequest
from edge_sd.text.tokenizer import TextTokenizer

from ..original import original, save_family

FAMILIES = ("sd1", "sd2", "sdxl")
SMALL = {"modelspec.resolution": "64x64"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, emoji: Path) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("families")
    return {family: save_family(home / family, emoji, family) for family in FAMILIES}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, folders: dict[str, Path]) -> dict[str, Path]:
    # The names say nothing, or the wrong thing.
    home = tmp_path_factory.mktemp("checkpoints")
    names = {"sd1": "xl-inpainting", "sd2": "model", "sdxl": "v1-5"}
    return {
        family: save(home / f"{names[family]}.safetensors", original(folders[family], family)) for family in FAMILIES
    }


def save(path: Path, tensors: dict[str, Any], **metadata: str) -> Path:
    from safetensors.torch import save_file

    save_file(tensors, path, {"format": "pt", **SMALL, **metadata})
    return path


def read(path: Path) -> Checkpoint:
    with opened(path, path) as found:
        return Checkpoint.of(found)


def weights(folder: Path) -> dict[str, Any]:
    """All tensors; a text encoder's inner model has a name in some versions of transformers, and none in others."""
    from safetensors.torch import load_file

    found = {}
    for path in sorted(folder.glob("*/*.safetensors")):
        found |= {f"{path.parent.name} {name}": x for name, x in load_file(path).items()}
    return {name.replace(" text_model.", " "): x for name, x in found.items() if "position_ids" not in name}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_becomes_the_folder_that_it_came_from(
    folders: dict[str, Path], checkpoints: dict[str, Path], tmp_path: Path, emoji: Path, family: str
) -> None:
    import diffusers
    import torch
    import transformers

    wish = {"prediction": "v_prediction"} if family == "sd2" else {}
    made = unpack(checkpoints[family], tmp_path / "made", tokenizer=emoji, **wish)
    expected, found = weights(folders[family]), weights(made)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], x) for name, x in expected.items())
    # What no weight tells, heads and activations, shows in what the modules compute.
    context = {"sd1": 768, "sd2": 1024, "sdxl": 2048}[family]
    inputs: dict[str, Any] = {"encoder_hidden_states": torch.randn(1, 8, context)}
    if family == "sdxl":
        inputs["added_cond_kwargs"] = {"text_embeds": torch.randn(1, 1280), "time_ids": torch.ones(1, 6)}
    unets = [diffusers.UNet2DConditionModel.from_pretrained(each / "unet") for each in (folders[family], made)]
    sample = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        outputs = [unet(sample, 7, return_dict=False, **inputs)[0] for unet in unets]
        assert torch.equal(*outputs)
        vaes = [diffusers.AutoencoderKL.from_pretrained(each / "vae") for each in (folders[family], made)]
        assert torch.equal(*[vae.decode(sample, return_dict=False)[0] for vae in vaes])
        assert vaes[0].config.scaling_factor == vaes[1].config.scaling_factor
        for part in ("text_encoder", "text_encoder_2")[: 1 + (family == "sdxl")]:
            kind = transformers.CLIPTextModelWithProjection if part[-1] == "2" else transformers.CLIPTextModel
            states = [kind.from_pretrained(each / part)(torch.arange(10)[None]) for each in (folders[family], made)]
            assert torch.equal(states[0].last_hidden_state, states[1].last_hidden_state)
    kinds = [json.loads((each / "model_index.json").read_text())["_class_name"] for each in (folders[family], made)]
    assert kinds[0] == kinds[1]
    schedulers = [
        diffusers.EulerDiscreteScheduler.from_pretrained(each / "scheduler") for each in (folders[family], made)
    ]
    assert schedulers[0].config.prediction_type == schedulers[1].config.prediction_type
    assert torch.equal(schedulers[0].alphas_cumprod, schedulers[1].alphas_cumprod)


def test_marks_of_edm_models_become_their_schedulers_and_latents(
    folders: dict[str, Path], tmp_path: Path, emoji: Path
) -> None:
    import torch
    from diffusers import StableDiffusionXLPipeline

    tensors = original(folders["sdxl"], "sdxl")
    mean, std = torch.tensor([-1.5, 2.0, -1.25, 2.5]), torch.tensor([8.5, 6.0, 6.5, 5.25])
    marks = {"edm_mean": mean.reshape(1, 4, 1, 1), "edm_std": std.reshape(1, 4, 1, 1)}
    path = save(tmp_path / "a.safetensors", {**tensors, **marks})
    made = unpack(path, tmp_path / "a", tokenizer=emoji)
    facts = ModelBundle.open(made).facts
    assert (facts.latents.mean, facts.latents.std, facts.latents.scale) == (
        tuple(mean.tolist()),
        tuple(std.tolist()),
        0.5,
    )
    assert (facts.schedule.sigma_data, facts.schedule.sigma_max, facts.defaults.sampler) == (0.5, 80.0, "dpmpp_2m")
    pipe = StableDiffusionXLPipeline.from_pretrained(made)
    pipe.set_progress_bar_config(disable=True)
    pipe.watermark = None
    expected = pipe("a red apple", num_inference_steps=3, generator=torch.Generator().manual_seed(2)).images[0]
    with Pipeline.open(made) as pipeline:
        result = pipeline.generate(Request("a red apple", seed=2, steps=3))
    assert psnr(np.asarray(result.pictures[0].image), np.asarray(expected), peak=255) >= 40
    marks = {"edm_vpred.sigma_max": torch.tensor(120.0), "edm_vpred.sigma_min": torch.tensor(0.25)}
    path = save(tmp_path / "b.safetensors", {**tensors, **marks})
    schedule = ModelBundle.open(unpack(path, tmp_path / "b", tokenizer=emoji)).facts.schedule
    assert (schedule.sigma_data, schedule.sigma_min, schedule.sigma_max) == (1.0, 0.25, 120.0)
    assert (schedule.prediction_type, schedule.sigma_spacing) == ("v_prediction", "exponential")
    with pytest.raises(InvalidRequest, match="marked as an EDM model; leave --prediction epsilon out"):
        read(path).prediction("epsilon")


def test_a_text_encoder_without_its_outer_name_is_the_same(
    folders: dict[str, Path], tmp_path: Path, emoji: Path
) -> None:
    import torch

    tensors = {name.replace(".text_model.", "."): x for name, x in original(folders["sd1"], "sd1").items()}
    made = unpack(save(tmp_path / "a.safetensors", tensors), tmp_path / "a", tokenizer=emoji)
    expected, found = weights(folders["sd1"]), weights(made)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], x) for name, x in expected.items())


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_its_pictures_are_those_of_the_folder_in_diffusers(
    folders: dict[str, Path], checkpoints: dict[str, Path], tmp_path: Path, emoji: Path, family: str
) -> None:
    import torch
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folders[family])
    pipe.set_progress_bar_config(disable=True)
    expected = pipe("a red apple", num_inference_steps=4, generator=torch.Generator().manual_seed(2)).images[0]
    wish = {"prediction": "v_prediction"} if family == "sd2" else {}
    made = unpack(checkpoints[family], tmp_path / "made", tokenizer=emoji, **wish)
    with Pipeline.open(made) as pipeline:
        result = pipeline.generate(Request("a red apple", seed=2, steps=4, sampler="euler"))
    assert psnr(np.asarray(result.pictures[0].image), np.asarray(expected), peak=255) >= 40


def test_it_is_a_source_of_convert(
    folders: dict[str, Path], checkpoints: dict[str, Path], tmp_path: Path, emoji: Path
) -> None:
    bundle = tmp_path / "bundle"
    command = [sys.executable, "-m", "edge_sd", "convert", str(checkpoints["sd1"]), str(bundle), "--precision", "fp32",
               "--tokenizer", str(emoji / "tokenizer"), "--quiet"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    opened = ModelBundle.open(bundle)
    assert opened.name == "xl-inpainting"
    assert list(opened.variants) == ["openvino-fp32"]
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"], "nothing of the unpacked checkpoint is left"
    request = Request("a red apple", seed=2, steps=4, sampler="euler")
    with Pipeline.open(bundle) as ours, Pipeline.open(folders["sd1"]) as theirs:
        pictures = [np.asarray(each.generate(request).pictures[0].image) for each in (ours, theirs)]
    assert psnr(*pictures, peak=255) >= 40


def test_inpainting_is_told_by_the_channels(folders: dict[str, Path], tmp_path: Path, emoji: Path) -> None:
    import torch

    tensors = original(folders["sd1"], "sd1")
    first = "model.diffusion_model.input_blocks.0.0.weight"
    tensors[first] = torch.cat([tensors[first], torch.zeros(32, 5, 3, 3)], dim=1)
    made = unpack(save(tmp_path / "plain.safetensors", tensors), tmp_path / "made", tokenizer=emoji)
    assert json.loads((made / "model_index.json").read_text())["_class_name"] == "StableDiffusionInpaintPipeline"
    assert json.loads((made / "unet/config.json").read_text())["in_channels"] == 9


@pytest.mark.parametrize(
    ("marks", "metadata", "expected"),
    [
        ({"v_pred"}, {}, "v_prediction"),
        (set(), {"modelspec.prediction_type": "v"}, "v_prediction"),
        (set(), {"modelspec.prediction_type": "epsilon"}, "epsilon"),
    ],
)
def test_marks_say_what_is_predicted(marks: set[str], metadata: dict[str, str], expected: str) -> None:
    names = {"model.diffusion_model.x", "first_stage_model.x", "cond_stage_model.model.x"} | marks
    checkpoint = Checkpoint(Path("any.safetensors"), dict.fromkeys(names, ()), metadata)
    assert checkpoint.kind == "sd2"
    assert checkpoint.prediction(None) == expected
    assert checkpoint.prediction("epsilon") == "epsilon"


def test_sd2_without_a_mark_asks(checkpoints: dict[str, Path], tmp_path: Path, emoji: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"does not say what it predicts.*--prediction v_prediction"):
        unpack(checkpoints["sd2"], tmp_path / "made", tokenizer=emoji)
    assert not (tmp_path / "made").exists()


CONV = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(CONV), r"unet: lacks down_blocks.0.resnets.0.conv1.weight"),
        (lambda t: t.update({CONV: t[CONV][:, :3].clone()}), r"unet: has a wrong shape for down.*\[32, 3, 3, 3\]"),
        (lambda t: t.update({CONV.replace("in_layers.2", "zog"): t[CONV].clone()}), r"unet: has what .* not: .*zog"),
        (lambda t: t.update({"first_stage_model.zog": t[CONV].clone()}), r"vae: has what .* not: .*zog"),
        (
            lambda t: t.pop("cond_stage_model.transformer.text_model.final_layer_norm.weight"),
            r"text_encoder: lacks text_model.final_layer_norm.weight",
        ),
        (lambda t: [t.pop(k) for k in list(t) if k.startswith("first_stage")], r"no whole .* no autoencoder"),
        (lambda t: [t.pop(k) for k in list(t) if k.startswith("cond_")], r"no whole .* no text encoder"),
    ],
)  # fmt: skip
def test_what_is_missing_or_too_much_is_named(
    folders: dict[str, Path], tmp_path: Path, emoji: Path, change: Any, message: str
) -> None:
    tensors = original(folders["sd1"], "sd1")
    change(tensors)
    with pytest.raises(InvalidModel, match=message):
        unpack(save(tmp_path / "x.safetensors", tensors), tmp_path / "made", tokenizer=emoji)


class Bomb:
    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["model.ckpt", "model.safetensors"])
def test_a_pickle_is_never_opened(tmp_path: Path, name: str) -> None:
    bomb = Bomb()
    bomb.path = tmp_path / "opened"  # type: ignore[attr-defined]
    (tmp_path / name).write_bytes(pickle.dumps(bomb, protocol=2))
    with pytest.raises(InvalidModel, match="is a pickle, which can run code when opened; only safetensors are read"):
        read(tmp_path / name)
    assert not (tmp_path / "opened").exists()


def test_a_cut_file_is_called_damaged(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(checkpoints["sd1"].read_bytes()[:-7])
    with pytest.raises(InvalidModel, match="is damaged or no safetensors file"):
        read(path)


def test_a_tokenizer_of_another_size_is_refused(
    checkpoints: dict[str, Path], tmp_path: Path, emoji: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if installed_vocabulary() is not None:
        with pytest.raises(
            InvalidRequest, match=r"the tokenizer has 49408 tokens, the text encoder of .* [0-9]+: give"
        ):
            unpack(checkpoints["sd1"], tmp_path / "made")
    monkeypatch.setattr("edge_sd.converters.sources.checkpoint.installed_vocabulary", lambda: None)
    with pytest.raises(InvalidRequest, match=r"has no tokenizer inside.*--tokenizer FOLDER"):
        unpack(checkpoints["sd1"], tmp_path / "made")


def test_options_of_checkpoints_are_refused_for_folders(miniature: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="belong to single-file checkpoints"), unpacked(
        miniature, tmp_path / "bundle", prediction="epsilon"
    ):  # fmt: skip
        pass


def test_the_vocabulary_of_a_package_is_clips(tmp_path: Path) -> None:
    """OpenAI's README publishes no ids; these are those of every CLIP tokenizer for a photo of a cat."""
    found = installed_vocabulary()
    if found is None:
        pytest.skip(f"no installed package has {FILE}")
    (tmp_path / "vocab.json").write_text(json.dumps(found[0]), "utf-8")
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, found[1])]), "utf-8")
    ids = TextTokenizer(tmp_path, 77)("a photo of a cat").ids[0, :7]
    assert ids.tolist() == [49406, 320, 1125, 539, 320, 2368, 49407]
