"""Pictures on disk, with the parameters that made them inside.

PNG        text chunks `parameters` (AUTOMATIC1111's text) and `edge_sd` (JSON, the exact request)
JPEG/WebP  EXIF UserComment with the same text, EXIF ImageDescription with the JSON
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any

from .errors import InvalidRequest, OutputError, choices
from .request import Picture
from .samplers import SAMPLERS

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_USER_COMMENT, _IMAGE_DESCRIPTION, _EXIF_IFD = 0x9286, 0x010E, 0x8769


def check_output(path: Path) -> None:
    """Refuse a path that no picture can be written to, before any time is spent on drawing."""
    if path.suffix.lower() not in FORMATS:
        found = path.suffix or "no ending"
        raise InvalidRequest(f"{path.name!r} is not a picture's name ({found}); valid endings: {choices(FORMATS)}")
    folder = path.parent
    if not folder.is_dir():
        raise InvalidRequest(f"the output folder {str(folder)!r} does not exist")
    if path.is_dir():
        raise InvalidRequest(f"the output {str(path)!r} is a folder")
    if not os.access(folder, os.W_OK):
        raise InvalidRequest(f"the output folder {str(folder)!r} cannot be written to")


def parameters_text(picture: Picture) -> str:
    """AUTOMATIC1111's text; values hold no ":" or ",", which its readers stumble over."""
    settings = picture.settings
    lines = [settings.prompt]
    if settings.negative:
        lines.append(f"Negative prompt: {settings.negative}")
    sampler = SAMPLERS[settings.sampler].title
    values = {
        "Steps": settings.steps,
        "Sampler": sampler,
        "CFG scale": f"{settings.guidance:g}",
        "Seed": settings.seed,
        "Size": f"{settings.width}x{settings.height}",
        **({} if settings.strength is None else {"Denoising strength": f"{settings.strength:g}"}),
        **({} if settings.mask_blur is None else {"Mask blur": f"{settings.mask_blur:g}"}),
        "Model hash": picture.model_hash,
        "Model": re.sub(r"[:,\s]+", " ", picture.model),
    }
    lines.append(", ".join(f"{key}: {value}" for key, value in values.items()))
    return "\n".join(lines)


def request_json(picture: Picture) -> str:
    """Everything that makes the picture again, ASCII only."""
    from . import __version__

    return json.dumps(
        {
            "version": __version__,
            "request": asdict(picture.settings),
            "model": picture.model,
            "model_hash": picture.model_hash,
            "variant": picture.variant,
            "device": picture.device,
        }
    )


def read_request(path: Path) -> dict[str, Any]:
    """The JSON that `save` put into a picture. InvalidRequest if there is none."""
    from PIL import Image

    try:
        with Image.open(path, formats=["PNG", "JPEG", "WEBP"]) as image:
            text = image.info.get("edge_sd") if image.format == "PNG" else image.getexif().get(_IMAGE_DESCRIPTION)
        document = json.loads(text or "")
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"{path} holds no edge-sd request") from error
    if not isinstance(document, dict) or not isinstance(document.get("request"), dict):
        raise InvalidRequest(f"{path} holds no edge-sd request")
    return document


def encode(picture: Picture, kind: str) -> bytes:
    """The bytes of a PNG, JPEG or WEBP file."""
    from PIL.Image import Exif
    from PIL.PngImagePlugin import PngInfo

    buffer = BytesIO()
    text, request = parameters_text(picture), request_json(picture)
    if kind == "PNG":
        chunks = PngInfo()
        # iTXt carries UTF-8; tEXt would be Latin-1.
        add = chunks.add_text if text.isascii() else chunks.add_itxt
        add("parameters", text)
        chunks.add_text("edge_sd", request)
        picture.image.save(buffer, "PNG", pnginfo=chunks)
    else:
        exif = Exif()
        exif[_IMAGE_DESCRIPTION] = request
        exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = b"UNICODE\0" + text.encode("utf-16-be")
        picture.image.save(buffer, kind, exif=exif, quality=95)
    return buffer.getvalue()


def save(picture: Picture, path: Path) -> Path:
    """Write `picture` by the ending of `path`; all of it or nothing. Raises InvalidRequest or OutputError."""
    from .bundle import write_atomically

    check_output(path)
    try:
        write_atomically(path, encode(picture, FORMATS[path.suffix.lower()]))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise OutputError(f"{path} could not be written ({reason}); nothing was left behind") from error
    return path
