"""Components that SDNQ quantized: decoded as its own library decodes them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_sd.bundle.weights import load_module
from edge_sd.converters.sources.checkpoint import unpacked
from edge_sd.converters.sources.sdnq import LAYOUTS, TYPES
from edge_sd.converters.sources.source import Source
from edge_sd.errors import InvalidModel

from ..transformers import save_z_image

# Compiled for each kind of weights, its functions would take minutes.
os.environ.setdefault("SDNQ_USE_TORCH_COMPILE", "0")
import sdnq


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_z_image(tmp_path_factory.mktemp("sdnq") / "model")


def quantized(folder: Path, target: Path, **how: Any) -> dict[str, Any]:
    """A copy whose transformer SDNQ quantized and saved; its weights as the library makes them again."""
    import torch
    from diffusers import ZImageTransformer2DModel
    from sdnq.dequantizer import dequantize_sdnq_model

    shutil.copytree(folder, target)
    model = ZImageTransformer2DModel.from_pretrained(folder / "transformer")
    config = sdnq.SDNQConfig(minimum_allowed_numel=0, minimum_allowed_channel_size=8, **how)
    model = sdnq.sdnq_post_load_quant(
        model, torch_dtype=torch.float32, quantization_config=config, minimum_allowed_numel=0,
        minimum_allowed_channel_size=8, **how,
    )  # fmt: skip
    shutil.rmtree(target / "transformer")
    sdnq.save_sdnq_model(model, str(target / "transformer"), sdnq_config=config)
    path = target / "transformer/config.json"
    document = json.loads(path.read_text("utf-8"))
    # As its published models have it.
    how = {key: value for key, value in config.to_dict().items() if isinstance(value, str | int | float | list | dict)}
    path.write_text(json.dumps({**document, "quantization_config": {**how, "quant_method": "sdnq"}}), "utf-8")
    return dict(dequantize_sdnq_model(model).state_dict())


@pytest.mark.parametrize(
    ("how", "kind"),
    [
        ({"weights_dtype": "int8"}, "int8"),
        ({"weights_dtype": "uint8"}, "uint8"),
        ({"weights_dtype": "int8", "use_quantized_matmul": True}, "int8"),
        ({"weights_dtype": "uint4", "group_size": 8}, "uint4"),
        ({"weights_dtype": "int4", "use_svd": True, "svd_rank": 4}, "int4"),
        *(({"weights_dtype": f"uint{bits}"}, f"uint{bits}") for bits in (7, 6, 5, 3, 2)),
        ({"weights_dtype": "int5", "group_size": 16}, "int5"),
    ],
)  # fmt: skip
def test_its_numbers_are_those_of_its_library(folder: Path, tmp_path: Path, how: dict[str, Any], kind: str) -> None:
    from safetensors.torch import load_file

    expected = quantized(folder, tmp_path / "model", **how)
    with unpacked(tmp_path / "model", tmp_path / "bundle") as made:
        found = load_file(next((Path(made) / "transformer").glob("*.safetensors")))
        source = Source.open(made)
        assert (source.quantized("transformer"), source.origin) == (kind, kind)
        assert source.facts.name == "model"
    assert set(found) == set(expected)
    for name, x in expected.items():
        np.testing.assert_allclose(found[name].float(), x.detach().float(), rtol=1e-3, atol=1e-5, err_msg=name)
    assert [each.name for each in tmp_path.iterdir()] == ["model"]
    with pytest.raises(InvalidModel, match="is quantized by sdnq, and can't be used as it is; edge-sd convert reads"):
        load_module(type("Any", (), {}), tmp_path / "model/transformer", "diffusion_pytorch_model")


def test_whole_folders_pass_by(folder: Path, tmp_path: Path) -> None:
    with unpacked(folder, tmp_path / "bundle") as made:
        assert made == folder


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            {"quant_method": "bitsandbytes"},
            "transformer is quantized by bitsandbytes, which is not read; read are sdnq",
        ),
        ({"quant_method": "sdnq", "weights_dtype": "float4_e2m1fn"}, "by sdnq to float4_e2m1fn, which is not read"),
        ({"quant_method": "sdnq", "use_hadamard": True}, "by sdnq with Hadamard rotations, which are not read"),
        ({"quant_method": "sdnq", "modules_dtype_dict": {"fp8": ["a"]}}, "by sdnq to fp8, which is not read"),
    ],
)
def test_what_is_not_read_is_named(folder: Path, tmp_path: Path, how: dict[str, Any], message: str) -> None:
    shutil.copytree(folder, tmp_path / "model")
    path = tmp_path / "model/transformer/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), "quantization_config": how}), "utf-8")
    with pytest.raises(InvalidModel, match=message), unpacked(tmp_path / "model", tmp_path / "bundle"):
        pass


def test_the_layouts_hold_every_bit_once() -> None:
    for bits, (width, numbers) in LAYOUTS.items():
        places = [(byte, first + n) for each in numbers for byte, first, size, _ in each for n in range(size)]
        assert sorted(places) == [(byte, bit) for byte in range(width) for bit in range(8)]
        assert all(
            sorted(to + n for *_, size, to in each for n in range(size)) == list(range(bits)) for each in numbers
        )
    assert len(TYPES) == 2 + 2 * len(LAYOUTS)
