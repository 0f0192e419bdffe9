"""DevicePlan: which variant runs where, and why. Choosing is a pure function; only `discover` looks at the machine."""

from __future__ import annotations

from dataclasses import dataclass

from .backends import NAMES, Backend, Device, backend
from .bundle import ModelBundle
from .errors import DeviceError, MissingExtra, VariantNotFound, choices

# For a device that nobody has measured yet: the smallest form that is still near lossless comes first.
PRECISIONS = ("fp16", "as exported", "fp32", "p8", "int8", "p6", "mixed", "p4", "int4", "p2", "p1")


@dataclass(frozen=True)
class DevicePlan:
    """A variant, a device, and the reasons in words, in the order they were weighed."""

    variant: str
    device: Device
    reasons: tuple[str, ...]

    def explain(self) -> str:
        return f"{self.variant} on {self.device.name} ({self.device.description}): {'; '.join(self.reasons)}"


def discover() -> tuple[list[Device], list[str]]:
    """The devices of all installed backends, and a line for each backend that is not installed."""
    devices, absent = [], []
    for name in NAMES:
        try:
            found: Backend = backend(name)
            devices += found.devices()
        except MissingExtra as error:
            absent.append(str(error))
    return devices, absent


def choose(bundle: ModelBundle, devices: list[Device], wish: str = "auto", variant: str | None = None) -> DevicePlan:
    """The plan for `bundle`: `wish` is a device's name or "auto", `variant` a variant's name or None.

    Raises DeviceError or VariantNotFound, naming what there is.
    """
    if not devices:
        raise DeviceError('no backend is installed; install one: pip install "edge-sd[openvino]"')
    names = ["auto", *(device.name for device in devices)]
    if wish not in names:
        raise DeviceError(f"no device {wish!r} here; valid: {choices(names)}")
    reasons = []
    if variant is not None:
        bundle.variant(variant)
        candidates = [variant]
        reasons.append("the variant was asked for")
    else:
        candidates = sorted(bundle.variants, key=lambda name: _rank(bundle.variants[name].precision))
    if wish != "auto":
        devices = [device for device in devices if device.name == wish]
        reasons.append("the device was asked for")
    else:
        # The CPU is where every variant was measured; others wait for a measurement on the machine itself.
        devices = sorted(devices, key=lambda device: device.name != "cpu")
        reasons.append("the CPU comes first until another device has been measured here")
    for device in devices:
        # A form that was arranged for this very device goes before those for others.
        for name in sorted(candidates, key=lambda name: bundle.variants[name].compute not in ("", device.name)):
            if bundle.variants[name].backend == device.backend:
                if variant is None:
                    reasons.append(f"{bundle.variants[name].precision} is the first precision offered for it")
                return DevicePlan(name, device, tuple(reasons))
    raise VariantNotFound(
        f"{bundle.name} has no variant for {wish}; it has: {choices(bundle.variants)}, "
        f"and this machine has: {choices(device.name for device in devices)}"
    )


def _rank(precision: str) -> int:
    return PRECISIONS.index(precision) if precision in PRECISIONS else len(PRECISIONS)
