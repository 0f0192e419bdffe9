"""The strength of LoRAs beside peft and diffusers, which write the same files and merge them themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edge_sd.components.lora import read_lora
from edge_sd.errors import InvalidModel

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

Q, V = "down_blocks.0.attn1.to_q", "mid_block.attn2.to_v"
CONV, POINT = "up_blocks.1.resnets.0.conv1", "up_blocks.1.proj_in"
SHAPES = {Q: (24, 16), V: (12, 16), CONV: (8, 6, 3, 3), POINT: (8, 6, 1, 1)}


class Model(torch.nn.Module):
    """Layers with a UNet's names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, (rows, columns, *kernel) in SHAPES.items():
            *path, last = name.split(".")
            module: Any = self
            for each in path:
                if not hasattr(module, each):
                    module.add_module(each, torch.nn.Module())
                module = getattr(module, each)
            module.add_module(
                last, torch.nn.Conv2d(columns, rows, kernel[0]) if kernel else torch.nn.Linear(columns, rows)
            )

    def forward(self, x: Any) -> Any:
        return x


def adapted(config: Any, seed: int = 1) -> tuple[Any, dict[str, Any]]:
    """A model with a random adapter, and what the adapter adds to each weight by peft's own sum."""
    plain = {name: module.weight.detach().clone() for name, module in Model().named_modules() if name in SHAPES}
    model = peft.get_peft_model(Model(), config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if any(mark in name for mark in ("lora_", "hada_", "lokr_")):
            parameter.data = torch.randn(parameter.shape, generator=generator)
    import copy

    merged = dict(copy.deepcopy(model).merge_and_unload().named_modules())
    return model, {name: merged[name].weight.detach() - weight for name, weight in plain.items()}


def assert_equal(path: Path, expected: dict[str, Any]) -> None:
    lora = read_lora(path)
    found = lora.differences("unet", expected)
    assert set(found) == set(expected)
    assert lora.notes(["unet"]) == []
    for name, difference in expected.items():
        ours = torch.from_numpy(found[name].of(SHAPES[name]))
        torch.testing.assert_close(ours, difference, atol=1e-4, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


PATTERNS: dict[str, Any] = {
    "alpha_pattern": {"attn2.to_v": 1, f"^{Q}": 32}, "rank_pattern": {"up_blocks.*conv1": 3, "to_v": 5},
}  # fmt: skip
CONFIGS = {
    "alpha": lambda **each: peft.LoraConfig(r=2, lora_alpha=8, **each),
    "alpha and rank by patterns": lambda **each: peft.LoraConfig(r=4, lora_alpha=8, **PATTERNS, **each),
    "rsLoRA": lambda **each: peft.LoraConfig(r=9, lora_alpha=4, use_rslora=True, **PATTERNS, **each),
    "LoHa": lambda **each: peft.LoHaConfig(r=2, alpha=6, **PATTERNS, **each),
    "LoHa with kernels": lambda **each: peft.LoHaConfig(r=2, alpha=6, use_effective_conv2d=True, **each),
    "LoKr": lambda **each: peft.LoKrConfig(r=2, alpha=6, **PATTERNS, **each),
    "LoKr of two products": lambda **each: peft.LoKrConfig(r=1, alpha=6, decompose_both=True, **each),
    "LoKr with kernels": lambda **each: peft.LoKrConfig(r=1, alpha=3, use_effective_conv2d=True, **each),
    "LoKr of two whole matrices": lambda **each: peft.LoKrConfig(r=64, alpha=32, **each),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_pefts_files_have_pefts_strength(tmp_path: Path, kind: str) -> None:
    model, expected = adapted(CONFIGS[kind](target_modules=list(SHAPES)))
    model.save_pretrained(tmp_path)
    assert_equal(tmp_path / "adapter_model.safetensors", expected)


@pytest.mark.parametrize("kind", ["alpha", "alpha and rank by patterns", "rsLoRA"])
def test_diffusers_files_have_the_strength_of_their_header(tmp_path: Path, kind: str) -> None:
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers

    model, expected = adapted(CONFIGS[kind](target_modules=list(SHAPES)))
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(model.base_model.model)),
        unet_lora_adapter_metadata={
            key: sorted(value) if isinstance(value, set) else value
            for key, value in model.peft_config["default"].to_dict().items()
        },
    )
    assert_equal(tmp_path / "pytorch_lora_weights.safetensors", expected)


def test_a_text_encoders_adapter_is_found_by_its_class_or_folder(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    name = "text_model.encoder.layers.0.mlp.fc1"
    tensors = {f"base_model.model.{name}.lora_A.weight": torch.ones(2, 5),
               f"base_model.model.{name}.lora_B.weight": torch.ones(6, 2)}  # fmt: skip
    for folder, kind, part in (
        ("a", None, "text_encoder"), ("b", "CLIPTextModelWithProjection", "text_encoder_2"),
        ("text_encoder_2", None, "text_encoder_2"),
    ):  # fmt: skip
        path = tmp_path / folder / "adapter_model.safetensors"
        path.parent.mkdir()
        save_file(tensors, path)
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "auto_mapping": kind and {"base_model_class": kind}}
        (path.parent / "adapter_config.json").write_text(json.dumps(config))
        (found,) = read_lora(path).differences(part, [name]).values()
        assert found.scale == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "OFT"}, "of a OFT adapter|of an OFT adapter"),
        ({"use_dora": True}, "says DoRA"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4': its base model's weights were changed"),
        ({"r": 3}, "says rank 3 of .*to_q, whose tensors have 2"),
        ({"r": 0}, "the rank r is 0"),
        ({"lora_alpha": "8"}, "lora_alpha is '8', not a number"),
        ({"alpha_pattern": {"(a+)+b": 3}}, r"alpha_pattern names '\(a\+\)\+b'"),
        ({"rank_pattern": [3]}, "rank_pattern is no object"),
        (None, "is a list, not a JSON object"),
    ],
)
def test_a_config_that_can_not_be_honoured_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    model, _ = adapted(peft.LoraConfig(r=2, lora_alpha=8, target_modules=[Q]))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps([] if change is None else {**config, **change}))
    with pytest.raises(InvalidModel, match=message):
        read_lora(tmp_path / "adapter_model.safetensors")


def test_pefts_file_without_its_config_says_what_was_assumed(tmp_path: Path) -> None:
    model, _ = adapted(peft.LoraConfig(r=2, lora_alpha=8, target_modules=[Q]))
    model.save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    assert "no adapter_config.json beside it" in read_lora(tmp_path / "adapter_model.safetensors").notes(["unet"])[0]


def test_an_alpha_said_twice_must_be_one(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    header = {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 8})}
    tensors = {f"unet.{Q}.lora_A.weight": torch.ones(2, 5), f"unet.{Q}.lora_B.weight": torch.ones(6, 2)}
    path = tmp_path / "x.safetensors"
    save_file({**tensors, f"unet.{Q}.alpha": torch.tensor(8.0)}, path, header)
    (difference,) = read_lora(path).modules.values()
    assert difference.scale == 4
    save_file({**tensors, f"unet.{Q}.alpha": torch.tensor(2.0)}, path, header)
    with pytest.raises(InvalidModel, match="1 as a tensor, and 4 by its config"):
        read_lora(path)
