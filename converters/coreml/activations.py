"""Activations of 8 bits: the inputs of convolutions and linear layers rounded to integers of a fixed range.

coremltools writes the operations, but calibrates by Core ML, which is on macOS alone. Here the ranges are what the
executor meets in recorded pictures. A range stretched by a few outliers leaves few steps for the other numbers. The
layers whose input loses most that way keep float16, as many as the component's floor needs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from edge_sd.bundle.mlpackage.package import Package
from edge_sd.errors import ConversionError

from .convert import first_line
from .mil import Program

LAYERS = ("conv", "linear")
# The shares of layers that keep float16, tried one after the other.
SHARES = (0.0, 0.0625, 0.125, 0.25, 0.5)


@dataclass
class Range:
    """Observed range of one value: smallest and largest number, and the sum of squares."""

    low: float = float("inf")
    high: float = float("-inf")
    squares: float = 0.0
    count: int = 0

    def add(self, x: Tensor) -> None:
        self.low, self.high = min(self.low, float(x.min())), max(self.high, float(x.max()))
        self.squares += float(x.double().square().sum())
        self.count += x.numel()

    def noise(self) -> float:
        """The mean square error of 255 even steps over the range, for each mean square of the value."""
        step = (max(self.high, 0.0) - min(self.low, 0.0)) / 255
        return step**2 / 12 / max(self.squares / max(self.count, 1), 1e-30)


def ranges(program: Program, run: Callable[[], object]) -> dict[str, Range]:
    """The range of every float value of a program while `run` calls it."""
    found: dict[str, Range] = {}

    def watch(name: str, x: Tensor) -> None:
        if x.is_floating_point() and x.numel():
            found.setdefault(name, Range()).add(x)

    program.watch = watch
    run()
    program.watch = None
    return found


def by_noise(package: Path, met: Mapping[str, Range]) -> list[str]:
    """The names of the layers whose inputs are not constants, those first whose input loses most."""
    layers = {
        str(each.attributes["name"].read()) if "name" in each.attributes else each.name: each.inputs["x"][0]
        for function in Package.open(package).functions.values()
        for each in function.operations
        if each.kind in LAYERS
    }
    given = {name: met[x].noise() for name, x in layers.items() if isinstance(x, str) and x in met}
    return sorted(given, key=lambda name: -given[name])


def compress(model: Any, met: Mapping[str, Range], layers: Collection[str]) -> Any:
    """A new model in which the inputs of `layers` are rounded to 8 bits. Raises ConversionError."""
    import coremltools.optimize.coreml as cto
    from coremltools.converters.mil.mil.passes.graph_pass import PassOption
    from coremltools.converters.mil.mil.passes.pass_registry import PASS_REGISTRY
    from coremltools.models import utils

    rounded = cto.OpLinearQuantizerConfig(mode="linear", dtype="int8")
    config = cto.OptimizationConfig(op_name_configs=dict.fromkeys(layers, rounded))
    # Zero must be a step: convolutions pad with it.
    stats = {name: {"rmin": min(each.low, 0.0), "rmax": max(each.high, 0.0)} for name, each in met.items()}
    # Inputs only: outputs of a layer are added and normalised in float16.
    rounding = PASS_REGISTRY["compression::insert_prefix_quantize_dequantize_pair"]
    rounding.set_options([PassOption("config", config), PassOption("activation_stats", stats)])
    try:
        return utils._apply_graph_pass(model, [rounding])
    except Exception as error:  # The library raises errors of any type.
        raise ConversionError(f"activations could not be stored in 8 bits: {first_line(error)}") from error
