"""The plan of a comparison: artists draw the same shots, and each row of the report compares two artists.

artist   one way to draw: torch float32, a variant on a device, or a variant with one component of another
shot     a prompt and a seed
row      what an artist drew, measured against what another drew of the same shots
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Literal

from edge_sd.bundle.bundle import ModelBundle
from edge_sd.bundle.library import installed_models
from edge_sd.devices.estimates import APPLE, placed
from edge_sd.devices.rules import REFERENCES
from edge_sd.errors import EdgeSDError, InvalidRequest, MissingExtra, choices
from edge_sd.pipeline.request import MAX_SEED, Request

from .machine import machine

TORCH = "torch-fp32"
OTHER_SEEDS = 1000

Kind = Literal["reference", "variant", "floor", "swap"]


@dataclass(frozen=True)
class Artist:
    """One way to draw.

    variant   of the bundle; "" is torch float32 through diffusers
    device    "auto" or the name of a device
    part      the component that the variant `donor` gives instead, with those at home with it; "" for none
    """

    name: str
    variant: str = ""
    device: str = "auto"
    part: str = ""
    donor: str = ""


@dataclass(frozen=True)
class Shot:
    """A prompt and a seed; `stem` names its files."""

    prompt: str
    seed: int

    @property
    def stem(self) -> str:
        words = re.sub(r"[^a-z0-9]+", "-", self.prompt.lower()).strip("-")[:40].rstrip("-")
        return f"{words}-{self.seed}-{hashlib.sha256(self.prompt.encode()).hexdigest()[:6]}"


@dataclass(frozen=True)
class Row:
    """A line of the report: `artist` with seeds raised by `shift`, against `against`, over the first `count` shots."""

    name: str
    kind: Kind
    artist: Artist
    against: Artist
    count: int
    shift: int = 0


@dataclass(frozen=True)
class Wishes:
    """Options of all pictures; None is the variant's own default."""

    steps: int | None = None
    guidance: float | None = None
    sampler: str | None = None
    width: int | None = None
    height: int | None = None
    negative: str = ""

    def request(self, shot: Shot) -> Request:
        return Request(prompt=shot.prompt, seed=shot.seed, **asdict(self))


@dataclass(frozen=True)
class Comparison:
    """All that decides the pictures of a report; `weights` is the diffusers folder of the torch artist."""

    bundle: ModelBundle
    weights: Path | None
    reference: Artist
    rows: tuple[Row, ...]
    shots: tuple[Shot, ...]
    wishes: Wishes
    notes: tuple[str, ...] = ()

    def artists(self) -> dict[Artist, list[Shot]]:
        """Each artist with the shots that it draws."""
        wanted: dict[Artist, dict[Shot, None]] = {}
        for row in self.rows:
            for shot in self.shots[: row.count]:
                wanted.setdefault(row.against, {})[shot] = None
                wanted.setdefault(row.artist, {})[replace(shot, seed=shot.seed + row.shift)] = None
        return {artist: list(shots) for artist, shots in wanted.items()}

    def timed(self) -> list[Artist]:
        """Those whose speed is measured."""
        rows = [row for row in self.rows if row.kind in ("reference", "variant")]
        return [row.artist for row in rows if not self.numerics_only(row.artist)]

    def numerics_only(self, artist: Artist) -> bool:
        """Whether a reference device draws: its figures are those of a Mac's device, its seconds are not."""
        if not artist.variant or self.bundle.variant(artist.variant).backend not in APPLE:
            return False
        return artist.device in REFERENCES or only_by_executor(self.bundle, artist.variant)

    def folder_name(self, artist: Artist) -> str:
        """A name that depends on everything that could change this artist's pictures or times."""
        hashes = [self.bundle.fingerprint(name) for name in (artist.variant, artist.donor) if name]
        if not artist.variant and self.weights:
            from edge_sd.converters.sources.source import Source

            hashes = [Source.open(self.weights).fingerprint()]
        key = {
            "artist": asdict(replace(artist, name="")),
            "files": hashes,
            "facts": asdict(self.bundle.facts),
            "defaults": asdict(self.bundle.defaults_of(artist.variant) if artist.variant else self.bundle.defaults),
            "wishes": asdict(self.wishes),
            "machine": machine(),
        }
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:10]
        return f"{re.sub(r'[^a-z0-9.]+', '-', artist.name.lower()).strip('-')}-{digest}"


def plan(
    bundle: ModelBundle,
    *,
    variants: Sequence[str] = (),
    reference: str | None = None,
    weights: Path | None = None,
    prompts: Sequence[str] = (),
    seed: int = 0,
    seeds: int = 1,
    swapped: int = 4,
    device: str = "auto",
    wishes: Wishes | None = None,
) -> Comparison:
    """A comparison of `variants` (NAME or NAME@DEVICE; without any, all that run here) with `reference`.

    `reference` is "torch-fp32" or a variant; None is the first where it can be had, else the variant with the most
    bytes. `swapped` shots are drawn with one component swapped at a time.

    Raises VariantNotFound, InvalidRequest, or MissingExtra where torch-fp32 was asked for and can't be had.
    """
    wishes = wishes or Wishes()
    shots = _shots(prompts or default_prompts(), seed, seeds)
    wishes.request(shots[0])
    weights = weights or _find_weights(bundle)
    notes = []
    candidates = [_artist(bundle, name, device) for name in variants]
    if not candidates:
        # torch is the reference, in torch-fp32; its own variants are compared where they are named, or alone.
        converted = [name for name, each in sorted(bundle.variants.items()) if each.backend != "torch"]
        skipped = [name for name in converted if only_by_executor(bundle, name)]
        names = [name for name in converted or sorted(bundle.variants) if name not in skipped]
        candidates = [_artist(bundle, name, device) for name in names]
        for name in skipped:
            notes.append(f"{name} is left out: only a slow reference runs it here; name it to compare it")
    judged_by = _reference(bundle, reference, weights, candidates, device)
    candidates = [artist for artist in dict.fromkeys(candidates) if artist != judged_by]
    count = len(shots)
    rows = [Row(judged_by.name, "reference", judged_by, judged_by, count)]
    rows += [Row(artist.name, "variant", artist, judged_by, count) for artist in candidates]
    rows += _floors(bundle, judged_by, [judged_by, *candidates], count)
    rows += _swaps(bundle, [artist for artist in [judged_by, *candidates] if artist.variant], min(swapped, count))
    if not judged_by.variant:
        notes.append(f"{TORCH} is diffusers' own pipeline in float32: its scheduler, tokenizer and noise, not ours")
    found = Comparison(bundle, weights, judged_by, tuple(rows), tuple(shots), wishes)
    if emulated := [artist.name for artist in (judged_by, *candidates) if found.numerics_only(artist)]:
        notes.append(
            f"{', '.join(emulated)}: numerics, not speed: a reference on this CPU computed what a Mac's device would "
            "round, and nothing of it is timed"
        )
    return replace(found, notes=tuple(notes))


def default_prompts() -> list[str]:
    return read_prompts(Path(__file__).with_name("prompts.txt"))


def read_prompts(path: Path) -> list[str]:
    """One prompt a line; empty lines and those that start with # are none. Raises InvalidRequest."""
    try:
        lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise InvalidRequest(f"the prompts in {path} cannot be read: {reason}") from error
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise InvalidRequest(f"{path} holds no prompt; write one a line")
    return list(dict.fromkeys(prompts))


def _shots(prompts: Iterable[str], seed: int, seeds: int) -> list[Shot]:
    if not 0 <= seed <= seed + seeds + OTHER_SEEDS <= MAX_SEED:
        raise InvalidRequest(f"seed {seed} is not a whole number from 0 to {MAX_SEED - seeds - OTHER_SEEDS}")
    # Every prompt once before any twice: the first few shots are of different things.
    return [Shot(prompt, seed + n) for n, prompt in product(range(seeds), prompts)]


def _artist(bundle: ModelBundle, name: str, device: str) -> Artist:
    variant, _, at = name.partition("@")
    bundle.variant(variant)
    return Artist(name, variant, at or device)


def only_by_executor(bundle: ModelBundle, name: str) -> bool:
    """Whether only a reference, which is slow, draws with this variant here."""
    return bundle.variants[name].backend in APPLE and sys.platform != "darwin"


def _find_weights(bundle: ModelBundle) -> Path | None:
    """The diffusers folder that the variants were made of: the bundle itself or an installed model; None without."""
    if not all(find_spec(name) for name in ("torch", "diffusers", "transformers", "safetensors")):
        return None
    from edge_sd.converters.sources.source import Source

    made_of = {variant.source for variant in bundle.variants.values() if variant.source}
    folders = [bundle.root, *installed_models().values()] if made_of else [bundle.root]
    for folder in folders:
        try:
            source = Source.open(folder)
        except EdgeSDError:
            continue
        if folder == bundle.root or source.fingerprint() in made_of:
            return folder
    return None


def _reference(
    bundle: ModelBundle, wish: str | None, weights: Path | None, candidates: list[Artist], device: str
) -> Artist:
    if wish is None:
        if weights is not None:
            return Artist(TORCH)
        if not candidates:
            raise InvalidRequest(f"no variant of {bundle.name} runs here; it has: {choices(bundle.variants)}")
        # A few-step variant has defaults of its own and draws something else.
        return max(candidates, key=lambda a: (bundle.variant(a.variant).defaults is None, _bytes(bundle, a.variant)))
    if wish != TORCH:
        return _artist(bundle, wish, device)
    if not find_spec("torch") or not find_spec("diffusers"):
        raise MissingExtra(f"the reference {TORCH}", "convert")
    if weights is None:
        raise InvalidRequest(f"the torch weights of {bundle.name} are not here; give their folder with --weights")
    return Artist(TORCH)


def _bytes(bundle: ModelBundle, variant: str) -> int:
    return bundle.variant(variant).size()


def _floors(bundle: ModelBundle, reference: Artist, artists: list[Artist], count: int) -> list[Row]:
    """The noise floor, for scale: the distance between pictures whose difference is well known."""
    rows = []
    by_form: dict[tuple[str, str, str], Artist] = {}
    for artist in artists:
        if artist.variant and bundle.variant(artist.variant).defaults is None:
            variant = bundle.variant(artist.variant)
            by_form[variant.backend, variant.compute, variant.precision] = artist
    for (backend, compute, precision), artist in by_form.items():
        exact = by_form.get((backend, compute, "fp32"))
        if precision == "fp16" and exact:
            rows.append(Row(f"fp16 against fp32 ({backend})", "floor", artist, exact, count))
    for n, artist in enumerate(artists):
        for other in artists[:n]:
            if artist.variant == other.variant and artist.device != other.device:
                name = f"another device ({artist.name} against {other.name})"
                rows.append(Row(name, "floor", artist, other, count))
    # Unrelated pictures differ by about the same: a few tell.
    rows.append(Row("another seed", "floor", reference, reference, min(count, 4), OTHER_SEEDS))
    return rows


def _swaps(bundle: ModelBundle, artists: list[Artist], count: int) -> list[Row]:
    """For each variant, the largest of the same backend with one component of it at a time, against that largest."""
    rows = []
    # A few-step variant has a UNet for other steps: there is nothing to swap it with.
    artists = [artist for artist in artists if count and bundle.variant(artist.variant).defaults is None]
    for artist in artists:
        own = bundle.variant(artist.variant)
        family = [a for a in artists if bundle.variant(a.variant).backend == own.backend and a.device == artist.device]
        base = max(family, key=lambda a: _bytes(bundle, a.variant))
        if base == artist:
            continue
        for part in placed(bundle.facts):
            theirs = bundle.variant(base.variant).artifacts.get(part)
            mine = own.artifacts.get(part)
            if mine and theirs and mine.graph != theirs.graph:
                mixed = Artist(
                    f"{base.name} with the {part} of {artist.name}", base.variant, base.device, part, artist.variant
                )
                rows.append(Row(mixed.name, "swap", mixed, base, count))
        rows.append(Row(f"{base.name} with all of {artist.name}", "swap", artist, base, count))
    return rows


def common_parts(bundle: ModelBundle, variants: Iterable[str]) -> frozenset[str]:
    """The components that all of these variants have: sizes are compared by them alone."""
    found = [set(bundle.variant(name).artifacts) for name in variants]
    return frozenset(set.intersection(*found)) if found else frozenset()


def component_bytes(bundle: ModelBundle, name: str, common: frozenset[str] = frozenset()) -> dict[str, int]:
    """Bytes on disk of each component of a variant.

    "total" is all of its files, those for other programs too. "compared" is the files of the `common` components, each
    once: components share weights, and a variant without a ControlNet is not smaller for that.
    """
    variant = bundle.variant(name)
    owned = {part: variant.part_files(part) for part in variant.artifacts}
    sizes = {part: sum(variant.files[path].bytes for path in paths) for part, paths in owned.items()}
    compared = {path for part in common for path in owned[part]}
    return {**sizes, "compared": sum(variant.files[path].bytes for path in compared), "total": variant.size()}


def incomplete(bundle: ModelBundle, variants: Iterable[str]) -> list[str]:
    """One note for each variant that lacks a component of another, with what it can't draw for it."""
    names = list(variants)
    every = {part for name in names for part in bundle.variant(name).artifacts}
    notes = []
    for name in names:
        if missing := sorted(every - set(bundle.variant(name).artifacts)):
            notes.append(f"{name} has no {', '.join(missing)}; sizes are compared without them")
    return notes
