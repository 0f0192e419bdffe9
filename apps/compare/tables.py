"""Tables and curves of a report, for its page, its text and its Markdown."""

from __future__ import annotations

from typing import Any

from .plots import COLOURS, Plot, Point, Series


def plots(report: dict[str, Any]) -> dict[str, Plot]:
    """Plots with data: quality over size, and the divergence of every step."""
    chosen: dict[str, Plot] = {}
    colour = colours(report)
    rows = {row["name"]: row for row in main_rows(report) if row["kind"] == "variant" and "quality" in row}

    def place(name: str) -> Point:
        return Point(rows[name]["bytes"]["compared"] / 1e6, rows[name]["quality"]["psnr"]["mean"])

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
    ends = ("compared", "total")
    parts = [*dict.fromkeys(part for row in sized for part in row["bytes"] if part not in ends), *ends]
    lines = [
        [row["name"], *(f"{row['bytes'][p] / 1e6:.2f}" if p in row["bytes"] else "–" for p in parts)] for row in sized
    ]
    return ["variant", *parts], lines


def failures(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and reason of each row that failed, without rows that failed only because their variant did."""
    found: list[tuple[str, str]] = []
    for row in (row for row in report["rows"] if "error" in row):
        own = row["kind"] in ("reference", "variant")
        if own or not any(row["error"].endswith(known) for _, known in found):
            found.append((row["name"], row["error"]))
    return found


def where(report: dict[str, Any]) -> str:
    """The machine in a line."""
    it = report["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in it["versions"].items())
    cores = f"{it['cores']} core{'s' * (it['cores'] != 1)}"
    return f"{it['processor']}, {cores}, {it['system']}, Python {it['python']}, {versions}"


def main_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The reference and the variants, the rows that the table is about."""
    return [row for row in report["rows"] if row["kind"] in ("reference", "variant")]


def colours(report: dict[str, Any]) -> dict[str, str]:
    """A colour for each variant, the same in all plots."""
    names = [row["name"] for row in main_rows(report)]
    return {name: COLOURS[n % len(COLOURS)] for n, name in enumerate(names)}


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
        "MB": f"{row['bytes']['compared'] / 1e6:.1f}" if "bytes" in row else "–",
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


def label(row: dict[str, Any]) -> str:
    """The name of a main row, with a remark where its figures need one."""
    remarks = ["reference"] if row["kind"] == "reference" else []
    remarks += [f"from {row['origin']}"] if row.get("origin") else []
    remarks += ["numerics, not speed"] if row.get("numerics_only") else []
    return f"{row['name']} ({'; '.join(remarks)})" if remarks else str(row["name"])


def _seconds(value: float) -> str:
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.2f} s"
