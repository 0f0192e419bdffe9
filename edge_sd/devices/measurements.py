"""Measurements: load and call times of components on this machine's devices, kept between runs.

One small JSON file for each machine with its drivers; in it a row for each component, variant and device, found again
by the variant's fingerprint. Other drivers, other weights or another version of this format are other keys, so nothing
stale is ever used. A damaged file counts as none.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..backends.base import Device
from ..bundle.bundle import ModelBundle
from ..caches import cache_folder
from ..errors import OutputError
from ..files import write_atomically
from ..machine import Machine

FORMAT = 1
LIMIT = 4 << 20


@dataclass(frozen=True)
class Measured:
    """One component on one device, timed on this machine.

    load, call   seconds; `psnr` in dB against the reference variant
    failure      why it can't be used, or ""
    """

    load: float = 0.0
    call: float = 0.0
    psnr: float = 0.0
    failure: str = ""


# (part, variant, place); a place is "backend:device".
Row = tuple[str, str, str]
Measurements = Mapping[Row, Measured]


def place_of(device: Device) -> str:
    """The name of a device that is the only one of its kind even where two backends have a "cpu"."""
    return f"{device.backend}:{device.name}"


def measurements_file(devices: Sequence[Device], machine: Machine) -> Path:
    """Where the measurements of this machine with these drivers are kept."""
    key = [machine.system, machine.version, machine.arch, machine.cpu, sorted(machine.flags), machine.cores,
           machine.apple_chip, sorted([place_of(d), d.description, d.driver] for d in devices)]  # fmt: skip
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    return cache_folder("measured") / f"{digest}.json"


def remembered(bundle: ModelBundle, devices: Sequence[Device], machine: Machine) -> tuple[Measurements, str]:
    """What was measured here of this bundle's very files, and a note where the file could not be used, or ""."""
    path = measurements_file(devices, machine)
    rows, note = _read(path)
    found = {}
    for name in bundle.variants:
        for row in rows.get(bundle.fingerprint(name), []):
            key = (str(row["part"]), name, str(row["place"]))
            found[key] = Measured(float(row["load"]), float(row["call"]), float(row["psnr"]), str(row["failure"]))
    return found, note


def remember(bundle: ModelBundle, devices: Sequence[Device], machine: Machine, new: Measurements) -> Path:
    """Add `new` to what is known, in one rename. Raises OutputError."""
    path = measurements_file(devices, machine)
    rows, _ = _read(path)
    known, _ = remembered(bundle, devices, machine)
    for name in bundle.variants:
        merged = {key: row for key, row in {**known, **new}.items() if key[1] == name}
        if merged:
            rows[bundle.fingerprint(name)] = [
                {"part": part, "place": place, **asdict(row)} for (part, _, place), row in sorted(merged.items())
            ]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        document = {"format": FORMAT, "machine": machine.describe(), "rows": rows}
        write_atomically(path, (json.dumps(document, indent=1) + "\n").encode())
    except OSError as error:
        raise OutputError(f"{path} could not be written ({error.strerror}); nothing is remembered") from error
    return path


def _read(path: Path) -> tuple[dict[str, list[dict[str, Any]]], str]:
    """The rows by fingerprint, all of them sound; none, and why, where the file is not."""
    try:
        if path.stat().st_size > LIMIT:
            return {}, f"{path} is too large to be measurements; it is ignored"
        document = json.loads(path.read_text("utf-8"))
        if document["format"] != FORMAT:
            return {}, f"{path} is of another version of edge-sd; it is ignored"
        rows: dict[str, list[dict[str, Any]]] = document["rows"]
        for row in (row for some in rows.values() for row in some):
            _check(row)
    except FileNotFoundError:
        return {}, ""
    except OSError as error:
        return {}, f"{path} cannot be read ({error.strerror}); it is ignored"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}, f"{path} is damaged; it is ignored"
    return rows, ""


def _check(row: dict[str, Any]) -> None:
    for name in ("part", "place", "failure"):
        if not isinstance(row[name], str):
            raise TypeError(name)
    for name in ("load", "call", "psnr"):
        if not math.isfinite(row[name]) or (row[name] < 0 and name != "psnr"):
            raise ValueError(name)
