"""LoRA files beside diffusers, which loads the same ones with its own code and peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_sd import ModelBundle, Request
from edge_sd.converters.parity import psnr

from .test_prompts import draw, ours, theirs

__all__ = ["theirs"]

PROMPT = "a red apple"


def modules(pipeline: Any) -> dict[tuple[str, str], tuple[int, ...]]:
    """Linear layers of both models and some convolutions: (part, name) -> shape of the weight."""
    found = {}
    for part in ("unet", "text_encoder"):
        for name, module in getattr(pipeline, part).named_modules():
            attention = name.split(".")[-1] in ("to_q", "to_k", "to_v", "q_proj", "out_proj") or name.endswith(
                "to_out.0"
            )
            if attention or name.endswith(("proj_in", "resnets.0.conv1")):
                found[part, name] = tuple(module.weight.shape)
    return found


def write(path: Path, pipeline: Any, kind: str) -> Path:
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for (part, name), (rows, columns, *kernel) in modules(pipeline).items():
        down = torch.randn(4, columns, *kernel, generator=generator) * 0.3
        up = torch.randn(rows, 4, *[1] * len(kernel), generator=generator) * 0.3
        if kind == "kohya":
            key = f"lora_{'unet' if part == 'unet' else 'te'}_{name.replace('.', '_')}"
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(2.0)}
        else:
            tensors |= {f"{part}.{name}.lora_A.weight": down, f"{part}.{name}.lora_B.weight": up}
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("kind", ["kohya", "peft"])
def test_a_lora_is_what_diffusers_draws_with_it(theirs: Any, bundle: ModelBundle, tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "style.safetensors", theirs, kind)
    theirs.load_lora_weights(str(tmp_path), weight_name=path.name, adapter_name="style")
    theirs.set_adapters("style", 0.7)
    expected = draw(theirs, prompt=PROMPT)
    theirs.unload_lora_weights()
    found = ours(bundle, PROMPT, loras={path: 0.7})
    assert psnr(found, expected, peak=255) >= 40
    assert psnr(ours(bundle, f"{PROMPT}<lora:style:0.7>", lora_folder=tmp_path), found, peak=255) == 200
    assert psnr(ours(bundle, PROMPT), expected, peak=255) < 35


def test_two_loras_add_up_and_are_recorded(bundle: ModelBundle, theirs: Any, tmp_path: Path) -> None:
    from edge_sd import Pipeline
    from edge_sd.pipeline.recorded import read_recorded

    paths = [write(tmp_path / f"{name}.safetensors", theirs, "peft") for name in "ab"]
    wishes: dict[str, Any] = {"seed": 1, "steps": 4, "sampler": "euler", "width": 64, "height": 64}
    with Pipeline.open(bundle.root, variant="openvino-fp32") as pipeline:
        both = pipeline.generate(Request(PROMPT, loras={paths[0]: 0.25, paths[1]: 0.5}, **wishes))
        one = pipeline.generate(Request(PROMPT, loras={paths[0]: 0.75}, **wishes))
        plain = pipeline.generate(Request(PROMPT, **wishes))
        again = pipeline.generate(Request(PROMPT, loras={paths[0]: 0.75}, **wishes))
    first, second, third, fourth = (np.asarray(each.pictures[0].image) for each in (both, one, plain, again))
    assert psnr(first, second, peak=255) >= 40
    assert psnr(third, second, peak=255) < 35
    assert np.array_equal(second, fourth)
    recorded = read_recorded(both.pictures[0].save(tmp_path / "x.png"))
    assert {name: row[0] for name, row in recorded.settings["loras"].items()} == {"a": 0.25, "b": 0.5}
    assert "<lora:a:0.25> <lora:b:0.5>" in recorded.text
