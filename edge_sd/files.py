"""Files of a model: how large they are, their hashes, written whole or not at all, and never outside its folder."""

from __future__ import annotations

import contextlib
import getpass
import glob
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Generic, TypeVar

from .errors import InvalidModel

T = TypeVar("T")
_POINTER = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True)
class FileRecord:
    bytes: int
    sha256: str


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()


def record_file(path: Path) -> FileRecord:
    return FileRecord(path.stat().st_size, hash_file(path))


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside, flush to the disk, rename: whoever reads `path` finds the old bytes or the new."""
    with _written_beside(path, data) as beside:
        os.replace(beside, path)


def append_line(path: Path, line: str) -> None:
    """Add a line to a file, on the disk when this returns. A line that a power cut tore is the last one, without end.

    What lies in the same folder is on the disk under its name then, too.
    """
    sync_folder(path.parent)
    with path.open("ab") as file:
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk, where the system can: a rename alone may not outlive a power cut."""
    if os.name == "nt":
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def write_new(path: Path, data: bytes) -> None:
    """Write a file that is not there yet, all or nothing. Raises FileExistsError where another was faster."""
    with _written_beside(path, data) as beside:
        try:
            # Unlike a rename, a link never replaces.
            os.link(beside, path)
        except FileExistsError:
            raise
        except OSError:
            # A file system without links: claim the name, then fill it.
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            os.replace(beside, path)


@contextlib.contextmanager
def _written_beside(path: Path, data: bytes) -> Iterator[Path]:
    """A file in the folder of `path` that holds `data`, on the disk; gone at the end, if it still has its name."""
    beside = partial(path)
    try:
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield beside
    finally:
        beside.unlink(missing_ok=True)


@contextlib.contextmanager
def replaced(target: Path) -> Iterator[Path]:
    """A path beside `target` to make a file or a folder at, which takes that name at the end; after an error it goes.

    What was called so stays as it was until then. What a killed process left half made is removed at the next start.
    """
    recover(target)
    beside = partial(target)
    try:
        yield beside
        for path in [beside, *beside.rglob("*")]:
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        exchange(beside, target)
    finally:
        remove(beside)


@contextlib.contextmanager
def scratch(target: Path) -> Iterator[Path]:
    """A folder beside `target`, for what is then moved to that name or is needed for a while. It goes at the end.

    What killed processes left of the same name goes at the beginning.
    """
    folder = partial(target)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def aside(target: Path) -> Path:
    """Where the older folder is while a newer one takes its name."""
    return target.with_name(f".{target.name}.old")


def exchange(new: Path, target: Path) -> None:
    """Give `new` the name `target`; an older folder of that name is removed. Raises OSError.

    Where the system can't exchange two folders at once, the older one is set aside first, where `recover` finds it.
    """
    if not target.is_dir() or target.is_symlink():
        os.replace(new, target)
    elif _swapped(new, target):
        # Half removed, it must not be taken for what `new` was.
        with contextlib.suppress(OSError):
            os.replace(new, aside(target))
        shutil.rmtree(aside(target), ignore_errors=True)
    else:
        os.replace(target, aside(target))
        try:
            os.replace(new, target)
        except OSError:
            recover(target)
            raise
        shutil.rmtree(aside(target), ignore_errors=True)


def _swapped(one: Path, other: Path) -> bool:
    """Exchange two paths in one step, if the system and its file system can: Linux's renameat2, macOS's renamex_np."""
    if sys.platform not in ("linux", "darwin"):
        return False
    import ctypes

    library, names = ctypes.CDLL(None), (os.fsencode(one.absolute()), os.fsencode(other.absolute()))
    try:
        # RENAME_EXCHANGE and RENAME_SWAP are both 2; absolute names need no folder.
        if sys.platform == "linux":
            return int(library.renameat2(-1, names[0], -1, names[1], 2)) == 0
        return int(library.renamex_np(*names, 2)) == 0
    except AttributeError:
        return False


def recover(target: Path) -> None:
    """Undo or finish an exchange of two folders that was stopped between its two renames. Raises OSError."""
    older = aside(target)
    if older.is_dir() and not target.exists():
        os.replace(older, target)
    shutil.rmtree(older, ignore_errors=True)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class Files(Generic[T]):
    """What `reader` made of files, each read once; again when the size or the time of one has changed.

    `beside` are names of files in the same folder that are read with it, where they are there.
    """

    def __init__(self, reader: Callable[[Path], T], beside: tuple[str, ...] = ()) -> None:
        self.reader, self.beside = reader, beside
        self._made: dict[Path, tuple[list[tuple[int, int] | None], T]] = {}

    def read(self, path: Path) -> T:
        """Raises what the reader raises."""
        path = path.absolute()
        state = [_state(path), *(_state(path.with_name(name)) for name in self.beside)]
        known = self._made.get(path)
        if known is not None and known[0] == state:
            return known[1]
        made = self.reader(path)
        self._made[path] = (state, made)
        return made


def _state(path: Path) -> tuple[int, int] | None:
    """Bytes and nanoseconds of the last change; None where there is no such file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def partial(path: Path) -> Path:
    """A name beside `path`, of this thread alone, to make it at; what killed processes left at theirs is removed."""
    sweep(path.parent, path.name)
    return path.with_name(f".{path.name}.{threading.get_ident()}.{os.getpid()}.partial")


def is_partial(path: Path) -> bool:
    """Whether a path is one that was not finished, in this module, when its process was killed."""
    return re.fullmatch(r"\..+\.\d+\.partial", path.name) is not None


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove what processes that are gone left of writing `name`, or anything, in a folder.

    A process that runs has its number in the name.
    """
    with contextlib.suppress(OSError, re.error):
        for each in folder.glob(f".{'*' if name is None else glob.escape(name)}.*.partial"):
            number = each.name.split(".")[-2]
            if is_partial(each) and int(number) != os.getpid() and not _runs(int(number)):
                remove(each)


def _runs(process: int) -> bool:
    """Whether a process of this number runs; where that can't be asked without harm, it may."""
    if os.name == "nt":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def refuse_pointer(path: Path) -> None:
    """Raise InvalidModel where `path` holds a Git LFS pointer: the line that a clone without LFS has for the file."""
    try:
        with path.open("rb") as file:
            start = file.read(len(_POINTER))
    except OSError:
        return  # Whoever opens it next says what is wrong.
    if start == _POINTER:
        raise InvalidModel(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` where it was cloned")


@contextlib.contextmanager
def locked(path: Path, seconds: float = -1) -> Iterator[None]:
    """Let one process at a time change `path`, as far as the system can lock files.

    It waits so many `seconds`, -1 is for as long as it takes. Raises TimeoutError.

    Nothing may rest on it but work that would be done twice: the lock is a file in the folder for temporary ones,
    since beside `path` it would be debris, and removing a lock that others wait for would break it.
    """
    from filelock import FileLock, Timeout

    key = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    user = os.getuid() if hasattr(os, "getuid") else getpass.getuser()
    lock = FileLock(Path(tempfile.gettempdir()) / f"edge-sd-{user}-{key}.lock")
    try:
        lock.acquire(timeout=seconds)
    except Timeout:
        raise TimeoutError(f"{path} is in use by another process") from None
    try:
        yield
    finally:
        lock.release()


def inside(root: Path, relative: str) -> Path:
    """`root`/`relative`, or InvalidModel where that is not a plain path below root."""
    pure = PurePosixPath(relative)
    odd = not relative or "\\" in relative or "\0" in relative or ":" in relative
    home = root.resolve()
    if home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--"):
        # Hugging Face's cache keeps files in blobs/, and a snapshot is links to them.
        home = home.parent.parent
    if odd or pure.is_absolute() or ".." in pure.parts or not (root / pure).resolve().is_relative_to(home):
        raise InvalidModel(
            f"{root.name}: the manifest names {relative!r}, which is not a path inside the model's folder"
        )
    return root / pure


def parse_json(text: str, **options: Any) -> Any:
    """The value of a JSON text; `options` are those of json.loads.

    Raises ValueError for what is none, halves of characters too, which can't be hashed, shown or made a name of, and
    RecursionError.
    """
    document = json.loads(text, **options)
    if "\\ud" in text.lower():
        json.dumps(document, ensure_ascii=False).encode()
    return document


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from disk, or InvalidModel saying what is wrong with the file."""
    try:
        document = parse_json(path.read_text("utf-8"))
    except OSError as error:
        raise InvalidModel(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        refuse_pointer(path)
        raise InvalidModel(f"{path} is not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise InvalidModel(f"{path} holds a {type(document).__name__}, not a JSON object")
    return document
