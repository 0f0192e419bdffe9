"""Small torch modules as Core AI programs: what Apple's rules ask of a program, and weights in fewer bits."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("coreai_torch", reason="coreai-core and coreai-torch need Python 3.11 to 3.14")

import torch
from torch import nn

from edge_sd.backends.coreai.runtime import Asset, Loop, array
from edge_sd.converters.coreai import compress, convert
from edge_sd.converters.coreai.wrappers import AppleComponent, Function
from edge_sd.converters.parity import psnr
from edge_sd.converters.recipes import RECIPES, QuantRecipe


class Layers(nn.Module):
    """An embedding, a convolution, an upsampling and a linear layer; widths that no block of 32 divides among them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(64, 48)
        self.linear = nn.Linear(48, 96)
        self.conv = nn.Conv2d(6, 64, 3, padding=1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        states = self.linear(self.embedding(ids))
        doubled = nn.functional.interpolate(states.reshape(1, 6, 16, 8), scale_factor=2.0, mode="nearest")
        out: torch.Tensor = self.conv(doubled)
        return out


IDS = torch.arange(8, dtype=torch.int32)[None]


def asset(module: nn.Module, folder: Path, **sizes: Any) -> tuple[Asset, Any]:
    """The module saved and loaded by Apple's runtime, and its program."""
    component = AppleComponent("Layers", (Function("main", module, {"ids": IDS}, ("out",)),))
    program = convert.convert(component)
    convert.save(program, folder / "Layers.aimodel", "layers", "MIT")
    return Asset(folder / "Layers.aimodel", Loop()), program


def run(module: nn.Module, folder: Path) -> np.ndarray[Any, Any]:
    loaded, _ = asset(module, folder)
    try:
        found = loaded.call("main", {"ids": array(IDS.numpy())})["out"]
    finally:
        loaded.close()
    return np.asarray(found, np.float32)


@pytest.fixture(scope="module")
def exact() -> np.ndarray[Any, Any]:
    with torch.no_grad():
        return np.asarray(Layers()(IDS).numpy())


def test_upsampling_is_a_broadcast_that_the_gpus_segmenter_takes(tmp_path: Path, exact: Any) -> None:
    loaded, program = asset(Layers(), tmp_path)
    found = loaded.call("main", {"ids": array(IDS.numpy())})["out"]
    loaded.close()
    assert psnr(found, exact) > 120
    assert "interpolate" not in str(program)


def test_an_upsampling_by_no_whole_number_is_refused() -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.interpolate(x, size=(5, 5), mode="nearest")

    odd = AppleComponent("Odd", (Function("main", Odd(), {"x": torch.zeros(1, 1, 3, 3)}, ("out",)),))
    with pytest.raises(convert.ConversionError, match="3x3 is upsampled to 5x5"):
        convert.convert(odd)


# Bytes of the weights that are made smaller, of float16's: what each recipe stores for a number.
@pytest.mark.parametrize(
    ("name", "least", "most"), [("int8", 40, 0.56), ("int4", 20, 0.36), ("p6", 30, 0.45), ("p4", 18, 0.32)]
)
def test_weights_in_fewer_bits_run_as_torch_computes_them(
    tmp_path: Path, exact: Any, name: str, least: float, most: float
) -> None:
    module = compress.compress(Layers().half(), RECIPES[name])
    with torch.no_grad():
        wanted = module(IDS).float().numpy()
    found = run(module, tmp_path)
    assert psnr(found, wanted) > 55
    assert least < psnr(found, exact) < 70
    stored = sum(
        each.stored_bits() for each in module.modules() if isinstance(each, (compress.Blocks, compress.Palette))
    )
    whole = 16 * sum(value.numel() for value in compress.weights(Layers()).values())
    assert stored / whole < most
    # The packed numbers are what the file holds.
    assert (tmp_path / "Layers.aimodel/main.mlirb").stat().st_size < stored / 8 + 12_000


def test_eight_bits_are_those_of_apples_quantizer(tmp_path: Path) -> None:
    """The oracle is coreai-opt's pass over the program."""
    from coreai_opt.coreai_utils import CompressionGranularity, DType, quantize_weights

    torch.manual_seed(1)
    layer = nn.Sequential(nn.Linear(64, 96)).half()
    x = torch.randn(1, 64).half()

    def outputs(module: nn.Module, theirs: bool) -> np.ndarray[Any, Any]:
        component = AppleComponent("L", (Function("main", module, {"x": x}, ("out",)),))
        program = convert.convert(component)
        if theirs:
            program = quantize_weights(program, DType.INT8, granularity=CompressionGranularity.PER_CHANNEL)
        convert.save(program, tmp_path / "L.aimodel", "", "")
        loaded = Asset(tmp_path / "L.aimodel", Loop())
        found = loaded.call("main", {"x": array(x.numpy())})["out"]
        loaded.close()
        return np.asarray(found, np.float32)

    theirs = outputs(layer, True)
    ours = outputs(compress.compress(layer, RECIPES["int8"]), False)
    assert psnr(ours, theirs) > 60


def test_a_block_that_does_not_divide_a_width_is_made_smaller_not_left_out() -> None:
    weight = torch.randn(8, 36).half()
    blocks = compress.Blocks(weight, 4, 32)
    assert blocks.scale.shape == (8, 2)
    assert (blocks.numbers.min(), blocks.numbers.max()) == (-8, 7)


def test_numbers_of_mixed_bits_are_those_of_each_layer(tmp_path: Path) -> None:
    recipe = QuantRecipe("mixed4", 4, 0, palette=True, mixed=True)
    module = compress.compress(Layers().half(), recipe, {"embedding": 16, "linear": 2, "conv": 6})
    assert isinstance(module.get_submodule("embedding"), nn.Embedding)
    tables = {name: each.lut.numel() for name, each in module.named_modules() if isinstance(each, compress.Palette)}
    assert tables == {"linear.stored": 4, "conv.stored": 64}
    with torch.no_grad():
        wanted = module(IDS).float().numpy()
    assert psnr(run(module, tmp_path), wanted) > 55


def test_a_layer_whose_name_the_converter_misreads_is_refused() -> None:
    module = nn.ModuleDict({"convolution": nn.Conv2d(64, 64, 1)}).half()
    with pytest.raises(convert.ConversionError, match="convolution cannot be a palette"):
        compress.compress(module, RECIPES["p4"])


def test_a_saved_asset_holds_no_path_of_this_machine(tmp_path: Path) -> None:
    loaded, _ = asset(Layers(), tmp_path)
    loaded.close()
    held = b"".join(path.read_bytes() for path in (tmp_path / "Layers.aimodel").iterdir())
    assert not re.search(rb"site-packages|/home/|/root/|test_coreai", held)


def test_a_newer_version_of_apples_format_is_noticed(tmp_path: Path) -> None:
    """The extra pins what was tested. Should this fail after an update, read docs/coreai.md, "Versions", first."""
    import json
    from importlib.metadata import version

    loaded, _ = asset(Layers(), tmp_path)
    loaded.close()
    folder = tmp_path / "Layers.aimodel"
    assert sorted(path.name for path in folder.iterdir()) == ["main.hash", "main.mlirb", "metadata.json"]
    assert json.loads((folder / "metadata.json").read_text())["assetVersion"] == "2.0"
    assert [version(f"coreai-{name}") for name in ("core", "torch", "opt")] == ["1.0.0b3", "0.4.3", "0.4.0"]


def test_an_asset_is_put_together_of_safetensors(tmp_path: Path) -> None:
    """Its program holds float16 tensors as torch does; what is stored beside is the graph."""
    from safetensors.torch import save_file

    from edge_sd.bundle.assembly import Assembly
    from edge_sd.converters.coreai.link import link

    module = Layers().half()
    loaded, _ = asset(module, tmp_path)
    loaded.close()
    whole, linked = tmp_path / "Layers.aimodel", tmp_path / "linked/Layers.aimodel"
    weights, rest, pieces = (tmp_path / name for name in ("model.safetensors", "rest", "pieces.json"))
    save_file(module.state_dict(), weights)
    link(whole, [weights], linked, rest, pieces)
    assert not (linked / "main.mlirb").exists()
    large = sum(2 * value.numel() for value in compress.weights(module).values())
    assert rest.stat().st_size <= (whole / "main.mlirb").stat().st_size - large
    Assembly.read(pieces).write([weights, rest], linked)
    assert {path.name: path.read_bytes() for path in linked.iterdir()} == {
        path.name: path.read_bytes() for path in whole.iterdir()
    }
