"""Which variant of each component runs where, and why. Choosing is a pure function of facts; it returns a DevicePlan.

A plan uses one variant of each backend. All combinations of variants and devices are weighed by their cost, measured on
this machine (`tuning`) or else estimated (`estimates`), without those that a rule excludes (`rules`), within the free
memory. The plan keeps the next best places as fallbacks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from ..backends.base import Device
from ..bundle.bundle import ModelBundle
from ..bundle.parts import DENOISERS
from ..errors import DeviceError, InvalidRequest, VariantNotFound, choices, install_line
from ..machine import Machine
from .estimates import BACKEND_BYTES, INVISIBLE, calls, estimate, placed
from .measurements import Measurements, place_of
from .plan import DevicePlan, Placement, Rejected
from .rules import Objection, objections

# The least quality in dB that each preference takes while there is better; the next floor counts where nothing fits.
PREFERENCES: dict[str, tuple[float, ...]] = {
    "speed": (30.0, 20.0, -math.inf),
    "battery": (30.0, 20.0, -math.inf),
    "memory": (20.0, -math.inf),
    "quality": (-math.inf,),
}
# Of free memory, what a plan may take; of all memory, where free memory is not known.
SHARE_OF_FREE, SHARE_OF_ALL = 0.9, 0.6


@dataclass(frozen=True)
class _Option:
    part: str
    placement: Placement
    objection: Objection | None


def choose(
    bundle: ModelBundle,
    devices: Sequence[Device],
    wish: str | Mapping[str, str] = "auto",
    variant: str | None = None,
    *,
    machine: Machine | None = None,
    preference: str = "speed",
    measured: Measurements | None = None,
) -> DevicePlan:
    """The plan for `bundle`: `wish` is a device's name or "auto", `variant` a variant's name or None.

    A device that is asked for gets the denoiser, and every component that it does not run badly. `wish` may also name a
    device for each of some components: {"unet": "gpu", "vae_decoder": "cpu"}; the others are placed as by "auto".
    Nothing moves away from a device that was asked for: it has no spares.

    Raises DeviceError, VariantNotFound or InvalidRequest (the preference, a component), naming what there is.
    """
    if preference not in PREFERENCES:
        raise InvalidRequest(f"unknown preference {preference!r}; valid: {choices(PREFERENCES)}")
    if not devices:
        raise DeviceError(f"no backend is installed; install one: {install_line('openvino')}")
    parts = placed(bundle.facts)
    _check_wish(wish, devices, parts)
    if variant is not None:
        bundle.variant(variant)
    machine = machine or Machine()
    # The order in which devices and variants come must not matter.
    devices = sorted(devices, key=place_of)
    options = [
        option
        for name in sorted(bundle.variants)
        for device in devices
        if variant in (None, name) and device.backend == bundle.variants[name].backend
        for option in _options(bundle, name, device, machine, measured or {}, wish, variant)
    ]
    allowed = _allowed(options, wish, parts)
    plans = [replace(plan, preference=preference) for plan in _combinations(allowed)]
    if not plans:
        raise _nothing(bundle, devices, options, wish)
    budget = _budget(machine, devices)
    plan = _best(plans, budget, preference)
    spares = {part: _spares(plan, part, allowed, budget) for part in parts if _wished(part, wish)[0] == "auto"}
    defaults = bundle.defaults_of(plan.variant)
    return replace(
        plan,
        picture=f"a first picture of {defaults.width}x{defaults.height} in {defaults.steps} steps",
        reasons=_reasons(bundle, plan, budget, wish, variant),
        rejected=tuple(_rejections(bundle, devices, options, plan, plans, budget, variant)),
        spares=spares,
    )


def _check_wish(wish: str | Mapping[str, str], devices: Sequence[Device], parts: Sequence[str]) -> None:
    """Raises InvalidRequest or DeviceError."""
    names = {"auto", *(device.name for device in devices)}
    wishes = {"": wish} if isinstance(wish, str) else wish
    for part, name in wishes.items():
        if part and part not in parts:
            raise InvalidRequest(f"no component {part!r} has a device of its own; valid: {choices(parts)}")
        if name not in names:
            raise DeviceError(f"no device {name!r} here; valid: {choices(names)}")


def _wished(part: str, wish: str | Mapping[str, str]) -> tuple[str, bool]:
    """The device requested for a component, "auto" for none, and whether it must be that one."""
    if isinstance(wish, str):
        return wish, part in DENOISERS
    return wish.get(part, "auto"), True


def _options(
    bundle: ModelBundle,
    name: str,
    device: Device,
    machine: Machine,
    measured: Measurements,
    wish: str | Mapping[str, str],
    variant: str | None,
) -> Iterator[_Option]:
    for part in placed(bundle.facts):
        if part not in bundle.variants[name].artifacts and any(part in v.artifacts for v in bundle.variants.values()):
            continue
        told = objections(bundle, name, part, device, machine)
        against = next((each for each in told if not set(each.unless) & {_wished(part, wish)[0], variant}), None)
        cost = estimate(bundle, name, part, device, machine)
        found = measured.get((part, name, place_of(device)))
        if found is not None and found.failure:
            against = against or Objection(f"failed when it was measured here: {found.failure}")
        elif found is not None:
            draw = found.call * calls(bundle, name, part)
            cost = replace(cost, load=found.load, draw=draw, quality=min(cost.quality, found.psnr, INVISIBLE))
        timed = found is not None and not found.failure
        yield _Option(part, Placement(name, device, cost, timed), against)


def plausible(bundle: ModelBundle, devices: Sequence[Device], machine: Machine) -> dict[str, list[Placement]]:
    """For each component, every place that no rule excludes and that fits into memory on its own, by estimates."""
    budget = _budget(machine, devices)
    found: dict[str, list[Placement]] = {part: [] for part in placed(bundle.facts)}
    for name in sorted(bundle.variants):
        for device in sorted(devices, key=place_of):
            if device.backend == bundle.variants[name].backend:
                for option in _options(bundle, name, device, machine, {}, "auto", None):
                    if option.objection is None and _fits(_need([option.placement]), budget):
                        found[option.part].append(option.placement)
    return found


def _allowed(options: list[_Option], wish: str | Mapping[str, str], parts: Sequence[str]) -> dict[str, list[Placement]]:
    """For each component its allowed places: those without an objection, else those with a mild one."""
    allowed = {}
    for part in parts:
        mine = [option for option in options if option.part == part]
        free = [option.placement for option in mine if option.objection is None]
        device, only = _wished(part, wish)
        if device == "auto":
            allowed[part] = free or _despite(mine, "there is nothing better")
            continue
        there = [placement for placement in free if placement.device.name == device]
        against = _despite([option for option in mine if option.placement.device.name == device], "asked for")
        allowed[part] = (there or against) if only else (there or free or against)
    return allowed


def _despite(options: list[_Option], because: str) -> list[Placement]:
    against = ((option.placement, option.objection) for option in options if option.objection is not None)
    return [
        replace(placement, reason=f"{because}, though: {objection.why}")
        for placement, objection in against
        if objection.last or not (objection.final or objection.unless)
    ]


def _combinations(allowed: Mapping[str, list[Placement]]) -> Iterator[DevicePlan]:
    """Every plan that takes one variant of each backend in it."""
    variants: dict[str, list[str]] = {}
    for placement in (placement for row in allowed.values() for placement in row):
        rows = variants.setdefault(placement.device.backend, [])
        if placement.variant not in rows:
            rows.append(placement.variant)
    for some in product(*([None, *names] for names in variants.values())):
        taken = {name for name in some if name is not None}
        places = [[placement for placement in row if placement.variant in taken] for row in allowed.values()]
        for placements in product(*places):
            if {placement.variant for placement in placements} == taken:
                yield DevicePlan(dict(zip(allowed, placements, strict=True)), (), need=_need(placements))


def _need(placements: Iterable[Placement]) -> dict[str, int]:
    """Bytes by pool: the machine's memory is "", a device's own is named by its place."""
    placements = list(placements)
    need = {"": BACKEND_BYTES * len({placement.device.backend for placement in placements})}
    for placement in placements:
        pool = place_of(placement.device) if placement.device.memory else ""
        need[pool] = need.get(pool, 0) + placement.cost.memory
    return need


def _budget(machine: Machine, devices: Iterable[Device]) -> dict[str, float]:
    free = machine.free * SHARE_OF_FREE or machine.memory * SHARE_OF_ALL or math.inf
    return {"": free} | {place_of(device): device.memory * SHARE_OF_FREE for device in devices if device.memory}


def _fits(need: Mapping[str, int], budget: Mapping[str, float]) -> bool:
    return all(size <= budget[pool] for pool, size in need.items())


def _quality(plan: DevicePlan) -> float:
    return min(placement.cost.quality for placement in plan.parts.values())


def _size(plan: DevicePlan) -> int:
    return sum(plan.need.values())


def _names(plan: DevicePlan) -> tuple[str, ...]:
    return tuple(f"{p.variant} {place_of(p.device)}" for p in plan.parts.values())


def _best(plans: list[DevicePlan], budget: Mapping[str, float], preference: str) -> DevicePlan:
    fitting = [plan for plan in plans if _fits(plan.need, budget)]
    if not fitting:
        return replace(min(plans, key=lambda plan: (_size(plan), _names(plan))), tight=True)
    floors = PREFERENCES[preference]
    good = next(some for f in floors if (some := [plan for plan in fitting if _quality(plan) >= f]))
    if preference == "memory":
        return min(good, key=lambda plan: (_size(plan), -_quality(plan), plan.seconds, _names(plan)))
    if preference == "quality":
        return min(good, key=lambda plan: (-round(_quality(plan)), plan.seconds, _size(plan), _names(plan)))
    cost: Callable[[DevicePlan], float] = (
        (lambda plan: plan.energy) if preference == "battery" else lambda plan: plan.seconds
    )
    # Estimates are rough: within a tenth, what is nearer to the original goes first.
    limit = min(cost(plan) for plan in good) * 1.1 + 0.1
    near = [plan for plan in good if cost(plan) <= limit]
    return min(near, key=lambda plan: (-round(_quality(plan)), cost(plan), _size(plan), _names(plan)))


def _spares(
    plan: DevicePlan, part: str, allowed: Mapping[str, list[Placement]], budget: Mapping[str, float]
) -> tuple[Placement, ...]:
    """The other places of a component, the fastest first, one for each device and arithmetic."""
    chosen = plan.parts[part]
    seen = {(place_of(chosen.device), chosen.cost.arithmetic)}
    spares = []
    for each in sorted(allowed[part], key=lambda p: (p.cost.seconds, -p.cost.quality, p.variant, place_of(p.device))):
        key = (place_of(each.device), each.cost.arithmetic)
        need = _need({**plan.parts, part: each}.values())
        if key not in seen and (_fits(need, budget) or sum(need.values()) <= _size(plan)):
            seen.add(key)
            spares.append(each)
    return tuple(spares)


def _reasons(
    bundle: ModelBundle,
    plan: DevicePlan,
    budget: Mapping[str, float],
    wish: str | Mapping[str, str],
    variant: str | None,
) -> tuple[str, ...]:
    reasons = []
    if variant is not None:
        reasons.append("the variant was asked for")
    if wish != "auto":
        of = "" if isinstance(wish, str) else f" of {' and '.join(sorted(wish))}"
        reasons.append(f"the device{of} was asked for")
    if plan.preference == "memory":
        reasons.append(f"the smallest, about {_size(plan) / 2**20:.0f} MiB")
    elif plan.preference == "quality":
        reasons.append(f"the nearest to the original, about {_quality(plan):.0f} dB")
    if plan.tight:
        reasons.append(f"it needs about {_size(plan) >> 20} MiB where {int(budget['']) >> 20} are free: it may swap")
    floor = PREFERENCES[plan.preference][0]
    if _quality(plan) < floor and variant is not None:
        reasons.append(f"about {_quality(plan):.0f} dB beside the original, estimated")
    elif _quality(plan) < floor:
        reasons.append(f"nothing that fits keeps {floor:.0f} dB; this one about {_quality(plan):.0f}")
    return tuple(reasons)


def _rejections(
    bundle: ModelBundle,
    devices: Sequence[Device],
    options: list[_Option],
    plan: DevicePlan,
    plans: list[DevicePlan],
    budget: Mapping[str, float],
    wished: str | None,
) -> Iterator[Rejected]:
    """Reasons for each variant and device outside the plan, and for components that a device of the plan can't run."""
    backends = {device.backend for device in devices}
    for name, variant in sorted(bundle.variants.items()):
        if variant.backend not in backends:
            yield Rejected(name, f"nothing here runs {variant.backend}")
        elif wished not in (None, name):
            yield Rejected(name, f"{wished} was asked for")
        elif name not in {placement.variant for placement in plan.parts.values()}:
            mine = [option for option in options if option.placement.variant == name]
            yield Rejected(name, _why(mine, plan, [p for p in plans if p.variant == name], budget))
    for device in devices:
        label = f"{device.name} ({device.backend})"
        if all(place_of(placement.device) != place_of(device) for placement in plan.parts.values()):
            mine = [option for option in options if option.placement.device == device]
            if wished is not None and not mine:
                yield Rejected(label, f"{wished}, which was asked for, does not run there")
                continue
            yield Rejected(label, _why(mine, plan, [p for p in plans if p.device == device], budget))
            continue
        for option in options:
            if option.placement.device == device and option.placement.variant == plan.variant and option.objection:
                yield Rejected(f"{option.part} on {label}", option.objection.why)


def _why(mine: list[_Option], plan: DevicePlan, others: list[DevicePlan], budget: Mapping[str, float]) -> str:
    if not others:
        told = dict.fromkeys(option.objection.why for option in mine if option.objection)
        return "; ".join(told) or ("no variant of this model runs there" if not mine else "it was not asked for")
    fitting = [other for other in others if _fits(other.need, budget)]
    if not fitting:
        need, free = _size(min(others, key=_size)), int(budget[""])
        return f"needs about {need >> 20} MiB, {free >> 20} may be used"
    floor = PREFERENCES[plan.preference][0]
    best = max(_quality(other) for other in fitting)
    if best < floor:
        return f"about {best:.0f} dB of quality, less than the {floor:.0f} that are wanted"
    if plan.preference == "memory":
        return f"larger: about {min(map(_size, fitting)) >> 20} MiB instead of {_size(plan) >> 20}"
    if plan.preference == "quality" and round(best) < round(_quality(plan)):
        return f"about {best:.0f} dB of quality instead of {_quality(plan):.0f}"
    if plan.preference == "battery":
        return f"about {min(other.energy for other in fitting):.2g} J for a picture instead of {plan.energy:.2g}"
    seconds = min(other.seconds for other in fitting)
    if seconds <= plan.seconds:
        return f"no faster by more than a tenth (about {seconds:.2g} s), and {best:.0f} dB of quality"
    return f"about {seconds:.2g} s to a first picture instead of {plan.seconds:.2g}"


def _nothing(
    bundle: ModelBundle, devices: Sequence[Device], options: list[_Option], wish: str | Mapping[str, str]
) -> VariantNotFound:
    parts = [bundle.facts.denoiser] if isinstance(wish, str) else [*wish]
    label = wish if isinstance(wish, str) else ", ".join(f"{part}={name}" for part, name in wish.items())
    told = dict.fromkeys(f"{o.placement.variant} on {o.placement.device.name}: {o.objection.why}"
                         for o in options if o.objection and o.part in parts)  # fmt: skip
    return VariantNotFound(
        f"{bundle.name} has no variant for {label}; it has: {choices(bundle.variants)}, "
        f"and this machine has: {choices(device.name for device in devices)}" + "".join(f"; {why}" for why in told)
    )
