"""Where models are kept on this computer."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path


def embedded_models() -> Path:
    """The folder of the models that ship in the package."""
    return Path(__file__).parent / "models"


def models_home() -> Path:
    """Where a person's own models live: $EDGE_SD_MODELS, or the platform's place for data."""
    if chosen := os.environ.get("EDGE_SD_MODELS"):
        return Path(chosen)
    if sys.platform == "darwin":
        return _home() / "Library/Application Support/edge-sd/models"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", str(_home()))) / "edge-sd" / "models"
    return Path(os.environ.get("XDG_DATA_HOME") or _home() / ".local/share") / "edge-sd/models"


def _home() -> Path:
    """The user's own folder; one for temporary files where a user has none, as in containers run under any uid."""
    try:
        return Path.home()
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"edge-sd-{os.getuid() if hasattr(os, 'getuid') else 'user'}"
