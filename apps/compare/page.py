"""report.html: one file that opens without a network. Its style and behaviour are page.css and page.js beside this."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from .pictures import DIFFERENCE, SHOTS, data_uri, shown_rows, shown_shots
from .plots import Plot, svg
from .score import WORST
from .tables import failures, floors, plots, sizes, swaps, table, where

HERE = Path(__file__).parent
# In the titles of columns whose highest figure is the best; of all others it is the lowest.
HIGH = ("latent PSNR", "PSNR", "median", "worst", "SSIM", "MS-SSIM", "agreement", "CLIP")


def page(report: dict[str, Any], folder: Path) -> str:
    """The whole document; `folder` is the report's, which holds the pictures."""
    title = f"{report['model']}: variants against {report['reference']}"
    rows, shots = shown_rows(report), shown_shots(report)
    pictures = {
        f"{n}/{shot['shot']}": data_uri(folder / row["folder"] / f"{shot['shot']}.png")
        for n, row in enumerate(rows)
        for shot in shots
    }
    sections = [
        f"<h1>{escape(title)}</h1><p class=lead>{escape(report['recommendation'])}</p>",
        _failures(report),
        _table(*table(report), sortable=True),
        f"<p class=small>{escape(_scope(report))} Click a title to sort.</p>",
        _plots(report),
        _slider(rows, shots),
        _grid(rows, shots),
        _worst(report, rows, shots),
        _tables(report),
        _definitions(report),
    ]
    # "</" would end the script element wherever it stood in a prompt.
    data = json.dumps(pictures).replace("</", "<\\/")
    return (
        f"<!doctype html><html lang=en><head><meta charset=utf-8><title>{escape(title)}</title>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<style>{(HERE / 'page.css').read_text('utf-8')}</style></head><body><main>{''.join(sections)}</main>"
        f"<script type=application/json id=pictures>{data}</script>"
        f"<script>{(HERE / 'page.js').read_text('utf-8')}</script></body></html>\n"
    )


def _scope(report: dict[str, Any]) -> str:
    seeds = len(report["seeds"])
    return f"{len(report['prompts'])} prompts, {seeds} seed{'s' * (seeds > 1)}; means ± standard error."


def _table(titles: Sequence[str], lines: Iterable[Sequence[str]], sortable: bool = False) -> str:
    head = "".join(
        f"<th data-best={_best(each)}><button>{escape(each)}</button></th>" if sortable else f"<th>{escape(each)}</th>"
        for each in titles
    )
    body = "".join(
        f"<tr><th>{escape(first)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in rest)}</tr>"
        for first, *rest in lines
    )
    kind = "sortable" if sortable else "plain"
    return f"<div class=scroll><table class={kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _best(title: str) -> str:
    """Whether the best figure of a column is its highest or its lowest."""
    return "high" if title in HIGH else "low"


def _failures(report: dict[str, Any]) -> str:
    lines = "".join(f"<li><b>{escape(name)}</b> failed: {escape(why)}</li>" for name, why in failures(report))
    return f"<ul class=failed>{lines}</ul>" if lines else ""


def _plots(report: dict[str, Any]) -> str:
    figures = "".join(
        f"<figure><figcaption>{escape(plot.title)}</figcaption>{svg(plot)}{_legend(plot)}</figure>"
        for plot in plots(report).values()
    )
    return f"<div class=plots>{figures}</div>" if figures else ""


def _legend(plot: Plot) -> str:
    lines = [series for series in plot.series if series.line]
    keys = "".join(f'<li><i style="background:{each.colour}"></i>{escape(each.name)}</li>' for each in lines)
    return f"<ul class=legend>{keys}</ul>" if lines else ""


def _slider(rows: list[dict[str, Any]], shots: list[dict[str, Any]]) -> str:
    if len(rows) < 2:
        return ""

    def options(chosen: int) -> str:
        return "".join(
            f"<option value={n}{' selected' * (n == chosen)}>{escape(row['name'])}</option>"
            for n, row in enumerate(rows)
        )

    of_shots = "".join(
        f'<option value="{escape(s["shot"])}">{escape(s["prompt"])}, seed {s["seed"]}</option>' for s in shots
    )
    return (
        "<h2>Two side by side</h2><div class=slider><div class=choices>"
        f"<label>left <select id=left>{options(0)}</select></label>"
        f"<label>right <select id=right>{options(len(rows) - 1)}</select></label>"
        f"<label>picture <select id=shot>{of_shots}</select></label></div>"
        "<div class=stage><img id=below alt=right><img id=above alt=left><hr></div>"
        "<input id=divide type=range min=0 max=100 value=50 aria-label='where left ends and right begins'></div>"
    )


def _picture(n: int, row: dict[str, Any], shot: dict[str, Any], caption: str) -> str:
    """A picture and, laid over it, the reference's, which the page subtracts when differences are wanted."""
    own = next(each for each in row["pictures"] if each["shot"] == shot["shot"])
    value = f"<small>{own['psnr']:.1f} dB</small>" if "psnr" in own else ""
    key, alt = f"{n}/{shot['shot']}", f"{shot['prompt']}, {row['name']}"
    over = f'<img data-p="{escape("0/" + shot["shot"])}" alt="">' if n else ""
    frame = (
        f'<span class="frame{"" if n else " reference"}"><img data-p="{escape(key)}" alt="{escape(alt)}">{over}</span>'
    )
    return f"<figure>{frame}<figcaption>{escape(caption)} {value}</figcaption></figure>"


def _grid(rows: list[dict[str, Any]], shots: list[dict[str, Any]]) -> str:
    lines = []
    for shot in shots[:SHOTS]:
        strip = "".join(_picture(n, row, shot, row["name"]) for n, row in enumerate(rows))
        heading = f"<h3>{escape(shot['prompt'])} <small>seed {shot['seed']}</small></h3>"
        lines.append(f"<section>{heading}<div class=strip>{strip}</div></section>")
    if not lines:
        return ""
    what = f"differences from the reference, {DIFFERENCE} times brighter"
    label = f"<label><input type=checkbox id=difference> {what}</label>"
    return f"<h2>Pictures</h2>{label}<div class=grid>{''.join(lines)}</div>"


def _worst(report: dict[str, Any], rows: list[dict[str, Any]], shots: list[dict[str, Any]]) -> str:
    by_name = {shot["shot"]: shot for shot in shots}
    lines = []
    for n, row in enumerate(rows):
        if worst := row.get("worst"):
            strip = "".join(_picture(n, row, by_name[name], by_name[name]["prompt"]) for name in worst)
            lines.append(f"<h3>{escape(row['name'])}</h3><div class=strip>{strip}</div>")
    return f"<details><summary>The worst {WORST} of each variant</summary>{''.join(lines)}</details>" if lines else ""


def _tables(report: dict[str, Any]) -> str:
    out = ["<h2>What a decibel means here</h2><p>How far apart pictures are whose difference is known.</p>"]
    out.append(_table(["noise floor", "latent PSNR", "PSNR", "SSIM", "MS-SSIM"], floors(report)))
    if moved := swaps(report):
        parts = list(dict.fromkeys(part for row in moved.values() for part in row))
        out.append(
            "<h2>Which component costs what</h2><p>PSNR in dB of the base's pictures, one component swapped.</p>"
        )
        out.append(
            _table(["", *parts], [[name, *(row.get(part, "–") for part in parts)] for name, row in moved.items()])
        )
    out.append(
        "<h2>MB on disk</h2><p>Files that components share are counted in each of them, and once in the sums.</p>"
    )
    out.append(_table(*sizes(report)))
    if timed := [row for row in report["rows"] if "speed" in row]:
        names = ["load", "first", "step", "decode"]
        rounds = timed[0]["speed"]["rounds"]
        spreads = [[row["name"], *(_spread(row["speed"][name], rounds) for name in names)] for row in timed]
        what = f"Median, lowest and highest of {rounds} interleaved rounds." if rounds > 1 else "One round."
        out.append(f"<h2>Seconds</h2><p>{what}</p>")
        out.append(_table(["variant", *names], spreads))
    settings = [
        [row["name"], row["device"], *(str(value) for value in row["settings"].values())]
        for row in report["rows"]
        if "settings" in row
    ]
    if settings:
        out.append("<h2>Settings</h2>")
        out.append(_table(["variant", "device", "width", "height", "steps", "guidance", "sampler"], settings))
    return "".join(out)


def _spread(values: dict[str, float], rounds: int) -> str:
    if rounds == 1:
        return f"{values['median']:.3f}"
    return f"{values['median']:.3f} ({values['low']:.3f} to {values['high']:.3f})"


def _definitions(report: dict[str, Any]) -> str:
    terms = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in report["definitions"].items())
    notes = "".join(f"<li>{escape(note)}</li>" for note in report["notes"])
    return f"<h2>What the figures are</h2><dl>{terms}</dl><ul>{notes}</ul><p class=small>{escape(where(report))}</p>"
