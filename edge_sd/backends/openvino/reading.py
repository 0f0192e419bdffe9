"""A graph as it is read from a model's files, for inputs of known shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ...components.base import SAMPLES, Shapes
from ...errors import InvalidModel, InvalidRequest


def read_model(core: Any, graph: Path, weights: list[Path]) -> Any:
    """A graph whose weights are `weights`, one file after the other (see Artifact).

    Raises InvalidModel for names that are no text, and what OpenVINO raises: RuntimeError.
    """
    import openvino as ov

    try:
        if len(weights) == 1:
            model = core.read_model(graph, weights[0])
        else:
            parts = [np.fromfile(path, np.uint8) for path in weights]
            model = core.read_model(graph.read_bytes(), ov.Tensor(np.concatenate(parts)))
        # The bindings fail at such a name wherever it is asked for, or stands in an error.
        for op in model.get_ops():
            op.get_friendly_name()
            for output in op.outputs():
                output.get_names()
    except UnicodeDecodeError as error:
        raise InvalidModel(f"{graph} has a name that is no text: {error}") from error
    return model


def accept_fractional_timesteps(model: Any) -> None:
    """Let `timestep` be float32: files declare int64 for other programs, but Euler's timesteps lie between integers."""
    import openvino as ov

    for parameter in model.get_parameters():
        if "timestep" in parameter.output(0).get_names():
            parameter.set_element_type(ov.Type.f32)
    model.validate_nodes_and_infer_types()


def reshape(model: Any, shapes: Shapes, graph: str, factor: int) -> None:
    """Give `model` its sizes, or raise InvalidRequest that says which it takes."""
    try:
        model.reshape(dict(shapes))
    except RuntimeError as error:
        name = next((each for each in (*SAMPLES, "latent_sample") if each in shapes), "")
        if not name or len(shapes[name]) != 4:
            raise InvalidModel(f"{graph} does not take the inputs of this model: {first_line(error)}") from error
        scale = 1 if shapes[name][1] == 3 else factor
        ports = [each for each in model.inputs if name in each.names]
        if len(ports) != 1 or ports[0].partial_shape.rank != len(shapes[name]):
            what = f"has no input {name}" if not ports else f"takes another {name} than pictures"
            raise InvalidModel(f"{graph} {what}; it is no part of a model of this kind") from error
        fixed = ports[0].partial_shape
        asked = f"{shapes[name][3] * scale}x{shapes[name][2] * scale}"
        if fixed[2].is_static and fixed[3].is_static:
            sizes = f"only {fixed[3].get_length() * scale}x{fixed[2].get_length() * scale}"
        else:
            # Skip connections are as large as what they meet where halving leaves no remainder.
            sizes = f"sizes in multiples of {8 * factor}, and of less where its UNet is shallow"
        raise InvalidRequest(f"{graph} does not take {asked} pixels; it takes {sizes}") from error


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # OpenVINO puts source locations first and the reason last.
    return (lines[-1] if lines else type(error).__name__)[:300]
