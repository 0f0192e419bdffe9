"""The hub: models are pulled from Hugging Face into models_home(), or found where another program has put them.

Only safetensors, JSON and text are asked for; a pickle can run code when it is opened. A pull goes into a hidden
folder, is held beside the hashes that the hub names, and gets its name in one rename, with `hub.json`: the exact
revision and the hash of each file. One that was stopped goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import HubError, InvalidModel, InvalidRequest, MissingExtra, ModelNotFound, OutputError, choices
from ..files import hash_file, inside, write_atomically
from ..paths import models_home
from .library import HUB_RECORD, hub_folder

# What of a diffusers folder is a component; others hold samples, older weights or other programs' forms.
FOLDERS = frozenset({"text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "vae", "vae_tiny",
                     "scheduler", "safety_checker", "feature_extractor"})  # fmt: skip
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
# The weights of a component that has a repository of its own, such as an autoencoder, or a CLIP for `compare`.
PART_WEIGHTS = ("diffusion_pytorch_model.", "model.")
NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Of one weight file in two types, the name of the half as large.
HALF = ".fp16"


@dataclass(frozen=True)
class Remote:
    """A file on the hub: its bytes, and the hash that it has there: sha256, or git's own for what is small."""

    name: str
    size: int
    sha256: str = ""
    git: str = ""

    def matches(self, path: Path) -> bool:
        """Whether the file in `path` is this one, byte for byte."""
        if path.stat().st_size != self.size:
            return False
        if self.sha256:
            return hash_file(path) == self.sha256
        data = path.read_bytes()
        return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest() == self.git


def pull(name: str, revision: str | None = None, *, half: bool = False, file: str | None = None) -> Path:
    """The folder of the model ORG/NAME, pulled unless it is there: of its main branch, or a branch, tag or commit.

    `half` takes float16 files where there are both; `file` is the checkpoint of a repository that has several.

    Raises ModelNotFound (no such repository or revision), InvalidRequest (a name, or a choice that has to be made),
    InvalidModel (no safetensors, or other bytes than the hub says), HubError (the network), OutputError (the disk).
    """
    if not NAME.fullmatch(name):
        raise InvalidRequest(f"{name!r} is no model of the hub; they are called ORG/NAME")
    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingExtra("pulling models", "hub") from error
    target = hub_folder(name)
    info = _ask(name, lambda: huggingface_hub.HfApi().model_info(name, revision=revision, files_metadata=True))
    if recorded(target).get("revision") == info.sha and (file is None or (target / file).is_file()):
        return target
    wanted = select(name, [_remote(each) for each in info.siblings or ()], half, file)
    staging = target.with_name(f".{target.name}.partial")
    try:
        staging.mkdir(parents=True, exist_ok=True)
        _check_space(staging, wanted)
        for each in wanted:
            path = inside(staging, each.name)
            if not (path.is_file() and each.matches(path)):
                partial = path.with_name(f"{path.name}.partial")
                path.parent.mkdir(parents=True, exist_ok=True)
                _ask(name, lambda each=each, partial=partial: _fetch(name, str(info.sha), each, partial))
                if not each.matches(partial):
                    partial.unlink()
                    raise InvalidModel(
                        f"{name}: {each.name} is not what the hub says it is (its hash differs); pull again"
                    )
                os.replace(partial, path)
        files = {each.name: {"bytes": each.size, "sha256": hash_file(staging / each.name)} for each in wanted}
        _remove_strangers(staging, files)
        record = {"repo": name, "revision": info.sha, "files": files}
        write_atomically(staging / HUB_RECORD, (json.dumps(record, indent=1) + "\n").encode())
        shutil.rmtree(target, ignore_errors=True)
        os.replace(staging, target)
    except OSError as error:
        raise OutputError(f"{staging}: {error.strerror or error}; what is there is kept, pull again") from error
    return target


def _fetch(name: str, commit: str, remote: Remote, partial: Path) -> None:
    """Write a file into `partial`, from where that ends: the hub's library itself would begin again."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils._headers import build_hf_headers

    there = partial.stat().st_size if partial.exists() else 0
    with partial.open("r+b" if 0 < there < remote.size else "wb") as file:
        start = file.seek(0, os.SEEK_END)
        url = hf_hub_url(name, remote.name, revision=commit)
        http_get(url, file, resume_size=start, headers=build_hf_headers(), expected_size=remote.size,
                 displayed_filename=remote.name)  # fmt: skip


def recorded(folder: Path) -> dict[str, Any]:
    """What `pull` recorded in a folder; empty where it did not."""
    try:
        found = json.loads((folder / HUB_RECORD).read_text("utf-8"))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def select(name: str, files: Iterable[Remote], half: bool = False, file: str | None = None) -> list[Remote]:
    """What of a repository is a model: a diffusers folder's components, or one checkpoint.

    Raises InvalidRequest (several checkpoints and none named) or InvalidModel (nothing of either).
    """
    there = {each.name: each for each in files}
    if file is None and "model_index.json" in there:
        return _components(name, there, half)
    if (
        file is None
        and "config.json" in there
        and any(each.startswith(PART_WEIGHTS) and ".safetensors" in each for each in there)
    ):
        # Beside a component lies, now and then, a checkpoint of the same.
        own = [each for each in sorted(there) if "/" not in each]
        own = [each for each in own if ".safetensors" not in each or each.startswith(PART_WEIGHTS)]
        return [there[each] for each in _of_folder(name, "", own, half)]
    checkpoints = [each for each in there if each.endswith(".safetensors")]
    if file is not None and file not in checkpoints:
        raise InvalidRequest(f"{name} has no safetensors file {file!r}; it has: {choices(checkpoints)}")
    if not checkpoints:
        pickled = next((each for each in there if each.endswith(PICKLES)), "")
        why = f"only {pickled}, a pickle, which can run code when opened" if pickled else "no weights"
        raise InvalidModel(f"{name} has no safetensors: it has {why}")
    if file is None and len(checkpoints) > 1:
        raise InvalidRequest(f"{name} has several checkpoints; give --file with one of: {choices(checkpoints)}")
    return [there[file or checkpoints[0]]]


def _components(name: str, there: Mapping[str, Remote], half: bool) -> list[Remote]:
    folders: dict[str, list[str]] = {}
    for each in sorted(there):
        parts = PurePosixPath(each).parts
        if len(parts) == 2 and (parts[0] in FOLDERS or parts[0].startswith("controlnet")):
            folders.setdefault(parts[0], []).append(each)
    kept = ["model_index.json"]
    for folder, names in folders.items():
        kept += _of_folder(name, folder, names, half)
    return [there[each] for each in kept]


def _of_folder(name: str, folder: str, names: list[str], half: bool) -> list[str]:
    """Of the files of one component: its weights in one type, its configs and texts."""
    weights = [each for each in names if ".safetensors" in each and "non_ema" not in each]
    small = [each for each in weights if HALF in each]
    plain = [each for each in weights if HALF not in each]
    pickled = [each for each in names if each.endswith(PICKLES) and not each.endswith("openvino_model.bin")]
    if pickled and not weights:
        where = f" in {folder}" if folder else ""
        raise InvalidModel(
            f"{name} has no safetensors{where}: it has {pickled[0]}, a pickle, which can run code when opened"
        )
    kept = small if small and (half or not plain) else plain
    return kept + [each for each in names if each.endswith((".json", ".txt")) and ".index." not in each]


def _remote(sibling: Any) -> Remote:
    lfs = sibling.lfs
    sha256 = str((lfs.get("sha256") if isinstance(lfs, dict) else getattr(lfs, "sha256", "")) or "")
    return Remote(str(sibling.rfilename), int(sibling.size or 0), sha256, str(sibling.blob_id or ""))


def _ask(name: str, question: Any) -> Any:
    """The hub's answer, or one line that says why there is none."""
    import httpx
    from huggingface_hub import errors

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
        status = getattr(error.response, "status_code", "an error")
        raise HubError(f"{name}: the hub answered {status}; what was pulled is kept, pull again") from error
    except (httpx.HTTPError, errors.LocalEntryNotFoundError, ConnectionError, TimeoutError) as error:
        raise HubError(
            f"{name}: the hub can't be reached ({_reason(error)}); what was pulled is kept, pull again"
        ) from error


def _reason(error: BaseException) -> str:
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0][:200]


def _check_space(staging: Path, wanted: Iterable[Remote]) -> None:
    need = sum(each.size for each in wanted if not (staging / each.name).is_file())
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
