"""Contact sheets: the pictures of a batch in small, in the rows' order, with their numbers and prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edge_sd.images.files import save
from edge_sd.images.grids import grid

if TYPE_CHECKING:
    from PIL.Image import Image

# Pixels of a picture's side and of the lines below it; pictures on a sheet, and in a row of it.
SIDE, LINES, PICTURES, ACROSS = 192, 30, 96, 8


def write_sheets(folder: Path, rows: Sequence[tuple[Path, str]]) -> list[Path]:
    """Write contact-sheet.png, or contact-sheet-1.png, -2, … for many, of files and their captions.

    Raises InvalidRequest for a file that is no picture, OutputError.
    """
    sheets = [rows[n : n + PICTURES] for n in range(0, len(rows), PICTURES)]
    paths = []
    for n, sheet in enumerate(sheets, 1):
        number = f"-{n}" if len(sheets) > 1 else ""
        tiles = [_tile(path, caption) for path, caption in sheet]
        paths.append(save(grid(tiles, min(ACROSS, len(tiles))), folder / f"contact-sheet{number}.png"))
    return paths


def _tile(path: Path, caption: str) -> Image:
    """The picture in small, two lines of caption below it."""
    from PIL import Image as Images
    from PIL import ImageDraw, ImageFont

    from edge_sd.images.opening import open_picture

    image = open_picture(path, "picture")
    image.thumbnail((SIDE, SIDE))
    tile = Images.new("RGB", (SIDE + 8, SIDE + LINES + 8), "white")
    tile.paste(image, ((tile.width - image.width) // 2, 4 + (SIDE - image.height) // 2))
    font = ImageFont.load_default(11)
    draw = ImageDraw.Draw(tile)
    text = " ".join(caption.split())
    lines: list[str] = []
    while text and len(lines) < LINES // 14:
        fitting = next(n for n in range(len(text), 0, -1) if n == 1 or draw.textlength(text[:n], font) <= SIDE)
        lines.append(text[:fitting])
        text = text[fitting:].lstrip()
    draw.multiline_text((4, SIDE + 6), "\n".join(lines), "black", font, spacing=2)
    return tile
