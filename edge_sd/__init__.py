"""Stable Diffusion on the machine in front of you.

from edge_sd import Pipeline, Request

with Pipeline.open("emoji") as pipeline:
    pipeline.generate(Request("a red apple, glossy style", seed=7)).save("apple.png")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .bundle.bundle import ModelBundle as ModelBundle
    from .pipeline.pipeline import Pipeline as Pipeline
    from .pipeline.queue import Queue as Queue
    from .pipeline.request import Request as Request
    from .pipeline.result import Result as Result

__all__ = ["ModelBundle", "Pipeline", "Queue", "Request", "Result", "__version__"]

_HOMES = {
    "ModelBundle": "bundle.bundle",
    "Pipeline": "pipeline.pipeline",
    "Queue": "pipeline.queue",
    "Request": "pipeline.request",
    "Result": "pipeline.result",
}


def __getattr__(name: str) -> Any:
    # Lazy, so that `edge-sd --help` does not pay for numpy and Pillow.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
