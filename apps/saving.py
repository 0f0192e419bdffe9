"""Pictures of a command: saved as they are drawn, under names that replace nothing."""

from __future__ import annotations

import re
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from edge_sd.errors import InvalidRequest
from edge_sd.images.files import FORMATS, TooLongForExif, check_output, write

if TYPE_CHECKING:
    from edge_sd.pipeline.result import Picture


# Devices of Windows, which no file there can be called, whatever its ending.
RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(10))}


def stem_of(prompt: str) -> str:
    """A file's name made of a prompt: letters, digits and hyphens of ASCII, at most 60, and no device of Windows."""
    stem = re.sub(r"[^a-z0-9]+", "-", prompt[:1000].lower()).strip("-")[:60].rstrip("-") or "picture"
    return f"{stem}-picture" if stem in RESERVED else stem


def free_path(path: Path, count: int = 1) -> Path:
    """`path`, or with -2, -3, … before its ending: the first that no file has, nor those of its `count` pictures."""
    tried, n = path, 1
    while any(each.exists() for each in (tried, *numbered(tried, max(count, 2)))):
        n += 1
        tried = path.with_stem(f"{path.stem}-{n}")
    return tried


def numbered(path: Path, count: int) -> list[Path]:
    """The files of `count` pictures: `path` itself for one, -1, -2, … before the ending for several."""
    if count == 1:
        return [path]
    return [path.with_stem(f"{path.stem}-{n}") for n in range(1, count + 1)]


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Raise InvalidRequest where `path` is there and is not to be replaced."""
    if path.exists() and not overwrite:
        raise InvalidRequest(f"{path} is there already; give another name, or --overwrite to replace it")


class Saver:
    """Saves each picture of a request when it is drawn; as a context, the grid and the paths at the end.

    output     the file asked for; None names new ones by the prompt, in `folder`
    grid       all pictures go into one file, when the last is drawn or drawing stops
    overwrite  files that are there are replaced
    say        gets each path at the end, also when drawing was stopped; None says nothing
    """

    def __init__(
        self, output: Path | None, prompt: str, count: int, *, grid: bool = False, overwrite: bool = False,
        say: bool = True, folder: Path = Path(),
    ) -> None:  # fmt: skip
        self.count, self.grid, self.overwrite, self.say = count, grid, overwrite, say
        self.named = output is not None
        self._first = folder / f"{stem_of(prompt)}.png" if output is None else output
        self._files = 1 if grid else count
        self._wanted = output if output is not None else free_path(self._first, self._files)
        # Picture -> its file; notes on what was not saved as asked.
        self.paths: list[Path] = []
        self.notes: list[str] = []
        self._drawn: list[Picture] = []

    def check(self) -> None:
        """Refuse, before anything is drawn, what can't be written or would replace a file. Raises InvalidRequest."""
        check_output(self._wanted)
        for each in numbered(self._wanted, self._files):
            refuse_existing(each, self.overwrite)

    def save(self, n: int, picture: Picture) -> None:
        """Write picture `n`, counted from 0. Raises OutputError."""
        self._drawn.append(picture)
        if not self.grid:
            self.paths.append(self._write(picture, n))

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.grid and self._drawn:
            from edge_sd.pipeline.result import Result

            path = self._write(Result(self._drawn, "").gridded(), 0)
            self.paths = [path] * len(self._drawn)
        if self.say:
            for path in dict.fromkeys(self.paths):
                print(path)

    def _write(self, picture: Picture, n: int) -> Path:
        path = numbered(self._wanted, self._files)[n]
        try:
            data = picture.encode(FORMATS[path.suffix.lower()])
        except TooLongForExif as error:
            other = path.with_suffix(".png")
            self.notes.append(f"{error}; saved as {other} instead of {path}")
            path, data = other, picture.encode("PNG")
        elsewhere = path != numbered(self._wanted, self._files)[n]
        while True:
            try:
                return write(data, path, new=elsewhere or not self.overwrite)
            except FileExistsError:
                # Another process was faster, with the same prompt or the same --output.
                if self.named:
                    self.notes.append(f"{path} was written by another program meanwhile; this picture has its own name")
                    path, elsewhere = free_path(path), True
                else:
                    self._wanted = free_path(self._first, self._files)
                    path = numbered(self._wanted, self._files)[n]
