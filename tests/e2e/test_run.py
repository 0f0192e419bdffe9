"""`edge-sd run ORG/NAME "a prompt"` against a local hub, with a miniature in each layout that repositories have."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edge_sd import ModelBundle
from edge_sd.apps.run import wish_of
from edge_sd.bundle.catalogue import CATALOGUE
from edge_sd.bundle.repository import FORMS
from edge_sd.errors import InvalidModel
from edge_sd.pipeline.recorded import read_recorded
from edge_sd.sampling.samplers import SAMPLERS

from ..conftest import convert
from ..hub import Hub, serving

NAME = "some-org/tiny.sd"
# A row of the catalogue whose defaults are four steps and a guidance of 8.
LISTED = "SimianLuo/LCM_Dreamshaper_v7"
LIGHT = (
    "import importlib.util as u\nreal = u.find_spec\n"
    "u.find_spec = lambda name, *a: None if name in ('torch', 'nncf') else real(name, *a)\n"
)


def run(home: Path, hub: Hub, *words: str, name: str | None = None, **more: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "EDGE_SD_MODELS": str(home), "HF_ENDPOINT": hub.url, "HF_HOME": str(home / "hf"), **more}
    env.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-m", "edge_sd", "run", name or hub.name, *words]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=home, stdin=subprocess.DEVNULL)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.fixture(scope="session")
def export(shallow: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shallow miniature as optimum-intel would have exported it."""
    target = tmp_path_factory.mktemp("export") / "bundle"
    convert(shallow, target, "fp16")
    return target / "openvino-fp16"


def test_weights_are_pulled_in_halves_converted_once_and_then_just_drawn(shallow: Path, home: Path) -> None:
    repository = home / "repository"
    shutil.copytree(shallow, repository, ignore=shutil.ignore_patterns("controlnet"))
    unet = repository / "unet/diffusion_pytorch_model.safetensors"
    shutil.copyfile(unet, unet.with_suffix(".fp16.safetensors"))
    with serving(repository, LISTED) as hub:
        refused = run(home, hub, "a cat")
        assert refused.returncode == 2
        assert "GB (torch, then converted), licence unknown: nobody is here to ask; say --yes" in refused.stderr
        done = run(home, hub, "a cat", "--yes", "--seed", "3", "-o", "a.png")
        assert (done.returncode, done.stdout) == (0, "a.png\n"), done.stderr
        assert "unet/diffusion_pytorch_model.fp16.safetensors" in hub.gets()
        assert "unet/diffusion_pytorch_model.safetensors" not in hub.gets()
        hub.asked.clear()
        again = run(home, hub, "a cat", "--seed", "3", "-o", "b.png")
        assert (again.returncode, again.stdout) == (0, "b.png\n"), again.stderr
        assert hub.asked == []
        assert "converting" in done.stderr
        assert "converting" not in again.stderr
    assert (home / "a.png").read_bytes() == (home / "b.png").read_bytes()
    recorded = read_recorded(home / "a.png")
    assert (recorded.settings["steps"], recorded.settings["guidance"]) == (4, 8.0), "the catalogue's"
    assert recorded.variant == "openvino-fp16"


def test_an_export_is_drawn_with_without_torch(export: Path, home: Path) -> None:
    (home / "light").mkdir()
    (home / "light/sitecustomize.py").write_text(LIGHT)
    repository = home / "repository"
    shutil.copytree(export, repository)
    with serving(repository, NAME) as hub:
        done = run(home, hub, "a cat", "--yes", "--steps", "2", "-o", "a.png", PYTHONPATH=str(home / "light"))
        assert (done.returncode, done.stdout) == (0, "a.png\n"), done.stderr
        assert "unet/openvino_model.bin" in hub.gets()
    assert read_recorded(home / "a.png").variant == "openvino"
    folder = home / "some-org--tiny.sd"
    (folder / "unet/openvino_model.bin").write_bytes(b"\0" + (folder / "unet/openvino_model.bin").read_bytes()[1:])
    shown = run(home, hub, "a cat", "--steps", "2", "-o", "b.png")
    assert shown.returncode == 2
    assert "openvino_model.bin is damaged" in shown.stderr, "the hashes of the pull are checked"


def test_of_weights_and_an_export_in_one_repository_the_export_is_pulled(
    shallow: Path, export: Path, home: Path
) -> None:
    repository = home / "repository"
    shutil.copytree(shallow, repository)
    shutil.copytree(export, repository / "openvino")
    with serving(repository, NAME) as hub:
        done = run(home, hub, "a cat", "--yes", "--steps", "2", "-o", "a.png")
        assert (done.returncode, done.stdout) == (0, "a.png\n"), done.stderr
        assert not any(name.endswith(".safetensors") for name in hub.gets())


def test_without_the_converters_weights_are_not_pulled_and_an_export_is_named(shallow: Path, home: Path) -> None:
    (home / "light").mkdir()
    (home / "light/sitecustomize.py").write_text(LIGHT)
    with serving(shallow, LISTED) as hub:
        done = run(home, hub, "a cat", "--yes", PYTHONPATH=str(home / "light"))
        assert done.returncode == 2
        assert "edge-sd run OpenVINO/LCM_Dreamshaper_v7-int8-ov, an export of them" in done.stderr
        assert "convert" in done.stderr
        assert hub.asked == []


def test_core_ml_packages_as_apple_publishes_them(coreml_bundle: ModelBundle, home: Path) -> None:
    repository = home / "repository"
    names = {"TextEncoder": "text_encoder", "Unet": "unet", "VAEDecoder": "vae_decoder", "VAEEncoder": "vae_encoder"}
    for layout in ("original", "split_einsum"):
        for package in sorted((coreml_bundle.root / "coreml-ane-fp16").glob("*.mlpackage")):
            if package.stem in names:
                title = f"Stable_Diffusion_version_org_model_{names[package.stem]}.mlpackage"
                shutil.copytree(package, repository / layout / "packages" / title)
        (repository / layout / "compiled").mkdir()
        for text in ("vocab.json", "merges.txt"):
            shutil.copyfile(coreml_bundle.root / "tokenizer" / text, repository / layout / "compiled" / text)
    with serving(repository, NAME) as hub:
        words = ("a cat", "--yes", "--steps", "2", "-o", "a.png", "--form", "coreml", "--device", "coreml-reference")
        done = run(home, hub, *words)
        assert (done.returncode, done.stdout) == (0, "a.png\n"), done.stderr
        assert {name.split("/")[0] for name in hub.gets()} == {"split_einsum"}
        refused = run(home, hub, "a cat", "--form", "openvino", "--yes")
        assert refused.returncode == 2
        assert "has no openvino; it has: coreml" in refused.stderr
    assert read_recorded(home / "a.png").variant == "coreml-ane"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), 'there is no prompt: edge-sd run some-org/tiny.sd "a red apple"'),
        (("a cat", "--stepz", "3"), "No such option: --stepz"),
        (("a cat", "--steps", "ten"), "--steps"),
        (("a cat", "--model", "emoji"), "--model is what ORG/NAME says here"),
        (("a cat", "--form", "onnx"), "valid: checkpoint, coreml, openvino, torch"),
    ],
)
def test_mistakes_are_told_before_anything_is_asked_of_the_hub(
    shallow: Path, home: Path, words: tuple[str, ...], said: str
) -> None:
    with serving(shallow, NAME) as hub:
        done = run(home, hub, *words)
        assert (done.returncode, done.stdout) == (2, "")
        assert said in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
        assert hub.asked == []


def test_what_a_machine_takes_of_a_repository() -> None:
    mac, intel, linux = (
        wish_of(*each, None, None) for each in (("darwin", "arm64"), ("darwin", "x86_64"), ("linux", "x"))
    )
    assert (mac.forms[0], mac.layouts[0], mac.compiled) == ("coreml", "split_einsum", True)
    assert (intel.forms[0], intel.layouts[0]) == ("coreml", "original")
    assert linux.forms == ("openvino", "torch", "checkpoint")
    assert linux.compiled is None, "only macOS reads compiled models"


def test_every_row_of_the_catalogue_is_whole_and_cites_its_source() -> None:
    names = [each.name.lower() for each in CATALOGUE]
    assert len(names) == len(set(names)) >= 20
    for each in CATALOGUE:
        assert each.source.startswith("https://"), each.name
        assert each.form in FORMS
        assert each.openvino is None or each.openvino.lower() in names
        assert each.sampler is None or each.sampler in SAMPLERS
        # What is called checked is said by the row.
        assert all(getattr(each, name) is not None for name in each.checked), each.name


def test_the_catalogue_as_json_has_all_rows(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "edge_sd", "models", "catalogue", "--json"]
    rows = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout)
    assert [row["name"] for row in rows] == [each.name for each in CATALOGUE]


def test_a_damaged_record_is_one_line(export: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(export, folder)
    for record in ("[]", '{"files": 3}', '{"files": {"a": {}}}', '{"files": {}, "defaults": {"steps": "x"}}',
                   '{"files": {}, "defaults": {"best": 1}}', '{"files": {}, "defaults": []}'):  # fmt: skip
        (folder / "hub.json").write_text(record)
        with pytest.raises(InvalidModel, match=r"damaged; pull the model again"):
            ModelBundle.open(folder)
