"""Pictures on disk, with the parameters that made them inside; recorded.py reads them again.

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

from ..errors import InvalidRequest, OutputError, choices
from ..pipeline.result import Picture
from ..sampling.samplers import SAMPLERS

# Decoders of a few kilobytes of PNG can ask for gigabytes.
MAX_PIXELS = 100_000_000
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
USER_COMMENT, IMAGE_DESCRIPTION, EXIF_IFD = 0x9286, 0x010E, 0x8769


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
    lines = [settings.prompt + "".join(f" <lora:{name}:{weight:g}>" for name, (weight, _) in settings.loras.items())]
    if settings.negative:
        lines.append(f"Negative prompt: {settings.negative}")
    sampler = SAMPLERS[settings.sampler].title
    if settings.sigmas is not None:
        sampler += f" {settings.sigmas.replace('_', ' ').title().replace('Sgm', 'SGM')}"
    values = {
        "Steps": settings.steps,
        "Sampler": sampler,
        "CFG scale": f"{settings.guidance:g}",
        "Seed": settings.seed,
        "Size": f"{settings.width}x{settings.height}",
        **({} if settings.clip_skip == 1 else {"Clip skip": settings.clip_skip}),
        **({"Safety checker": "off"} if settings.safety is False else {}),
        **({} if settings.strength is None else {"Denoising strength": f"{settings.strength:g}"}),
        **({} if settings.mask_blur is None else {"Mask blur": f"{settings.mask_blur:g}"}),
        "Model hash": picture.model_hash,
        "Model": re.sub(r"[:,\s]+", " ", picture.model),
    }
    lines.append(", ".join(f"{key}: {value}" for key, value in values.items()))
    return "\n".join(lines)


def request_json(picture: Picture) -> str:
    """Everything that makes the picture again, ASCII only."""
    from .. import __version__

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
        exif[IMAGE_DESCRIPTION] = request
        exif.get_ifd(EXIF_IFD)[USER_COMMENT] = b"UNICODE\0" + text.encode("utf-16-be")
        picture.image.save(buffer, kind, exif=exif, quality=95)
    return buffer.getvalue()


def save(picture: Picture, path: Path) -> Path:
    """Write `picture` by the ending of `path`; all of it or nothing. Raises InvalidRequest or OutputError."""
    check_output(path)
    return write(encode(picture, FORMATS[path.suffix.lower()]), path)


def write(data: bytes, path: Path) -> Path:
    """Write a picture's bytes, all or nothing. Raises OutputError."""
    from ..files import write_atomically

    try:
        write_atomically(path, data)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise OutputError(f"{path} could not be written ({reason}); nothing was left behind") from error
    return path
