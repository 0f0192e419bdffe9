"""The processor's own counters of energy, where the system lets this user read them: Linux's powercap (RAPL)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Counter:
    """Microjoules since some moment; from `limit` it begins again at 0."""

    value: int
    limit: int


def consumed(root: Path = POWERCAP) -> dict[str, Counter]:
    """A counter for each processor package; empty where there is none or only root may read it.

    A package's zone is `intel-rapl:N` (AMD's has the same name); cores and memory are zones within, `intel-rapl:N:M`,
    and its copy for the memory bus, `intel-rapl-mmio:N`, counts the same joules again.
    """
    found = {}
    for zone in sorted(root.glob("intel-rapl:*")):
        try:
            if zone.name.count(":") == 1 and (zone / "name").read_text().startswith("package"):
                found[zone.name] = Counter(_read(zone / "energy_uj"), _read(zone / "max_energy_range_uj"))
        except (OSError, ValueError):
            return {}  # Some packages are not the machine.
    return found


def joules(before: dict[str, Counter], after: dict[str, Counter]) -> float | None:
    """Between two readings less than one round of the counters apart; None without counters."""
    if not before or before.keys() != after.keys():
        return None
    spent = 0
    for name, start in before.items():
        risen = after[name].value - start.value
        spent += risen if risen >= 0 else risen + start.limit
    return spent / 1e6


def _read(path: Path) -> int:
    return int(path.read_text())
