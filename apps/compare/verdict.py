"""Conclusions: the Pareto front, the recommended variant, and gates that were missed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edge_sd.errors import InvalidRequest, choices

MIN_PSNR = 30.0
GATES = ("latent_psnr", "psnr", "ssim", "ms_ssim", "agreement", "clip")


def pareto(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names of (cost, quality) that nothing else beats: no other is as cheap and as good, and better in one."""

    def beaten(name: str) -> bool:
        cost, quality = points[name]
        return any(c <= cost and q >= quality and (c < cost or q > quality) for c, q in points.values())

    return sorted((name for name in points if not beaten(name)), key=lambda name: (points[name], name))


def recommend(rows: Sequence[dict[str, Any]], min_psnr: float, max_size: float | None) -> dict[str, str | None]:
    """The names of the smallest and of the fastest variant within `min_psnr` dB and `max_size` MB; None for none.

    Sizes are of the components that all variants have (plan.py). `rows` are the report's.
    The reference, if it is a variant, is not recommended: it is what others replace.
    """
    fit = [row for row in rows if row["kind"] == "variant" and "quality" in row
           and row["quality"]["psnr"]["mean"] >= min_psnr
           and (max_size is None or row["bytes"]["compared"] <= max_size * 1e6)]  # fmt: skip
    timed = [row for row in fit if "picture" in row.get("speed", {})]
    smallest = min(fit, key=lambda row: (row["bytes"]["compared"], row["name"]), default=None)
    fastest = min(timed, key=lambda row: (row["speed"]["picture"]["median"], row["name"]), default=None)
    return {
        "smallest": smallest["name"] if smallest else None,
        "fastest": fastest["name"] if fastest else None,
    }


def sentence(rows: Sequence[dict[str, Any]], min_psnr: float, max_size: float | None) -> str:
    """The recommendation in words."""
    found = recommend(rows, min_psnr, max_size)
    within = f"{min_psnr:g} dB or more" + (f" and {max_size:g} MB or less" if max_size is not None else "")
    if not any(row["kind"] == "variant" for row in rows):
        return "Nothing to recommend: there is no variant beside the reference."
    if found["smallest"] is None:
        return f"No variant has {within}."
    by_name = {row["name"]: row for row in rows}
    small = by_name[found["smallest"]]
    text = f"With {within}: the smallest is {small['name']} ({small['bytes']['compared'] / 1e6:.1f} MB"
    text += f", {small['quality']['psnr']['mean']:.1f} dB)"
    if found["fastest"]:
        fast = by_name[found["fastest"]]
        text += f"; the fastest is {fast['name']} ({fast['speed']['picture']['median']:.2f} s a picture"
        text += f", {fast['quality']['psnr']['mean']:.1f} dB)"
    return text + "."


def parse_gates(texts: Sequence[str]) -> dict[str, float]:
    """ "psnr=30" or "30" (dB) or "psnr=30,ssim=0.9" -> metric and least mean. Raises InvalidRequest."""
    gates = {}
    for text in (part.strip() for each in texts for part in each.split(",")):
        name, equals, value = text.rpartition("=")
        name = name.strip() if equals else "psnr"
        if name not in GATES:
            raise InvalidRequest(f"no gate {name!r}; valid: {choices(GATES)}")
        try:
            gates[name] = float(value)
        except ValueError:
            raise InvalidRequest(f"the gate {text!r} has no number; write psnr=30 or ssim=0.9") from None
    return gates


def missed(rows: Sequence[dict[str, Any]], gates: Mapping[str, float]) -> list[str]:
    """One line for each variant that fails a gate; one that could not be measured fails every gate."""
    lines = []
    for row in rows if gates else []:
        if row["kind"] != "variant":
            continue
        if "error" in row:
            lines.append(f"{row['name']} failed: {row['error']}")
            continue
        for name, least in gates.items():
            value = row["quality"].get(name, {}).get("mean")
            if value is None:
                lines.append(f"{row['name']}: {name} was not measured")
            # not >=: NaN misses too
            elif not value >= least:
                lines.append(f"{row['name']}: {name} is {value:g}, below {least:g}")
    return lines
