"""The hub: models are pulled from Hugging Face into models_home(), or found where another program has put them.

Only safetensors, graphs, JSON and text are asked for; a pickle can run code when it is opened (repository.py). A pull
goes into a hidden folder, is compared with the hashes that the hub names, and gets its name in one rename, with
`hub.json`: the exact revision and the hash of each file. One that was stopped goes on where it was, and one that
replaces an older revision takes over the files that did not change.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..errors import HubError, InvalidModel, InvalidRequest, MissingExtra, ModelNotFound, OutputError
from ..files import exchange, hash_file, inside, locked, recover, write_atomically
from ..paths import models_home
from .catalogue import known
from .library import HUB_RECORD, hub_folder
from .pulled import recorded
from .repository import FORMS, Remote, Selection, Wish, select

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Answers of a server that is busy or being restarted (RFC 9110, section 15), and seconds between attempts.
BUSY = frozenset({408, 429, 500, 502, 503, 504})
PAUSES = (1.0, 2.0, 4.0, 8.0)
T = TypeVar("T")


@dataclass(frozen=True)
class Repository:
    """A model's repository at one revision.

    name      ORG/NAME
    revision  the commit, 40 hexadecimal digits
    files     everything in it
    license   the licence that its card names; "unknown" where it names none
    """

    name: str
    revision: str
    files: tuple[Remote, ...]
    license: str = "unknown"


def look(name: str, revision: str | None = None) -> Repository:
    """What the repository ORG/NAME holds: on its main branch, or on a branch, a tag or a commit.

    Raises ModelNotFound (no such repository or revision), InvalidRequest (no name of one), HubError (the network).
    """
    if not NAME.fullmatch(name):
        raise InvalidRequest(f"{name!r} is no model of the hub; they are called ORG/NAME")
    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingExtra("pulling models", "hub") from error
    info = _ask(name, lambda: huggingface_hub.HfApi().model_info(name, revision=revision, files_metadata=True))
    return Repository(name, str(info.sha), tuple(map(_remote, info.siblings or ())), _license(info))


def pull(
    name: str,
    revision: str | None = None,
    *,
    half: bool = False,
    file: str | None = None,
    forms: tuple[str, ...] = FORMS,
) -> Path:
    """The folder of the model ORG/NAME, pulled unless all of it is there.

    `half` takes float16 files where there are both; `file` is the checkpoint of a repository that has several; of
    several forms (repository.py) the first of `forms` is taken.

    Raises ModelNotFound (no such repository or revision), InvalidRequest (a name, or a choice that has to be made),
    InvalidModel (no model, or other bytes than the hub says), HubError (the network), OutputError (the disk).
    """
    repository = look(name, revision)
    return take(repository, select(name, repository.files, Wish(forms=forms, half=half, file=file)))


def take(repository: Repository, selection: Selection) -> Path:
    """Pull the selected files of a repository and put them in the place of an older pull. Returns the folder.

    The record, `hub.json`, has the revision, the hashes, the licence and what the catalogue knows of how to draw.
    Raises as `pull`.
    """
    name, wanted = repository.name, selection.files
    target = hub_folder(name)
    staging = target.with_name(f".{target.name}.partial")
    try:
        models_home().mkdir(parents=True, exist_ok=True)
        with locked(target):
            recover(target)
            if is_whole(target, repository.revision, wanted):
                if (staging / HUB_RECORD).is_file():
                    # A whole pull that was replaced, whose removal was stopped.
                    shutil.rmtree(staging, ignore_errors=True)
                return target
            staging.mkdir(exist_ok=True)
            _check_space(staging, wanted)
            for each in wanted:
                _place(repository, each, staging, target)
            files = {each.at: {"bytes": each.size, "sha256": hash_file(staging / each.at)} for each in wanted}
            _remove_strangers(staging, files)
            entry = known(name)
            record = {
                "repo": name,
                "revision": repository.revision,
                "form": selection.form,
                "license": repository.license,
                "defaults": {} if entry is None else entry.defaults,
                "files": files,
            }
            write_atomically(staging / HUB_RECORD, (json.dumps(record, indent=1) + "\n").encode())
            exchange(staging, target)
    except OSError as error:
        raise OutputError(f"{staging}: {error.strerror or error}; what is there is kept, pull again") from error
    return target


def is_whole(folder: Path, revision: str, wanted: Iterable[Remote]) -> bool:
    """Whether a pull of this revision is in `folder` with all wanted files at their size."""
    record, wanted = recorded(folder), list(wanted)
    if record.get("revision") != revision or not {each.at for each in wanted} <= set(record.get("files", ())):
        return False
    places = [(folder / each.at, each.size) for each in wanted]
    return all(path.is_file() and path.stat().st_size == size for path, size in places)


def _place(repository: Repository, remote: Remote, staging: Path, old: Path) -> None:
    """Put a file into `staging`: it is there, or an older pull has the same bytes, or it is fetched."""
    path = inside(staging, remote.at)
    if path.is_file() and remote.matches(path):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    before = inside(old, remote.at) if old.is_dir() else None
    if before is not None and before.is_file() and remote.matches(before):
        path.unlink(missing_ok=True)
        try:
            os.link(before, path)
        except OSError:
            # A file system without links.
            shutil.copyfile(before, path)
        return
    partial = path.with_name(f"{path.name}.partial")
    _ask(repository.name, lambda: _fetch(repository, remote, partial))
    if not remote.matches(partial):
        partial.unlink()
        raise InvalidModel(
            f"{repository.name}: {remote.name} is not what the hub says it is (its hash differs); pull again"
        )
    os.replace(partial, path)


def _fetch(repository: Repository, remote: Remote, partial: Path) -> None:
    """Write a file into `partial`, from where that ends: the hub's own library would begin again."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils._headers import build_hf_headers

    there = partial.stat().st_size if partial.exists() else 0
    with partial.open("r+b" if 0 < there < remote.size else "wb") as file:
        start = file.seek(0, os.SEEK_END)
        url = hf_hub_url(repository.name, remote.name, revision=repository.revision)
        http_get(url, file, resume_size=start, headers=build_hf_headers(), expected_size=remote.size,
                 displayed_filename=remote.name)  # fmt: skip


def _remote(sibling: Any) -> Remote:
    lfs = sibling.lfs
    sha256 = str((lfs.get("sha256") if isinstance(lfs, dict) else getattr(lfs, "sha256", "")) or "")
    return Remote(str(sibling.rfilename), int(sibling.size or 0), sha256, str(sibling.blob_id or ""))


def _license(info: Any) -> str:
    """The licence of a model's card, by its own name where the hub has no word for it."""
    card = info.card_data
    for key in ("license_name", "license"):
        with contextlib.suppress(AttributeError, KeyError, TypeError):
            if found := card.get(key):
                return " ".join(str(found).split())[:80]
    tags = (str(tag) for tag in info.tags or ())
    return next((tag.removeprefix("license:") for tag in tags if tag.startswith("license:")), "unknown")


def _ask(name: str, question: Callable[[], T]) -> T:
    """The hub's answer, asked for again while the server is busy; or one line that says why there is none."""
    from huggingface_hub import errors

    # httpx.HTTPError, or httpx2's: version 2 of the library has changed over.
    unreachable: Any = next(each for each in errors.HfHubHTTPError.__mro__ if each.__name__ == "HTTPError")
    for pause in (*PAUSES, None):
        try:
            return question()
        except errors.HFValidationError as error:
            raise InvalidRequest(f"{name!r} is no model of the hub: {_reason(error)}") from error
        except errors.RevisionNotFoundError as error:
            raise ModelNotFound(f"{name} has no such revision on the hub") from error
        except errors.GatedRepoError as error:
            raise HubError(
                f"{name} wants its licence accepted on the hub's page, and HF_TOKEN to say who you are"
            ) from error
        except errors.RepositoryNotFoundError as error:
            raise ModelNotFound(f"the hub has no model {name!r}, or shows it only to its owners") from error
        except errors.OfflineModeIsEnabled as error:
            raise HubError(f"{name} can't be pulled: HF_HUB_OFFLINE is set") from error
        except errors.HfHubHTTPError as error:
            status = getattr(error.response, "status_code", None)
            if status not in BUSY or pause is None:
                raise HubError(
                    f"{name}: the hub answered {status or 'an error'}; what was pulled is kept, pull again"
                ) from error
            time.sleep(_asked_pause(error, pause))
        except (unreachable, errors.LocalEntryNotFoundError, ConnectionError, TimeoutError) as error:
            raise HubError(
                f"{name}: the hub can't be reached ({_reason(error)}); what was pulled is kept, pull again"
            ) from error
    raise AssertionError("the last attempt returns or raises")


def _asked_pause(error: Any, pause: float) -> float:
    """Seconds to wait: what the server asks for in Retry-After, up to a minute, or `pause`."""
    try:
        return min(60.0, max(0.0, float(error.response.headers["Retry-After"])))
    except (AttributeError, KeyError, ValueError):
        return pause


def _reason(error: BaseException) -> str:
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0][:200]


def _check_space(staging: Path, wanted: Iterable[Remote]) -> None:
    need = sum(each.size for each in wanted if not (staging / each.at).is_file())
    free = shutil.disk_usage(staging).free
    if free < need:
        raise OutputError(f"{models_home()} has {free >> 20} MB free, the model needs {need >> 20} MB")


def _remove_strangers(staging: Path, files: Mapping[str, Any]) -> None:
    """Drop what an earlier pull of another revision left."""
    for path in sorted(staging.rglob("*"), reverse=True):
        if path.is_file() and path.relative_to(staging).as_posix() not in files:
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()
