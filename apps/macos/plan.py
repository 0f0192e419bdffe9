"""How many operations of each component Core ML runs on which engine, by its own plan."""

from __future__ import annotations

from edge_sd.backends import LoadRequest
from edge_sd.backends.coreml import CoreMLBackend
from edge_sd.backends.coreml.plan import ENGINES
from edge_sd.bundle.bundle import ModelBundle
from edge_sd.components.shapes import shapes_of
from edge_sd.errors import DeviceError, InvalidRequest, choices


def placements(model: str, device: str, variant: str | None = None) -> dict[str, dict[str, int]]:
    """Component -> engine -> operations. Raises InvalidRequest, VariantNotFound or DeviceError."""
    bundle = ModelBundle.open(model)
    names = [name for name, each in bundle.variants.items() if each.backend == "coreml"]
    chosen = bundle.variant(variant) if variant else bundle.variants[names[0]] if names else None
    if chosen is None or chosen.backend != "coreml":
        raise InvalidRequest(f"{variant or bundle.name} holds no Core ML packages; variants that do: {choices(names)}")
    backend = CoreMLBackend()
    places = {each.name: each for each in backend.devices()}
    if device not in places:
        raise DeviceError(f"Core ML has no device {device!r} here; valid: {choices(places)}")
    found = {}
    for part, shapes in shapes_of(bundle.facts, bundle.defaults.width, bundle.defaults.height, 2).items():
        component = backend.load(LoadRequest(bundle, chosen, part, places[device], shapes))
        counts = component.program.placements()
        component.close()
        found[part] = {engine: counts[engine] for engine in (*ENGINES.values(), "another")}
    return found


def table(rows: dict[str, dict[str, int]]) -> str:
    """A row for each component, as Markdown."""
    engines = (*ENGINES.values(), "another")
    lines = [f"| component | {' | '.join(engines)} |", "| --- |" + " --- |" * len(engines)]
    lines += [f"| {part} | {' | '.join(str(row[engine]) for engine in engines)} |" for part, row in rows.items()]
    return "\n".join(lines)
