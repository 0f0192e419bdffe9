"""How long it takes until a loaded model draws with another LoRA."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from .large import SIDE, make_bundle
from .process import measured

RANK = 16
SWITCH = """
from edge_sd import Pipeline, Request
seconds = []
with Pipeline.open(MODEL, "cpu", VARIANT) as pipeline:
    for file in FILES:
        started = time.perf_counter()
        request = Request("a red apple", seed=0, steps=1, width=SIDE, height=SIDE, loras={file: 0.8})
        pipeline.prepare(pipeline.resolve(request))
        seconds.append(time.perf_counter() - started)
print(json.dumps({"seconds": seconds}))
"""


def write_lora(folder: Path, path: Path, seed: int) -> None:
    """A LoRA in kohya's keys for every attention layer of a diffusers folder's UNet; its numbers are random."""
    import torch
    from diffusers import UNet2DConditionModel
    from safetensors.numpy import save_file

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet"))
    rng = np.random.default_rng(seed)
    tensors: dict[str, Any] = {}
    for name, layer in unet.named_modules():
        if isinstance(layer, torch.nn.Linear) and ".attn" in name:
            key = f"lora_unet_{name.replace('.', '_')}"
            up, down = (layer.out_features, RANK), (RANK, layer.in_features)
            tensors[f"{key}.lora_up.weight"] = rng.normal(0, 0.01, up).astype(np.float16)
            tensors[f"{key}.lora_down.weight"] = rng.normal(0, 0.01, down).astype(np.float16)
            tensors[f"{key}.alpha"] = np.array(RANK, np.float16)
    save_file(tensors, path)


def table(home: Path) -> str:
    """Markdown: seconds from one LoRA to another, for two variants of SD 1.5's shapes."""
    bundle = make_bundle(home)
    lines = ["| SD 1.5's shapes | from one LoRA to another |", "| --- | --- |"]
    with tempfile.TemporaryDirectory() as scratch:
        files = [f"{scratch}/{n}.safetensors" for n in range(4)]
        for n, file in enumerate(files):
            write_lora(home / "source", Path(file), n)
        for variant in ("openvino-fp16", "openvino-w8a8"):
            found = measured(variant, SWITCH, MODEL=str(bundle), VARIANT=variant, FILES=files, SIDE=SIDE)
            lines.append(f"| {variant} | {statistics.median(found['seconds'][1:]):.1f} s |")
    return "\n".join(lines)
