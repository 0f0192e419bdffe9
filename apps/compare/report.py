"""The report as data, and its forms for people: a table in the terminal, Markdown, PNG plots. `page` makes the HTML.

report.json holds everything; the other files are made of it and of the pictures. Everything in it but `speed`,
`recommendation` and what follows from them is the same again for the same seeds on the same machine.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edge_sd.errors import InvalidModel, OutputError
from edge_sd.files import write_atomically

from .machine import machine
from .measure import Work
from .plan import Artist, Comparison, component_bytes
from .plots import COLOURS, Plot, Point, Series, save_png
from .score import METRICS, Scorer, spread
from .verdict import pareto, sentence

FORMAT = 1
SPEED = {
    "load": "opening the model and loading all components, files in the system's cache",
    "first": "from the start of a fresh process to the pixels of its first picture",
    "step": "median of the steps of the process's second picture, its first step left out",
    "decode": "the decoder, in the second picture",
    "picture": "the second picture as a whole",
    "energy": "joules of the processor's packages during the second picture, other programs' too (Linux's powercap)",
    "memory": "largest resident set of the process up to its first picture",
}


def make_report(
    comparison: Comparison,
    work: dict[Artist, Work],
    failed: dict[str, str],
    folder: Path,
    min_psnr: float,
    max_size: float | None,
) -> dict[str, Any]:
    """Everything that was found, as JSON values; `failed` are variants that could not even be made, and why."""
    scorer = Scorer(comparison, work)
    rows = []
    for row in comparison.rows:
        its = work[row.artist]
        entry: dict[str, Any] = {"name": row.name, "kind": row.kind, "against": row.against.name, "variant": ""}
        if row.kind in ("reference", "variant"):
            entry |= {"variant": row.artist.variant, "bytes": _bytes(comparison, row.artist), **its.about}
            if comparison.numerics_only(row.artist):
                entry["numerics_only"] = True
            if its.times:
                entry["speed"] = _speed(its.times)
        if row.kind == "swap":
            entry |= {"part": row.artist.part or "all", "donor": row.artist.donor or row.artist.variant}
        entry["folder"] = its.folder.relative_to(folder).as_posix()
        rows.append(entry | scorer.score(row))
    rows += [{"name": name, "kind": "variant", "variant": name, "error": why} for name, why in failed.items()]
    measured = {row["name"]: (row["bytes"]["total"], row["quality"]["psnr"]["mean"]) for row in rows
                if row["kind"] == "variant" and "quality" in row}  # fmt: skip
    return {
        "format": FORMAT,
        "model": comparison.bundle.name,
        "reference": comparison.reference.name,
        "prompts": list(dict.fromkeys(shot.prompt for shot in comparison.shots)),
        "seeds": sorted({shot.seed for shot in comparison.shots}),
        "rows": rows,
        "pareto": pareto(measured),
        "recommendation": sentence(rows, min_psnr, max_size),
        "notes": [*comparison.notes, *scorer.notes, *_unmeasured(rows), *_redrawn(rows)],
        "definitions": {**METRICS, **SPEED},
        "machine": machine(),
    }


def _bytes(comparison: Comparison, artist: Artist) -> dict[str, int]:
    if artist.variant:
        return component_bytes(comparison.bundle, artist.variant)
    assert comparison.weights is not None
    folders = {"text_encoder": "text_encoder", "unet": "unet", "vae": "vae"}
    sizes = {name: sum(p.stat().st_size for p in (comparison.weights / at).glob("*.safetensors"))
             for name, at in folders.items()}  # fmt: skip
    return {**sizes, "total": sum(sizes.values())}


def _speed(times: Sequence[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in SPEED:
        values = [each[name] for each in times if each.get(name) is not None]
        if values:
            found[name] = spread(values)
    return {**found, "rounds": len(times), "same": all(each["same"] for each in times)}


def _unmeasured(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What a reader may look for and does not find, and why."""
    notes = []
    timed = [row["speed"] for row in rows if "speed" in row]
    if timed and not any("energy" in speed for speed in timed):
        notes.append("energy: not measured, since this system lets nobody read a counter of it (Linux's powercap)")
    return notes


def _redrawn(rows: Sequence[dict[str, Any]]) -> list[str]:
    timed = [row for row in rows if "speed" in row]
    unsteady = [row["name"] for row in timed if not row["speed"]["same"]]
    if unsteady:
        return [f"another process draws another picture of the same seed: {', '.join(unsteady)}"]
    rounds = sum(row["speed"]["rounds"] for row in timed)
    return [f"each timed process drew the first picture again, {rounds} in all: bit for bit the same"] if timed else []


def read_report(folder: Path) -> dict[str, Any]:
    """The report in a folder. Raises InvalidModel where there is none."""
    path = folder / "report.json"
    try:
        report: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidModel(f"{folder} holds no report; make one: edge-sd compare MODEL --report {folder}") from error
    if report.get("format") != FORMAT:
        raise InvalidModel(f"{path} has format {report.get('format')!r}; this version of edge-sd reads {FORMAT}")
    return report


def write_report(report: dict[str, Any], folder: Path) -> Path:
    """Write report.json, .md, .html and the plots into `folder`; returns the page. Raises OutputError."""
    from .page import page
    from .pictures import save_grid

    try:
        for name, plot in plots(report).items():
            save_png(plot, folder / f"{name}.png")
        save_grid(report, folder, folder / "grid.png")
        write_atomically(folder / "report.md", markdown(report, folder).encode())
        write_atomically(folder / "report.html", page(report, folder).encode())
        # The data comes last: where it is, the rest is whole.
        write_atomically(folder / "report.json", (json.dumps(report, indent=1, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        raise OutputError(f"the report in {folder} cannot be written: {error.strerror or error}") from error
    return folder / "report.html"


def main_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The reference and the variants, the rows that the table is about."""
    return [row for row in report["rows"] if row["kind"] in ("reference", "variant")]


def colours(report: dict[str, Any]) -> dict[str, str]:
    """A colour for each variant, the same in all plots."""
    names = [row["name"] for row in main_rows(report)]
    return {name: COLOURS[n % len(COLOURS)] for n, name in enumerate(names)}


def plots(report: dict[str, Any]) -> dict[str, Plot]:
    """Those that there is something to draw in: quality over size, and the divergence of every step."""
    chosen: dict[str, Plot] = {}
    colour = colours(report)
    rows = {row["name"]: row for row in main_rows(report) if row["kind"] == "variant" and "quality" in row}

    def place(name: str) -> Point:
        return Point(rows[name]["bytes"]["total"] / 1e6, rows[name]["quality"]["psnr"]["mean"])

    if rows:
        front = tuple(place(name) for name in report["pareto"])
        dots = [Series(name, (place(name),), colour[name], label=True) for name in rows]
        series = (Series("Pareto front", front, "#9498a0", line=len(front) > 1, faint=True), *dots)
        chosen["size"] = Plot(
            "Quality over size", "MB on disk", "image PSNR, dB", series if len(front) > 1 else tuple(dots)
        )
    curves = tuple(
        Series(name, tuple(Point(n + 1, dB) for n, dB in enumerate(row["divergence"])), colour[name], line=True)
        for name, row in rows.items()
        if "divergence" in row
    )
    if curves:
        chosen["steps"] = Plot("Divergence per step", "step", "latent PSNR, dB", curves, from_zero=False, whole=True)
    return chosen


def cells(row: dict[str, Any]) -> dict[str, str]:
    """The figures of a main row, column title -> text; "–" is not measured."""
    quality, speed = row.get("quality", {}), row.get("speed", {})

    def seconds(name: str) -> str:
        return _seconds(speed[name]["median"]) if name in speed else "–"

    def quality_of(name: str, form: str, error: bool = False) -> str:
        if name not in quality:
            return "–"
        text = form.format(quality[name]["mean"])
        return f"{text} ± {form.format(quality[name]['error'])}" if error else text

    return {
        "MB": f"{row['bytes']['total'] / 1e6:.1f}" if "bytes" in row else "–",
        "load": seconds("load"),
        "first picture": seconds("first"),
        "step": seconds("step"),
        "decode": seconds("decode"),
        "energy": f"{speed['energy']['median']:.1f} J" if "energy" in speed else "–",
        "memory": f"{speed['memory']['median'] / 2**20:.0f} MiB" if "memory" in speed else "–",
        "latent PSNR": quality_of("latent_psnr", "{:.1f}"),
        "PSNR": quality_of("psnr", "{:.1f}", error=True),
        "median": f"{quality['psnr']['median']:.1f}" if "psnr" in quality else "–",
        "worst": f"{quality['psnr']['worst']:.1f}" if "psnr" in quality else "–",
        "SSIM": quality_of("ssim", "{:.3f}"),
        "MS-SSIM": quality_of("ms_ssim", "{:.3f}"),
        "LPIPS": quality_of("lpips", "{:.4f}"),
        "agreement": quality_of("agreement", "{:.0%}"),
        "CLIP": quality_of("clip", "{:.2f}"),
    }


def _seconds(value: float) -> str:
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.2f} s"


def label(row: dict[str, Any]) -> str:
    """The name of a main row and what one must know to read its figures."""
    remarks = ["reference"] if row["kind"] == "reference" else []
    remarks += ["numerics, not speed"] if row.get("numerics_only") else []
    return f"{row['name']} ({'; '.join(remarks)})" if remarks else str(row["name"])


def table(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Titles and lines, without the columns that hold nothing."""
    rows = main_rows(report)
    filled = [cells(row) for row in rows]
    titles = [title for title in filled[0] if any(each[title] != "–" for each in filled)]
    lines = []
    for row, figures in zip(rows, filled, strict=True):
        lines.append([label(row), *(figures[title] for title in titles)])
    return ["variant", *titles], lines


def floors(report: dict[str, Any]) -> list[list[str]]:
    """The noise floor: name, latent PSNR, PSNR, SSIM, MS-SSIM."""
    found = []
    for row in report["rows"]:
        if row["kind"] == "floor":
            q = row.get("quality")
            figures = ["–"] * 4 if not q else [
                f"{q['latent_psnr']['mean']:.1f}", f"{q['psnr']['mean']:.1f}", f"{q['ssim']['mean']:.3f}",
                f"{q['ms_ssim']['mean']:.3f}",
            ]  # fmt: skip
            found.append([row["name"], *figures])
    return found


def swaps(report: dict[str, Any]) -> dict[str, dict[str, str]]:
    """ "VARIANT in BASE" -> component -> PSNR of the base's pictures with that component of the variant."""
    found: dict[str, dict[str, str]] = {}
    for row in report["rows"]:
        if row["kind"] == "swap":
            text = f"{row['quality']['psnr']['mean']:.1f}" if "quality" in row else "failed"
            found.setdefault(f"{row['donor']} into {row['against']}", {})[row["part"]] = text
    return found


def sizes(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Titles and lines of the MB that each component of the main rows has on disk."""
    sized = [row for row in main_rows(report) if "bytes" in row]
    parts = [*dict.fromkeys(part for row in sized for part in row["bytes"] if part != "total"), "total"]
    lines = [
        [row["name"], *(f"{row['bytes'][p] / 1e6:.2f}" if p in row["bytes"] else "–" for p in parts)] for row in sized
    ]
    return ["variant", *parts], lines


def failures(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and reason of each row that failed; what failed only because a variant did is not told again."""
    found: list[tuple[str, str]] = []
    for row in (row for row in report["rows"] if "error" in row):
        own = row["kind"] in ("reference", "variant")
        if own or not any(row["error"].endswith(known) for _, known in found):
            found.append((row["name"], row["error"]))
    return found


def text(report: dict[str, Any]) -> str:
    """The table for a terminal, what failed, and the recommendation."""
    titles, lines = table(report)
    widths = [max(len(line[n]) for line in [titles, *lines]) for n in range(len(titles))]
    shown = []
    for line in [titles, *lines]:
        first, *rest = (cell.ljust(w) if n == 0 else cell.rjust(w) for n, (cell, w) in enumerate(zip(line, widths)))  # noqa: B905
        shown.append("  ".join([first, *rest]).rstrip())
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


def where(report: dict[str, Any]) -> str:
    """The machine in a line."""
    it = report["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in it["versions"].items())
    cores = f"{it['cores']} core{'s' * (it['cores'] != 1)}"
    return f"{it['processor']}, {cores}, {it['system']}, Python {it['python']}, {versions}"


def _numbers(values: Sequence[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"


def _table(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    rows = [titles, ["---"] * len(titles), *lines]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
