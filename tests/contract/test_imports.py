"""What the runtime may load: never torch or a converter's library, and nothing at all for --help."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "diffusers", "transformers", "coremltools", "nncf", "optimum")


def loaded_after(code: str) -> set[str]:
    script = f"{code}\nimport sys; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in done.stdout.split()}


@pytest.mark.parametrize(
    "code",
    [
        "import edge_sd.pipeline.pipeline, edge_sd.images.files, edge_sd.bundle.diffusers",
        "from edge_sd import Pipeline, Request\n"
        "with Pipeline.open() as p: p.generate(Request('a cat', seed=1, steps=1))",
    ],
)
def test_the_runtime_never_loads_a_converters_library(code: str) -> None:
    assert not loaded_after(code) & set(HEAVY)


def test_help_loads_neither_numpy_nor_a_backend() -> None:
    assert not loaded_after("import edge_sd.apps.cli") & {*HEAVY, "numpy", "openvino", "tokenizers", "PIL"}


def test_the_runtime_imports_neither_apps_nor_converters() -> None:
    root = Path(__file__).parents[2] / "edge_sd"
    for path in root.rglob("*.py"):
        if path.name != "__main__.py":
            text = path.read_text("utf-8")
            assert "converters" not in "".join(line for line in text.splitlines() if "import" in line), path
            assert "apps" not in "".join(line for line in text.splitlines() if "import" in line), path
