"""What the README and the model card show is true: their commands run, their links lead somewhere."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")


def commands() -> list[str]:
    """Those of the README, less those that need the artwork and hours: tests/e2e/test_training.py is theirs."""
    lines = [line.strip() for line in README.splitlines() if line.startswith("    edge-sd ")]
    ours = [line for line in lines if not line.startswith(("edge-sd train", "edge-sd compare autoencoder"))]
    # Those with a model that is not here: tests/parity/test_families.py draws with miniatures of it.
    ours = [line for line in ours if "--model XL" not in line]
    # Nor is the hub, or a checkpoint: tests/e2e/test_hub.py and tests/parity/test_checkpoints.py have their own.
    ours = [line for line in ours if "ORG/NAME" not in line and "model.safetensors" not in line]
    # What it takes to sweep is in tests/e2e/test_compare.py.
    ours = [line for line in ours if not line.startswith("edge-sd compare sweep")]
    # Nor are parts that were published alone: tests/parity/test_parts.py makes some.
    ours = [line for line in ours if "--vae FOLDER" not in line]
    return [line.split("  #")[0] for line in ours]


def test_the_readme_has_commands() -> None:
    assert 'edge-sd generate "a red apple, glossy style" --seed 7 --output apple.png' in commands()


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_readme_runs(command: str, tmp_path_factory: pytest.TempPathFactory, shallow: Path) -> None:
    folder = tmp_path_factory.getbasetemp() / "readme"
    folder.mkdir(exist_ok=True)
    for name in ("photo.jpg", "mask.png", "star.png"):
        Image.effect_noise((64, 64), 80).save(folder / name)
    words = shlex.split(command.replace("SOURCE", str(shallow)))[1:]
    if words[:2] == ["compare", "emoji"]:
        words += ["--steps", "2", "--rounds", "1"]  # The same way in a tenth of the time.
    home = {**os.environ, "EDGE_SD_MODELS": str(folder / "home/models")}
    done = subprocess.run(
        [sys.executable, "-m", "edge_sd", *words], cwd=folder, capture_output=True, text=True, env=home
    )
    assert done.returncode == 0, done.stderr


def test_the_python_of_the_readme_runs(tmp_path: Path) -> None:
    examples = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        subprocess.run([sys.executable, "-c", example], cwd=tmp_path, check=True)
    assert (tmp_path / "apple.png").is_file()


def test_every_option_of_the_readme_is_an_option() -> None:
    shown = "".join(
        subprocess.run(
            [sys.executable, "-m", "edge_sd", *command, "--help"],
            capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "200"},
        ).stdout
        for command in (["generate"], ["compare", "run"])
    )  # fmt: skip
    for line in re.findall(r"^\| `--.*?\|", README, re.MULTILINE):
        for option in re.findall(r"--[a-z-]+", line):
            assert option in shown


@pytest.mark.parametrize("page", ["README.md", "edge_sd/models/emoji/README.md"])
def test_links_and_pictures_are_there(page: str) -> None:
    text = (ROOT / page).read_text("utf-8")
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in link:
            assert (ROOT / page).parent.joinpath(link).is_file(), link
