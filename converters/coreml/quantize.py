"""Smaller weights by coremltools.optimize: palettes made by k-means, or integers with a scale per channel."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from edge_sd.errors import ConversionError

from ..recipes import QuantRecipe
from .convert import first_line, require_target
from .mixed import palette

# Smaller constants stay as they are: biases, norms and tables of shapes are few bytes and need their digits.
SMALLEST = 2048


def check_target(recipe: QuantRecipe, target: str) -> None:
    """Raise InvalidRequest if packages for `target` cannot hold these weights."""
    if recipe.palette and recipe.group_size:
        require_target("a palette for each group of channels", target, "iOS18")
    if recipe.activations:
        require_target("activations in 8 bits", target, "iOS17")


def compress(model: Any, recipe: QuantRecipe, target: str, bits: Mapping[str, int] | None = None) -> Any:
    """A new model with its weights stored as `recipe` says; `bits` are each weight's own. Raises ConversionError."""
    if recipe.bits >= 16 and not bits:
        return model
    import coremltools.optimize.coreml as cto

    check_target(recipe, target)
    options: dict[str, Any] = {"weight_threshold": SMALLEST}
    each: Any
    if bits is not None:
        each = None
    elif recipe.palette:
        by = {"granularity": "per_grouped_channel", "group_size": recipe.group_size} if recipe.group_size else {}
        each = cto.OpPalettizerConfig(mode="kmeans", nbits=recipe.bits, **by, **options)
    else:
        each = cto.OpLinearQuantizerConfig(mode="linear_symmetric", dtype="int8", **options)
    apply = cto.palettize_weights if recipe.palette else cto.linear_quantize_weights
    # A palette of -inf and numbers has NaN for a mean: such masks are left alone.
    named: dict[str, Any] = dict.fromkeys(_infinite(model))
    if bits is not None:
        # A chunk has some of the weights.
        widths = {name: bits[name] for name in weights(model) if bits.get(name, 16) < 16}
        # The palettes that the analysis measured, not others as good: what was measured is what is written.
        named |= {
            name: cto.OpPalettizerConfig(mode="custom", lut_function=partial(palette, bits=n), **options)
            for name, n in widths.items()
        }
    config = cto.OptimizationConfig(global_config=each, op_name_configs=named)
    try:
        return apply(model, config)
    except Exception as error:  # The library raises whatever it stumbles over.
        raise ConversionError(f"weights could not be stored as {recipe.name}: {first_line(error)}") from error


def weights(model: Any) -> list[str]:
    """The names of the constants that can be made smaller."""
    return [name for name, value in _constants(model).items() if np.isfinite(value).all()]


def _infinite(model: Any) -> list[str]:
    """The names of constants that hold a NaN or an infinity."""
    return [name for name, value in _constants(model).items() if not np.isfinite(value).all()]


def _constants(model: Any) -> dict[str, Any]:
    import coremltools.optimize.coreml as cto

    return {name: each.val for name, each in cto.get_weights_metadata(model, weight_threshold=SMALLEST).items()}
