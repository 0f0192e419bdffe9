"""Mixed-bit palettes: the fewest bits for each weight of a package that keep a component at a given PSNR.

Let E_i(b) be the mean square error of the outputs when weight i alone is stored in b bits. Small errors of many weights
add up: E = sum_i E_i(b_i). Of all choices with as many bytes, the one with the smallest E minimises
E_i(b) + lambda n_i b for every weight on its own, at some price lambda for a bit (Shoham and Gersho, "Efficient bit
allocation for an arbitrary set of quantizers", 1988). The outputs come from the executor on recorded inputs, so that
every weight has the name it has in the package, and no package is made for a trial.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edge_sd.errors import InvalidModel
from edge_sd.images.files import encode, write

from ..parity import Recording, Runner, measure

Array = NDArray[Any]
# Called with the share of the work that is done, 0 to 1.
Share = Callable[[float], None]
Bits = dict[str, int]

# The widths of palettes that every target knows; 16 leaves a weight as it is.
WIDTHS = (1, 2, 4, 6, 8, 16)
# Each weight's palette is tried in these widths. Output errors grow as the square of weight errors, as to the rest.
TRIED = (2, 6)
# The recorded calls that are run for each trial: the first and the last of a picture's steps.
CALLS = 2
# PSNR that a point of the curve may have: a line is drawn for every ten.
MOST_DECIBELS = 1000.0


@dataclass(frozen=True)
class Point:
    """One choice of bits, run: mean bits per number, bytes of all weights, PSNR in dB against torch float32."""

    name: str
    bits: float
    bytes: int
    psnr: float

    @classmethod
    def read(cls, row: dict[str, Any]) -> Point:
        """Raises KeyError, TypeError, ValueError or OverflowError for what is no point."""
        point = cls(str(row["name"]), float(row["bits"]), int(row["bytes"]), float(row["psnr"]))
        if not (0 <= point.bits <= 32 and 0 <= point.bytes < 1 << 50 and abs(point.psnr) <= MOST_DECIBELS):
            raise ValueError(f"{row['name']!r} is no point of a curve")
        return point


@dataclass(frozen=True)
class BitRecipe:
    """Weight -> bits, and the curve that it was chosen from: fixed widths, and mixtures at several prices."""

    bits: Bits
    fixed: list[Point]
    mixed: list[Point]

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", "utf-8")

    @classmethod
    def open(cls, path: Path) -> BitRecipe:
        """Raises InvalidModel."""
        try:
            document = json.loads(path.read_text("utf-8"))
            fixed, mixed = ([Point.read(row) for row in document[name]] for name in ("fixed", "mixed"))
            bits = {str(name): int(width) for name, width in document["bits"].items()}
            if not fixed and not mixed:
                raise ValueError("it has no points")
            return cls(bits, fixed, mixed)
        except OSError as error:
            raise InvalidModel(f"{path} cannot be read ({error.strerror})") from error
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise InvalidModel(f"{path} is no recipe of bits: {error}") from error


class Constants(Protocol):
    """A program whose constants can be looked at and replaced."""

    def constant(self, name: str) -> Array: ...

    def substitute(self, name: str, value: Array) -> None: ...


def choose(
    program: Constants,
    names: list[str],
    run: Runner,
    recording: Recording,
    floor: float,
    report: Share = lambda _: None,
) -> BitRecipe:
    """The fewest bits for `names` (constants of the program) at which the component stays at `floor` dB.

    `run` calls the program with the recording's names; `report` is called with the share of trials that are done.
    What no bits reach gets 16 everywhere.
    """
    some = Recording(_ends(recording.inputs), _ends(recording.outputs))
    trials = _Trials(program, names, lambda: measure(run, some).psnr, report)
    fixed = [trials.point(f"p{width}", dict.fromkeys(names, width)) for width in WIDTHS[:-1]]
    prices = np.geomspace(*trials.prices(), 8)
    found = [(trials.cheapest(price), price) for price in prices]
    points = [(trials.point("mixed", bits), bits, price) for bits, price in found]
    good = [price for point, _, price in points if point.psnr >= floor]
    # Between the dearest price that is still near enough and the next one.
    low = max(good, default=0.0)
    high = min((price for price in prices if price > low), default=low)
    bits = trials.cheapest(low)
    for _ in range(5 if good else 0):
        middle = float(np.sqrt(low * high))
        tried = trials.cheapest(middle)
        point = trials.point("mixed", tried)
        points.append((point, tried, middle))
        low, high, bits = (middle, high, tried) if point.psnr >= floor else (low, middle, bits)
    mixed = sorted({(point.bytes, point.psnr): point for point, *_ in points}.values(), key=lambda each: each.bytes)
    return BitRecipe(bits, fixed, mixed)


def choose_within(
    program: Constants, names: list[str], run: Runner, recording: Recording, bits: float, report: Share = lambda _: None
) -> BitRecipe:
    """The bits of `names` with the smallest error among those of at most `bits` a number on average.

    `run` calls the program with the recording's names; `report` is called with the share of trials that are done.
    """
    some = Recording(_ends(recording.inputs), _ends(recording.outputs))
    trials = _Trials(program, names, lambda: measure(run, some).psnr, report)
    numbers = max(sum(weight.size for weight in trials.weights.values()), 1)

    def mean(chosen: Bits) -> float:
        return sum(trials.weights[name].size * width for name, width in chosen.items()) / numbers

    low, high = trials.prices()
    for _ in range(40):
        middle = float(np.sqrt(low * high))
        low, high = (low, middle) if mean(trials.cheapest(middle)) <= bits else (middle, high)
    best = trials.cheapest(high)
    fixed = [trials.point(f"p{width}", dict.fromkeys(names, width)) for width in (2, 4, 6)]
    return BitRecipe(best, fixed, [trials.point("mixed", best)])


def _ends(calls: list[Any]) -> list[Any]:
    return calls if len(calls) <= CALLS else [calls[0], calls[-1]]


class _Trials:
    """A program whose weights are palettized for the time of a measurement."""

    def __init__(
        self, program: Constants, names: list[str], psnr: Callable[[], float], report: Share = lambda _: None
    ) -> None:
        self.program, self.psnr = program, psnr
        self.weights = {name: program.constant(name) for name in names}
        # Relative to the outputs' range, as PSNR is.
        self.errors: dict[str, dict[int, float]] = {}
        exact = 10 ** (-psnr() / 10)
        for n, (name, weight) in enumerate(self.weights.items()):
            report(n / len(self.weights))
            distances = {width: _distance(weight, width) for width in WIDTHS}
            scales = {}
            for tried in TRIED:
                with self._stored({name: tried}):
                    caused = max(10 ** (-psnr() / 10) - exact, 0.0)
                scales[tried] = caused / distances[tried] if distances[tried] else 0.0
            self.errors[name] = {width: distances[width] * _between(scales, width) for width in WIDTHS}

    @contextmanager
    def _stored(self, bits: Bits) -> Iterator[None]:
        """The program with these weights in palettes, for a while."""
        try:
            for name, width in bits.items():
                self.program.substitute(name, palettized(self.weights[name], width))
            yield
        finally:
            for name in bits:
                self.program.substitute(name, self.weights[name])

    def cheapest(self, price: float) -> Bits:
        """min over b of E_i(b) + price n_i b, for each weight."""
        return {
            name: min(WIDTHS, key=lambda width: self.errors[name][width] + price * weight.size * width)
            for name, weight in self.weights.items()
        }

    def prices(self) -> tuple[float, float]:
        """From one at which hardly a weight is below 8 bits to one at which hardly any is above 2."""
        slopes = [
            (errors[2] - errors[8]) / (6 * self.weights[name].size)
            for name, errors in self.errors.items()
            if errors[2] > errors[8]
        ]
        return (min(slopes) / 100, max(slopes)) if slopes else (1e-12, 1.0)

    def point(self, name: str, bits: Bits) -> Point:
        with self._stored(bits):
            reached = self.psnr()
        numbers = sum(weight.size for weight in self.weights.values())
        stored = sum(self.weights[each].size * width for each, width in bits.items())
        tables = sum(2 * 2**width for width in bits.values() if width < 16)
        return Point(name, round(stored / max(numbers, 1), 3), stored // 8 + tables, round(reached, 2))


def _between(scales: dict[int, float], width: int) -> float:
    """What was measured for the nearest width; the geometric mean of both for one in the middle."""
    low, high = scales[TRIED[0]], scales[TRIED[1]]
    if width <= TRIED[0] or not high:
        return low
    return high if width >= TRIED[1] else float(np.sqrt(low * high))


def palettized(weight: Array, bits: int) -> Array:
    """`weight` with each number replaced by the nearest of 2**bits that Lloyd's k-means finds; itself at 16."""
    if bits == 16:
        return weight
    table, indices = palette(weight, bits)
    return table[indices].reshape(weight.shape)


def palette(weight: Array, bits: int) -> tuple[Array, Array]:
    """A table of 2**bits numbers in the type of `weight`, and for each of its numbers the nearest one's place."""
    flat = weight.astype(np.float64).reshape(-1)
    table = _k_means(np.sort(flat), 2**bits)
    return table.astype(weight.dtype), _nearest(table, flat).astype(np.uint8)


def _distance(weight: Array, bits: int) -> float:
    """Mean square error of the palettized weight."""
    return float(np.mean((palettized(weight, bits).astype(np.float64) - weight.astype(np.float64)) ** 2))


def _k_means(flat: Array, count: int, rounds: int = 30) -> Array:
    """The means of sorted numbers' clusters, from the better of two starts: no round makes the error larger, so that
    what comes of even steps is no worse than those.
    """
    sums = np.concatenate([[0.0], np.cumsum(flat)])
    even = np.linspace(flat[0], flat[-1], count)
    # Half by rank, dense where numbers are; half by value, for the rare large ones.
    ranks = flat[((np.arange(count) + 0.5) * len(flat) / count).astype(int)]
    found = [_lloyd(flat, sums, start, rounds) for start in ((ranks + even) / 2, even)]
    return max(found, key=lambda each: each[1])[0]


def _lloyd(flat: Array, sums: Array, table: Array, rounds: int) -> tuple[Array, float]:
    """Lloyd's algorithm on sorted numbers from a `table` of means, and the sum of n m^2 over clusters of n numbers with
    the mean m, which grows as the error falls. A cluster is a run of numbers, its sum a difference of `sums`.
    """
    explained = 0.0
    for _ in range(rounds):
        ends = np.searchsorted(flat, (table[1:] + table[:-1]) / 2)
        starts, ends = np.concatenate([[0], ends]), np.concatenate([ends, [len(flat)]])
        sizes, totals = ends - starts, sums[ends] - sums[starts]
        table = np.where(sizes > 0, totals / np.maximum(sizes, 1), table)
        explained = float((sizes * table**2).sum())
    return np.sort(table), explained


def _nearest(table: Array, values: Array) -> Array:
    return np.searchsorted((table[1:] + table[:-1]) / 2, values)


def table(recipe: BitRecipe) -> str:
    """The curve as Markdown, by size: fixed widths, and the mixtures between them."""
    rows = sorted([*recipe.fixed, *recipe.mixed], key=lambda point: point.bytes)
    lines = ["| weights | mean bits | size | PSNR against torch float32 |", "| --- | --- | --- | --- |"]
    lines += [f"| {row.name} | {row.bits:.2f} | {row.bytes / 1e6:.2f} MB | {row.psnr:.1f} dB |" for row in rows]
    return "\n".join(lines)


def draw(recipe: BitRecipe, path: Path) -> None:
    """The curve as a PNG: size to the right, PSNR up; fixed widths grey, mixtures red."""
    from PIL import Image, ImageDraw

    width, height, edge = 720, 420, 56
    image = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image)
    both = [*recipe.fixed, *recipe.mixed]
    right = max(1, *(point.bytes for point in both)) * 1.05
    bottom = 10 * np.floor(min(point.psnr for point in both) / 10)
    top = 10 * np.ceil(max(point.psnr for point in both) / 10)

    def place(point: Point) -> tuple[float, float]:
        x = edge + (width - 2 * edge) * point.bytes / right
        return x, height - edge - (height - 2 * edge) * (point.psnr - bottom) / max(top - bottom, 1)

    for psnr in np.arange(bottom, top + 1, 10):
        y = place(Point("", 0, 0, psnr))[1]
        pen.line([(edge, y), (width - edge, y)], "#dddddd")
        pen.text((8, y - 6), f"{psnr:.0f} dB", "#555555")
    for share in np.linspace(0, 1, 6):
        x = edge + (width - 2 * edge) * share
        pen.text((x - 18, height - edge + 8), f"{right * share / 1e6:.1f} MB", "#555555")
    for points, colour, label in ((recipe.fixed, "#777777", True), (recipe.mixed, "#cc3333", False)):
        ordered = sorted(points, key=lambda point: point.bytes)
        if len(ordered) > 1:
            pen.line([place(point) for point in ordered], colour, 2)
        for point in ordered:
            x, y = place(point)
            pen.ellipse([x - 4, y - 4, x + 4, y + 4], colour)
            if label:
                pen.text((x + 6, y + 4), point.name, colour)
    pen.text((edge, 16), "PSNR of the outputs over the size of the weights: one width (grey), mixed (red)", "#000")
    write(encode(image, "PNG"), path)
