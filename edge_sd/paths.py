"""Where models and caches lie on this computer."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import platformdirs

APP = "edge-sd"


def embedded_models() -> Path:
    """The folder of the models that ship in the package."""
    return Path(__file__).parent / "models"


def models_home() -> Path:
    """Where a person's own models live: $EDGE_SD_MODELS, or the platform's place for data."""
    chosen = os.environ.get("EDGE_SD_MODELS")
    return Path(chosen).expanduser() if chosen else _placed(platformdirs.user_data_path) / "models"


def cache_home() -> Path:
    """Where everything lies that can be made again: $EDGE_SD_CACHE, or the platform's place for caches."""
    chosen = os.environ.get("EDGE_SD_CACHE")
    return Path(chosen).expanduser() if chosen else _placed(platformdirs.user_cache_path)


def _placed(place: Callable[..., Path]) -> Path:
    """The platform's folder; a temporary one where a user has no home, as in containers that run under any number."""
    # platformdirs raises where there is no home, and once returned "~/…" as it stands.
    with suppress(RuntimeError):
        folder = place(APP, appauthor=False)
        if folder.is_absolute():
            return folder
    user = os.getuid() if hasattr(os, "getuid") else "user"
    return Path(tempfile.gettempdir()) / f"{APP}-{user}" / place.__name__
