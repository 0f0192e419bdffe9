"""The caches: what each holds, where it lies, how many bytes it has, and how it is cleared.

Each is a folder of entries in cache_home(). An entry is known by the form of its name, so that nothing else in a folder
that a person chose is ever counted, moved or removed.
"""

from __future__ import annotations

import functools
import hashlib
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .paths import cache_home, models_home


@dataclass(frozen=True)
class Cache:
    """One kind of entries.

    about    what they are
    pattern  a glob of their names
    """

    name: str
    about: str
    pattern: str

    def folder(self) -> Path:
        """Where its entries lie. What lies at `folder_before` is moved here, once, by renaming.

        Where the two are on different disks it stays where it is and is made again here; `edge-sd cache` shows and
        clears both.
        """
        folder, before = cache_home() / self.name, self.folder_before()
        # Another process may be moving the same entries, and a home may be closed to this user.
        with suppress(OSError):
            if before is not None and not folder.exists() and before.is_dir():
                folder.mkdir(parents=True)
                for path in before.glob(self.pattern):
                    os.replace(path, folder / path.name)
                before.rmdir()
        return folder

    def folder_before(self) -> Path | None:
        """Where the first versions of edge-sd kept it: beside the models. None where EDGE_SD_CACHE names a folder.

        Whoever names a folder wants that one and no other to be touched.
        """
        return None if os.environ.get("EDGE_SD_CACHE") else models_home().parent / self.name

    def entries(self, folder: Path) -> list[Path]:
        """Its entries in a folder, and what is left of some whose process was killed (files.partial)."""
        return sorted([*folder.glob(self.pattern), *folder.glob(f".{self.pattern}.*.partial")])


# Rooms that import the backends.
ABOVE_BACKENDS = frozenset({"devices", "pipeline", "converters", "apps"})
_HEX = "[0-9a-f]"
_KEY = _HEX * 16
CACHES = (
    Cache("openvino", "graphs compiled by OpenVINO", f"{_HEX * 24}.blob"),
    Cache("compiled", "packages compiled by Core ML", f"*-{_KEY}.mlmodelc"),
    Cache("edited", "packages with LoRAs, embeddings or CLIP skip in them", _KEY),
    Cache("assembled", "packages put together with the weights of their model", _KEY),
    Cache("measured", "what was measured on this machine", f"{_KEY}.json"),
    Cache("seen", "hashes of other programs' files, as they were first verified", f"{_HEX * 32}.json"),
    Cache("bench", "the large model that edge-sd bench makes", "sd15-random"),
)


@functools.cache
def code_digest() -> str:
    """The hash of all code of this version that can decide what a backend keeps.

    That is every file but those of the rooms above the backends, which no backend may import.
    """
    package, digest = Path(__file__).parent, hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package)
        if name.parts[0] not in ABOVE_BACKENDS:
            digest.update(name.as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def cache_folder(name: str) -> Path:
    """Where the entries of a cache lie; it may not be there yet."""
    (cache,) = [each for each in CACHES if each.name == name]
    return cache.folder()


def size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder; what goes meanwhile counts as none."""
    total = 0
    for each in [path] if path.is_file() else path.rglob("*"):
        with suppress(OSError):
            total += each.lstat().st_size if each.is_file() else 0
    return total
