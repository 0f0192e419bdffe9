"""The pages name what the code has: environment variables, errors, commands, precisions, samplers."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator

import pytest

from edge_sd import errors
from edge_sd.converters.recipes import RECIPES
from edge_sd.sampling.samplers import SAMPLERS

from .graph import ROOT, modules


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text("utf-8")


def variables() -> Iterator[str]:
    """Environment variables that the code reads or sets: subscripts and calls of os.environ, and typer's envvar."""
    for path in modules().values():
        tree = ast.parse(path.read_text("utf-8"))
        constants = {
            target.id: value.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign)
            for names, values in [(node.targets[0], node.value)]
            for target, value in (
                zip(names.elts, values.elts, strict=False)
                if isinstance(names, ast.Tuple) and isinstance(values, ast.Tuple)
                else [(names, values)]
            )
            if isinstance(target, ast.Name) and isinstance(value, ast.Constant)
        }
        for node in ast.walk(tree):
            found = None
            if isinstance(node, ast.Call) and re.fullmatch(r"os\.(environ\.\w+|getenv)", ast.unparse(node.func)):
                found = node.args[0]
            elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == "os.environ":
                found = node.slice
            elif isinstance(node, ast.keyword) and node.arg == "envvar":
                found = node.value
            if isinstance(found, ast.Name):
                yield str(constants[found.id])
            elif isinstance(found, ast.Constant):
                yield str(found.value)


def test_the_page_of_the_environment_names_every_variable() -> None:
    found = {*variables()}
    assert {"EDGE_SD_MODELS", "EDGE_SD_TOKEN", "HF_HUB_OFFLINE"} <= found
    assert not [name for name in found if f"`{name}" not in page("environment.md")]


def test_the_page_of_errors_names_every_error() -> None:
    kinds = [name for name, kind in vars(errors).items() if inspect.isclass(kind) and issubclass(kind, Exception)]
    assert "InvalidRequest" in kinds
    assert not [name for name in kinds if name not in page("errors.md")]


def test_every_precision_and_every_sampler_has_its_word() -> None:
    everything = "".join(path.read_text("utf-8") for path in (ROOT / "docs").glob("*.md"))
    assert not [name for name in RECIPES if f"`{name}`" not in everything]
    assert not [name for name in SAMPLERS if not re.search(rf"\b{name}\b", page("generate.md"))]


@pytest.mark.parametrize("name", ["LICENSE", "NOTICE", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_what_people_look_for_first_is_there(name: str) -> None:
    assert (ROOT / name).is_file()
