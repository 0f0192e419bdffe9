"""Differences of weights against torch, their names in every spelling, and the graphs that take them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_sd.backends.openvino.edits import add_loras
from edge_sd.components.lora import Unplaced, find_loras, read_lora
from edge_sd.errors import InvalidModel, InvalidRequest

torch = pytest.importorskip("torch")
from safetensors.torch import save_file  # noqa: E402

Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q"
FLAT = "lora_unet_" + Q.replace(".", "_")


def random(*shape: int) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def saved(folder: Path, tensors: dict[str, Any], name: str = "style") -> Path:
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / f"{name}.safetensors")
    return folder / f"{name}.safetensors"


def only(path: Path, shape: tuple[int, ...]) -> Any:
    (difference,) = read_lora(path).modules.values()
    return torch.from_numpy(difference.of(shape))


def test_a_convolutions_difference_is_two_convolutions(tmp_path: Path) -> None:
    down, up = random(2, 4, 3, 3), random(7, 2, 1, 1)
    path = saved(tmp_path, {f"{FLAT}.lora_down.weight": down, f"{FLAT}.lora_up.weight": up,
                            f"{FLAT}.alpha": torch.tensor(1.0)})  # fmt: skip
    x = random(1, 4, 9, 9)
    through = torch.nn.functional.conv2d(torch.nn.functional.conv2d(x, down), up) / 2
    torch.testing.assert_close(torch.nn.functional.conv2d(x, only(path, (7, 4, 3, 3))), through, atol=1e-4, rtol=1e-4)


def test_a_middle_convolution_too(tmp_path: Path) -> None:
    down, mid, up = random(2, 4, 1, 1), random(3, 2, 3, 3), random(7, 3, 1, 1)
    names = ("lora_down", "lora_mid", "lora_up")
    path = saved(tmp_path, {f"{FLAT}.{name}.weight": each for name, each in zip(names, (down, mid, up), strict=True)})
    x, conv = random(1, 4, 9, 9), torch.nn.functional.conv2d
    through = conv(conv(conv(x, down), mid), up)
    torch.testing.assert_close(conv(x, only(path, (7, 4, 3, 3))), through, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 3, 3)])
def test_loha_is_the_product_of_two_products(tmp_path: Path, shape: tuple[int, ...]) -> None:
    inner = int(np.prod(shape[1:]))
    a1, b1, a2, b2 = random(6, 2), random(2, inner), random(6, 2) + 1, random(2, inner) - 1
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    tensors = {f"{FLAT}.{name}": each for name, each in zip(names, (a1, b1, a2, b2), strict=True)}
    found = only(saved(tmp_path, {**tensors, f"{FLAT}.alpha": torch.tensor(1.0)}), shape)
    torch.testing.assert_close(found, 0.5 * ((a1 @ b1) * (a2 @ b2)).reshape(shape))


def test_lokr_is_a_kronecker_product(tmp_path: Path) -> None:
    w1, a, b = random(2, 3), random(4, 2), random(2, 5)
    tensors = {
        f"{FLAT}.lokr_w1": w1,
        f"{FLAT}.lokr_w2_a": a,
        f"{FLAT}.lokr_w2_b": b,
        f"{FLAT}.alpha": torch.tensor(1.0),
    }
    torch.testing.assert_close(only(saved(tmp_path, tensors), (8, 15)), 0.5 * torch.kron(w1, a @ b))
    w2 = random(4, 5, 3, 3)
    found = only(saved(tmp_path, {f"{FLAT}.lokr_w1": w1, f"{FLAT}.lokr_w2": w2}), (8, 15, 3, 3))
    torch.testing.assert_close(found, torch.kron(w1[:, :, None, None].contiguous(), w2))
    core, a, b = random(2, 3, 3, 3), random(2, 4), random(3, 5)
    tensors = {f"{FLAT}.lokr_w1": w1, f"{FLAT}.lokr_t2": core, f"{FLAT}.lokr_w2_a": a, f"{FLAT}.lokr_w2_b": b}
    w2 = torch.einsum("rskl,ro,si->oikl", core, a, b).contiguous()
    found = only(saved(tmp_path, tensors), (8, 15, 3, 3))
    torch.testing.assert_close(found, torch.kron(w1[:, :, None, None].contiguous(), w2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("key", "place"),
    [
        (f"{FLAT}.lora_down.weight", ("unet", Q)),
        (f"unet.{Q}.lora_A.weight", ("unet", Q)),
        ("base_model.model.text_model.encoder.layers.0.mlp.fc1.lora_A.default.weight",
         ("text_encoder", "text_model.encoder.layers.0.mlp.fc1")),
        ("text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.v_proj.lora_down.weight",
         ("text_encoder", "text_model.encoder.layers.0.self_attn.v_proj")),
        ("text_encoders.clip_g.transformer.text_model.encoder.layers.0.self_attn.v_proj.lora_down.weight",
         ("text_encoder_2", "text_model.encoder.layers.0.self_attn.v_proj")),
        ("clip_l.text_model.encoder.layers.0.mlp.fc1.lora_down.weight",
         ("text_encoder", "text_model.encoder.layers.0.mlp.fc1")),
        ("clip_g.text_model.encoder.layers.0.mlp.fc1.lora_down.weight",
         ("text_encoder_2", "text_model.encoder.layers.0.mlp.fc1")),
        (f"lora_unet_{FLAT}.lora_down.weight", ("unet", Q)),
        (f"unet.{Q}.lora.down.weight", ("unet", Q)),
        (f"unet.{Q.replace('to_q', 'processor.to_q')}_lora.down.weight", ("unet", Q)),
        (f"{Q.replace('to_q', 'processor.to_out')}_lora.down.weight", ("unet", Q.replace("to_q", "to_out.0"))),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
         ("text_encoder", "text_model.encoder.layers.0.mlp.fc1")),
        ("text_encoder.text_model.encoder.layers.3.self_attn.to_q_lora.down.weight",
         ("text_encoder", "text_model.encoder.layers.3.self_attn.q_proj")),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
         ("text_encoder_2", "encoder.layers.0.mlp.fc1")),
        # SDXL's, as its checkpoint numbers its blocks.
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight",
         ("unet", "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q")),
        ("lora_unet_input_blocks_8_1_proj_in.lora_down.weight", ("unet", "down_blocks.2.attentions.1.proj_in")),
        ("lora_unet_input_blocks_3_0_op.lora_down.weight", ("unet", "down_blocks.0.downsamplers.0.conv")),
        ("lora_unet_middle_block_1_proj_in.lora_down.weight", ("unet", "mid_block.attentions.0.proj_in")),
        ("lora_unet_middle_block_2_in_layers_2.lora_down.weight", ("unet", "mid_block.resnets.1.conv1")),
        ("lora_unet_output_blocks_5_1_proj_out.lora_down.weight", ("unet", "up_blocks.1.attentions.2.proj_out")),
        ("lora_unet_output_blocks_2_2_conv.lora_down.weight", ("unet", "up_blocks.0.upsamplers.0.conv")),
        ("lora_unet_output_blocks_7_0_skip_connection.lora_down.weight",
         ("unet", "up_blocks.2.resnets.1.conv_shortcut")),
    ],
)  # fmt: skip
def test_every_programs_names_are_the_models(tmp_path: Path, key: str, place: tuple[str, str]) -> None:
    up = key.replace("lora_down", "lora_up").replace("lora_A", "lora_B").replace("lora.down", "lora.up")
    lora = read_lora(saved(tmp_path, {key: random(2, 5), up: random(6, 2)}))
    part, name = place
    assert list(lora.differences(part, [name, "another.module"])) == [name]
    assert not [note for note in lora.notes([part]) if "no place" in note]


def half(name: str = Q, width: int = 5) -> dict[str, Any]:
    return {f"unet.{name}.lora_A.weight": random(2, width), f"unet.{name}.lora_B.weight": random(6, 2)}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"unet.{Q}.lora_A.weight": random(2, 5)}, "has down, but no up"),
        ({"a": random(2)}, "is no LoRA: it holds a"),
        ({f"unet.{Q}.lora_A.weight": random(2, 5) * torch.nan, f"unet.{Q}.lora_B.weight": random(6, 2)}, "NaN"),
        ({**half(), f"unet.{Q}.dora_scale": random(6)}, "is a DoRA"),
        ({f"{FLAT}.oft_blocks": random(2, 4, 4)}, "is an OFT"),
        ({f"base_model.model.{Q}.boft_R": random(2, 4, 4, 4)}, "is a BOFT"),
        ({f"{FLAT}.{name}.weight": random(4, 6) for name in ("a1", "a2", "b1", "b2")}, "is a GLoRA"),
        ({"unet:0:down": random(2, 5), "unet:0:up": random(6, 2)}, "form of cloneofsimo/lora"),
        ({**half(), f"unet.{Q}.lora_A.scale_weight": random(1)}, "scaled float8"),
        ({f"unet.{Q}.lora_A.weight": random(2, 5), f"unet.{Q}.lora_B.weight": random(6, 3)}, "do not multiply"),
        ({f"unet.{Q}.lora_A.weight": random(2, 5).char(), f"unet.{Q}.lora_B.weight": random(6, 2)}, "whole numbers"),
        ({f"unet.{Q}.lora_A.weight": random(2), f"unet.{Q}.lora_B.weight": random(6, 2)}, r"of the shape \[2\]"),
    ],
)
def test_what_is_no_lora_is_said(tmp_path: Path, tensors: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidModel, match=message):
        read_lora(saved(tmp_path, tensors))


def test_eight_bits_are_read_and_what_is_no_tensor_of_a_lora_is_named(tmp_path: Path) -> None:
    down, up = random(2, 5).to(torch.float8_e4m3fn), random(6, 2).to(torch.float8_e5m2)
    path = saved(tmp_path, {f"unet.{Q}.lora_A.weight": down, f"unet.{Q}.lora_B.weight": up, "step": torch.tensor(9)})
    torch.testing.assert_close(only(path, (6, 5)), up.float() @ down.float())
    assert "step" in read_lora(path).notes(["unet"])[0]


def test_nothing_is_multiplied_for_another_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path, {f"unet.{Q}.lora_A.weight": random(1, 50_000), f"unet.{Q}.lora_B.weight": random(50_000, 1)})
    (difference,) = read_lora(path).modules.values()
    monkeypatch.setattr(type(difference), "factors", None)  # The product would be made of these.
    with pytest.raises(ValueError, match=r"\[50000, 50000\] where the weight is \[6, 5\]"):
        difference.of((6, 5))


@pytest.mark.parametrize("size", [0, 4, 8, 60])
def test_a_cut_file_is_called_damaged(tmp_path: Path, size: int) -> None:
    path = saved(tmp_path, half())
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InvalidModel, match="damaged"):
        read_lora(path)


def test_another_family_says_found_and_expected(tmp_path: Path) -> None:
    lora = read_lora(saved(tmp_path, half(Q.replace("to_q", "to_k"), 2048)))
    with pytest.raises(InvalidRequest, match="reads text of 2048 numbers, this model's 768"):
        lora.check(768)


def test_what_has_no_place_is_named(tmp_path: Path) -> None:
    lora = read_lora(saved(tmp_path, {**half(), **half("mid_block.x"), "odd.key": random(1)}))
    assert list(lora.differences("unet", [Q])) == [Q]
    unplaced = Unplaced()
    unplaced.record(lora, "unet", lora.unplaced("unet", [Q]))
    (note,) = lora.notes(["unet"], unplaced.of(lora))
    assert note == "the LoRA 'style' has what this model has no place for: odd.key, mid_block_x"


def test_a_prompts_names_are_files_of_a_folder(tmp_path: Path) -> None:
    style, other = saved(tmp_path, half()), saved(tmp_path, half(), "other")
    assert find_loras({style: 0.5}, {"other": 0.3}, tmp_path) == {style: 0.5, other: 0.3}
    with pytest.raises(InvalidRequest, match="'none'; valid: other, style"):
        find_loras({}, {"none": 1.0}, tmp_path)
    with pytest.raises(InvalidRequest, match="give the folder"):
        find_loras({}, {"style": 1.0}, None)


def graph(kind: str) -> tuple[Any, Any]:
    """x [1, 5] times a weight [6, 5] of that kind, as the converter names it; and the weight as it is stored."""
    import openvino as ov
    from openvino import opset13 as ops

    weight = random(6, 5).numpy()
    x = ops.parameter([1, 5], np.float32, "x")
    if kind in ("f32", "f16"):
        constant = ops.constant(weight.astype(np.float16 if kind == "f16" else np.float32))
        constant.set_friendly_name(f"self.model.{Q}.weight")
        source = ops.convert(constant, "f32") if kind == "f16" else constant
        stored = np.asarray(constant.data, np.float32)
    else:
        low, scale = weight.min(), (weight.max() - weight.min()) / (255 if kind == "u8" else 15)
        numbers = np.round((weight - low) / scale).astype(np.uint8)
        zero = np.array(round(-low / scale), np.uint8)
        data = numbers if kind == "u8" else ov.Tensor(_packed(numbers), ov.Shape([6, 5]), ov.Type.u4)
        # Else it would read the memory of an array that is gone.
        constant = ov.op.Constant(data, shared_memory=False)
        constant.set_friendly_name(f"self.model.{Q}.weight")
        wide = ops.subtract(ops.convert(constant, "f16"), ops.convert(ops.constant(zero), "f16"))
        source = ops.convert(ops.multiply(wide, ops.constant(np.array(scale, np.float16))), "f32")
        stored = (numbers.astype(np.float32) - zero) * np.float32(np.float16(scale))
    node = source if kind == "f32" else source.output(0)
    return ov.Model([ops.matmul(x, node, False, True)], [x]), stored


def _packed(numbers: np.ndarray) -> np.ndarray:
    flat = numbers.ravel()
    return (flat[0::2] | flat[1::2] << 4).astype(np.uint8)


@pytest.mark.parametrize(("kind", "tolerance"), [("f32", 1e-5), ("f16", 1e-2), ("u8", 0.2), ("u4", 0.2)])
def test_weights_of_every_kind_take_a_difference(tmp_path: Path, kind: str, tolerance: float) -> None:
    import openvino as ov

    model, stored = graph(kind)
    tensors = half()
    lora = read_lora(saved(tmp_path, tensors))
    expected = stored + 0.5 * (tensors[f"unet.{Q}.lora_B.weight"] @ tensors[f"unet.{Q}.lora_A.weight"]).numpy()
    add_loras(model, [(lora, 0.5)], "unet", "unet")
    run = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": ov.Type.f32})
    x = random(1, 5).numpy()
    np.testing.assert_allclose(run([x])[0], x @ expected.T, atol=tolerance)


@pytest.mark.parametrize("kind", ["f8e4m3", "f8e5m2", "nf4", "i4", "bf16"])
def test_weights_of_types_that_numpy_does_not_have_take_one_too(tmp_path: Path, kind: str) -> None:
    """Bytes were taken for numbers: the model drew another picture, without a word."""
    import openvino as ov
    from openvino import opset13 as ops

    numbers = np.random.default_rng(0).integers(0, 60, 15 if kind in ("nf4", "i4") else 30, np.uint8)
    if kind == "bf16":
        # The upper halves of float32's numbers.
        numbers = np.ascontiguousarray(random(6, 5).numpy().view(np.uint16)[:, 1::2]).view(np.uint8).ravel()
    constant = ov.op.Constant(ov.Tensor(numbers, ov.Shape([6, 5]), getattr(ov.Type, kind)), shared_memory=False)
    constant.set_friendly_name(f"self.model.{Q}.weight")
    x = ops.parameter([-1, 5], np.float32, "x")
    scaled = ops.multiply(ops.convert(constant, "f16"), ops.constant(np.full((6, 1), 0.1, np.float16)))
    source = constant if kind == "bf16" else scaled
    model = ov.Model([ops.matmul(x, ops.convert(source, "f32"), False, True)], [x])
    exact = {"INFERENCE_PRECISION_HINT": ov.Type.f32}
    # What OpenVINO computes with.
    stored = ov.Core().compile_model(model, "CPU", exact)([np.eye(5, dtype=np.float32)])[0].T
    tensors = half()
    lora = read_lora(saved(tmp_path, tensors))
    expected = stored + 0.5 * (tensors[f"unet.{Q}.lora_B.weight"] @ tensors[f"unet.{Q}.lora_A.weight"]).numpy()
    add_loras(model, [(lora, 0.5)], "unet", "unet")
    found = ov.Core().compile_model(model, "CPU", exact)([np.eye(5, dtype=np.float32)])[0].T
    np.testing.assert_allclose(found, expected, atol=1e-4 if kind == "bf16" else np.ptp(expected) / 100)


def test_a_difference_of_another_shape_is_named(tmp_path: Path) -> None:
    lora = read_lora(saved(tmp_path, half(width=9)))
    with pytest.raises(InvalidRequest, match=r"'style' does not fit this model: .*to_q is \[6, 9\] where .* \[6, 5\]"):
        add_loras(graph("f32")[0], [(lora, 1.0)], "unet", "unet")


def test_a_lora_of_which_nothing_fits_is_refused(tmp_path: Path) -> None:
    lora = read_lora(saved(tmp_path, half("mid_block.x")))
    with pytest.raises(InvalidRequest, match="changes nothing that unet has"):
        add_loras(graph("f32")[0], [(lora, 1.0)], "unet", "unet")
