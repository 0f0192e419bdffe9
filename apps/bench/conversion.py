"""What it takes to convert a UNet of full size to Core ML."""

from __future__ import annotations

import tempfile
from pathlib import Path

from .process import measured

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


def table() -> str:
    """SD 1.5's UNet to Core ML in both forms, each in a process of its own; a table in Markdown."""
    lines = ["| SD 1.5 UNet, 512x512, to Core ML in fp16 | time | peak memory | package |", "| --- | --- | --- | --- |"]
    for compute, target in (("gpu", "iOS18"), ("ane", "iOS16")):
        with tempfile.TemporaryDirectory() as scratch:
            output = Path(scratch, "Unet.mlpackage")
            found = measured(
                f"converting for {compute}", FULL_SIZE, ANE=compute == "ane", TARGET=target, OUTPUT=str(output)
            )
        lines.append(
            f"| {compute}, {target} | {found['seconds']:.0f} s | {found['peak'] / 2**30:.1f} GiB "
            f"| {found['bytes'] / 1e6:.0f} MB |"
        )
    return "\n".join(lines)
