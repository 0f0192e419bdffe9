"""What a pull recorded in a model's folder, hub.json: hashes, the licence, and how its makers draw with it."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ..errors import InvalidModel
from ..files import FileRecord, parse_json
from .facts import Defaults, Facts
from .library import HUB_RECORD


def recorded(folder: Path) -> dict[str, Any]:
    """What `pull` recorded in a folder; empty where it did not."""
    try:
        found = parse_json((folder / HUB_RECORD).read_text("utf-8"))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError, RecursionError):
        return {}


def hashes(folder: Path) -> dict[str, FileRecord]:
    """The files of a model that was pulled from the hub, with their hashes; none where it was not.

    Raises InvalidModel for a damaged record.
    """
    record = recorded(folder)
    if not record:
        if (folder / HUB_RECORD).is_file():
            raise InvalidModel(f"{folder / HUB_RECORD} is damaged; pull the model again")
        return {}
    try:
        return {str(name): FileRecord(int(row["bytes"]), str(row["sha256"])) for name, row in record["files"].items()}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InvalidModel(f"{folder / HUB_RECORD} is damaged; pull the model again") from error


def with_record(folder: Path, facts: Facts) -> Facts:
    """`facts` with the licence and the defaults of a pull's record, where `folder` has one.

    Raises InvalidModel for defaults that are none.
    """
    record = recorded(folder)
    if not record:
        return facts
    wanted = record.get("defaults", {})
    kinds = {each.name: type(getattr(facts.defaults, each.name)) for each in fields(Defaults)}
    try:
        defaults = {name: kinds[name](value) for name, value in wanted.items()}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InvalidModel(f"{folder / HUB_RECORD}: its defaults are damaged; pull the model again") from error
    license = str(record.get("license", facts.license))
    return replace(facts, defaults=replace(facts.defaults, **defaults), license=license)
