"""What `import edge_sd` hands out: every name is there, lazily, and documented on itself."""

from __future__ import annotations

import dataclasses
import inspect
import re
import subprocess
import sys

import pytest

import edge_sd
from edge_sd import errors


def test_the_lazy_names_are_those_that_are_promised() -> None:
    assert {*edge_sd._HOMES, "__version__"} == {*edge_sd.__all__}
    assert len(edge_sd.__all__) == len({*edge_sd.__all__})


def test_every_error_can_be_caught_from_the_top() -> None:
    kinds = {name for name, each in vars(errors).items() if inspect.isclass(each) and issubclass(each, Exception)}
    assert kinds <= {*edge_sd.__all__}


@pytest.mark.parametrize("name", sorted({*edge_sd.__all__} - {"__version__"}))
def test_a_public_name_is_documented_on_itself(name: str) -> None:
    found = getattr(edge_sd, name)
    assert found.__doc__
    assert not found.__doc__.startswith(f"{name}("), "a dataclass's own signature is no documentation"


@pytest.mark.parametrize("name", sorted({*edge_sd.__all__} - {"__version__", "Settings"}))
def test_every_field_of_a_public_dataclass_is_documented(name: str) -> None:
    # Settings has Request's fields, and says which differ.
    found = getattr(edge_sd, name)
    if not dataclasses.is_dataclass(found):
        return
    section = re.search(r"Args:\n((?:    .+\n?)+)", inspect.getdoc(found) or "")
    assert section is not None
    documented = re.findall(r"^    (\w+): ", section[1], re.MULTILINE)
    assert sorted(documented) == sorted(each.name for each in dataclasses.fields(found))


@pytest.mark.parametrize("name", sorted({*edge_sd.__all__} - {"__version__"}))
def test_a_public_name_has_an_example(name: str) -> None:
    found = getattr(edge_sd, name)
    if inspect.isclass(found) and issubclass(found, edge_sd.EdgeSDError):
        # They are caught as their base is.
        found = edge_sd.EdgeSDError
    assert "Example:" in (inspect.getdoc(found) or "")


def test_importing_the_package_loads_nothing_heavy() -> None:
    script = "import edge_sd, sys; print(' '.join({'numpy', 'PIL', 'torch', 'openvino'} & {*sys.modules}))"
    assert not subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Pipelin'"):
        edge_sd.Pipelin  # noqa: B018
