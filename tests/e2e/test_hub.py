"""`edge-sd models pull` from a local server that speaks the hub's API."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edge_sd import ModelBundle
from edge_sd.bundle.library import find_model
from edge_sd.bundle.repository import Remote, Wish, select
from edge_sd.errors import InvalidModel, InvalidRequest

from ..hub import COMMIT, Hub, serving

NAME = "some-org/tiny.sd"
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def hub(miniature: Path, tmp_path: Path) -> Iterator[Hub]:
    folder = tmp_path / "repository"
    shutil.copytree(miniature, folder)
    shutil.rmtree(folder / "controlnet")
    shutil.copyfile(folder / UNET, folder / "unet/diffusion_pytorch_model.fp16.safetensors")
    # What nobody needs, or nobody should have.
    shutil.copyfile(folder / UNET, folder / "model-pruned.safetensors")
    (folder / "unet/diffusion_pytorch_model.bin").write_bytes(b"\x80\x02pickle")
    (folder / "README.md").write_text("a model")
    with serving(folder, NAME) as hub:
        yield hub


def pull(home: Path, hub: Hub | None, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    url = hub.url if hub else "http://127.0.0.1:9"
    env = {**os.environ, "EDGE_SD_MODELS": str(home), "HF_ENDPOINT": url, "HF_HOME": str(home / "hf"), **more}
    env = {name: value for name, value in env.items() if name != "HF_HUB_OFFLINE" or name in more}
    command = [sys.executable, "-m", "edge_sd", "models", "pull", *(words or (NAME,))]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)


def failed(done: subprocess.CompletedProcess[str], message: str) -> None:
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert message in done.stderr


def test_what_is_pulled_is_a_model_by_its_name(
    hub: Hub, tmp_path: Path, miniature: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "models"
    done = pull(home, hub)
    assert done.returncode == 0, done.stderr
    folder = home / "some-org--tiny.sd"
    assert done.stdout == f"{folder}\n"
    assert COMMIT in done.stderr
    record = json.loads((folder / "hub.json").read_text())
    assert (record["repo"], record["revision"]) == (NAME, COMMIT)
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == set(record["files"]) | {"hub.json"}
    assert hub.gets() == set(record["files"])
    assert UNET in found
    assert not any("pickle" in name or "fp16" in name or name.endswith((".bin", ".md")) for name in found)
    assert "model-pruned.safetensors" not in found
    assert (folder / UNET).read_bytes() == (miniature / UNET).read_bytes()
    monkeypatch.setenv("EDGE_SD_MODELS", str(home))
    bundle = ModelBundle.open(NAME)
    assert (bundle.root, bundle.name) == (folder, "tiny.sd")
    assert bundle.verify() == []
    assert all(record.sha256 for record in bundle.variant("torch").files.values())
    hub.asked.clear()
    assert pull(home, hub).returncode == 0
    assert hub.asked == [], "what is there is not pulled again"


def test_a_pull_that_was_cut_goes_on_where_it_was(hub: Hub, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    home, chunk = tmp_path / "models", 10 << 20  # What the library writes at a time.
    save_file({"weights": np.zeros(chunk, np.float16)}, hub.folder / UNET)
    hub.cut = chunk + 50_000
    failed(pull(home, hub), "some-org/tiny.sd: the hub answered 403; what was pulled is kept, pull again")
    assert not (home / "some-org--tiny.sd").exists()
    hub.cut = 0
    whole = hub.gets() - {UNET}
    hub.asked.clear()
    done = pull(home, hub)
    assert done.returncode == 0, done.stderr
    spans = [(path, span) for method, path, span in hub.asked if method == "GET" and span]
    assert spans == [(UNET, f"bytes={chunk}-")]
    assert whole
    assert not whole & hub.gets(), "whole files are not asked for again"
    assert (home / "some-org--tiny.sd" / UNET).read_bytes() == (hub.folder / UNET).read_bytes()


def test_a_busy_hub_is_asked_again(hub: Hub, tmp_path: Path) -> None:
    hub.busy = {"info": 2, UNET: 1}
    done = pull(tmp_path / "models", hub)
    assert done.returncode == 0, done.stderr
    assert hub.busy == {"info": 0, UNET: 0}


def test_after_half_the_whole_set_is_pulled(hub: Hub, tmp_path: Path) -> None:
    home = tmp_path / "models"
    half = "unet/diffusion_pytorch_model.fp16.safetensors"
    assert pull(home, hub, NAME, "--half").returncode == 0
    assert half in hub.gets()
    assert UNET not in hub.gets()
    hub.asked.clear()
    assert pull(home, hub).returncode == 0
    assert hub.gets() == {UNET}, "what both have in common is not pulled again"
    assert not (home / "some-org--tiny.sd" / half).exists()


@pytest.mark.fault(25, "an update of pull stopped at each rename")
@pytest.mark.parametrize("exchanged", [True, False])
def test_an_update_that_is_stopped_anywhere_leaves_a_model(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanged: bool
) -> None:
    """Each rename of an update fails in turn, as if the process had ended there.

    Where the system can't exchange two folders in one step, the older one is set aside first.
    """
    if not exchanged:
        monkeypatch.setattr("edge_sd.files._swapped", lambda one, other: False)
    from edge_sd.bundle import hub as pulling

    home = tmp_path / "models"
    assert pull(home, hub).returncode == 0
    monkeypatch.setenv("EDGE_SD_MODELS", str(home))
    files = [Remote(each["rfilename"], each["size"], (each.get("lfs") or {}).get("sha256", ""), each["blobId"])
             for each in hub.info()["siblings"]]  # fmt: skip
    real = os.replace
    stopped = 0
    for nth in range(1, 6):
        repository = pulling.Repository(NAME, f"{nth:040d}", tuple(files))
        calls = 0

        def replace(source: str, target: str, nth: int = nth) -> None:
            nonlocal calls
            calls += 1
            if calls == nth:
                raise KeyboardInterrupt
            real(source, target)

        monkeypatch.setattr(os, "replace", replace)
        try:
            pulling.take(repository, select(NAME, files))
        except KeyboardInterrupt:
            stopped += 1
        finally:
            monkeypatch.setattr(os, "replace", real)
        bundle = ModelBundle.open(NAME)
        assert bundle.verify() == []
    assert stopped >= (2 if exchanged else 3), "the record, perhaps the old folder, and the new one are renamed"
    assert pulling.take(repository, select(NAME, files)) == home / "some-org--tiny.sd"
    assert [path.name for path in home.iterdir() if path.name.startswith(".")] == []


@pytest.mark.fault(5, "other bytes than the hub says")
def test_other_bytes_than_the_hub_says_are_refused(hub: Hub, tmp_path: Path) -> None:
    hub.lie = UNET
    failed(pull(tmp_path / "models", hub), f"{UNET} is not what the hub says it is (its hash differs)")
    assert not (tmp_path / "models/some-org--tiny.sd").exists()
    hub.lie = ""
    assert pull(tmp_path / "models", hub).returncode == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nobody/nothing",), "the hub has no model 'nobody/nothing'"),
        ((NAME, "--revision", "v9"), f"{NAME} has no such revision on the hub"),
        (("tiny",), "'tiny' is no model of the hub; they are called ORG/NAME"),
    ],
)
def test_what_is_not_there_is_one_line(hub: Hub, tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    failed(pull(tmp_path / "models", hub, *words), message)
    assert hub.asked == []


def test_no_network_is_one_line(tmp_path: Path) -> None:
    failed(pull(tmp_path / "models", None), f"{NAME}: the hub can't be reached")
    failed(pull(tmp_path / "models", None, HF_HUB_OFFLINE="1"), "HF_HUB_OFFLINE is set")


def test_a_snapshot_of_other_programs_is_found(
    miniature: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "hub" / "models--some-org--tiny.sd"
    for path in [each for each in miniature.rglob("*") if each.is_file()]:
        # As Hugging Face's libraries do: files in blobs/, links to them in the snapshot.
        blob, link = cache / "blobs" / path.name, cache / "snapshots" / COMMIT / path.relative_to(miniature)
        blob = blob.with_name(f"{path.parent.name}-{path.name}")
        blob.parent.mkdir(parents=True, exist_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, blob)
        link.symlink_to(Path(os.path.relpath(blob, link.parent)))
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text(COMMIT)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("EDGE_SD_MODELS", str(tmp_path / "models"))
    assert find_model(NAME) == cache / "snapshots" / COMMIT
    bundle = ModelBundle.open(NAME)
    assert bundle.name == "tiny.sd"
    bundle.check("torch")


def remote(*names: str) -> list[Remote]:
    return [Remote(name, 1) for name in names]


def test_what_of_a_repository_is_pulled() -> None:
    def taken(*names: str, **wishes: bool) -> set[str]:
        return {each.name for each in select(NAME, remote("model_index.json", *names), Wish(**wishes)).files}

    def alone(*names: str) -> list[str]:
        return [each.name for each in select(NAME, remote(*names)).files]

    both = ("unet/x.safetensors", "unet/x.fp16.safetensors", "unet/config.json", "vae_1_0/x.safetensors")
    assert taken(*both) == {"model_index.json", "unet/x.safetensors", "unet/config.json"}
    assert taken(*both, half=True) == {"model_index.json", "unet/x.fp16.safetensors", "unet/config.json"}
    assert taken("unet/x.fp16.safetensors") == {"model_index.json", "unet/x.fp16.safetensors"}
    shards = ("unet/x-1-of-2.safetensors", "unet/x-2-of-2.safetensors", "unet/x.safetensors.index.json")
    assert taken(*shards, "unet/x.bin.index.json") == {"model_index.json", *shards}
    with pytest.raises(InvalidModel, match=r"no safetensors in unet: it has unet/diffusion_pytorch_model.bin, a pick"):
        taken("unet/diffusion_pytorch_model.bin", "unet/config.json")
    assert alone("a.safetensors", "README.md") == ["a.safetensors"]
    part = {"config.json", "diffusion_pytorch_model.safetensors"}
    beside = ("sdxl_vae.safetensors", "diffusion_pytorch_model.bin", "README.md", "samples/a.json")
    assert set(alone(*part, *beside)) == part
    clip = {"config.json", "model.safetensors", "vocab.json", "merges.txt"}
    assert set(alone(*clip, "pytorch_model.bin", "tf_model.h5")) == clip
    with pytest.raises(InvalidRequest, match=r"several checkpoints; give --file with one of: a.safetensors, b"):
        alone("a.safetensors", "b.safetensors")
    with pytest.raises(InvalidModel, match=r"no safetensors: it has only a.ckpt, a pickle"):
        alone("a.ckpt")
    with pytest.raises(InvalidModel, match=r"only model_compiled.zip, an archive: unpack it yourself"):
        alone("README.md", "model_compiled.zip")


GRAPHS = [f"{part}/{name}" for part in ("text_encoder", "unet", "vae_decoder", "vae_encoder")
          for name in ("openvino_model.xml", "openvino_model.bin", "config.json")]  # fmt: skip
EXPORT = ["model_index.json", *GRAPHS, "scheduler/scheduler_config.json", "tokenizer/vocab.json",
          "tokenizer/merges.txt", "tokenizer/tokenizer_config.json"]  # fmt: skip


def test_an_export_of_optimum_intel_is_pulled_with_its_weights() -> None:
    beside = ["README.md", "openvino_config.json", "tokenizer/openvino_tokenizer.bin", "sample.png"]
    found = select(NAME, remote(*EXPORT, *beside))
    assert (found.form, {each.name for each in found.files}) == ("openvino", set(EXPORT))
    # In a folder of a repository, beside the weights of torch.
    weights = ["unet/diffusion_pytorch_model.safetensors", "unet/config.json"]
    mixed = remote("model_index.json", *weights, *(f"openvino/{name}" for name in EXPORT))
    assert select(NAME, mixed).form == "torch"
    found = select(NAME, mixed, Wish(forms=("openvino", "torch")))
    assert {each.at for each in found.files} == set(EXPORT)
    with pytest.raises(InvalidModel, match=r"no unet/openvino_model\.bin"):
        select(NAME, remote(*(name for name in EXPORT if name != "unet/openvino_model.bin")))


def test_of_core_ml_repositories_one_layout_is_pulled_under_apples_names() -> None:
    prefix = "Stable_Diffusion_version_org_model_"
    files = ["README.md"]
    for layout in ("original", "split_einsum"):
        for title in ("TextEncoder", "Unet", "UnetChunk1", "UnetChunk2", "VAEDecoder", "SafetyChecker"):
            files += [f"{layout}/compiled/{title}.mlmodelc/{rest}" for rest in ("model.mil", "weights/weight.bin")]
        files += [f"{layout}/compiled/{name}" for name in ("vocab.json", "merges.txt")]
        for part in ("text_encoder", "unet", "vae_decoder", "vae_encoder"):
            files += [f"{layout}/packages/{prefix}{part}.mlpackage/{rest}"
                      for rest in ("Manifest.json", "Data/com.apple.CoreML/weights/weight.bin")]  # fmt: skip
    packages = select(NAME, remote(*files))
    assert packages.form == "coreml"
    assert {each.at.split("/")[0] for each in packages.files} == {
        "TextEncoder.mlpackage", "Unet.mlpackage", "VAEDecoder.mlpackage", "VAEEncoder.mlpackage", "vocab.json",
        "merges.txt",
    }  # fmt: skip
    assert all(each.name.startswith("split_einsum/") for each in packages.files)
    compiled = select(NAME, remote(*files), Wish(compiled=True, layouts=("original",)))
    assert {each.at.split("/")[0] for each in compiled.files} == {
        "TextEncoder.mlmodelc", "Unet.mlmodelc", "VAEDecoder.mlmodelc", "SafetyChecker.mlmodelc", "vocab.json",
        "merges.txt",
    }  # fmt: skip
    assert all(each.name.startswith("original/compiled/") for each in compiled.files)
