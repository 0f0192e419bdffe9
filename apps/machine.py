"""`edge-sd devices`, `tune` and `doctor`: the machine's devices, what runs best on them, and whether it is right."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from edge_sd.errors import DeviceError, InvalidRequest, VariantNotFound

from . import completion
from .drawing import parse_device
from .options import AsJson
from .terminal import messages, progress, say, say_json

if TYPE_CHECKING:
    from edge_sd.bundle.bundle import ModelBundle
    from edge_sd.devices.discovery import Here
    from edge_sd.devices.measurements import Measured, Row
    from edge_sd.devices.plan import DevicePlan

Model = Annotated[str, typer.Argument(help="A model's name or folder.", autocompletion=completion.models)]
Prefer = Annotated[
    str,
    typer.Option(
        help="What counts where there is a choice: speed, quality, battery, memory.",
        autocompletion=completion.one_of("speed", "quality", "battery", "memory"),
    ),
]


def devices(
    model: Model = "emoji",
    device: Annotated[str, typer.Option(help="As for generate.")] = "auto",
    variant: Annotated[str | None, typer.Option(help="As for generate.")] = None,
    prefer: Prefer = "speed",
    as_json: AsJson = False,
) -> None:
    """Show what this machine has, where a model would run, and what was rejected and why."""
    from edge_sd.bundle.bundle import ModelBundle
    from edge_sd.devices.discovery import discover

    bundle, here = ModelBundle.open(model), discover()
    why, plan = "", None
    try:
        plan = _plan(bundle, here, device, variant, prefer)
    except (DeviceError, VariantNotFound) as error:
        # A name that is not there is a mistake; that nothing is installed is an answer.
        if device != "auto" or variant is not None:
            raise
        why = str(error)
    if as_json:
        plans = {"model": bundle.name, "plan": plan.as_dict() if plan else None, "why": why}
        say_json({**here.as_dict(), **plans})
        return
    say("\n".join(here.lines()))
    say(f"\n{bundle.name}: {plan.explain() if plan else why}")


def _plan(bundle: ModelBundle, here: Here, device: str, variant: str | None, prefer: str) -> DevicePlan:
    from edge_sd.devices.planning import plan_here

    return plan_here(bundle, here, parse_device(device), variant, prefer, messages(False))


def tune(
    model: Model = "emoji",
    seconds: Annotated[float, typer.Option(help="At most; what is not reached stays an estimate.")] = 600.0,
    prefer: Prefer = "speed",
    as_json: AsJson = False,
) -> None:
    """Measure each plausible variant on each device, and remember it for this machine, its drivers and this model."""
    from dataclasses import asdict

    from edge_sd.bundle.bundle import ModelBundle
    from edge_sd.devices import tuning
    from edge_sd.devices.discovery import discover

    _check_seconds(seconds)
    bundle, here = ModelBundle.open(model), discover()
    _plan(bundle, here, "auto", None, prefer)  # Report mistakes, or a machine without devices, before measuring.
    rows = tuning.all_rows(bundle, here.devices, here.machine)

    done: list[Row] = []
    with progress(as_json, "measuring") as report_progress:

        def told(row: Row, measured: Measured) -> None:
            done.append(row)
            report_progress(f"measured {' '.join(row)}", len(done) / len(rows))
            if not as_json:
                say(f"{' '.join(row)}\n  {_figures(measured)}")

        found = tuning.tune(bundle, here.devices, here.machine, rows, seconds, told)
    plan = _plan(bundle, here, "auto", None, prefer)
    if as_json:
        names = ("part", "variant", "place")
        report: dict[str, Any] = {
            "measured": [{**dict(zip(names, row, strict=True)), **asdict(each)} for row, each in found.found.items()],
            "left": [dict(zip(names, row, strict=True)) for row in found.left],
            "plan": plan.as_dict(),
        }
        say_json(report)
        return
    for row in found.left:
        say(f"{' '.join(row)}\n  not reached in {seconds:g} s; it stays an estimate")
    say(f"\n{bundle.name}: {plan.summary()}")


def _figures(measured: Measured) -> str:
    if measured.failure:
        return f"failed: {measured.failure}"
    return f"loads in {measured.load:.2f} s, {measured.call:.3f} s a call, {measured.psnr:.0f} dB beside the reference"


def doctor(
    model: Model = "emoji",
    seconds: Annotated[float, typer.Option(help="That one device may take for its picture.")] = 600.0,
    as_json: AsJson = False,
) -> None:
    """Draw a picture on every device and compare it with torch's; a report to paste. Exit code 1 if one is off."""
    from .doctor import examine

    _check_seconds(seconds)
    with progress(as_json, "looking") as watch:
        report = examine(model, seconds, watch)
    if as_json:
        say_json(report.as_dict())
    else:
        say(report.text())
    if not report.sound:
        raise typer.Exit(1)


def _check_seconds(seconds: float) -> None:
    if not 1 <= seconds <= 86400:
        raise InvalidRequest(f"seconds {seconds:g} is not a number from 1 to 86400")
