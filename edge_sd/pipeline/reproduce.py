"""Opening the pipeline that drew a recorded picture, or the nearest to it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..bundle.library import installed_models
from ..errors import DeviceError, MissingExtra, ModelNotFound, VariantNotFound
from .pipeline import Pipeline
from .recorded import Recorded


def open_recorded(
    recorded: Recorded,
    model: str | Path | None = None,
    device: str | Mapping[str, str] = "auto",
    variant: str | None = None,
    preset: str | None = None,
    tell: Callable[[str], None] = lambda line: None,
    **options: Any,
) -> Pipeline:
    """Open the model and variant that drew `recorded`; `tell` gets a line where another one has to do.

    What is given goes before what was recorded; `options` are further ones of Pipeline.open.

    Raises what Pipeline.open raises, and ModelNotFound where no model has the recorded name here.
    """

    def opened(model: str | Path, variant: str | None) -> Pipeline:
        return Pipeline.open(model, device, variant, tell=tell, preset=preset or "exact", **options)

    if not recorded.exact:
        return opened(model or "emoji", variant)
    if model is None and recorded.model not in installed_models():
        raise ModelNotFound(
            f"{recorded.path} was drawn by the model {recorded.model!r}, which is not installed under that name; "
            "give a name or a folder with --model"
        )
    model = model or recorded.model
    pipeline = None
    if variant is None and preset is None and device == "auto":
        # Where the recorded variant can't run, another of the same weights draws nearly the same.
        with contextlib.suppress(DeviceError, VariantNotFound, MissingExtra):
            pipeline = opened(model, recorded.variant)
    pipeline = pipeline or opened(model, variant)
    found, bundle = pipeline.plan.variant, pipeline.bundle
    if found != recorded.variant:
        tell(
            f"note: {recorded.path} was drawn by variant {recorded.variant}, this is {found}; expect small differences"
        )
    elif bundle.fingerprint(found) != recorded.model_hash:
        tell(f"note: the files of {bundle.name} are not those that drew {recorded.path}; expect another picture")
    return pipeline
