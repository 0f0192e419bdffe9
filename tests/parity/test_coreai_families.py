"""Components of SD 2's and SDXL's shapes and a ControlNet, scaled down, as Core AI programs beside torch float32."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("coreai_torch", reason="coreai-core and coreai-torch need Python 3.11 to 3.14")

import torch

from edge_sd.backends.coreai.runtime import Asset, Loop, array
from edge_sd.bundle.bundle import ModelBundle
from edge_sd.bundle.facts import TextPart
from edge_sd.components.shapes import shapes_of_conditions
from edge_sd.converters.coreai import convert, wrappers
from edge_sd.converters.coreml import ane
from edge_sd.converters.parity import psnr
from edge_sd.converters.sources import wrappers as stock
from edge_sd.converters.static import Sizes

from .test_coreml_families import IDS, text_model, xl_unet

SIZES = [Sizes(32, 32)]


@pytest.fixture(scope="module")
def facts(emoji: Path) -> Any:
    texts = tuple(TextPart(part, "tokenizer", "hidden_states.1") for part in ("text_encoder", "text_encoder_2"))
    return replace(ModelBundle.open(emoji).facts, family="sdxl", max_tokens=9, texts=texts)


def measured(component: wrappers.AppleComponent, folder: Path, exact: Any = None, **given: Any) -> dict[str, float]:
    """PSNR of each output of `main` against torch; random inputs but those `given`. `exact` is another module."""
    return run(component, convert.convert(component), folder, exact, **given)


def run(
    component: wrappers.AppleComponent, program: Any, folder: Path, exact: Any = None, **given: Any
) -> dict[str, float]:
    """The same of a program that is there."""
    convert.save(program, folder / f"{component.name}.aimodel", "", "")
    function = component.functions[0]
    torch.manual_seed(3)
    inputs = {name: torch.randn(value.shape).to(value.dtype) for name, value in function.example.items()}
    inputs |= {name: torch.tensor(value).to(function.example[name].dtype) for name, value in given.items()}
    with torch.no_grad():
        wanted = (exact or function.module)(*inputs.values())
    asset = Asset(folder / f"{component.name}.aimodel", Loop())
    found = asset.call("main", {name: array(value.numpy()) for name, value in inputs.items()})
    asset.close()
    row = wanted if isinstance(wanted, tuple) else (wanted,)
    return {name: psnr(found[name], value.numpy()) for name, value in zip(function.outputs, row, strict=True)}


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_sdxls_text_encoders(facts: Any, tmp_path: Path, part: str) -> None:
    kind = "CLIPTextModel" if part == "text_encoder" else "CLIPTextModelWithProjection"
    model = text_model(kind, **({} if part == "text_encoder" else {"hidden_act": "gelu", "projection_dim": 24}))
    component = wrappers.wrap(part, stock.TextEncoder(model), facts, SIZES, torch.float32)
    assert component.name == ("TextEncoder" if part == "text_encoder" else "TextEncoder2")
    assert [each.name for each in component.functions] == ["main", "layers"]
    ids = torch.tensor(IDS)
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
    # The oracle is the library's own list of hidden states, under its own causal mask.
    wanted = (out.hidden_states[-2], out.pooler_output if part == "text_encoder" else out.text_embeds)
    found = measured(component, tmp_path, lambda ids: wanted, input_ids=IDS)
    assert set(found) == {"hidden_embeds", "pooled_outputs"}
    assert min(found.values()) >= 100


def xl_facts(facts: Any) -> Any:
    return replace(facts, conditioning="size", pooled_width=20, text_width=24)


@pytest.mark.parametrize("compute", ["gpu", "ane"])
def test_sdxls_unet_and_the_rules_of_its_engine(facts: Any, tmp_path: Path, compute: str) -> None:
    from copy import deepcopy

    model = xl_unet()
    facts = xl_facts(facts)
    names = tuple(name for name in shapes_of_conditions(facts, 1) if name != "encoder_hidden_states")
    plain = stock.UNet(deepcopy(model), names)
    if compute == "ane":
        ane.rewrite(model)
    component = wrappers.wrap(
        "unet", stock.UNet(model, names), facts, SIZES, torch.float32, channel_first=compute == "ane"
    )
    program = convert.convert(component)
    text = str(program)
    assert min(run(component, program, tmp_path, plain, timestep=[500.0, 500.0]).values()) >= 100
    assert "interpolate" not in text
    assert "-inf" not in text
    assert "0xFF800000" not in text
    products = re.findall(r"coreai\.(?:decomposable\.)?\w*batch_matmul", text)
    attentions = sum(type(each).__name__ == "Attention" for each in plain.modules())
    if compute == "gpu":
        # Fused attention is one composite graph of Apple's for each shape of it, and takes all heads at once.
        assert attentions > 0
        assert "scaled_dot_product_attention" in text
    else:
        assert "scaled_dot_product_attention" not in text
        ranks = [shape.count("x") for shape in re.findall(r"tensor<((?:\d+x)+)", text)]
        assert max(ranks) <= 5
        # Two products for each head, and none for projections, which are convolutions.
        assert not any(type(each) is torch.nn.Linear for name, each in model.named_modules() if "attn" in name)
        assert products


def test_a_controlnet_and_its_unet(facts: Any, tmp_path: Path) -> None:
    from diffusers import ControlNetModel, UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(16, 32), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        mid_block_type="UNetMidBlock2D", up_block_types=("UpBlock2D", "UpBlock2D"), layers_per_block=1,
        norm_num_groups=8, cross_attention_dim=24, attention_head_dim=2,
    ).eval()  # fmt: skip
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8, 8, 8)).eval()
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    plain = replace(facts, family="sd1", text_width=24)
    for part, module in (("controlnet", stock.ControlNet(net)), ("controlled_unet", stock.ControlledUNet(unet))):
        component = wrappers.wrap(part, module, plain, SIZES, torch.float32)
        found = measured(component, tmp_path, timestep=[500.0, 500.0])
        assert min(found.values()) >= 100, part


def test_several_sizes_are_functions_that_share_their_weights(facts: Any, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
                        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4).eval()  # fmt: skip
    bytes_of = {}
    for sizes in ([(32, 32)], [(32, 32), (64, 32)]):
        component = wrappers.wrap(
            "vae_decoder", stock.VAEDecoder(vae), facts, [Sizes(h, w) for w, h in sizes], torch.float16
        )
        component.functions[0].module.half()
        convert.save(convert.convert(component), tmp_path / "VAEDecoder.aimodel", "", "")
        bytes_of[len(sizes)] = (tmp_path / "VAEDecoder.aimodel/main.mlirb").stat().st_size
    weights = 2 * sum(each.numel() for each in component.functions[0].module.parameters())
    assert bytes_of[2] - bytes_of[1] < weights / 2
    asset = Asset(tmp_path / "VAEDecoder.aimodel", Loop())
    assert {name: ports["z"].shape for name, ports in asset.functions.items()} == {
        "main": (1, 4, 4, 4), "size_64x32": (1, 4, 4, 8)
    }  # fmt: skip
    found = asset.call("size_64x32", {"z": array(np.zeros((1, 4, 4, 8), np.float16))})
    asset.close()
    assert found["image"].shape == (1, 3, 8, 16)
