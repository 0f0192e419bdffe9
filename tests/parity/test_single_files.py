"""Files of transformers in one file: miniatures in their makers' names become the weights that they came from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_sd import Pipeline, Request
from edge_sd.apps.compare.tables import label
from edge_sd.bundle.bundle import ModelBundle
from edge_sd.converters.build import build
from edge_sd.converters.recipes import recipe_named
from edge_sd.converters.sources.checkpoint import unpack, unpacked
from edge_sd.converters.sources.single_file import DENOISER, Checkpoint
from edge_sd.converters.sources.single_file_configs import denoiser_config
from edge_sd.converters.sources.source import Source
from edge_sd.converters.targets import form_named
from edge_sd.errors import InvalidModel, InvalidRequest

from ..original import original, save_family, save_sd3_whole, whole_sd3
from ..original_transformers import original_transformer
from ..transformers import save_klein, save_sana, save_sd3, save_z_image

SAVED = {
    "sd3": lambda folder, emoji: save_sd3(folder, emoji, t5=False),
    "sd35": lambda folder, emoji: save_sd3(folder, emoji, dual=True),
    "flux2": lambda folder, _: save_klein(folder),
    "zimage": lambda folder, _: save_z_image(folder),
    "sana": lambda folder, _: save_sana(folder),
}
FAMILIES = tuple(SAVED)
SMALL = {"modelspec.resolution": "64x64"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, emoji: Path) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("bases")
    return {name: save(home / name, emoji) for name, save in SAVED.items()}


def tensors_of(folders: dict[str, Path], name: str, prefix: str = "") -> dict[str, Any]:
    made = original_transformer(folders[name], "sd3" if name == "sd35" else name)
    return {prefix + each: x for each, x in made.items()}


def save(path: Path, tensors: dict[str, Any], **metadata: str) -> Path:
    from safetensors.torch import save_file

    save_file(tensors, path, {"format": "pt", **metadata})
    return path


def without_weights(folder: Path, target: Path) -> Path:
    """A base as people have it who left the largest file out; of the transformer, its config."""
    shutil.copytree(folder, target)
    next((target / "transformer").glob("*.safetensors")).unlink()
    return target


def picture(model: Path) -> np.ndarray:
    request = Request("a red apple", seed=2, steps=2, width=64, height=64)
    with Pipeline.open(model, variant="torch") as pipeline:
        return np.asarray(pipeline.generate(request).pictures[0].image)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("name", FAMILIES)
def test_its_picture_is_the_folders_bit_for_bit(
    folders: dict[str, Path], tmp_path: Path, name: str, prefix: str
) -> None:
    from safetensors.torch import load_file

    path = save(tmp_path / "any.safetensors", tensors_of(folders, name, prefix))
    made = unpack(path, tmp_path / "made", base=without_weights(folders[name], tmp_path / "base"))
    own = "transformer/diffusion_pytorch_model.safetensors"
    expected, found = load_file(folders[name] / own), load_file(made / own)
    assert set(found) == set(expected)
    assert all(np.array_equal(found[each], x) for each, x in expected.items())
    before, after = (json.loads((each / "transformer/config.json").read_text()) for each in (folders[name], made))
    assert {key: after.get(key) for key in before if key[0] != "_"} == {
        key: value for key, value in before.items() if key[0] != "_"
    }
    if not prefix:
        # What is unpacked is a folder of links, and a model that is drawn with has none that lead out of it.
        shutil.copytree(made, tmp_path / "whole")
        assert np.array_equal(picture(tmp_path / "whole"), picture(folders[name]))


CONFIGS = {
    # As published: FLUX.2 klein 4B and 9B, Z-Image, SD 3 medium, 3.5 medium and large, SANA's two sizes.
    "klein 4B": (
        {"img_in.weight": (3072, 128), "txt_in.weight": (3072, 7680), "time_in.in_layer.weight": (3072, 256),
         "double_blocks.4.img_mlp.2.weight": (3072, 9216), "double_blocks.0.img_mlp.2.weight": (3072, 9216),
         "double_blocks.0.img_attn.norm.query_norm.scale": (128,), "single_blocks.19.linear2.weight": (3072, 12288),
         "double_stream_modulation_img.lin.weight": (18432, 3072)},
        {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "attention_head_dim": 128,
         "joint_attention_dim": 7680, "mlp_ratio": 3.0, "guidance_embeds": False, "axes_dims_rope": [32, 32, 32, 32],
         "rope_theta": 2000, "in_channels": 128, "timestep_guidance_channels": 256},
    ),
    "klein 9B": (
        {"img_in.weight": (4096, 128), "txt_in.weight": (4096, 12288), "time_in.in_layer.weight": (4096, 256),
         "double_blocks.7.img_mlp.2.weight": (4096, 12288), "double_blocks.0.img_mlp.2.weight": (4096, 12288),
         "double_blocks.0.img_attn.norm.query_norm.scale": (128,), "single_blocks.23.linear2.weight": (4096, 16384),
         "double_stream_modulation_img.lin.weight": (24576, 4096)},
        {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288},
    ),
    "Z-Image": (
        {"x_embedder.weight": (3840, 64), "cap_pad_token": (1, 3840), "cap_embedder.1.weight": (3840, 2560),
         "layers.29.x": (), "layers.0.attention.q_norm.weight": (128,), "noise_refiner.1.x": ()},
        {"dim": 3840, "n_heads": 30, "n_kv_heads": 30, "n_layers": 30, "n_refiner_layers": 2, "in_channels": 16,
         "cap_feat_dim": 2560, "axes_dims": [32, 48, 48], "rope_theta": 256.0, "all_patch_size": [2]},
    ),
    "SD 3.5 large": (
        {"x_embedder.proj.weight": (2432, 16, 2, 2), "pos_embed": (1, 36864, 2432),
         "y_embedder.mlp.0.weight": (2432, 2048),
         "context_embedder.weight": (2432, 4096), "final_layer.linear.weight": (64, 2432), "joint_blocks.37.x": (),
         "joint_blocks.0.x_block.attn.qkv.weight": (7296, 2432), "joint_blocks.0.x_block.attn.ln_q.weight": (64,)},
        {"num_layers": 38, "num_attention_heads": 38, "attention_head_dim": 64, "pos_embed_max_size": 192,
         "caption_projection_dim": 2432, "joint_attention_dim": 4096, "pooled_projection_dim": 2048,
         "out_channels": 16, "qk_norm": "rms_norm", "dual_attention_layers": [], "sample_size": 128},
    ),
    "SD 3 medium": (
        {"x_embedder.proj.weight": (1536, 16, 2, 2), "pos_embed": (1, 36864, 1536),
         "y_embedder.mlp.0.weight": (1536, 2048),
         "context_embedder.weight": (1536, 4096), "final_layer.linear.weight": (64, 1536), "joint_blocks.23.x": (),
         "joint_blocks.0.x_block.attn.qkv.weight": (4608, 1536)},
        {"num_layers": 24, "num_attention_heads": 24, "attention_head_dim": 64, "qk_norm": None},
    ),
    "SANA 1.6B": (
        {"x_embedder.proj.weight": (2240, 32, 1, 1), "final_layer.linear.weight": (32, 2240), "blocks.19.x": (),
         "y_embedder.y_proj.fc1.weight": (2240, 2304), "blocks.0.mlp.inverted_conv.conv.weight": (11200, 2240, 1, 1),
         "attention_y_norm.weight": (2240,), "blocks.0.cross_attn.kv_linear.weight": (4480, 2240)},
        {"num_layers": 20, "num_attention_heads": 70, "attention_head_dim": 32, "num_cross_attention_heads": 20,
         "cross_attention_head_dim": 112, "caption_channels": 2304, "mlp_ratio": 2.5, "patch_size": 1},
    ),
    "SANA 0.6B": (
        {"x_embedder.proj.weight": (1152, 32, 1, 1), "final_layer.linear.weight": (32, 1152), "blocks.27.x": (),
         "y_embedder.y_proj.fc1.weight": (1152, 2304), "blocks.0.mlp.inverted_conv.conv.weight": (5760, 1152, 1, 1),
         "attention_y_norm.weight": (1152,), "blocks.0.cross_attn.kv_linear.weight": (2304, 1152)},
        {"num_layers": 28, "num_attention_heads": 36, "num_cross_attention_heads": 16, "cross_attention_head_dim": 72},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_read_off_the_shapes(name: str) -> None:
    shapes, expected = CONFIGS[name]
    checkpoint = Checkpoint(Path("x"), {f"{DENOISER}{each}": shape for each, shape in shapes.items()}, {})
    config = denoiser_config(checkpoint)
    assert {key: config[key] for key in expected} == expected
    # Of a base of another size, nothing that the shapes tell is taken.
    other = {
        "num_attention_heads": 3,
        "attention_head_dim": 5,
        "num_layers": 1,
        "n_layers": 1,
        "cross_attention_head_dim": 7,
    }
    assert {key: denoiser_config(checkpoint, other)[key] for key in expected if key in other} == {
        key: value for key, value in expected.items() if key in other
    }


def refusal(path: Path, base: Path | None, beside: Path) -> str:
    """What is said of a checkpoint that is no source."""
    with pytest.raises(InvalidModel) as raised, unpacked(path, beside, base=base and str(base)) as made:
        Source.open(made)
    return str(raised.value)


def test_what_does_not_fit_is_one_line(folders: dict[str, Path], tmp_path: Path) -> None:
    klein, base = tensors_of(folders, "flux2"), folders["flux2"]
    path = save(tmp_path / "klein.safetensors", klein)
    some = klein["img_in.weight"].clone()
    less = {name: x for name, x in klein.items() if name != "double_blocks.0.img_attn.proj.weight"}
    narrow = {**klein, "txt_in.weight": klein["txt_in.weight"][:, :8].clone()}
    cases: list[tuple[Any, Path | None, str]] = [
        (klein, None, "is no whole checkpoint: it has no autoencoder; FLUX.2 is in it alone; give --base FOLDER"),
        (klein, folders["zimage"], "is of FLUX.2, a Flux2Transformer2DModel; the transformer of"),
        (klein, tmp_path, "is no base: it has no model_index.json"),
        (less, base, "transformer: lacks transformer_blocks.0.attn.to_out.0.weight"),
        ({**klein, "double_blocks.0.zog.weight": some}, base, "has what this family has not: double_blocks.0.zog.wei"),
        ({**klein, "zog": some}, base, "transformer: has what this family has not: zog"),
        (narrow, base, "its transformer attends to 8 numbers, 3 layers of its text encoder have 48"),
        ({"a": some}, base, "no denoiser that is known; it holds a"),
        ({"double_blocks.0.img_attn.qkv.weight": some}, base, "is of FLUX.1, which is not offered in one file"),
    ]
    for tensors, given, message in cases:
        said = refusal(save(path, tensors), given, tmp_path / "bundle")
        assert message in said
        assert "\n" not in said
    assert sorted(each.name for each in tmp_path.iterdir()) == ["klein.safetensors"]


def test_a_base_is_for_a_file(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="--base belong to single-file checkpoints"), unpacked(
        folders["sd3"], tmp_path / "bundle", base=str(folders["sd3"])
    ):  # fmt: skip
        pass


@pytest.mark.parametrize("t5", [True, False])
def test_a_whole_sd3_needs_its_tokenizers_alone(tmp_path: Path, emoji: Path, t5: bool) -> None:
    import torch
    from safetensors.torch import load_file

    folder = save_sd3_whole(tmp_path / "folder", emoji, t5=t5)
    path = save(tmp_path / "sd3.safetensors", whole_sd3(folder), **SMALL)
    if t5:
        with pytest.raises(InvalidRequest, match=r"has a T5, but not its tokenizer: give --tokenizer FOLDER"):
            unpack(path, tmp_path / "none", tokenizer=emoji)
    made = unpack(path, tmp_path / "made", tokenizer=folder if t5 else emoji)
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2", *(["text_encoder_3"] if t5 else [])):
        before, after = (load_file(next((each / part).glob("*.safetensors"))) for each in (folder, made))
        tied = "encoder.embed_tokens.weight"
        inner = {name.removeprefix("text_model."): x for name, x in after.items() if name != tied}
        before = {name.removeprefix("text_model."): x for name, x in before.items()
                  if "position_ids" not in name and name != tied}  # fmt: skip
        assert set(inner) == set(before), part
        assert all(torch.equal(inner[name], x) for name, x in before.items()), part
    assert np.array_equal(picture(made), picture(folder))


def as_gguf(path: Path, tensors: dict[str, Any], kind: str) -> tuple[Path, dict[str, Any]]:
    """A file as llama.cpp's library writes it, and what is in it: layers of whole blocks in `kind`, others exact."""
    import gguf
    import torch

    writer, expected = gguf.GGUFWriter(path, "any"), {}
    for name, x in tensors.items():
        values = x.float().numpy()
        if values.ndim == 2 and values.shape[1] % 32 == 0:
            data = gguf.quantize(values, gguf.GGMLQuantizationType[kind])
            writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
            values = gguf.dequantize(data, gguf.GGMLQuantizationType[kind]).astype(np.float16)
        else:
            writer.add_tensor(name, values)
        expected[name] = torch.from_numpy(values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, expected


@pytest.mark.parametrize(("name", "kind"), [("flux2", "Q8_0"), ("sd35", "Q4_0"), ("zimage", "Q5_1")])
def test_a_gguf_is_what_its_numbers_are_in_safetensors(
    folders: dict[str, Path], tmp_path: Path, name: str, kind: str
) -> None:
    import torch
    from safetensors.torch import load_file

    path, expected = as_gguf(tmp_path / "x.gguf", tensors_of(folders, name), kind)
    made = unpack(path, tmp_path / "made", base=folders[name])
    plain = unpack(save(tmp_path / "x.safetensors", expected), tmp_path / "plain", base=folders[name])
    own = "transformer/diffusion_pytorch_model.safetensors"
    before, after = load_file(plain / own), load_file(made / own)
    assert set(before) == set(after)
    assert all(torch.equal(after[each].float(), x) for each, x in before.items())
    assert (Source.open(made).quantized("transformer"), Source.open(made).origin) == (kind, kind)
    assert Source.open(plain).origin == ""
    assert [each.name for each in tmp_path.iterdir() if "plain" in each.name] == ["plain"]


def test_diffusers_reads_the_same_numbers_of_a_gguf(folders: dict[str, Path], tmp_path: Path) -> None:
    import torch
    from diffusers import Flux2Transformer2DModel, GGUFQuantizationConfig

    path, _ = as_gguf(tmp_path / "x.gguf", tensors_of(folders, "flux2"), "Q8_0")
    made = unpack(path, tmp_path / "made", base=folders["flux2"])
    theirs = Flux2Transformer2DModel.from_single_file(
        path, quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32), torch_dtype=torch.float32,
        config=str(folders["flux2"]), subfolder="transformer", local_files_only=True,
    )  # fmt: skip
    ours = Flux2Transformer2DModel.from_pretrained(made / "transformer", torch_dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "hidden_states": torch.randn(1, 16, 16, generator=generator),
        "encoder_hidden_states": torch.randn(1, 8, 48, generator=generator), "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(1, 16, 4), "txt_ids": torch.zeros(1, 8, 4),
    }  # fmt: skip
    with torch.no_grad():
        outputs = [each(**inputs, return_dict=False)[0] for each in (ours, theirs)]
    # They, too, round what blocks are multiplied by to float16.
    assert torch.equal(*outputs)
    assert outputs[0].std() > 0.01


def float8(tensors: dict[str, Any], scales: str, rows: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """Layers in float8 with scales of this name, and what they are."""
    import torch

    made, expected = {}, {}
    for name, x in tensors.items():
        if x.ndim != 2:
            made[name] = expected[name] = x.half()
            continue
        scale = x.abs().amax(1, keepdim=True) / 448 if rows else (x.abs().amax() / 448).reshape(())
        made[name] = (x / scale).to(torch.float8_e4m3fn)
        if scales:
            made[f"{name.removesuffix('.weight')}.{scales}"] = scale
        expected[name] = (made[name].float() * scale).half() if scales else made[name].half()
    return made, expected


@pytest.mark.parametrize(
    ("scales", "rows"), [("weight_scale", False), ("scale_weight", False), ("weight_scale", True), ("", False)]
)
def test_float8_is_multiplied_by_its_scales(folders: dict[str, Path], tmp_path: Path, scales: str, rows: bool) -> None:
    import torch
    from safetensors.torch import load_file

    made, expected = float8(tensors_of(folders, "flux2"), scales, rows)
    more = {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn), "img_in.input_scale": torch.tensor(1.0)}
    path = save(tmp_path / "x.safetensors", {**made, **(more if scales else {})})
    folder = unpack(path, tmp_path / "made", base=folders["flux2"])
    plain = unpack(save(tmp_path / "y.safetensors", expected), tmp_path / "plain", base=folders["flux2"])
    own = "transformer/diffusion_pytorch_model.safetensors"
    before, after = load_file(plain / own), load_file(folder / own)
    assert set(before) == set(after)
    assert all(torch.equal(after[each], x) for each, x in before.items())
    assert Source.open(folder).origin == "F8_E4M3"


def test_forms_that_are_not_read_are_refused_by_name(folders: dict[str, Path], tmp_path: Path) -> None:
    import torch

    klein, base = tensors_of(folders, "flux2"), folders["flux2"]
    whole, _ = float8(klein, "weight_scale")
    one = "double_blocks.0.img_mlp.0"
    text = torch.frombuffer(bytearray(b'{"format": "nvfp4"}'), dtype=torch.uint8)
    cases: list[tuple[dict[str, Any], str]] = [
        (
            {**klein, f"{one}.weight": torch.zeros(4, 4, dtype=torch.uint8)},
            rf"in a form that is not read ({one}.weight)",
        ),
        ({**whole, f"{one}.weight_scale_2": torch.ones(1)}, f"in a form that is not read ({one}.weight_scale_2)"),
        ({**whole, f"{one}.comfy_quant": text}, f"{one}.comfy_quant says nvfp4; supported: float8_e4m3fn and"),
        ({**whole, f"{one}.weight_scale": torch.ones(3)}, f"{one}.weight_scale has the shape [3], for weights"),
        ({**whole, "zog.weight_scale": torch.ones(1)}, "has a scale for zog.weight, which it has not"),
    ]
    for tensors, message in cases:
        said = refusal(save(tmp_path / "x.safetensors", tensors), base, tmp_path / "bundle")
        assert message in said
        assert "\n" not in said


def test_unets_of_the_older_families_are_read_alone_and_whole(tmp_path: Path, emoji: Path) -> None:
    import torch
    from safetensors.torch import load_file

    folder = save_family(tmp_path / "sd1", emoji, "sd1")
    tensors = {name: x for name, x in original(folder, "sd1").items() if name not in ("betas", "model_ema.decay")}
    # stable-diffusion.cpp writes all of a checkpoint; others write the UNet without its prefix.
    whole, expected = as_gguf(tmp_path / "whole.gguf", tensors, "Q8_0")
    prefix = "model.diffusion_model."
    unet = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
    alone, _ = as_gguf(tmp_path / "alone.gguf", unet, "Q8_0")
    made = [unpack(whole, tmp_path / "a", tokenizer=emoji), unpack(alone, tmp_path / "b", base=folder)]
    made.append(unpack(save(tmp_path / "x.safetensors", expected, **SMALL), tmp_path / "c", tokenizer=emoji))
    weights = [load_file(each / "unet/diffusion_pytorch_model.safetensors") for each in made]
    for each in weights[:2]:
        assert set(each) == set(weights[2])
        assert all(torch.equal(x.float(), weights[2][name]) for name, x in each.items())
    assert [Source.open(each).quantized("unet") for each in made] == ["Q8_0", "Q8_0", ""]
    assert [Source.open(each).quantized("text_encoder") for each in made] == ["Q8_0", "", ""]
    # In diffusers' names, as few-step UNets are published.
    own = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
    again = unpack(save(tmp_path / "own.safetensors", own), tmp_path / "d", base=folder)
    found = load_file(again / "unet/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(found[name], x) for name, x in own.items())


def test_its_variant_stands_beside_that_of_whole_weights(folders: dict[str, Path], tmp_path: Path) -> None:
    from dataclasses import replace

    path, _ = as_gguf(tmp_path / "model.gguf", tensors_of(folders, "zimage"), "Q4_0")
    target, form = tmp_path / "bundle", form_named("openvino")
    recipe = recipe_named("fp16", form.recipes)

    def converted(source: Path, base: str | None) -> None:
        with unpacked(source, target, base=base) as made:
            build(made, target, form, recipe, lambda *_: None)

    converted(path, str(folders["zimage"]))
    bundle = ModelBundle.open(target)
    name = "openvino-fp16_from-Q4_0"
    made = bundle.variant(name)
    assert (list(bundle.variants), made.origin) == ([name], "Q4_0")
    assert {part for part, each in made.artifacts.items() if each.quantized} == {"transformer"}
    # As if its whole weights had been converted before: it is neither taken for them, nor refused beside them.
    whole = {part: replace(each, quantized="") for part, each in made.artifacts.items()}
    other = replace(made, artifacts=whole, source="0" * 64)
    replace(bundle, variants={name: made, "openvino-fp32": other}).write_manifest()
    converted(path, str(folders["zimage"]))
    assert {name: each.origin for name, each in ModelBundle.open(target).variants.items()} == {
        name: "Q4_0",
        "openvino-fp32": "",
    }
    with pytest.raises(InvalidRequest, match="was made from other weights"):
        converted(folders["zimage"], None)
    assert label({"name": "x", "kind": "variant", "origin": "Q4_0"}) == "x (from Q4_0)"
