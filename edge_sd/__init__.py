"""Stable Diffusion on the machine in front of you.

Example:
    from edge_sd import Pipeline, Request

    with Pipeline.open("emoji") as pipeline:
        pipeline.generate(Request("a red apple, glossy style", seed=7)).save("apple.png")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .bundle.bundle import ModelBundle as ModelBundle
    from .components.lora import Lora as Lora
    from .components.lora import read_lora as read_lora
    from .devices.plan import DevicePlan as DevicePlan
    from .errors import ConversionError as ConversionError
    from .errors import DeviceError as DeviceError
    from .errors import EdgeSDError as EdgeSDError
    from .errors import HubError as HubError
    from .errors import InvalidModel as InvalidModel
    from .errors import InvalidRequest as InvalidRequest
    from .errors import MissingExtra as MissingExtra
    from .errors import ModelError as ModelError
    from .errors import ModelNotFound as ModelNotFound
    from .errors import NumericalError as NumericalError
    from .errors import OutputError as OutputError
    from .errors import ParityError as ParityError
    from .errors import VariantNotFound as VariantNotFound
    from .images.files import save as save_picture
    from .images.opening import open_picture as open_picture
    from .pipeline.control import Control as Control
    from .pipeline.pipeline import Pipeline as Pipeline
    from .pipeline.queue import Queue as Queue
    from .pipeline.recorded import Recorded as Recorded
    from .pipeline.recorded import read_recorded as read_recorded
    from .pipeline.request import Request as Request
    from .pipeline.result import Picture as Picture
    from .pipeline.result import Result as Result
    from .pipeline.settings import Settings as Settings
    from .sampling.noise import NoiseSource as NoiseSource
    from .sampling.samplers import Step as Step

# Name -> the module that holds it, and its name there. Loaded at first use, so that `edge-sd --help` does not pay for
# numpy and Pillow.
_ERRORS = (
    "EdgeSDError", "InvalidRequest", "ModelError", "ModelNotFound", "InvalidModel", "VariantNotFound", "DeviceError",
    "NumericalError", "MissingExtra", "ConversionError", "ParityError", "HubError", "OutputError",
)  # fmt: skip
_HOMES = {
    "Pipeline": ("pipeline.pipeline", "Pipeline"),
    "Request": ("pipeline.request", "Request"),
    "Control": ("pipeline.control", "Control"),
    "Settings": ("pipeline.settings", "Settings"),
    "Result": ("pipeline.result", "Result"),
    "Picture": ("pipeline.result", "Picture"),
    "Step": ("sampling.samplers", "Step"),
    "NoiseSource": ("sampling.noise", "NoiseSource"),
    "Queue": ("pipeline.queue", "Queue"),
    "DevicePlan": ("devices.plan", "DevicePlan"),
    "ModelBundle": ("bundle.bundle", "ModelBundle"),
    "Lora": ("components.lora", "Lora"),
    "read_lora": ("components.lora", "read_lora"),
    "Recorded": ("pipeline.recorded", "Recorded"),
    "read_recorded": ("pipeline.recorded", "read_recorded"),
    "open_picture": ("images.opening", "open_picture"),
    "save_picture": ("images.files", "save"),
    **{name: ("errors", name) for name in _ERRORS},
}

__all__ = [
    "ConversionError", "Control", "DeviceError", "DevicePlan", "EdgeSDError", "HubError", "InvalidModel",
    "InvalidRequest", "Lora", "MissingExtra", "ModelBundle", "ModelError", "ModelNotFound", "NoiseSource",
    "NumericalError", "OutputError", "ParityError", "Picture", "Pipeline", "Queue", "Recorded", "Request", "Result",
    "Settings", "Step", "VariantNotFound", "__version__", "open_picture", "read_lora", "read_recorded",
    "save_picture",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module, there = _HOMES[name]
    return getattr(import_module(f".{module}", __name__), there)
