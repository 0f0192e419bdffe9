"""Pictures on disk, with the texts that tell how they were made inside.

PNG        text chunks `parameters` (AUTOMATIC1111's text) and `edge_sd` (JSON, the exact request)
JPEG/WebP  EXIF UserComment with the same text, EXIF ImageDescription with the JSON
"""

from __future__ import annotations

import os
import struct
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InvalidRequest, OutputError, choices
from ..files import write_atomically, write_new
from .metadata import EXIF_IFD, IMAGE_DESCRIPTION, USER_COMMENT

if TYPE_CHECKING:
    from PIL.Image import Image

# Decoders of a few kilobytes of PNG can ask for gigabytes.
MAX_PIXELS = 50_000_000
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
# Types of EXIF's fields.
BYTE, UNDEFINED = 1, 7
# Bytes of an EXIF block in a JPEG: a segment's 65,535 with its length.
EXIF_LIMIT = 65_533


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


class TooLongForExif(OutputError):
    """The texts of a picture are longer than a JPEG holds: 64 kB (JEITA CP-3451, section 4.7.2)."""


def encode(image: Image, kind: str, text: str = "", request: str = "", quality: int = 95) -> bytes:
    """The bytes of a PNG, JPEG or WEBP file with both texts inside, where they are not ""; `request` is ASCII.

    quality   1 to 100, of JPEG and WebP
    Raises TooLongForExif.
    """
    from PIL.PngImagePlugin import PngInfo

    buffer = BytesIO()
    if kind == "PNG":
        chunks = PngInfo()
        if text:
            # iTXt carries UTF-8; tEXt would be Latin-1.
            add = chunks.add_text if text.isascii() else chunks.add_itxt
            add("parameters", text)
        if request:
            chunks.add_text("edge_sd", request)
        image.save(buffer, "PNG", pnginfo=chunks)
    else:
        exif = _exif(request, text)
        if kind == "JPEG" and len(exif) > EXIF_LIMIT:
            raise TooLongForExif("the prompt and the other settings are too long for a JPEG's EXIF, 64 kB")
        image.save(buffer, kind, exif=exif, quality=quality)
    return buffer.getvalue()


def _exif(description: str, comment: str) -> bytes:
    """EXIF with an ASCII description and a comment in UTF-16, each where it is not "".

    Pillow gives every field of bytes the type BYTE. The standard has UNDEFINED for UserComment, and readers of
    AUTOMATIC1111's files fail on others. Both types count bytes, so that the type's own number is all that changes.
    """
    from PIL.Image import Exif

    exif = Exif()
    if description:
        exif[IMAGE_DESCRIPTION] = description
    if not comment:
        return exif.tobytes()
    exif.get_ifd(EXIF_IFD)[USER_COMMENT] = b"UNICODE\0" + comment.encode("utf-16-be")
    data = exif.tobytes()
    order = "<" if data[6:8] == b"II" else ">"
    entry = struct.pack(f"{order}HH", USER_COMMENT, BYTE)
    # The description before it is ASCII, which the entry's bytes are not.
    return data.replace(entry, struct.pack(f"{order}HH", USER_COMMENT, UNDEFINED), 1)


def save(image: Image, path: str | Path, text: str = "", request: str = "") -> Path:
    """Write `image` as PNG, JPEG or WebP by the ending of `path`; all of it or nothing.

    `text` and `request` are put inside, where they are not "": a text for people, and JSON in ASCII. Returns the path.
    Raises InvalidRequest or OutputError.

    Example:
        save_picture(Image.new("RGB", (64, 64), "white"), "white.png")
    """
    path = Path(path)
    check_output(path)
    return write(encode(image, FORMATS[path.suffix.lower()], text, request), path)


def write(data: bytes, path: Path, new: bool = False) -> Path:
    """Write a picture's bytes, all or nothing; a `new` file replaces none. Raises OutputError, FileExistsError."""
    try:
        (write_new if new else write_atomically)(path, data)
    except FileExistsError:
        raise
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise OutputError(f"{path} could not be written ({reason}); nothing was left behind") from error
    return path
