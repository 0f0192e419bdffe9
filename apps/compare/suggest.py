"""`compare suggest`: which component in which precision, for a size or a quality, by what each of them costs alone.

Each component's precision moves the picture a little. As long as these moves are small and unrelated, their mean
squares add up: e(mixture) = e(base) + sum over components of e(base with that one swapped). All mixtures that nothing
beats in both bytes and e follow, component by component. The one that is chosen is drawn with, and both figures are
shown.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edge_sd.bundle.bundle import ModelBundle
from edge_sd.bundle.mixture import add_mixture, drop_variant, mixture
from edge_sd.bundle.parts import home_of
from edge_sd.devices.estimates import placed
from edge_sd.errors import DeviceError, InvalidRequest, OutputError, choices
from edge_sd.images.metrics import PEAK, psnr

from .measure import Report, Work, measure
from .plan import Artist, Comparison, Row, only_by_executor
from .score import pixels

# What a component's precision is called in the name of a mixture (converters/recipes.PARTS), where it is another word.
LABELS = {"text_encoder": "text", "vae_decoder": "vae"}


@dataclass(frozen=True)
class Mixture:
    """`donors` is home -> variant; `bytes` on disk; `error` the mean square of what differs, in levels of 0 to 255."""

    donors: Mapping[str, str]
    bytes: int
    error: float

    @property
    def psnr(self) -> float:
        """In dB, the peak being 255."""
        return min(100.0, 10 * math.log10(PEAK**2 / self.error)) if self.error else 100.0


@dataclass(frozen=True)
class Made:
    """A mixture that was drawn with: bytes, and PSNR in dB as it was expected and as it was measured."""

    name: str
    bytes: int
    expected: float
    psnr: float


def parse_bytes(text: str) -> float:
    """Bytes of "500MB", "0.5 GB" or "500", which is MB. Raises InvalidRequest."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*(mb|gb)?", text.strip().lower())
    if match is None or not float(match[1]):
        raise InvalidRequest(f"{text!r} is no size on disk, such as 500MB or 0.5GB")
    return float(match[1]) * (1e9 if match[2] == "gb" else 1e6)


def family(bundle: ModelBundle, names: Sequence[str]) -> list[str]:
    """Those variants that can give each other components, of the form that has most of them; the most exact first.

    Without `names`, those that run here. Raises InvalidRequest for fewer than two, or where those that were named are
    of different forms.
    """
    kinds: dict[tuple[str, str, str], list[str]] = {}
    for name in names or sorted(bundle.variants):
        each = bundle.variant(name)
        # A few-step variant has a denoiser for other steps, and a mixture's parts are those of others.
        mixed = len({each.precision_of(part) for part in placed(bundle.facts)}) > 1
        left_out = (
            each.backend == "torch"
            or each.defaults is not None
            or mixed
            or each.origin != ""
            or only_by_executor(bundle, name)
        )
        if names or not left_out:
            kinds.setdefault((each.backend, each.compute, each.target), []).append(name)
    found = max(kinds.values(), key=len, default=[])
    if len(found) < 2 or (names and len(kinds) > 1):
        raise InvalidRequest(
            f"a mixture needs two variants of one form in different precisions; {bundle.name} has: "
            f"{choices(bundle.variants)} (edge-sd compare sweep makes them)"
        )
    return sorted(found, key=lambda name: -bundle.variant(name).size())


def search(comparison: Comparison, names: Sequence[str], folder: Path, report: Report) -> list[Mixture]:
    """The front of all mixtures of the variants `names`, the first of which is the base of the trials.

    Draws into `folder`/work, where finished work is kept. Raises what `errors` raises.
    """
    base = Artist(names[0], names[0])
    comparison = swaps(comparison, base, names)
    found = errors(comparison, folder, report)
    own = 0.0 if comparison.reference == base else found[base]
    return sized(comparison.bundle, front(options(comparison, base, found), own))


def make(
    comparison: Comparison,
    found: Sequence[Mixture],
    max_bytes: float | None,
    min_psnr: float | None,
    folder: Path,
    report: Report,
) -> Made:
    """Add the best mixture within the limits to the bundle, and draw with it.

    One that misses `min_psnr` when it is drawn with is removed again, and the next is tried. Raises what `chosen` and
    `errors` raise, or OutputError where the bundle can't be written to; the bundle is then as it was.
    """
    bundle = comparison.bundle
    for each in chosen(found, max_bytes, min_psnr):
        name = name_of(bundle, each)
        fresh, good = name not in bundle.variants, False
        with _writing(bundle, "nothing was added to it"):
            added = add_mixture(bundle, name, each.donors) if fresh else bundle
        try:
            psnr = measured(comparison, added, name, folder, report)
            good = min_psnr is None or psnr >= min_psnr
        finally:
            # After Ctrl-C as well: what was not measured is not kept.
            if fresh and not good:
                with _writing(bundle, f"{name} is still there"):
                    drop_variant(added, name)
        if good:
            return Made(name, each.bytes, each.psnr, psnr)
    raise InvalidRequest(f"no mixture within these limits reaches {min_psnr:g} dB when it is drawn with")


@contextmanager
def _writing(bundle: ModelBundle, end: str) -> Iterator[None]:
    """Raise OutputError where the bundle can't be written to; `end` says how it is then."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{bundle.root}: {error.strerror or error}; {end}") from error


def swaps(comparison: Comparison, base: Artist, variants: Sequence[str]) -> Comparison:
    """`comparison` with nothing to draw but `base`, and `base` with each component of each of `variants`."""
    bundle, count = comparison.bundle, len(comparison.shots)
    rows = [Row(comparison.reference.name, "reference", comparison.reference, comparison.reference, count)]
    rows.append(Row(base.name, "variant", base, comparison.reference, count))
    for name in variants:
        for home in placed(bundle.facts):
            if name != base.variant:
                artist = Artist(f"{base.name} with the {home} of {name}", base.variant, base.device, home, name)
                rows.append(Row(artist.name, "swap", artist, base, count))
    return replace(comparison, rows=tuple(rows))


def errors(comparison: Comparison, folder: Path, report: Report) -> dict[Artist, float]:
    """The mean square error of each artist's pictures against what its row says. Raises DeviceError where one fails."""
    work = measure(comparison, folder, 0, report)
    found = {}
    for row in comparison.rows:
        for artist in (row.artist, row.against):
            if why := work[artist].error:
                raise DeviceError(f"{artist.name} failed: {why}")
        found[row.artist] = _error(comparison, row, work)
    return found


def measured(comparison: Comparison, bundle: ModelBundle, name: str, folder: Path, report: Report) -> float:
    """PSNR in dB of the pictures of one variant of `bundle` against the comparison's reference."""
    artist, reference, count = Artist(name, name), comparison.reference, len(comparison.shots)
    row = Row(name, "variant", artist, reference, count)
    rows = (Row(reference.name, "reference", reference, reference, count), row)
    error = errors(replace(comparison, bundle=bundle, rows=rows), folder, report)[artist]
    return Mixture({}, 0, error).psnr


def _error(comparison: Comparison, row: Row, work: Mapping[Artist, Work]) -> float:
    squares = []
    for shot in comparison.shots[: row.count]:
        own, theirs = (pixels(work[artist].folder / f"{shot.stem}.png") for artist in (row.artist, row.against))
        if own.shape != theirs.shape:
            raise InvalidRequest(f"{row.artist.name} draws another size than {row.against.name}; give --size")
        squares.append(PEAK**2 / 10 ** (psnr(own, theirs, PEAK) / 10))
    return sum(squares) / len(squares)


def options(comparison: Comparison, base: Artist, found: Mapping[Artist, float]) -> list[list[Mixture]]:
    """For each home, the variants that could give its components: their bytes, and what they cost in the picture."""
    bundle = comparison.bundle
    names = [base.variant, *dict.fromkeys(artist.donor for artist in found if artist.donor)]
    cost = {(artist.part, artist.donor): error for artist, error in found.items() if artist.donor}
    return [
        [Mixture({home: name}, home_bytes(bundle, name, home), cost.get((home, name), 0.0)) for name in names]
        for home in placed(bundle.facts)
    ]


def home_bytes(bundle: ModelBundle, name: str, home: str) -> int:
    """Bytes on disk of the components of a variant that are at home there, each file once."""
    variant = bundle.variant(name)
    paths = {path for part in variant.artifacts if home_of(part) == home for path in variant.part_files(part)}
    return sum(variant.files[path].bytes for path in paths)


def front(choices: Iterable[Sequence[Mixture]], error: float) -> list[Mixture]:
    """All mixtures of one option of each home that no other beats in bytes and error, the smallest first.

    `error` is that of the base. A mixture of some homes that is beaten stays so whatever is added to both, so that only
    what is not goes on to the next home.
    """
    best = [Mixture({}, 0, error)]
    for each in choices:
        merged = [Mixture({**m.donors, **o.donors}, m.bytes + o.bytes, m.error + o.error) for m in best for o in each]
        best = []
        for candidate in sorted(merged, key=lambda m: (m.bytes, m.error)):
            if not best or candidate.error < best[-1].error:
                best.append(candidate)
    return best


def sized(bundle: ModelBundle, found: Sequence[Mixture]) -> list[Mixture]:
    """The same with the bytes of whole variants, which have files of no component too."""
    return [replace(each, bytes=mixture(bundle, "mixture", each.donors)[0].size()) for each in found]


def chosen(found: Sequence[Mixture], max_bytes: float | None, min_psnr: float | None) -> list[Mixture]:
    """Those of a front within the limits, the best first: the most exact in a size, or the smallest of a quality.

    Raises InvalidRequest where there is none, with what comes nearest.
    """
    fit = [each for each in found if max_bytes is None or each.bytes <= max_bytes]
    if not fit:
        raise InvalidRequest(f"the smallest mixture has {min(each.bytes for each in found) / 1e6:.1f} MB")
    if min_psnr is None:
        return sorted(fit, key=lambda each: each.error)
    good = [each for each in fit if each.psnr >= min_psnr]
    if not good:
        raise InvalidRequest(f"the most exact mixture within that size is near {max(m.psnr for m in fit):.1f} dB")
    return sorted(good, key=lambda each: each.bytes)


def name_of(bundle: ModelBundle, each: Mixture) -> str:
    """As `convert` names a variant whose parts have precisions of their own; one that is there already has its own."""
    base = each.donors[bundle.facts.denoiser]
    if set(each.donors.values()) == {base}:
        return base
    stored = {home: bundle.variant(donor).precision_of(home) for home, donor in each.donors.items()}
    words = [f"{LABELS.get(home, home)}-{stored[home]}" for home in each.donors if each.donors[home] != base]
    return "_".join([base, *words])


def rows_of(bundle: ModelBundle, found: Sequence[Mixture], picked: str = "") -> list[dict[str, Any]]:
    """A front as JSON values."""
    return [
        {
            "name": name_of(bundle, each),
            "bytes": each.bytes,
            "psnr": round(each.psnr, 2),
            "parts": {home: bundle.variant(donor).precision_of(home) for home, donor in each.donors.items()},
            "chosen": name_of(bundle, each) == picked,
        }
        for each in found
    ]
