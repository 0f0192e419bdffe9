"""Mixtures: a variant whose components are those of other variants of the bundle, by links to the same files."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ..errors import InvalidRequest
from ..files import FileRecord, locked, remove, replaced
from .bundle import ModelBundle, read_manifest
from .parts import home_of
from .variants import Artifact, Variant


def mixture(bundle: ModelBundle, name: str, donors: Mapping[str, str]) -> tuple[Variant, dict[str, str]]:
    """The variant `name`, and for each file of its own the one that it is the same as; nothing is written.

    donors   home (parts.home_of) -> the variant that gives the components at home there. The denoiser's gives what
             belongs to no component too, and the precision that the variant goes by
    Raises VariantNotFound, or InvalidRequest where variants do not go together.
    """
    base = donors[bundle.facts.denoiser]
    own = bundle.variant(base)
    artifacts: dict[str, Artifact] = {}
    files: dict[str, FileRecord] = {}
    places: dict[str, str] = {}
    for donor in sorted({*donors.values()}, key=lambda each: each != base):
        theirs = bundle.variant(donor)
        if (theirs.backend, theirs.compute, theirs.target) != (own.backend, own.compute, own.target):
            raise InvalidRequest(f"{donor} and {base} are of different forms, which can't be one variant")
        taken = {part for part in theirs.artifacts if donors.get(home_of(part), base) == donor}
        for part in taken:
            artifacts[part] = _moved(theirs, part, donor, name, own.precision)
        for path in _files(theirs, donor, taken, rest=donor == base):
            new = _renamed(path, donor, name)
            if files.setdefault(new, theirs.files[path]) != theirs.files[path]:
                raise InvalidRequest(f"{donor} has another {path.removeprefix(f'{donor}/')} than {base}")
            if new != path:
                places[new] = path
    return replace(own, artifacts=dict(sorted(artifacts.items())), files=files, sample=""), places


def add_mixture(bundle: ModelBundle, name: str, donors: Mapping[str, str]) -> ModelBundle:
    """The bundle with `mixture(bundle, name, donors)`, on disk.

    Raises what that does, InvalidModel for a manifest that is damaged, or OSError; nothing is added.
    """
    target = bundle.root / name
    with locked(bundle.root):
        # Another process may have added a variant since.
        bundle = read_manifest(bundle.root)
        variant, places = mixture(bundle, name, donors)
        with replaced(target) as staging:
            for new, old in places.items():
                _link(bundle.path(old), staging / new.removeprefix(f"{name}/"))
        added = replace(bundle, variants={**bundle.variants, name: variant})
        try:
            added.write_manifest()
        except OSError:
            # Not listed is not added.
            with contextlib.suppress(OSError):
                remove(target)
            raise
    return added


def drop_variant(bundle: ModelBundle, name: str) -> ModelBundle:
    """The bundle without that variant, on disk too. Raises InvalidModel for a damaged manifest, or OSError."""
    with locked(bundle.root):
        bundle = read_manifest(bundle.root)
        left = replace(bundle, variants={other: each for other, each in bundle.variants.items() if other != name})
        left.write_manifest()
        remove(bundle.root / name)
    return left


def _moved(variant: Variant, part: str, donor: str, name: str, precision: str) -> Artifact:
    """A component of `donor` as one of `name`, with its precision where that is not the whole variant's."""
    artifact, stored = variant.artifacts[part], variant.precision_of(part)

    def to(path: str) -> str:
        return _renamed(path, donor, name)

    return replace(
        artifact,
        graph=to(artifact.graph),
        weights=tuple(map(to, artifact.weights)),
        lora=artifact.lora and to(artifact.lora),
        pieces=artifact.pieces and to(artifact.pieces),
        chunks=tuple(map(to, artifact.chunks)),
        precision="" if stored == precision and artifact.precision != "float32" else artifact.precision or stored,
    )


def _renamed(path: str, donor: str, name: str) -> str:
    """Where a file of `donor` is in the variant `name`; files that all variants share stay."""
    return f"{name}/{path.removeprefix(f'{donor}/')}" if path.startswith(f"{donor}/") else path


def _files(variant: Variant, name: str, taken: set[str], rest: bool) -> set[str]:
    """The files of the components `taken`, configs beside graphs too; with `rest`, those of none as well."""
    owned = {
        part: variant.part_files(part) | {path for path in variant.files if path.startswith(f"{name}/{part}/")}
        for part in variant.artifacts
    }
    found = {path for part in taken for path in owned[part]}
    return found | (set(variant.files) - set().union(*owned.values()) if rest else set())


def _link(old: Path, new: Path) -> None:
    new.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(old, new)
    except OSError:
        # Some file systems have no links.
        shutil.copyfile(old, new)
