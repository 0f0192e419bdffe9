"""DevicePlan: a place for each component, the reasons in words, and where to go when one of them fails."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..backends.base import Device
from ..bundle.parts import DENOISERS
from .estimates import BACKEND_SECONDS, Estimate, energy

ARITHMETIC = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Placement:
    """A component's variant and device, what it is expected to cost there, and why it is there."""

    variant: str
    device: Device
    cost: Estimate
    measured: bool = False
    reason: str = ""

    def explain(self) -> str:
        told = "measured here" if self.measured else "estimated"
        words = f"{ARITHMETIC[self.cost.arithmetic]}, {told} {self.cost.seconds:.2g} s"
        return "; ".join(filter(None, [f"{self.variant} on {self.device.name}: {words}", self.reason]))


@dataclass(frozen=True)
class Rejected:
    """A variant, a device, or a component's placement that was not chosen."""

    what: str
    why: str


@dataclass(frozen=True)
class DevicePlan:
    """A place for each component, the reasons in words, and what was rejected.

    Args:
        parts: Component -> its place. A component that is not here shares the device of another (bundle/parts.py).
        reasons: Why, in words; a line is added where a component moves.
        rejected: What was not chosen, and why.
        spares: The next best places of each component, best first.
        need: Bytes expected, by pool: "" is the machine's memory, others are devices with their own.
        tight: Nothing fits into the free memory; this is the smallest.
        preference: "speed", "quality", "battery" or "memory".
        picture: What the costs are of: "a first picture of 512x512 in 20 steps", "these 4 pictures"; "" where they are
            not known.

    Example:
        with Pipeline.open("emoji") as pipeline:
            plan = pipeline.plan
        exact = replace(plan.parts["vae_decoder"], variant="openvino-fp32")
        pipeline = Pipeline.open("emoji", plan=replace(plan, parts={**plan.parts, "vae_decoder": exact}))
    """

    parts: dict[str, Placement]
    reasons: tuple[str, ...]
    rejected: tuple[Rejected, ...] = ()
    spares: dict[str, tuple[Placement, ...]] = field(default_factory=dict)
    need: dict[str, int] = field(default_factory=dict)
    tight: bool = False
    preference: str = "speed"
    picture: str = ""

    @property
    def variant(self) -> str:
        """The denoiser's, whose name and hash a picture carries."""
        return self._denoiser.variant

    @property
    def device(self) -> Device:
        """The denoiser's: where nearly all of the time goes."""
        return self._denoiser.device

    @property
    def _denoiser(self) -> Placement:
        return next(self.parts[name] for name in DENOISERS if name in self.parts)

    @property
    def seconds(self) -> float:
        """Seconds until the first picture, loading included; each further backend's library is loaded, too."""
        more = len({placement.device.backend for placement in self.parts.values()}) - 1
        return sum(placement.cost.seconds for placement in self.parts.values()) + more * BACKEND_SECONDS

    @property
    def energy(self) -> float:
        """Joules, loading shared among ten."""
        return sum(energy(placement.cost, placement.device) for placement in self.parts.values())

    @property
    def expectation(self) -> str:
        """The seconds, or the joules where those count, and what they are of; "" where that is not known."""
        measured = all(placement.measured for placement in self.parts.values())
        end = f"for {self.picture}, {'measured here' if measured else 'estimated'}"
        if self.picture and self.preference == "speed":
            return f"about {self.seconds:.2g} s {end.replace(',', ', loading included,', 1)}"
        return f"about {self.energy:.2g} J {end}" if self.picture and self.preference == "battery" else ""

    def scaled(self, draws: Mapping[str, float], loads: Mapping[str, float], picture: str) -> DevicePlan:
        """The plan with the costs of `picture`: of each component those that it has times the given factors."""
        parts = {
            part: replace(
                p, cost=replace(p.cost, draw=p.cost.draw * draws[part], load=p.cost.load * loads.get(part, 1))
            )
            for part, p in self.parts.items()
        }
        return replace(self, parts=parts, picture=picture)

    def summary(self) -> str:
        """One line: the denoiser's place, those of the others where they differ, the reasons, what it takes."""
        others = [f"{part} on {p.device.name}" for part, p in self.parts.items() if p.device != self.device]
        where = f"{self.variant} on {self.device.name} ({self.device.description})"
        told = "; ".join(filter(None, [*self.reasons, self.expectation]))
        return f"{', '.join([where, *others])}{told and ': '}{told}"

    def explain(self) -> str:
        """All of it: each component's place, and what was rejected and why."""
        lines = [self.summary()]
        lines += [f"  {part:13} {placement.explain()}" for part, placement in self.parts.items()]
        for pool, need in sorted(self.need.items()):
            of = f" of {pool}" if pool else ""
            lines.append(f"  memory        about {need / 2**20:.0f} MiB{of}, for the model's own picture")
        lines += [f"  not {row.what}: {row.why}" for row in self.rejected]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "preference": self.preference,
            "parts": {
                part: {"variant": p.variant, "device": p.device.name, "backend": p.device.backend,
                       "arithmetic": ARITHMETIC[p.cost.arithmetic], "measured": p.measured,
                       "load_seconds": round(p.cost.load, 4), "picture_seconds": round(p.cost.draw, 4),
                       "quality_db": round(p.cost.quality, 1), "reason": p.reason}
                for part, p in self.parts.items()
            },
            "reasons": [*self.reasons, *filter(None, [self.expectation])],
            "memory_bytes": self.need,
            "tight": self.tight,
            "rejected": [{"what": row.what, "why": row.why} for row in self.rejected],
        }  # fmt: skip

    def fall_back(self, part: str, why: str, numerical: bool = False) -> DevicePlan | None:
        """The plan with `part` at its next place; None where there is none. `numerical`: it returned no numbers.

        A component that overflows float16 does so on every device, so a wider type goes first then.
        """
        spares = self.spares.get(part, ())
        if not spares:
            return None
        wide = [spare for spare in spares if spare.cost.arithmetic != "f16"] if numerical else []
        chosen = (wide or list(spares))[0]
        failed = self.parts[part]
        told = f"{part} moved from {failed.variant} on {failed.device.name} to {chosen.variant} on {chosen.device.name}"
        return replace(
            self,
            parts={**self.parts, part: replace(chosen, reason=f"{failed.device.name} failed: {why}")},
            reasons=(*self.reasons, f"{told}: {why}"),
            spares={**self.spares, part: tuple(spare for spare in spares if spare is not chosen)},
        )
