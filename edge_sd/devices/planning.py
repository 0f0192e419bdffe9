"""Planning: the plan for a model on this machine, by what was measured here, or a plan that is given, checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..backends import NAMES, backend
from ..bundle.bundle import ModelBundle
from ..errors import DeviceError, InvalidRequest, choices
from .choose import choose
from .discovery import Here
from .estimates import placed
from .measurements import place_of, remembered
from .plan import DevicePlan


def plan_here(
    bundle: ModelBundle,
    here: Here,
    device: str | Mapping[str, str],
    variant: str | None,
    preference: str,
    tell: Callable[[str], None],
    measure: bool = False,
) -> DevicePlan:
    """The plan of `choose` by what is remembered of this machine.

    With `measure`, where device and variant are open, places between which estimates do not decide are measured first,
    once, for at most `tuning.FIRST_USE` seconds. Raises what `choose` raises, and MissingExtra for a device whose
    library is not installed.
    """
    _check_installed(device, here)
    measured, note = remembered(bundle, here.devices, here.machine)
    if note:
        tell(f"note: {note}")
    plan = choose(bundle, here.devices, device, variant, machine=here.machine, preference=preference, measured=measured)
    if measure and device == "auto" and variant is None:
        from .tuning import first_use

        if found := first_use(bundle, here.devices, here.machine, plan, measured, tell):
            measured = {**measured, **found}
            plan = choose(bundle, here.devices, machine=here.machine, preference=preference, measured=measured)
    return plan


def _check_installed(device: str | Mapping[str, str], here: Here) -> None:
    """Raise MissingExtra for a device such as torch-cpu whose library is not here: its message says how to get it."""
    there = {each.name for each in here.devices}
    for name in [device] if isinstance(device, str) else device.values():
        library = name.partition("-")[0]
        if library in NAMES and name not in there:
            backend(library)


def check_plan(plan: DevicePlan, bundle: ModelBundle, here: Here) -> None:
    """Raise InvalidRequest or DeviceError unless this machine can follow a plan that was given for this bundle."""
    if missing := [part for part in placed(bundle.facts) if part not in plan.parts]:
        raise InvalidRequest(f"the plan has no place for {', '.join(missing)}")
    devices = {place_of(each): each for each in here.devices}
    for part, placement in plan.parts.items():
        backend = bundle.variant(placement.variant).backend
        if place_of(placement.device) not in devices:
            raise DeviceError(f"{part}: no device {place_of(placement.device)!r} here; valid: {choices(devices)}")
        if placement.device.backend != backend:
            raise DeviceError(f"{part}: {placement.variant} runs on {backend}, not on {place_of(placement.device)}")
