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
from .plan import Artist, Comparison, common_parts, component_bytes, incomplete
from .plots import save_png
from .score import METRICS, Scorer, spread
from .tables import plots
from .text import markdown
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
    """All results as JSON values. `failed`: variants that could not be made, with the reason."""
    scorer = Scorer(comparison, work)
    main = (row.artist.variant for row in comparison.rows if row.kind in ("reference", "variant"))
    drawn = list(dict.fromkeys(filter(None, main)))
    common = common_parts(comparison.bundle, drawn)
    rows = []
    for row in comparison.rows:
        its = work[row.artist]
        entry: dict[str, Any] = {"name": row.name, "kind": row.kind, "against": row.against.name, "variant": ""}
        if row.kind in ("reference", "variant"):
            entry |= {"variant": row.artist.variant, "bytes": _bytes(comparison, row.artist, common), **its.about}
            if row.artist.variant and (origin := comparison.bundle.variant(row.artist.variant).origin):
                entry["origin"] = origin
            if comparison.numerics_only(row.artist):
                entry["numerics_only"] = True
            if its.times:
                entry["speed"] = _speed(its.times)
        if row.kind == "swap":
            entry |= {"part": row.artist.part or "all", "donor": row.artist.donor or row.artist.variant}
        entry["folder"] = its.folder.relative_to(folder).as_posix()
        rows.append(entry | scorer.score(row))
    rows += [{"name": name, "kind": "variant", "variant": name, "error": why} for name, why in failed.items()]
    measured = {row["name"]: (row["bytes"]["compared"], row["quality"]["psnr"]["mean"]) for row in rows
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
        "notes": [
            *incomplete(comparison.bundle, drawn),
            *comparison.notes,
            *scorer.notes,
            *_unmeasured(rows),
            *_redrawn(rows),
        ],
        "definitions": {**METRICS, **SPEED},
        "machine": machine(),
    }


def _bytes(comparison: Comparison, artist: Artist, common: frozenset[str]) -> dict[str, int]:
    if artist.variant:
        return component_bytes(comparison.bundle, artist.variant, common)
    assert comparison.weights is not None
    denoiser = comparison.bundle.facts.denoiser
    folders = {"text_encoder": "text_encoder", denoiser: denoiser, "vae": "vae"}
    sizes = {name: sum(p.stat().st_size for p in (comparison.weights / at).glob("*.safetensors"))
             for name, at in folders.items()}  # fmt: skip
    return {**sizes, "compared": sum(sizes.values()), "total": sum(sizes.values())}


def _speed(times: Sequence[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in SPEED:
        values = [each[name] for each in times if each.get(name) is not None]
        if values:
            found[name] = spread(values)
    return {**found, "rounds": len(times), "same": all(each["same"] for each in times)}


def _unmeasured(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Notes on figures that were not measured, with the reason."""
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
