"""How long it takes until a loaded model draws with another LoRA."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from .large import SIDE, make_bundle
from .process import measured
from .report import Column, Table, seconds

RANK = 16
STEPS = 5
SWITCH = """
from edge_sd import Pipeline, Request
seconds, steps = [], []
with Pipeline.open(MODEL, "cpu", VARIANT) as pipeline:
    for files in ([], *([file] for file in FILES)):
        started = time.perf_counter()
        request = Request("a red apple", seed=0, steps=STEPS, width=SIDE, height=SIDE, loras=dict.fromkeys(files, 0.8))
        pipeline.prepare(pipeline.resolve(request))
        seconds.append(time.perf_counter() - started)
        if not files or files == FILES[-1:]:
            marks = [time.perf_counter() for step in pipeline.steps(request)]
            steps.append(sorted(after - before for before, after in zip(marks, marks[1:])))
print(json.dumps({"seconds": seconds, "steps": [each[len(each) // 2] for each in steps]}))
"""


def write_lora(folder: Path, path: Path, seed: int) -> None:
    """A LoRA as kohya's scripts make by default: every layer of a UNet's transformers; its numbers are random."""
    import torch
    from diffusers import UNet2DConditionModel
    from safetensors.numpy import save_file

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet"))
    rng = np.random.default_rng(seed)
    tensors: dict[str, Any] = {}
    for name, layer in unet.named_modules():
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d) and ".attentions." in name:
            outputs, inputs, *kernel = layer.weight.shape
            key = f"lora_unet_{name.replace('.', '_')}"
            tensors[f"{key}.lora_up.weight"] = rng.normal(0, 0.01, (outputs, RANK, *kernel)).astype(np.float16)
            tensors[f"{key}.lora_down.weight"] = rng.normal(0, 0.01, (RANK, inputs, *kernel)).astype(np.float16)
            tensors[f"{key}.alpha"] = np.array(RANK, np.float16)
    save_file(tensors, path)


def table(home: Path) -> Table:
    """Seconds to the first LoRA and from one to another, for two variants of SD 1.5's shapes."""
    bundle = make_bundle(home)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        files = [f"{scratch}/{n}.safetensors" for n in range(4)]
        for n, file in enumerate(files):
            write_lora(home / "source", Path(file), n)
        for variant in ("openvino-fp16", "openvino-w8a8"):
            found = measured(variant, SWITCH, MODEL=str(bundle), VARIANT=variant, FILES=files, SIDE=SIDE, STEPS=STEPS)
            model, first, *others = found["seconds"]
            without, with_one = found["steps"]
            rows.append({"variant": variant, "model": model, "first": first, "another": statistics.median(others),
                         "without": without, "with": with_one})  # fmt: skip
    columns = (
        Column("variant", f"SD 1.5's shapes, LoRAs of rank {RANK}"),
        Column("model", "the model", seconds(1)),
        Column("first", "the first LoRA", seconds(1)),
        Column("another", "another", seconds(2)),
        Column("without", "a step without", seconds(2)),
        Column("with", "with", seconds(2)),
    )
    return Table("lora", columns, rows)
