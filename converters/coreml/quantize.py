"""Smaller weights by coremltools.optimize: palettes made by k-means, or integers with a scale per channel."""

from __future__ import annotations

from typing import Any

import numpy as np

from edge_sd.errors import ConversionError

from ..recipes import QuantRecipe
from .convert import first_line, require_target

# Smaller constants stay as they are: biases, norms and tables of shapes are few bytes and need their digits.
SMALLEST = 2048


def check_target(recipe: QuantRecipe, target: str) -> None:
    """Raise InvalidRequest if packages for `target` cannot hold these weights."""
    if recipe.palette and recipe.group_size:
        require_target("a palette for each group of channels", target, "iOS18")


def compress(model: Any, recipe: QuantRecipe, target: str) -> Any:
    """A new model with its weights stored as `recipe` says. Raises ConversionError."""
    if recipe.bits >= 16:
        return model
    import coremltools.optimize.coreml as cto

    check_target(recipe, target)
    options: dict[str, Any] = {"weight_threshold": SMALLEST}
    each: Any
    if recipe.palette:
        by = {"granularity": "per_grouped_channel", "group_size": recipe.group_size} if recipe.group_size else {}
        each = cto.OpPalettizerConfig(mode="kmeans", nbits=recipe.bits, **by, **options)
    else:
        each = cto.OpLinearQuantizerConfig(mode="linear_symmetric", dtype="int8", **options)
    apply = cto.palettize_weights if recipe.palette else cto.linear_quantize_weights
    # A palette of -inf and numbers has NaN for a mean: such masks are left alone.
    config = cto.OptimizationConfig(global_config=each, op_name_configs=dict.fromkeys(_infinite(model)))
    try:
        return apply(model, config)
    except Exception as error:  # The library raises whatever it stumbles over.
        raise ConversionError(f"weights could not be stored as {recipe.name}: {first_line(error)}") from error


def _infinite(model: Any) -> list[str]:
    """The names of constants that hold a NaN or an infinity."""
    import coremltools.optimize.coreml as cto

    constants = cto.get_weights_metadata(model, weight_threshold=SMALLEST)
    return [name for name, each in constants.items() if not np.isfinite(each.val).all()]
