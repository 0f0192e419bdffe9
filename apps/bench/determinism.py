"""The same request on the same machine and variant makes the same bytes: hashes, across processes and threads.

python -m edge_sd.apps.bench.determinism VARIANT      the hash alone, which `table` asks a process of its own for
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from tempfile import TemporaryDirectory
from typing import Any

from edge_sd import ModelBundle, Pipeline, Request
from edge_sd.errors import DeviceError, MissingExtra, VariantNotFound

from .report import Column, Table

MODEL, DEVICE = "emoji", "cpu"
REQUESTS = (
    Request("a red apple, glossy style", seed=7, steps=4),
    Request("a cat", "a dog", seed=8, steps=4, sampler="euler_a"),
)
THREADS = 4


def digest(variant: str) -> str:
    """sha256 of the pixels of all REQUESTS, drawn by a pipeline of its own."""
    found = hashlib.sha256()
    with Pipeline.open(MODEL, DEVICE, variant) as pipeline:
        for request in REQUESTS:
            found.update(pipeline.generate(request).pictures[0].image.tobytes())
    return found.hexdigest()


def table() -> Table:
    """One row for each variant of the embedded model that runs on this machine's processor."""
    rows = [row for name in sorted(ModelBundle.open(MODEL).variants) if (row := _row(name)) is not None]
    columns = (
        Column("variant", "variant"),
        Column("sha256", "sha256 of the pixels of two pictures"),
        Column("again", "again", _same),
        Column("process", "another process, compiled anew", _same),
        Column("threads", f"{THREADS} threads at once", _same),
    )
    note = ("Other processors sum in another order: between machines pictures are compared by PSNR, with the floor of "
            "their variant's precision, and not by hash.")  # fmt: skip
    return Table("determinism", columns, rows, (note,))


def _row(variant: str) -> dict[str, Any] | None:
    try:
        first = digest(variant)
    except (DeviceError, MissingExtra, VariantNotFound):
        return None
    command = [sys.executable, "-m", "edge_sd.apps.bench.determinism", variant]
    with TemporaryDirectory() as cold:
        env = {**os.environ, "EDGE_SD_CACHE": cold}
        other = subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout.strip()
    with ThreadPoolExecutor(THREADS) as pool:
        together = list(pool.map(digest, [variant] * THREADS))
    return {
        "variant": variant,
        "sha256": first[:16],
        "again": digest(variant) == first,
        "process": other == first,
        "threads": set(together) == {first},
    }


def _same(value: bool) -> str:
    return "the same" if value else "DIFFERENT"


if __name__ == "__main__":
    print(digest(sys.argv[1]))
