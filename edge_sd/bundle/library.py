"""Where models are: in the package, in a person's own folder, pulled from the hub, or anywhere by path."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from ..errors import ModelNotFound, choices
from ..files import aside
from ..paths import embedded_models, models_home

# In the folder of a model: what is true of it (see bundle.py).
MANIFEST = "edge_sd.json"
# In the folder of a model that was pulled from the hub: its revision and hashes (see hub.py).
HUB_RECORD = "hub.json"
# The end of the name of a bundle that was made of a pull.
CONVERTED = ".converted"


def installed_models() -> dict[str, Path]:
    """Name -> folder of every model that can be opened by name."""
    found: dict[str, Path] = {}
    for home in (models_home(), embedded_models()):
        found |= {folder.name: folder for folder in _folders(home) if _has(folder, MANIFEST)}
    return {name: folder for name, folder in found.items() if not name.endswith(CONVERTED)}


def pulled_models() -> dict[str, Path]:
    """ORG/NAME -> folder of every model that was pulled from the hub; of one that was converted, the bundle."""
    pulled = [each for each in _folders(models_home()) if _has(each, HUB_RECORD) and each.suffix != CONVERTED]
    bundles = {each.name: each for each in _folders(models_home()) if _has(each, MANIFEST)}
    return {each.name.replace("--", "/", 1): bundles.get(f"{each.name}{CONVERTED}", each) for each in pulled}


def unreadable() -> str:
    """Why models_home() can't be looked into, which then counts as empty; "" where it can, or is not there."""
    try:
        os.listdir(models_home())
    except FileNotFoundError:
        return ""
    except OSError as error:
        return f"{models_home()} cannot be read ({error.strerror})"
    return ""


def _folders(home: Path) -> list[Path]:
    """Entries of a folder of models. Hidden names are pulls and conversions under way, and are left out."""
    try:
        return sorted(each for each in home.iterdir() if not each.name.startswith("."))
    except OSError:
        return []


def _has(folder: Path, name: str) -> bool:
    try:
        return (folder / name).is_file()
    except OSError:
        return False


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False


def hub_folder(name: str) -> Path:
    """Where the hub's model ORG/NAME goes."""
    return models_home() / name.replace("/", "--")


def converted_folder(name: str) -> Path:
    """Where the bundle goes that `edge-sd run` makes of the hub's model ORG/NAME."""
    folder = hub_folder(name)
    return folder.with_name(f"{folder.name}{CONVERTED}")


def find_pulled(name: str) -> Path | None:
    """The hub's model ORG/NAME on this disk: pulled here, or a snapshot in the cache of Hugging Face's libraries."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return None
    for folder in (hub_folder(name), aside(hub_folder(name))):
        if _is_folder(folder):
            return folder
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub") / f"models--{name.replace('/', '--')}"
    # RuntimeError: a user without a home.
    with contextlib.suppress(OSError, UnicodeDecodeError, RuntimeError):
        cache = cache.expanduser()
        snapshot = cache / "snapshots" / (cache / "refs/main").read_text("utf-8").strip()
        return snapshot if snapshot.is_dir() else None
    return None


def model_name(folder: Path) -> str:
    """What a model in `folder` is called: ORG/NAME's NAME where the hub's name is in the path, else the folder's."""
    folder = folder.resolve()
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        folder = folder.parent.parent
    pulled = (folder / HUB_RECORD).is_file() or folder.name.startswith("models--")
    return folder.name.split("--")[-1] if pulled else folder.name


def find_model(model: str | Path, weights: bool = False) -> Path:
    """The folder of a model given by name or by path.

    Of a pull that was converted it is the bundle, or with `weights` the pull itself. Raises ModelNotFound.
    """
    installed = installed_models()
    if isinstance(model, str) and model in installed:
        return installed[model]
    # A name with a NUL or of 5,000 characters is no folder either.
    with contextlib.suppress(OSError, ValueError):
        if Path(model).is_dir():
            return Path(model)
        if (pulled := find_pulled(str(model))) is not None:
            bundle = converted_folder(str(model))
            return pulled if weights or not _has(bundle, MANIFEST) else bundle
    closed = f"; {why}" if (why := unreadable()) else ""
    raise ModelNotFound(
        f"no model {str(model)[:200]!r}: neither a folder nor installed; installed: {choices(installed)}{closed}"
    )
