"""Hashes of files that came without any, recorded when they are first verified: in cache_home()/seen."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import OutputError
from ..files import FileRecord, record_file, write_atomically
from ..paths import cache_home


@dataclass(frozen=True)
class Seen:
    """What was recorded of a model's folder; the record is named by the folder's path."""

    root: Path
    records: dict[str, FileRecord]

    @classmethod
    def of(cls, root: Path) -> Seen:
        """The record of a folder; an empty one where there is none, or none that can be read."""
        try:
            rows = json.loads(_place(root).read_text("utf-8"))
            return cls(root, {str(name): FileRecord(**row) for name, row in rows.items()})
        except (OSError, ValueError, TypeError, AttributeError):
            return cls(root, {})

    def problems(self, names: list[str]) -> list[str]:
        """One line for each of these files that is not as it was recorded."""
        return [
            f"{name} is not as it was when it was first verified (its sha256 differs)"
            for name in names
            if name in self.records and record_file(self.root / name) != self.records[name]
        ]

    def remember(self, names: list[str]) -> list[str]:
        """Record those of these files that are not yet; which they are. Raises OutputError."""
        new = [name for name in names if name not in self.records]
        if new:
            records = {**self.records, **{name: record_file(self.root / name) for name in new}}
            place = _place(self.root)
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(place, json.dumps({name: asdict(each) for name, each in records.items()}).encode())
            except OSError as error:
                raise OutputError(f"{place}: {error.strerror or error}") from error
        return new


def _place(root: Path) -> Path:
    return cache_home() / "seen" / f"{hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:32]}.json"
