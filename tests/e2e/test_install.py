"""The plain install: what a person gets who installs edge-sd and nothing else."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "diffusers", "transformers", "coremltools", "nncf", "optimum", "safetensors")


@pytest.mark.slow
def test_a_plain_install_draws_without_a_converters_library(tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    constraints = ROOT / "constraints.txt"
    subprocess.run([python, "-m", "pip", "install", "-q", "-c", constraints, ROOT], check=True, cwd=tmp_path)
    done = subprocess.run(
        [python, "-m", "edge_sd", "generate", "a cat", "--seed", "1", "-o", "x.png"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x.png").stat().st_size > 1000
    few = ("--steps", "1", "--seeds", "1", "--rounds", "1", "--json")
    compared = subprocess.run(
        [python, "-m", "edge_sd", "compare", "emoji", *few], cwd=tmp_path, capture_output=True, text=True
    )
    assert compared.returncode == 0, compared.stderr
    assert (tmp_path / "comparison/report.html").stat().st_size > 10_000
    find = "import importlib.util as u, sys; print([n for n in sys.argv[1:] if u.find_spec(n)])"
    found = subprocess.run([python, "-c", find, *HEAVY], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
    # What is no Python file ships too.
    (site,) = (tmp_path / "venv").rglob("site-packages/edge_sd")
    templates = {path.name for path in (site / "apps/macos/quick_action").iterdir()}
    assert templates == {"Info.plist", "document.wflow"}
    # The list of parts (PEP 770) names what is required, and the model inside with the hash of its manifest.
    (listed,) = site.parent.glob("edge_sd-*.dist-info/sboms/*.cdx.json")
    parts = {each["name"]: each for each in json.loads(listed.read_text())["components"]}
    assert set(parts) >= {"numpy", "pillow", "tokenizers", "huggingface_hub", "emoji"}
    manifest = hashlib.sha256((site / "models/emoji/edge_sd.json").read_bytes()).hexdigest()
    assert parts["emoji"]["hashes"] == [{"alg": "SHA-256", "content": manifest}]
    refused = subprocess.run(
        [python, "-m", "edge_sd", "convert", "emoji", "b"], cwd=tmp_path, capture_output=True, text=True
    )
    assert refused.returncode == 2
    cpu = "pip install torch --index-url https://download.pytorch.org/whl/cpu && " if sys.platform != "darwin" else ""
    assert refused.stderr.strip().endswith(f'{cpu}pip install "{ROOT}[convert]"')
