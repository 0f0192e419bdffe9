"""A report as text for the terminal, and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..terminal import columns
from .tables import failures, floors, plots, sizes, swaps, table, where


def text(report: dict[str, Any]) -> str:
    """The table for a terminal, what failed, and the recommendation."""
    titles, lines = table(report)
    shown = columns(titles, lines)
    for floor in floors(report):
        shown.append(f"noise floor, {floor[0]}: latent PSNR {floor[1]}, PSNR {floor[2]}, SSIM {floor[3]}")
    shown += [f"{name} failed: {why}" for name, why in failures(report)]
    shown += [f"note: {note}" for note in report["notes"]]
    return "\n".join([*shown, report["recommendation"]])


def markdown(report: dict[str, Any], folder: Path) -> str:
    """report.md: the same for a pull request or a README; plots and the grid are files beside it."""
    titles, lines = table(report)
    out = [f"# {report['model']}: variants against {report['reference']}", "", report["recommendation"], ""]
    out += _table(titles, lines)
    failed = [f"- **{name}** failed: {why}" for name, why in failures(report)]
    out += ["", *failed, "", "## Noise floor", ""]
    out += _table(["", "latent PSNR", "PSNR", "SSIM", "MS-SSIM"], floors(report))
    if moved := swaps(report):
        parts = list(dict.fromkeys(part for row in moved.values() for part in row))
        out += [
            "",
            "## One component at a time",
            "",
            "PSNR in dB of the base's pictures with one component swapped.",
            "",
        ]
        out += _table(["", *parts], [[name, *(row.get(part, "–") for part in parts)] for name, row in moved.items()])
    out += ["", "## MB on disk", "", *_table(*sizes(report))]
    out += ["", *(f"![{plot.title}]({name}.png)\n" for name, plot in plots(report).items())]
    if (folder / "grid.png").is_file():
        out += ["![pictures, prompt by variant](grid.png)"]
    out += ["", "## What the figures are", ""]
    out += [f"- {name}: {meaning}" for name, meaning in report["definitions"].items()]
    out += [f"- {note}" for note in report["notes"]]
    return "\n".join(
        [*out, "", f"{len(report['prompts'])} prompts, seeds {_numbers(report['seeds'])}. {where(report)}", ""]
    )


def _numbers(values: Sequence[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"


def _table(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    rows = [titles, ["---"] * len(titles), *lines]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
