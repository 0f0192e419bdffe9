"""Parts from elsewhere: a source with another autoencoder, a ControlNet, a tiny autoencoder or an IP-Adapter.

Such parts are published by themselves, as folders with a config and safetensors, or as single files. A source with them
is a diffusers folder of links, so nothing downstream knows.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edge_sd.bundle.ip_adapter import FOLDER as ADAPTER
from edge_sd.bundle.library import MANIFEST, find_model, find_pulled, model_name
from edge_sd.bundle.parts import IMAGE_ENCODER, UPSCALER
from edge_sd.bundle.safetensors import check_readable
from edge_sd.errors import ConversionError, InvalidModel, InvalidRequest, ModelNotFound
from edge_sd.files import read_json, scratch

# Folder of a source -> the class of what goes there.
CLASSES = {"vae": "AutoencoderKL", "controlnet": "ControlNetModel", "vae_tiny": "AutoencoderTiny",
           IMAGE_ENCODER: "CLIPVisionModelWithProjection"}  # fmt: skip
# What is published as one file of safetensors, and put into its folder.
SINGLE = (UPSCALER, ADAPTER)


@contextmanager
def composed(source: str | Path, beside: Path, parts: Mapping[str, str | Path | None]) -> Iterator[str | Path]:
    """`source` if nothing is given; else a folder beside `beside`, removed at the end, of its parts and the given ones.

    `parts` are folder -> a part's folder, a model that has one, or ORG/NAME. Raises InvalidRequest, InvalidModel,
    ModelNotFound or ConversionError.
    """
    given = {
        name: Path(place) if name in SINGLE else find_part(name, place)
        for name, place in parts.items()
        if place is not None
    }
    if not given:
        yield source
        return
    whole = find_model(source, weights=True)
    given |= _image_encoder(whole, given)
    parent = beside.absolute().parent
    if not parent.is_dir():
        raise InvalidRequest(f"the folder {str(parent)!r}, where the bundle would go, does not exist")
    with scratch(parent / f"{beside.name}.composed") as folder:
        made = folder / model_name(whole)
        made.mkdir()
        try:
            for each in whole.iterdir():
                # The manifest's facts are of its own autoencoder.
                if each.name not in given and (each.name != MANIFEST or "vae" not in given):
                    link(each, made / each.name)
            for name, place in given.items():
                _put(name, place, made / name)
        except OSError as error:
            raise ConversionError(f"{parent}: {error.strerror or error}; nothing was made") from error
        yield made


def _image_encoder(whole: Path, given: Mapping[str, Path]) -> dict[str, Path]:
    """The CLIP of an adapter that is given without one: beside its file, as they are published, or the source's own.

    Raises InvalidRequest where there is none, or a CLIP alone is given.
    """
    if ADAPTER not in given:
        if IMAGE_ENCODER in given and not (whole / ADAPTER).is_dir():
            raise InvalidRequest("an image encoder goes with an IP-Adapter: give --ip-adapter FILE")
        return {}
    check_readable(given[ADAPTER])
    if IMAGE_ENCODER in given:
        return {}
    beside = given[ADAPTER].absolute().parent / IMAGE_ENCODER
    if (beside / "config.json").is_file():
        return {IMAGE_ENCODER: find_part(IMAGE_ENCODER, beside)}
    if not (whole / IMAGE_ENCODER / "config.json").is_file():
        raise InvalidRequest(
            f"{given[ADAPTER].name} needs the CLIP that it was trained with; give its folder: --image-encoder FOLDER"
        )
    return {}


def _put(name: str, place: Path, target: Path) -> None:
    """Put a part into a source's folder. Raises as `composed`, and OSError."""
    if name == UPSCALER:
        from .upscaler import unpack

        unpack(place, target)
    elif name == ADAPTER:
        target.mkdir()
        link(place, target / place.with_suffix(".safetensors").name)
    else:
        link(place, target)


def find_part(name: str, place: str | Path) -> Path:
    """The folder of the part that belongs into a source's folder `name`. Raises as `composed`."""
    folder = Path(place) if Path(place).is_dir() else find_pulled(str(place))
    if folder is None:
        raise ModelNotFound(f"no {name} {str(place)[:200]!r}: neither a folder nor pulled from the hub")
    for candidate in (folder, folder / name):
        if (candidate / "config.json").is_file():
            found = _class(read_json(candidate / "config.json"))
            if found != CLASSES[name]:
                raise InvalidModel(f"{candidate} is {found or 'of no class'}; a {name} is {CLASSES[name]}")
            return candidate.resolve()
    raise InvalidRequest(f"{folder} has neither config.json nor {name}/config.json, as a {name} has")


def _class(config: Mapping[str, Any]) -> str | None:
    """What a config of diffusers or transformers is of."""
    names = config.get("architectures")
    return config.get("_class_name") or (str(names[0]) if isinstance(names, list) and names else None)


def link(source: Path, target: Path) -> None:
    """A link to a file or a folder; a copy of it where links are not allowed."""
    try:
        os.symlink(source.resolve(), target, target_is_directory=source.is_dir())
    except OSError:
        # Windows lets only some people link.
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, target)
