"""Time and memory to convert a model of full size: to OpenVINO, beside optimum-cli, and its UNet to Core ML."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from .process import measured
from .report import Column, Table, beside, gibibytes, seconds

# A UNet of SD 1.5's full size, with random weights: what a conversion needs does not depend on their values.
FULL_SIZE = """
from dataclasses import replace
from pathlib import Path
from diffusers import UNet2DConditionModel
from edge_sd.apps.libraries import hush_libraries
from edge_sd.bundle import LatentSpace, ModelBundle
from edge_sd.converters.coreml import ane, convert
from edge_sd.converters.coreml.wrappers import Sizes, wrap
hush_libraries()
unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768).eval().requires_grad_(False)
facts = replace(ModelBundle.open("emoji").facts, max_tokens=77, latents=LatentSpace())
started = time.perf_counter()
component = wrap("unet", ane.rewrite(unet) if ANE else unet, facts, Sizes(512, 512), channel_first=ANE)
convert.save(convert.convert(component, TARGET), Path(OUTPUT))
print(json.dumps({"seconds": time.perf_counter() - started, "peak": peak_memory(),
                  "bytes": sum(file.stat().st_size for file in Path(OUTPUT).rglob("*") if file.is_file())}))
"""


# A program as a child; the wrapper is small, so the child's peak is the program's.
PROGRAM = """
import os, resource, subprocess, time
started = time.perf_counter()
done = subprocess.run(COMMAND, capture_output=True, text=True)
assert done.returncode == 0, done.stderr[-2000:]
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if os.uname().sysname == "Darwin" else 1024)
print(json.dumps({"seconds": time.perf_counter() - started, "peak": peak}))
"""


def beside_optimum(source: Path) -> Table:
    """A diffusers folder of full size to OpenVINO in fp16, here (measured beside torch, too) and by optimum-cli."""
    rows: list[dict[str, Any]] = []
    programs = Path(sys.executable).parent
    with tempfile.TemporaryDirectory() as scratch:
        commands = {
            "optimum-cli export openvino": [
                str(programs / "optimum-cli"), "export", "openvino", "--model", str(source), "--task", "text-to-image",
                "--weight-format", "fp16", f"{scratch}/theirs",
            ],
            "edge-sd convert": [str(programs / "edge-sd"), "convert", str(source), f"{scratch}/ours", "--quiet"],
        }  # fmt: skip
        for name, command in commands.items():
            found = measured(name, PROGRAM, COMMAND=command)
            shutil.rmtree(f"{scratch}/theirs", ignore_errors=True)
            first = rows[0] if rows else None
            rows.append({"program": name, **{key: (found[key], found[key] / first[key][0] if first else None)
                                             for key in ("seconds", "peak")}})  # fmt: skip
    columns = (
        Column("program", "SD 1.5's shapes to OpenVINO in fp16"),
        Column("seconds", "time", beside(seconds(0))),
        Column("peak", "peak memory", beside(gibibytes(1))),
    )
    return Table("conversion", columns, rows)


def table() -> Table:
    """SD 1.5's UNet to Core ML in both forms, each in a process of its own."""
    rows = []
    for compute, target in (("gpu", "iOS18"), ("ane", "iOS16")):
        with tempfile.TemporaryDirectory() as scratch:
            output = Path(scratch, "Unet.mlpackage")
            found = measured(
                f"converting for {compute}", FULL_SIZE, ANE=compute == "ane", TARGET=target, OUTPUT=str(output)
            )
        rows.append({"form": f"{compute}, {target}", **found})
    columns = (
        Column("form", "SD 1.5 UNet, 512x512, to Core ML in fp16"),
        Column("seconds", "time", seconds(0)),
        Column("peak", "peak memory", gibibytes(1)),
        Column("bytes", "package", lambda value: f"{value / 1e6:.0f} MB"),
    )
    return Table("coreml", columns, rows)
