"""What may import what: the order of the rooms, no circle, and what the runtime may load."""

from __future__ import annotations

import subprocess
import sys

import pytest

from edge_sd.caches import ABOVE_BACKENDS

from .graph import ROOT, circles, import_graph, modules

HEAVY = ("torch", "diffusers", "transformers", "coremltools", "coreai", "coreai_torch", "coreai_opt", "nncf", "optimum")
# Each room may import from those in lines above its own, and from itself.
ORDER = (
    ("errors", "_version", "paths", "machine"),
    ("files", "caches"),
    ("sampling",),
    ("images", "bundle"),
    ("components",),
    ("text",),
    ("backends",),
    ("devices",),
    ("pipeline",),
    # The lazy face, and what stands above the runtime.
    ("__init__", "__main__"),
    ("converters",),
    ("apps",),
)
FLOOR = {room: n for n, rooms in enumerate(ORDER) for room in rooms}
MODULES = modules()
GRAPH = import_graph()


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def test_every_room_has_its_floor() -> None:
    assert {room(name) for name in MODULES} - {"models"} == {*FLOOR}


def test_a_room_imports_only_what_stands_before_it() -> None:
    # `from edge_sd import Pipeline` is the public face, for what stands above the runtime.
    upward = [
        f"{name} imports {target}"
        for name, targets in GRAPH.items()
        for target in targets
        if room(name) != room(target) and room(name) not in ("__init__", "__main__")
        if FLOOR[room(target)] >= FLOOR[room(name)]
    ]
    assert not upward


def test_the_key_of_what_backends_keep_has_all_code_that_they_import() -> None:
    above = {room for room in FLOOR if FLOOR[room] > FLOOR["backends"]} - {"__init__", "__main__"}
    assert above == ABOVE_BACKENDS
    reached, left = set[str](), {name for name in GRAPH if room(name) == "backends"}
    while left:
        reached |= left
        left = {target for name in left for target in GRAPH[name]} - reached
    assert {"edge_sd.components.lora", "edge_sd.components.edits", "edge_sd.bundle.mlpackage.rewrite"} <= reached
    assert not {room(name) for name in reached} & ABOVE_BACKENDS


def test_no_file_imports_itself_by_way_of_others() -> None:
    # A package's face imports its rooms lazily; what is inside them does not count as a circle of files.
    assert not circles({name: targets - {"edge_sd"} for name, targets in GRAPH.items() if name != "edge_sd"})


def test_every_folder_with_python_files_is_packaged() -> None:
    tomllib = pytest.importorskip("tomllib")
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["packages"]
    folders = {".".join(path.relative_to(ROOT).parent.parts) for top in ("edge_sd", "converters", "apps")
               for path in (ROOT / top).rglob("*.py")}  # fmt: skip
    wanted = {name if name.startswith("edge_sd") else f"edge_sd.{name}" for name in folders}
    assert {*packages} == wanted


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
