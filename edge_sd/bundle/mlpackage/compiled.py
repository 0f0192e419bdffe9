"""A `.mlmodelc`, what Core ML compiles a package to: its interface, out of the metadata.json beside the program.

[{"inputSchema": [{"name": "sample", "dataType": "Float16", "shape": "[2, 4, 64, 64]", …}], "outputSchema": […],
  "mlProgramOperationTypeHistogram": {"Ios16.einsum": 320, …}, …}]
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...errors import InvalidModel
from .package import Package, TensorType

COMPILED = ".mlmodelc"
SUFFIXES = (".mlpackage", COMPILED)


def interface(folder: Path) -> tuple[dict[str, TensorType], tuple[str, ...], tuple[str, ...]]:
    """Inputs by name, names of outputs, and the kinds of operations. Raises InvalidModel."""
    path = folder / "metadata.json"
    try:
        (model, *_) = json.loads(path.read_text("utf-8"))
        inputs = {str(row["name"]): _type(row) for row in model["inputSchema"]}
        outputs = tuple(str(row["name"]) for row in model["outputSchema"])
        return inputs, outputs, tuple(model.get("mlProgramOperationTypeHistogram", ()))
    except OSError as error:
        raise InvalidModel(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise InvalidModel(f"{path} is no compiled model's metadata: {error}") from error


def inputs(model: Path) -> dict[str, TensorType]:
    """The inputs of a package's default function, or of what was compiled of it. Raises InvalidModel."""
    if model.suffix == COMPILED:
        return interface(model)[0]
    package = Package.open(model)
    return package.functions[package.default].inputs


def _type(row: dict[str, Any]) -> TensorType:
    return TensorType(row["dataType"].lower(), tuple(int(size) for size in json.loads(row["shape"])))
