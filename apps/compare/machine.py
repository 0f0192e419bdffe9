"""The machine and the libraries that figures depend on, as the report states them."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from edge_sd.machine import this_machine

LIBRARIES = ("edge-sd", "numpy", "openvino", "coremltools", "coreai-core", "torch", "diffusers")


def machine() -> dict[str, Any]:
    """The same on every call on one machine: nothing that changes by the minute, such as free memory."""
    here = this_machine()
    return {
        "processor": f"Apple {here.apple_chip}" if here.apple_chip else here.cpu or "unknown processor",
        "instructions": sorted(here.flags),
        "cores": here.cores,
        "system": f"{here.system} {here.version} {here.arch}",
        "python": platform.python_version(),
        "versions": {name: found for name in LIBRARIES if (found := _version(name))},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
