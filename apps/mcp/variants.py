"""One picture by several variants of a model, for an agent that wonders which to take."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_sd.errors import DeviceError, EdgeSDError, InvalidRequest, VariantNotFound, choices
from edge_sd.images.metrics import finite, psnr
from edge_sd.pipeline.request import MAX_SEED

from ..server.failure import describe
from ..server.wish import Wish
from .studio import Progress, Studio

if TYPE_CHECKING:
    from PIL.Image import Image

MOST = 8


async def compared(
    studio: Studio, prompt: str, variants: Sequence[str] | None, seed: int | None, steps: int | None, model: str,
    progress: Progress,
) -> tuple[list[dict[str, Any]], list[Image]]:  # fmt: skip
    """A row for each variant, and the pictures of those that could draw. Raises InvalidRequest.

    Each draws twice, so that the seconds are those of a picture alone; the first one loads. Likeness is PSNR in
    decibels beside the first variant's picture, 100 for equal ones.
    """
    engines = studio.service.engines
    name = model or engines.default
    bundle = engines.bundle(name)
    planned = engines.plan((name, None, "auto", "exact"))[0].split(" ")[0]
    if variants is None:
        # The one that would be drawn with is the reference.
        variants = sorted(bundle.variants, key=lambda each: (each != planned, each))[:MOST]
    if not 1 <= len(variants) <= MOST:
        raise InvalidRequest(f"{len(variants)} variants are not 1 to {MOST}")
    for each in variants:
        if each not in bundle.variants:
            raise InvalidRequest(f"{name} has no variant {each[:80]!r}; valid: {choices(bundle.variants)}")
    chosen = secrets.randbelow(MAX_SEED) if seed is None else seed
    rows: list[dict[str, Any]] = []
    images: list[Image] = []
    for n, each in enumerate(variants):

        async def told(share: float, what: str, n: int = n, each: str = each) -> None:
            await progress((n + share) / len(variants), f"{each}: {what}")

        row: dict[str, Any] = {"variant": each, "megabytes": round(bundle.variant(each).size() / 1e6, 1)}
        rows.append(row)
        wish = Wish(prompt=prompt, model=name, variant=each, seed=chosen, steps=steps)
        try:
            await studio.run(wish, told)
            started = time.perf_counter()
            job = await studio.run(wish, told)
        except (DeviceError, VariantNotFound, InvalidRequest) as error:
            row["not drawn"] = describe(error).message
            continue
        picture = job.drawn[0]
        row |= {"device": picture.device, "seconds": round(time.perf_counter() - started, 2), "seed": chosen}
        images.append(picture.image)
        pixels, first = (np.asarray(image) for image in (picture.image, images[0]))
        if pixels.shape == first.shape:
            row["psnr"] = round(finite(psnr(pixels, first, 255)), 1)
    if not images:
        raise _Nothing(f"no variant of {name} could draw: {rows[0].get('not drawn', '')}")
    return rows, images


class _Nothing(EdgeSDError):
    """No variant could draw."""
