"""The pictures of a report: which are shown, and in which form. They are read from the work folder."""

from __future__ import annotations

import base64
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, ImageChops, ImageDraw, ImageFont

from edge_sd.images.files import encode, write

SIDE = 256  # Larger pictures are shrunk in the page; the files in the work folder are whole.
SHOTS = 12  # rows of the grid
DIFFERENCE = 8  # times brighter


def shown_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The reference and the variants that drew."""
    return [row for row in report["rows"] if row["kind"] in ("reference", "variant") and "pictures" in row]


def shown_shots(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The first shots, and after them the worst of every variant: shot, prompt, seed."""
    rows = shown_rows(report)
    if not rows:
        return []
    everything = {picture["shot"]: picture for row in rows for picture in row["pictures"]}
    wanted = [picture["shot"] for picture in rows[0]["pictures"][:SHOTS]]
    wanted += [shot for row in rows for shot in row.get("worst", [])]
    return [everything[shot] for shot in dict.fromkeys(wanted)]


def data_uri(path: Path) -> str:
    """A picture as lossless WebP in a data: address, at most SIDE pixels high and wide."""
    with Image.open(path) as image:
        small = image.convert("RGB")
        small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        data = BytesIO()
        small.save(data, "WEBP", lossless=True)
    return "data:image/webp;base64," + base64.b64encode(data.getvalue()).decode()


def save_grid(report: dict[str, Any], folder: Path, path: Path, side: int = 96, count: int = 6) -> None:
    """grid.png: a line for each of the first shots; for each variant its picture, and under it the difference."""
    rows = shown_rows(report)
    if not rows:
        return
    shots = [picture["shot"] for picture in rows[0]["pictures"][:count]]
    font = ImageFont.load_default(11)
    sheet = Image.new("RGB", (side * len(shots) + 150, (2 * side * len(rows)) - side), "white")
    pen = ImageDraw.Draw(sheet)
    y = 0
    for row in rows:
        pen.text((6, y + side // 2), row["name"], "black", font, "lm")
        if row["kind"] != "reference":
            pen.text((6, y + side + side // 2), f"difference x {DIFFERENCE}", "#777777", font, "lm")
        for n, shot in enumerate(shots):
            own = _open(folder / row["folder"] / f"{shot}.png")
            sheet.paste(_small(own, side), (150 + n * side, y))
            if row["kind"] != "reference":
                theirs = _open(folder / rows[0]["folder"] / f"{shot}.png")
                sheet.paste(_small(_difference(own, theirs), side), (150 + n * side, y + side))
        y += side if row["kind"] == "reference" else 2 * side
    write(encode(sheet, "PNG"), path)


def _open(path: Path) -> Image.Image:
    with Image.open(path) as image:
        whole: Image.Image = image.convert("RGB")
        return whole


def _small(image: Image.Image, side: int) -> Image.Image:
    return image.resize((side, side), Image.Resampling.LANCZOS)


def _difference(a: Image.Image, b: Image.Image) -> Image.Image:
    brighter = [min(255, value * DIFFERENCE) for value in range(256)]
    return ImageChops.difference(a, b).point(brighter * 3)
