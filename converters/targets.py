"""The forms by their backends' names."""

from __future__ import annotations

from typing import Any

from edge_sd.errors import InvalidRequest, choices

from .form import Form
from .openvino.form import OpenVINOForm

TARGETS = ("openvino", "coreml", "coreai")


def form_named(name: str, **wishes: Any) -> Form:
    """The form for a backend's name; `wishes` are the fields of its class. Raises InvalidRequest."""
    if name == "openvino":
        if given := sorted(key for key, value in wishes.items() if value is not None):
            raise InvalidRequest(f"openvino takes no {', '.join(given)}: its variants run everywhere, in any size")
        return OpenVINOForm()
    if name == "coreml":
        from .coreml.form import CoreMLForm

        return CoreMLForm(**{key: value for key, value in wishes.items() if value is not None})
    if name == "coreai":
        from .coreai.form import CoreAIForm

        foreign = {"target", "chunks"} & {key for key, value in wishes.items() if value is not None}
        if foreign:
            raise InvalidRequest(f"coreai takes no {', '.join(sorted(foreign))}; valid: compute, sizes, batch")
        return CoreAIForm(**{key: value for key, value in wishes.items() if value is not None})
    raise InvalidRequest(f"unknown target {name!r}; valid: {choices(TARGETS)}")
