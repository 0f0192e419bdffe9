"""The errors a caller can catch.

EdgeSDError
├── InvalidRequest        what was asked for makes no sense or is not offered; the message lists what is
├── ModelError
│   ├── ModelNotFound     no such name and no such folder
│   ├── InvalidModel      the folder is damaged, unsafe, or not a model
│   └── VariantNotFound   the model has no variant that fits the wish
├── DeviceError           the device is not here, or refused the model
├── NumericalError        a component returned NaN or infinity
├── MissingExtra          an optional dependency is not installed; the message holds the install line
├── ConversionError       a conversion could not be finished; nothing was added to the bundle
│   └── ParityError       it finished, but the result is too far from torch float32
├── HubError              the hub could not be reached, or refused
└── OutputError           a file could not be written
"""

from __future__ import annotations

from collections.abc import Iterable


class EdgeSDError(Exception):
    """Base of everything edge-sd raises on purpose; its message is one line meant for people.

    Example:
        try:
            pipeline.generate(request)
        except EdgeSDError as error:
            print(error)
    """


class InvalidRequest(EdgeSDError, ValueError):
    """A value of the request is out of range or unknown."""


class ModelError(EdgeSDError):
    """Something about a model on disk."""


class ModelNotFound(ModelError):
    """Neither the name of an installed model nor a folder."""


class InvalidModel(ModelError):
    """A model folder that is damaged, unsafe or not a model."""


class VariantNotFound(ModelError):
    """The model has no such variant, or none for this device."""


class DeviceError(EdgeSDError):
    """The device is not available, or could not compile or run a component."""


class NumericalError(EdgeSDError):
    """A component returned NaN or infinity."""


class MissingExtra(EdgeSDError):
    """An optional dependency is not installed; the message ends with the command that installs it."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f'{what} needs the "{extra}" extra, which is not installed: {install_line(extra)}')


# Extras with torch in them. Where pip's own torch brings CUDA, gigabytes of it, PyTorch's index has the CPU build.
TORCH_EXTRAS = ("convert", "torch", "train")
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def install_line(extra: str) -> str:
    """The command that adds an extra to this installation, of a clone or of an index (PEP 610 tells which)."""
    import importlib.metadata
    import json
    import sys
    from importlib.util import find_spec

    place = "edge-sd"
    try:
        told = importlib.metadata.distribution("edge-sd").read_text("direct_url.json")
        url = str(json.loads(told or "{}").get("url", ""))
        if url.startswith("file:"):
            from urllib.parse import unquote, urlsplit
            from urllib.request import url2pathname

            place = url2pathname(unquote(urlsplit(url).path))
    except (importlib.metadata.PackageNotFoundError, ValueError, AttributeError, OSError):
        pass  # Run from its folder, without being installed.
    first = ""
    if sys.platform != "darwin" and any(each in TORCH_EXTRAS for each in extra.split(",")) and not find_spec("torch"):
        first = f"pip install torch --index-url {CPU_INDEX} && "
    return f'{first}pip install "{place}[{extra}]"'


class ConversionError(EdgeSDError):
    """A conversion could not be finished."""


class ParityError(ConversionError):
    """A converted component is too far from torch float32."""


class HubError(EdgeSDError):
    """The hub could not be reached, or refused."""


class OutputError(EdgeSDError):
    """A file could not be written."""


def choices(names: Iterable[str]) -> str:
    """The end of a message about an unknown name: the valid ones, in order."""
    return ", ".join(sorted(names)) or "none"
