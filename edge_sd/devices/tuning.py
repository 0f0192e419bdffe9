"""Tuning: which places are worth measuring, and measuring them within a budget of seconds.

Components run in a process of their own (`probe`), one after the other. A crash or a timeout counts as a failure of
that placement. Placements that the budget does not reach stay estimates.
"""

from __future__ import annotations

import contextlib
import json
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

from ..backends.base import Device
from ..bundle.bundle import ModelBundle
from ..errors import DeviceError, OutputError
from ..machine import Machine
from .choose import PREFERENCES, plausible
from .estimates import placed
from .measurements import Measured, Measurements, Row, place_of, remember
from .plan import DevicePlan, Placement

# Seconds: at first use, and by `edge-sd tune`.
FIRST_USE, THOROUGH = 20.0, 600.0
# Seconds that one component may take; compiling a large one for a Neural Engine takes minutes.
PATIENCE = 240.0
# At first use: a picture that is expected sooner is not worth it, and neither is a place this many times slower.
QUICK, HOPELESS = 3.0, 4.0
PROBE = (sys.executable, "-m", "edge_sd.devices.probe")

Told = Callable[[Row, Measured], None]


@dataclass
class Tuning:
    """What was measured, and what the budget did not reach."""

    found: dict[Row, Measured] = field(default_factory=dict)
    left: list[Row] = field(default_factory=list)


def all_rows(bundle: ModelBundle, devices: Sequence[Device], machine: Machine) -> list[Row]:
    """Every plausible place of every component; the reference of each component first, then the fastest."""
    places = plausible(bundle, devices, machine)
    # Denoisers first: they take nearly all of the time.
    return [
        row for part in (bundle.facts.denoiser, "vae_decoder", "text_encoder") for row in _ordered(part, places[part])
    ]


def undecided(
    bundle: ModelBundle, devices: Sequence[Device], machine: Machine, plan: DevicePlan, measured: Measurements
) -> list[Row]:
    """Rows to measure at first use: the denoiser on each device that may be the fastest.

    Empty where the choice is clear: one device is plausible, the picture is quick anyway, speed is not what counts, or
    some of these were measured before, whatever came of it.
    """
    if plan.preference not in ("speed", "battery") or plan.seconds < QUICK:
        return []
    part, floor = bundle.facts.denoiser, PREFERENCES[plan.preference][0]
    chosen = plan.parts[part]
    best: dict[str, Placement] = {}
    for each in sorted(plausible(bundle, devices, machine)[part], key=lambda each: each.cost.seconds):
        if each.cost.quality >= floor and each.cost.seconds <= HOPELESS * chosen.cost.seconds:
            best.setdefault(place_of(each.device), each)
    rows = _ordered(part, best.values())
    return [] if len(rows) < 2 or any(row in measured for row in rows) else rows


def first_use(
    bundle: ModelBundle,
    devices: Sequence[Device],
    machine: Machine,
    plan: DevicePlan,
    measured: Measurements,
    tell: Callable[[str], None],
) -> Measurements:
    """Measure the `undecided` rows, with a message. If measuring fails, a message says so and the estimates stay."""
    rows = undecided(bundle, devices, machine, plan, measured)
    if not rows:
        return {}
    places = " and ".join(place.split(":")[1] for _, _, place in rows)
    tell(f"first use of {bundle.name} here: measuring {places}, once, {FIRST_USE:.0f} s at most")
    found: dict[Row, Measured] = {}
    try:
        tune(bundle, devices, machine, rows, FIRST_USE, found.__setitem__)
        if not found:
            # Otherwise every later run would measure again.
            found[rows[0]] = Measured(failure=f"not loaded and run within {FIRST_USE:.0f} s")
            remember(bundle, devices, machine, found)
    except (DeviceError, OutputError) as error:
        tell(str(error))
    return found


def _ordered(part: str, places: Iterable[Placement]) -> list[Row]:
    """The reference first: on the CPU, which is trusted most, and in the best quality."""
    places = sorted(places, key=lambda each: (each.cost.seconds, each.variant, place_of(each.device)))
    reference = max(places, key=lambda each: (each.device.kind == "cpu", each.cost.quality), default=None)
    rest = [each for each in places if each is not reference]
    return [(part, each.variant, place_of(each.device)) for each in ([reference, *rest] if reference else [])]


def tune(
    bundle: ModelBundle,
    devices: Sequence[Device],
    machine: Machine,
    rows: Sequence[Row],
    seconds: float = THOROUGH,
    told: Told = lambda row, measured: None,
    command: Sequence[str] = PROBE,
    patience: float = PATIENCE,
) -> Tuning:
    """Measure `rows` for at most `seconds` and keep the results. `told` is called with each result.

    Raises DeviceError where measuring could not start, InvalidModel for damaged files, OutputError.
    """
    for variant in dict.fromkeys(variant for _, variant, _ in rows):
        bundle.check(variant)
    tuning, deadline = Tuning(left=list(rows)), time.monotonic() + seconds
    try:
        while tuning.left and time.monotonic() < deadline:
            # A process that crashed is followed by another, which needs the references again.
            first = {row[0]: row for row, measured in reversed(tuning.found.items()) if not measured.failure}
            again = [
                first[part]
                for part in placed(bundle.facts)
                if part in first and any(row[0] == part for row in tuning.left)
            ]
            for row, measured in _probed(bundle, [*again, *tuning.left], deadline, patience, command):
                if row not in tuning.found:
                    tuning.found[row] = measured
                    tuning.left.remove(row)
                    told(row, measured)
                elif measured.failure:
                    # The reference itself does not come a second time; without it nothing is compared.
                    return tuning
    finally:
        if tuning.found:
            remember(bundle, devices, machine, tuning.found)
    return tuning


def _probed(
    bundle: ModelBundle, rows: Sequence[Row], deadline: float, patience: float, command: Sequence[str]
) -> Iterator[tuple[Row, Measured]]:
    """Each row as a process measures it, until it is through, has crashed or hangs, or the deadline is there."""
    child = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )
    lines: queue.Queue[str | None] = queue.Queue()
    assert child.stdin is not None
    assert child.stdout is not None
    threading.Thread(target=_read, args=(child.stdout, lines), daemon=True).start()
    ready, last = False, ""
    waiting, limit = list(rows), deadline
    try:
        with contextlib.suppress(OSError):
            child.stdin.write(json.dumps({"model": str(bundle.root.absolute()), "rows": rows}))
            child.stdin.close()
        while waiting or not ready:
            try:
                line = lines.get(timeout=max(0.0, min(deadline, limit) - time.monotonic()))
            except queue.Empty:
                if ready and limit < deadline:
                    yield waiting[0], Measured(failure=f"not loaded and run within {patience:.0f} s")
                return
            if line is None:
                why = _ending(child.wait(), last)
                if not ready:
                    raise DeviceError(f"measuring could not start: {why}")
                yield waiting[0], Measured(failure=why)
                return
            document = _document(line)
            if document is None:
                # stdout also holds output of drivers and tracebacks.
                last = line.strip() or last
            elif "ready" in document:
                ready, limit = True, time.monotonic() + patience
            elif ready:
                yield waiting.pop(0), Measured(**document)
                limit = time.monotonic() + patience
    finally:
        child.kill()
        child.wait()


def _read(stream: IO[str], lines: queue.Queue[str | None]) -> None:
    with contextlib.suppress(ValueError, OSError):
        for line in stream:
            lines.put(line)
    lines.put(None)


def _document(line: str) -> dict[str, Any] | None:
    try:
        document = json.loads(line)
    except ValueError:
        return None
    return document if isinstance(document, dict) and ("ready" in document or "psnr" in document) else None


def _ending(code: int, last: str) -> str:
    told = f" ({last[:200]})" if last else ""
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"its process crashed with {signal.Signals(-code).name}{told}"
    return f"its process ended with exit code {code}{told}"
