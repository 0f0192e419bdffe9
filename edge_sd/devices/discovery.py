"""Discovery: the one look at this computer that choosing, tuning and the doctor start from."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..backends import AllBackends, Device
from ..machine import Machine, this_machine


@dataclass(frozen=True)
class Here:
    """The backends that are installed, the devices they find, and the machine around them."""

    backends: AllBackends
    devices: list[Device]
    machine: Machine

    @property
    def absent(self) -> list[str]:
        """A line for each backend that is not installed."""
        return self.backends.absent

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        machine = {**asdict(self.machine), "flags": sorted(self.machine.flags)}
        devices = [{**asdict(device), "features": sorted(device.features)} for device in self.devices]
        return {"machine": machine, "devices": devices, "absent": self.absent}

    def lines(self) -> list[str]:
        """For people."""
        rows = [f"machine           {self.machine.describe()}"]
        for device in self.devices:
            own = f"{device.memory / 2**30:.1f} GB of its own" if device.memory else ""
            driver = f"driver {device.driver}" if device.driver else ""
            told = [device.description, " ".join(sorted(device.features)), own, driver]
            rows.append(f"{device.name:17} {', '.join(filter(None, told))}")
        return rows + [f"absent            {line}" for line in self.absent]


def discover() -> Here:
    """Find backends, devices and machine. Missing or unknown things raise nothing."""
    backends = AllBackends()
    return Here(backends, backends.devices(), this_machine())
