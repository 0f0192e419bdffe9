"""DevicePlan: a place for each component, the reasons in words, and where to go when one of them fails."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from ..backends.base import Device
from ..bundle.parts import DENOISERS
from .estimates import BACKEND_SECONDS, Estimate

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

    def summary(self) -> str:
        """One line: the denoiser's place, those of the others where they differ, the reasons."""
        others = [f"{part} on {p.device.name}" for part, p in self.parts.items() if p.device != self.device]
        where = f"{self.variant} on {self.device.name} ({self.device.description})"
        return f"{', '.join([where, *others])}: {'; '.join(self.reasons)}"

    def explain(self) -> str:
        """All of it: each component's place, and what was rejected and why."""
        lines = [self.summary()]
        lines += [f"  {part:13} {placement.explain()}" for part, placement in self.parts.items()]
        for pool, need in sorted(self.need.items()):
            lines.append(f"  memory        about {need / 2**20:.0f} MiB" + (f" of {pool}" if pool else ""))
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
            "reasons": list(self.reasons),
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
