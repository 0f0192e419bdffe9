"""Plots, laid out once and written twice: as SVG for the page, and as PNG by Pillow for everything else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, Literal, NamedTuple

from edge_sd.images.files import encode, write

# Observable's categorical colours: each is readable on white and on black.
COLOURS = ("#4269d0", "#ff725c", "#3ca951", "#efb118", "#a463f2", "#6cc5b0", "#ff8ab7", "#9c6b4e", "#97bbf5", "#9498a0")
WIDTH, HEIGHT = 420, 300
LEFT, RIGHT, TOP, BOTTOM = 40, 14, 28, 40
FONT, RADIUS = 12, 4.5


class Point(NamedTuple):
    x: float
    y: float


@dataclass(frozen=True)
class Series:
    """Points of one name; `line` joins them, `label` writes the name beside the last."""

    name: str
    points: tuple[Point, ...]
    colour: str
    line: bool = False
    label: bool = False
    faint: bool = False


@dataclass(frozen=True)
class Plot:
    """Axes start where the data does, but at 0 for x where `from_zero`; `whole` is for an x that counts."""

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    from_zero: bool = True
    whole: bool = False


class Mark(NamedTuple):
    """Something to draw, in pixels of a WIDTH x HEIGHT sheet."""

    kind: Literal["rule", "axis", "path", "dot", "text"]
    points: tuple[Point, ...]
    colour: str = ""
    text: str = ""
    anchor: Literal["start", "middle", "end"] = "start"
    faint: bool = False


@dataclass
class _Frame:
    """Data coordinates to pixels."""

    xs: list[float]
    ys: list[float]
    marks: list[Mark] = field(default_factory=list)

    def at(self, point: Point) -> Point:
        x0, x1, y0, y1 = self.xs[0], self.xs[-1], self.ys[0], self.ys[-1]
        return Point(
            LEFT + (point.x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (point.y - y0) / (y1 - y0) * (HEIGHT - BOTTOM - TOP),
        )


def ticks(low: float, high: float, about: int = 5, least: float = 0.0) -> list[float]:
    """Round numbers, 1, 2 or 5 times a power of ten and at least `least` apart, from below `low` to above `high`."""
    if high - low < 1e-9 * max(1.0, abs(low), abs(high)):
        low, high = low - 1, high + 1
    raw = max((high - low) / about, least)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * n for n in (1, 2, 5, 10) if power * n >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(n * step, 10) for n in range(first, last + 1)]


def lay_out(plot: Plot) -> list[Mark]:
    """The marks of a plot that has at least one point."""
    everything = [point for series in plot.series for point in series.points]
    xs = [point.x for point in everything]
    frame = _Frame(
        ticks(min([*xs, 0.0] if plot.from_zero else xs), max(xs), least=1.0 if plot.whole else 0.0),
        ticks(min(point.y for point in everything), max(point.y for point in everything)),
    )
    marks = frame.marks
    for y in frame.ys:
        left, right = frame.at(Point(frame.xs[0], y)), frame.at(Point(frame.xs[-1], y))
        marks.append(Mark("rule", (left, right)))
        marks.append(Mark("text", (Point(left.x - 6, left.y + 4),), text=f"{y:g}", anchor="end"))
    for x in frame.xs:
        foot = frame.at(Point(x, frame.ys[0]))
        marks.append(Mark("text", (Point(foot.x, foot.y + 16),), text=f"{x:g}", anchor="middle"))
    marks.append(Mark("axis", (frame.at(Point(frame.xs[0], frame.ys[0])), frame.at(Point(frame.xs[-1], frame.ys[0])))))
    middle = (LEFT + WIDTH - RIGHT) / 2
    marks.append(Mark("text", (Point(middle, HEIGHT - 6),), text=plot.x_label, anchor="middle"))
    # Above the axis, not beside it, where it would be rotated.
    marks.append(Mark("text", (Point(4, 11),), text=plot.y_label))
    for series in plot.series:
        pixels = tuple(frame.at(point) for point in series.points)
        if series.line and len(pixels) > 1:
            marks.append(Mark("path", pixels, series.colour, faint=series.faint))
        else:
            marks += [Mark("dot", (pixel,), series.colour) for pixel in pixels]
    dots = [mark.points[0] for mark in marks if mark.kind == "dot"]
    return marks + _labels([(s, frame.at(s.points[-1])) for s in plot.series if s.label], dots)


def _labels(labelled: Sequence[tuple[Series, Point]], dots: Sequence[Point]) -> list[Mark]:
    """Names beside their points, moved up or down so far that none covers another or a dot."""
    marks = []
    # left, right, y
    taken = [(dot.x - RADIUS, dot.x + RADIUS, dot.y + 4) for dot in dots]
    for series, point in sorted(labelled, key=lambda each: each[1].y):
        width = len(series.name) * FONT * 0.56
        on_the_left = point.x + 8 + width > WIDTH
        left = point.x - 8 - width if on_the_left else point.x + 8
        near = [other for low, high, other in taken if left < high and left + width > low]
        moves = sorted(range(-HEIGHT, HEIGHT), key=abs)
        y = point.y + 4 + next(move for move in moves if all(abs(point.y + 4 + move - other) >= FONT for other in near))
        taken.append((left, left + width, y))
        anchor: Literal["start", "end"] = "end" if on_the_left else "start"
        at = Point(point.x - 8 if on_the_left else point.x + 8, y)
        marks.append(Mark("text", (at,), series.colour, series.name, anchor))
    return marks


def svg(plot: Plot) -> str:
    """One <svg>; text takes the page's colour where the mark has none of its own."""
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(plot.title)}">']
    for mark in lay_out(plot):
        first, last = mark.points[0], mark.points[-1]
        if mark.kind in ("rule", "axis"):
            ends = f'x1="{first.x:.1f}" y1="{first.y:.1f}" x2="{last.x:.1f}" y2="{last.y:.1f}"'
            parts.append(f'<line class="{mark.kind}" {ends}/>')
        elif mark.kind == "path":
            line = " ".join(f"{p.x:.1f},{p.y:.1f}" for p in mark.points)
            dash = ' stroke-dasharray="4 3"' if mark.faint else ""
            parts.append(f'<polyline points="{line}" stroke="{mark.colour}"{dash}/>')
        elif mark.kind == "dot":
            parts.append(f'<circle cx="{first.x:.1f}" cy="{first.y:.1f}" r="{RADIUS}" fill="{mark.colour}"/>')
        else:
            colour = f' style="fill:{mark.colour}"' if mark.colour else ""
            where = f'x="{first.x:.1f}" y="{first.y:.1f}" text-anchor="{mark.anchor}"'
            parts.append(f"<text {where}{colour}>{escape(mark.text)}</text>")
    return "".join([*parts, "</svg>"])


def save_png(plot: Plot, path: Path, scale: int = 2) -> None:
    """The same on white, with a legend of the lines, WIDTH x HEIGHT times `scale` pixels and more below."""
    from PIL import Image, ImageDraw, ImageFont

    lines = [series for series in plot.series if series.line and not series.label]
    extra = (FONT + 5) * len(lines) + 8 if lines else 0
    image = Image.new("RGB", (WIDTH * scale, (HEIGHT + extra) * scale), "white")
    pen = ImageDraw.Draw(image)
    font: Any = ImageFont.load_default(FONT * scale)
    anchors = {"start": "ls", "middle": "ms", "end": "rs"}

    def scaled(points: Sequence[Point]) -> list[tuple[float, float]]:
        return [(point.x * scale, point.y * scale) for point in points]

    for mark in lay_out(plot):
        at = scaled(mark.points)
        if mark.kind == "rule":
            pen.line(at, "#dddddd", scale)
        elif mark.kind == "axis":
            pen.line(at, "#888888", scale)
        elif mark.kind == "path":
            pen.line(at, mark.colour, 2 * scale, joint="curve")
        elif mark.kind == "dot":
            pen.circle(at[0], RADIUS * scale, mark.colour)
        else:
            pen.text(
                at[0], mark.text, mark.colour or "#333333", font, anchors[mark.anchor],
                stroke_width=2 * scale, stroke_fill="white",
            )  # fmt: skip
    for n, series in enumerate(lines):
        y = (HEIGHT + (FONT + 5) * n + FONT) * scale
        pen.line([(LEFT * scale, y - 4 * scale), ((LEFT + 16) * scale, y - 4 * scale)], series.colour, 2 * scale)
        pen.text(((LEFT + 24) * scale, y), series.name, "#333333", font, "ls")
    write(encode(image, "PNG"), path)
