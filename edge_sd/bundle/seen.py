"""What files were when they were first used or verified on this machine: in cache_home()/seen, one record a folder.

At first use every file is hashed, and compared with its manifest where that has a hash. From then on an open reads a
sample of it: blocks at places that only this machine knows. A file that was written again since is hashed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from ..errors import OutputError
from ..files import FileRecord, hash_file, write_atomically
from ..paths import cache_home

# Bytes of a block, and how many of them are a sample: 256 kB of each file, whatever its size.
BLOCK, BLOCKS = 4096, 64


@dataclass(frozen=True)
class Sight:
    """A file as it was seen: bytes, their sha256, when it was changed (ns since 1970), and the hash of its sample."""

    bytes: int
    sha256: str
    changed: int
    sample: str


@dataclass
class Found:
    """What opening files has shown: `problems` are damage, `notes` are files that were written anew since."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Seen:
    """What was recorded of a model's folder; the record is named by the folder's path.

    key  hexadecimal; it decides which blocks are a sample, and is as secret as the account's files
    """

    root: Path
    records: dict[str, Sight]
    key: str

    @classmethod
    def of(cls, root: Path) -> Seen:
        """The record of a folder; an empty one where there is none, or none that can be read."""
        try:
            document = json.loads(_place(root).read_text("utf-8"))
            key = str(document["key"])
            bytes.fromhex(key)
            return cls(root, {str(name): Sight(**row) for name, row in document["files"].items()}, key)
        except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError):
            return cls(root, {}, secrets.token_hex(16))

    def open(self, files: Mapping[str, FileRecord]) -> Found:
        """Compare files with what was seen of them, and record the others. That a record can't be kept is no error."""
        found, new = Found(), {}
        for name, record in files.items():
            known = self.records.get(name)
            try:
                size, changed = _state(self.root / name)
                if known is not None and (known.bytes, known.changed) == (size, changed):
                    if self.sample(name) != known.sample:
                        found.problems.append(f"{name} is damaged (it is not as it was when it was first used)")
                    continue
                sight = self._look(name)
            except OSError as error:
                found.problems.append(f"{name} cannot be read ({error.strerror})")
                continue
            if record.sha256 and sight.sha256 != record.sha256:
                found.problems.append(f"{name} is damaged (its sha256 differs from the manifest)")
                continue
            if known is not None and not record.sha256 and known.sha256 != sight.sha256:
                before, now = known.sha256[:10], sight.sha256[:10]
                found.notes.append(
                    f"{name} is another file than was used here before: its sha256 was {before}…, is {now}…"
                )
            new[name] = sight
        if new:
            with contextlib.suppress(OutputError):
                replace(self, records={**self.records, **new})._write()
        return found

    def problems(self, names: list[str]) -> list[str]:
        """One line for each of these files whose hash is not as it was recorded."""
        return [
            f"{name} is not as it was when it was first verified (its sha256 differs)"
            for name in names
            if name in self.records and hash_file(self.root / name) != self.records[name].sha256
        ]

    def remember(self, names: list[str]) -> list[str]:
        """Record those of these files that are not yet; which they are. Raises OutputError."""
        new = {name: self._look(name) for name in names if name not in self.records}
        if new:
            replace(self, records={**self.records, **new})._write()
        return list(new)

    def sample(self, name: str) -> str:
        """The hash of a file's size and of its blocks at this record's places. Raises OSError."""
        digest = hashlib.blake2b(digest_size=16, key=bytes.fromhex(self.key))
        with (self.root / name).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(str(size).encode())
            last = max(0, size - BLOCK)
            chosen = random.Random(f"{self.key} {name} {size}")
            # The first block holds a header, the last one shows a file that was not written to its end.
            places = {0, last, *(chosen.randint(0, last) for _ in range(BLOCKS - 2))}
            for place in sorted(places):
                file.seek(place)
                digest.update(file.read(BLOCK))
        return digest.hexdigest()

    def _look(self, name: str) -> Sight:
        size, changed = _state(self.root / name)
        return Sight(size, hash_file(self.root / name), changed, self.sample(name))

    def _write(self) -> None:
        place = _place(self.root)
        document = {"key": self.key, "files": {name: asdict(each) for name, each in self.records.items()}}
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(place, json.dumps(document).encode())
        except OSError as error:
            raise OutputError(f"{place}: {error.strerror or error}") from error


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _place(root: Path) -> Path:
    return cache_home() / "seen" / f"{hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:32]}.json"
