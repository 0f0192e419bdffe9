"""Texts inside a picture's file, read without decoding its pixels and within stated limits.

PNG    tEXt, zTXt, iTXt and eXIf chunks (PNG specification, third edition), also those after the pixels
JPEG   EXIF and the comment segment
WebP   EXIF and XMP chunks (RIFF)

A file from a stranger costs at most MAX_TEXT characters of memory a text and MAX_TOTAL together, and time that grows
with its length alone.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from ..errors import InvalidRequest

MAX_TEXT = 4 << 20
MAX_TOTAL = 16 << 20
# Chunks are a few bytes each: a file of 100 MB could hold eight million.
MAX_CHUNKS = 100_000
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
USER_COMMENT, IMAGE_DESCRIPTION, EXIF_IFD = 0x9286, 0x010E, 0x8769
MAKE, MODEL = 0x010F, 0x0110
# The names that EXIF's fields have among Texts.texts.
EXIF_NAMES = {IMAGE_DESCRIPTION: "ImageDescription", MAKE: "Make", MODEL: "Model", USER_COMMENT: "UserComment"}
XMP = "XML:com.adobe.xmp"


@dataclass(frozen=True)
class Texts:
    """What a file says: `texts` by the PNG's keyword, or EXIF_NAMES, XMP, "comment"; `size` in pixels."""

    kind: str
    size: tuple[int, int]
    texts: dict[str, str] = field(default_factory=dict)


def read_texts(path: Path) -> Texts:
    """The texts of a PNG, JPEG or WebP file. Raises InvalidRequest for none, one cut short, or beyond limits."""
    try:
        if not path.is_file():
            # A pipe would be waited for without end.
            raise InvalidRequest(f"{path} cannot be read ({'it is no file' if path.exists() else 'No such file'})")
        with path.open("rb") as file:
            head = file.read(12)
            file.seek(0)
            if head.startswith(PNG_SIGNATURE):
                return _read_png(file)
            if head[:4] == b"RIFF" and head[8:] == b"WEBP":
                return _read_webp(file)
            if head.startswith(b"\xff\xd8"):
                return _read_jpeg(file)
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error) as error:
        if isinstance(error, InvalidRequest):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InvalidRequest(f"{path} cannot be read ({reason})") from error
    raise InvalidRequest(f"{path} is no PNG, JPEG or WebP picture, or a damaged one")


def _read_png(file: BinaryIO) -> Texts:
    file.seek(len(PNG_SIGNATURE))
    size = (0, 0)
    texts: dict[str, str] = {}
    for kind, data in _png_chunks(file):
        if kind == b"IHDR":
            width, height = struct.unpack(">II", data[:8])
            size = int(width), int(height)
        elif kind == b"eXIf":
            _add_all(texts, _read_exif(data))
        elif (found := _png_text(kind, data)) is not None:
            _add_all(texts, dict([found]))
    return Texts("PNG", size, texts)


def _png_chunks(file: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    """Kind and data of the chunks that hold no pixels, up to IEND; each with its checksum compared."""
    wanted = {b"IHDR", b"tEXt", b"zTXt", b"iTXt", b"eXIf"}
    total = 0
    for _ in range(MAX_CHUNKS):
        head = file.read(8)
        if len(head) < 8:
            raise ValueError("the file is cut short")
        length, kind = struct.unpack(">I4s", head)
        if kind == b"IEND":
            return
        if kind not in wanted or length > MAX_TEXT:
            end = file.seek(length + 4, io.SEEK_CUR)
            # Seeking beyond the end succeeds, reading does not.
            if file.seek(0, io.SEEK_END) < end:
                raise ValueError("the file is cut short")
            file.seek(end)
            continue
        data, check = file.read(length), file.read(4)
        if len(data) < length or len(check) < 4:
            raise ValueError("the file is cut short")
        if zlib.crc32(kind + data) != int.from_bytes(check, "big"):
            raise ValueError(f"the checksum of its chunk {kind.decode('latin-1')} is wrong")
        total += length
        if total > MAX_TOTAL:
            raise ValueError(f"it holds more than {MAX_TOTAL >> 20} MiB of text")
        yield kind, data
    raise ValueError(f"it has more than {MAX_CHUNKS} chunks")


def _png_text(kind: bytes, data: bytes) -> tuple[str, str] | None:
    """Keyword and text of a tEXt, zTXt or iTXt chunk."""
    keyword, _, rest = data.partition(b"\0")
    name = keyword.decode("latin-1")
    if kind == b"tEXt":
        return name, _decoded(rest)
    if kind == b"zTXt":
        return name, _decoded(_inflated(rest[1:]))
    if kind == b"iTXt" and len(rest) >= 2:
        compressed, rest = rest[0], rest[2:]
        _, _, rest = rest.partition(b"\0")
        _, _, text = rest.partition(b"\0")
        return name, (_inflated(text) if compressed else text).decode("utf-8", "replace")
    return None


def _decoded(data: bytes) -> str:
    """tEXt is Latin-1 by the standard; several programs write UTF-8, which other text almost never is by chance."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _inflated(data: bytes) -> bytes:
    unpacking = zlib.decompressobj()
    text = unpacking.decompress(data, MAX_TEXT)
    if unpacking.unconsumed_tail:
        raise ValueError(f"a text unpacks to more than {MAX_TEXT >> 20} MiB")
    return text


def _read_webp(file: BinaryIO) -> Texts:
    length = int.from_bytes(file.read(8)[4:], "little")
    end = 8 + length
    file.seek(12)
    size = (0, 0)
    texts: dict[str, str] = {}
    for _ in range(MAX_CHUNKS):
        if file.tell() >= end:
            return Texts("WEBP", size, texts)
        head = file.read(8)
        if len(head) < 8:
            raise ValueError("the file is cut short")
        kind, count = head[:4], int.from_bytes(head[4:], "little")
        kept = min(count, MAX_TEXT) if kind in (b"EXIF", b"XMP ") else min(count, 16)
        data = file.read(kept)
        after = file.seek(count - len(data) + count % 2, io.SEEK_CUR)
        if len(data) < kept or file.seek(0, io.SEEK_END) < after - count % 2:
            raise ValueError("the file is cut short")
        file.seek(after)
        if kind in (b"VP8X", b"VP8 ", b"VP8L"):
            size = _webp_size(kind, data) or size
        elif kind == b"EXIF":
            _add_all(texts, _read_exif(data))
        elif kind == b"XMP ":
            _add_all(texts, {XMP: _decoded(data)})
    raise ValueError(f"it has more than {MAX_CHUNKS} chunks")


def _webp_size(kind: bytes, data: bytes) -> tuple[int, int] | None:
    """Width and height in the header of a WebP's canvas (VP8X), its lossy (VP8) or its lossless picture (VP8L)."""
    if kind == b"VP8X" and len(data) >= 10:
        return int.from_bytes(data[4:7], "little") + 1, int.from_bytes(data[7:10], "little") + 1
    if kind == b"VP8 " and len(data) >= 10:
        width, height = struct.unpack("<HH", data[6:10])
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L" and len(data) >= 5:
        bits = int.from_bytes(data[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return None


def _read_jpeg(file: BinaryIO) -> Texts:
    from PIL import Image

    try:
        # Opening reads the segments before the pixels and no more.
        opened = Image.open(file, formats=["JPEG"])
    except Image.DecompressionBombError as error:
        raise ValueError("it has more pixels than a picture that is opened here may have") from error
    with opened as image:
        texts = _read_exif(image.info["exif"]) if "exif" in image.info else {}
        comment = image.info.get("comment")
        if isinstance(comment, bytes) and len(comment) <= MAX_TEXT:
            texts["comment"] = _decoded(comment)
        if isinstance(found := image.info.get("xmp"), bytes) and len(found) <= MAX_TEXT:
            texts[XMP] = _decoded(found)
        size = image.size
    file.seek(-2, io.SEEK_END)
    tail = file.read()
    # Some writers pad after the end marker; one that is missing in the last 64 KiB is a file cut short.
    if tail != b"\xff\xd9":
        file.seek(max(0, file.seek(0, io.SEEK_END) - (64 << 10)))
        if b"\xff\xd9" not in file.read():
            raise ValueError("the file is cut short")
    return Texts("JPEG", size, texts)


def _read_exif(data: bytes) -> dict[str, str]:
    from PIL.Image import Exif

    exif = Exif()
    exif.load(data)
    found: dict[str, str] = {}
    # Fooocus leaves UserComment in the first directory, where the standard puts it into the Exif one.
    for directory in (exif, exif.get_ifd(EXIF_IFD)):
        for tag, name in EXIF_NAMES.items():
            value = directory.get(tag)
            if isinstance(value, (str, bytes)) and len(value) <= MAX_TEXT and value:
                found[name] = _decode_comment(value) if tag == USER_COMMENT else _exif_text(value)
    return found


def _exif_text(value: str | bytes) -> str:
    """ASCII fields hold any encoding in practice; Pillow decodes them as Latin-1."""
    try:
        return _decoded(value if isinstance(value, bytes) else value.encode("latin-1"))
    except UnicodeEncodeError:
        return str(value)


def _decode_comment(comment: bytes | str) -> str:
    """EXIF's UserComment: 8 bytes name the encoding. UTF-16 is big-endian unless it says so or plainly is not."""
    if isinstance(comment, str):
        return comment
    head, body = comment[:8], comment[8:]
    if head == b"UNICODE\0":
        if body[:2] in (b"\xff\xfe", b"\xfe\xff"):
            return body.decode("utf-16", "replace")
        # Text in Latin letters has its zeros first when big-endian; some writers follow the file's own order instead.
        little = body[1::2].count(0) > body[0::2].count(0)
        return body.decode("utf-16-le" if little else "utf-16-be", "replace")
    return _decoded(body if head in (b"ASCII\0\0\0", b"\0" * 8) else comment).strip("\0")


def _add_all(texts: dict[str, str], more: dict[str, str]) -> None:
    """The first text of a name stays: programs that save a picture again put theirs after it."""
    for name, text in more.items():
        texts.setdefault(name, text.removeprefix("\ufeff"))
