"""Miniatures of Stable Diffusion 3 and 3.5 beside diffusers: the same random weights, prompt and seed, in float32."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edge_sd import Control, InvalidModel, InvalidRequest, ModelBundle, Pipeline, Request, read_lora
from edge_sd.converters.build import build
from edge_sd.converters.parity import psnr
from edge_sd.converters.recipes import RECIPES

from ..conftest import convert
from ..families import half, picture
from ..transformers import save_sd3

PROMPT, NEGATIVE, SEED = "a red apple, glossy style", "a green pear", 3
Sources = Callable[[str], Path]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, emoji: Path) -> Sources:
    """Name -> a miniature's diffusers folder: "sd3", "sd35" (medium), "bare" (without T5)."""
    wishes: dict[str, dict[str, bool]] = {"sd3": {}, "sd35": {"dual": True}, "bare": {"t5": False}}

    @cache
    def made(name: str) -> Path:
        return save_sd3(tmp_path_factory.mktemp(name) / name, emoji, **wishes[name])

    return made


@cache
def loaded(source: Path) -> Any:
    import diffusers
    import torch

    absent = {} if (source / "text_encoder_3").is_dir() else {"text_encoder_3": None, "tokenizer_3": None}
    return diffusers.StableDiffusion3Pipeline.from_pretrained(source, torch_dtype=torch.float32, **absent)


def theirs(source: Path, kind: str = "StableDiffusion3Pipeline", **wishes: Any) -> np.ndarray:
    import diffusers
    import torch

    pipeline = getattr(diffusers, kind).from_pipe(loaded(source))
    pipeline.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": 4, "guidance_scale": 5.0, **wishes}
    result = pipeline(PROMPT, generator=torch.Generator().manual_seed(SEED), **given)
    return np.asarray(result.images[0])


def ours(folder: Path, **wishes: Any) -> np.ndarray:
    """As decoded, before anything is pasted."""
    given = {"seed": SEED, "steps": 4, "guidance": 5.0, **wishes}
    with Pipeline.open(folder) as pipeline:
        *_, last = pipeline.steps(Request(PROMPT, **given))
        return pipeline.decode(last.latents)


@pytest.mark.parametrize("name", ["sd3", "sd35", "bare"])
def test_torch_draws_a_folder_as_it_is(sources: Sources, name: str) -> None:
    source = sources(name)
    expected = theirs(source, width=64, height=96)
    assert psnr(ours(source, width=64, height=96), expected, peak=255) >= 40


def test_a_negative_prompt_is_read_by_all_encoders(sources: Sources) -> None:
    source = sources("sd3")
    expected = theirs(source, negative_prompt=NEGATIVE)
    assert psnr(ours(source, negative=NEGATIVE), expected, peak=255) >= 40
    assert psnr(ours(source), expected, peak=255) < 40


def test_without_guidance_the_prompt_alone_is_drawn(sources: Sources) -> None:
    source = sources("sd3")
    assert psnr(ours(source, guidance=1.0), theirs(source, guidance_scale=1.0), peak=255) >= 40


@pytest.mark.parametrize("inpaint", [False, True])
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_it_goes_on_from_a_picture(sources: Sources, inpaint: bool, strength: float) -> None:
    source = sources("sd3")
    kind = f"StableDiffusion3{'Inpaint' if inpaint else 'Img2Img'}Pipeline"
    more: dict[str, Any] = {"mask_image": half(), "width": 64, "height": 64} if inpaint else {}
    expected = theirs(source, kind, image=picture(), strength=strength, **more)
    found = ours(source, image=picture(), strength=strength, mask=half() if inpaint else None)
    assert psnr(found, expected, peak=255) >= 40


@pytest.fixture(scope="module")
def bundle(sources: Sources, tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    return convert(sources("sd3"), tmp_path_factory.mktemp("bundle") / "sd3", "fp32")


def test_openvino_draws_what_diffusers_draws(sources: Sources, bundle: ModelBundle) -> None:
    expected = theirs(sources("sd3"), width=64, height=96, negative_prompt=NEGATIVE)
    found = ours(bundle.root, width=64, height=96, negative=NEGATIVE)
    assert psnr(found, expected, peak=255) >= 40


def test_openvino_goes_on_from_a_picture(sources: Sources, bundle: ModelBundle) -> None:
    wishes = {"image": picture(), "strength": 0.75, "width": 64, "height": 64}
    expected = theirs(sources("sd3"), "StableDiffusion3InpaintPipeline", mask_image=half(), **wishes)
    assert psnr(ours(bundle.root, mask=half(), **wishes), expected, peak=255) >= 40


def test_optimum_loads_what_was_written(sources: Sources, bundle: ModelBundle) -> None:
    import torch
    from optimum.intel import OVPipelineForText2Image

    pipeline = OVPipelineForText2Image.from_pretrained(bundle.root / "openvino-fp32", device="CPU")
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(
        PROMPT, num_inference_steps=4, guidance_scale=5.0, width=64, height=96,
        generator=torch.Generator().manual_seed(SEED),
    ).images[0]  # fmt: skip
    assert psnr(np.asarray(image), theirs(sources("sd3"), width=64, height=96), peak=255) >= 40


@pytest.mark.long
def test_an_export_of_optimum_opens_as_a_model(sources: Sources, tmp_path: Path) -> None:
    from optimum.intel import OVStableDiffusion3Pipeline

    OVStableDiffusion3Pipeline.from_pretrained(sources("sd3"), export=True, compile=False).save_pretrained(tmp_path)
    found = ours(tmp_path, width=64, height=96)
    assert psnr(found, theirs(sources("sd3"), width=64, height=96), peak=255) >= 40


def test_the_manifest_says_what_the_family_needs(bundle: ModelBundle, sources: Sources) -> None:
    facts = ModelBundle.open(bundle.root).facts
    assert (facts.family, facts.denoiser, facts.conditioning, facts.blank_rows) == ("sd3", "transformer", "joint", 0)
    assert (facts.grain, facts.pooled_width, facts.text_width, facts.defaults.max_side) == (16, 24, 32, 384)
    assert [(text.part, text.kind, text.tokens) for text in facts.encoders] == [
        ("text_encoder", "clip", 0), ("text_encoder_2", "clip", 0), ("text_encoder_3", "t5", 256),
    ]  # fmt: skip
    assert facts == ModelBundle.open(sources("sd3")).facts
    bare = ModelBundle.open(sources("bare")).facts
    assert (len(bare.encoders), bare.blank_rows) == (2, 256)


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of both streams' attention and a feed-forward layer, in the keys that diffusers writes for SD 3."""
    from safetensors.numpy import save_file

    rng, tensors = np.random.default_rng(1), {}
    blocks = "transformer.transformer_blocks"
    layers = {f"{blocks}.0.attn.to_q": (32, 32), f"{blocks}.0.attn.add_k_proj": (32, 32),
              f"{blocks}.0.attn.to_out.0": (32, 32), f"{blocks}.1.ff.net.0.proj": (32, 128)}  # fmt: skip
    for name, (wide, high) in layers.items():
        tensors[f"{name}.lora_A.weight"] = rng.normal(size=(4, wide)).astype(np.float32)
        tensors[f"{name}.lora_B.weight"] = rng.normal(size=(high, 4)).astype(np.float32)
    path = tmp_path_factory.mktemp("lora") / "style.safetensors"
    save_file(tensors, path)
    return path


def test_a_lora_of_the_family_changes_what_it_changes_in_diffusers(
    sources: Sources, bundle: ModelBundle, lora: Path
) -> None:
    pipeline = loaded(sources("sd3"))
    plain = theirs(sources("sd3"))
    pipeline.load_lora_weights(lora.parent, weight_name=lora.name)
    try:
        expected = theirs(sources("sd3"), joint_attention_kwargs={"scale": 0.6})
    finally:
        pipeline.unload_lora_weights()
    assert psnr(plain, expected, peak=255) < 40, "it matters"
    for folder in (sources("sd3"), bundle.root):
        assert psnr(ours(folder, loras={lora: 0.6}), expected, peak=255) >= 40


def test_a_lora_of_another_family_is_refused_by_name(
    sources: Sources, miniature: Path, lora: Path, tmp_path: Path
) -> None:
    from .test_torch_backend import write_lora

    cases = [
        (sources("sd3"), write_lora(tmp_path / "old.safetensors"), "it changes a unet, this model has a transformer"),
        (miniature, lora, "it changes a transformer, this model has a unet"),
    ]
    for folder, file, said in cases:
        with Pipeline.open(folder) as pipeline, pytest.raises(InvalidRequest, match=said):
            pipeline.resolve(Request(PROMPT, loras={file: 1.0}))


@pytest.mark.parametrize(
    ("wishes", "said"),
    [
        ({"width": 72}, "width 72 is not a multiple of 16, as this model needs"),
        ({"height": 400}, "height 400 is beyond this model's limit of 384; larger ones need --tile"),
        ({"width": 640, "tile": 72}, "tile 72 is not a multiple of 16, as this model needs"),
        ({"controls": [Control(Image.new("RGB", (64, 64)))]}, "has no controlnet, which a control picture needs"),
        ({"sampler": "pndm"}, "PNDM is no sampler for a flow-matching model"),
        ({"zero_snr": True}, "zero_snr needs a model of v_prediction"),
    ],
)
def test_what_the_family_cannot_do_is_said_by_name(sources: Sources, wishes: dict[str, Any], said: str) -> None:
    with Pipeline.open(sources("sd3")) as pipeline, pytest.raises(InvalidRequest, match=said):
        pipeline.resolve(Request(PROMPT, **wishes))


def test_what_is_left_out_is_said(bundle: ModelBundle) -> None:
    long = "a red apple " * 100
    request = Request(long, seed=1, steps=2, width=64, height=64, deep_every=2, merge_tokens=True)
    with Pipeline.open(bundle.root) as pipeline:
        notes = pipeline.generate(request).notes
    assert notes[0].startswith("text_encoder_3 takes 256 tokens of the prompt; it does not read: ")
    assert notes[1] == "openvino-fp32 computes everything: deep_every and merge_tokens leave out parts of a UNet"


def edited(folder: Path, source: Path, part: str | None = None, **changes: Any) -> Path:
    """A copy of `source` with one config changed; without `part`, whose folder is left out."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns(part or ""))
    for name, values in changes.items():
        path = folder / name / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


def test_a_folder_that_lacks_or_mixes_parts_is_refused_in_one_line(sources: Sources, tmp_path: Path) -> None:
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("text_encoder_3", {}, r"has no text_encoder_3, .* to draw without T5, set \"text_encoder_3\": \[null, null\]"),
        ("text_encoder_2", {}, "has no text_encoder_2, which its model_index.json names"),
        ("", {"transformer": {"in_channels": 8}}, "its transformer takes 8 channels, its autoencoder has 16"),
        ("", {"transformer": {"joint_attention_dim": 16}}, "text encoders are wider than the 16 numbers"),
        ("", {"transformer": {"pos_embed_max_size": None}}, "in its configs"),
    ]
    for n, (part, changes, said) in enumerate(cases):
        folder = edited(tmp_path / str(n), sources("sd3"), part, **changes)
        with pytest.raises(InvalidModel, match=said) as caught:
            ModelBundle.open(folder)
        assert "\n" not in str(caught.value)


def test_a_form_without_a_layout_of_transformers_is_refused(sources: Sources, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="a transformer, of which coreml has no form yet; valid: --to openvino"):
        build(sources("sd3"), tmp_path / "b", "coreml", RECIPES["fp16"], lambda what, share: None)
    assert not (tmp_path / "b").exists()


def original_lora(form: str, dual: bool) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A LoRA in the names of Stability's code, as a program writes it, and what it adds to which original weight."""
    rng, tensors, added = np.random.default_rng(2), dict[str, np.ndarray](), dict[str, np.ndarray]()
    shapes = {f"joint_blocks.{n}.{stream}_block.{layer}": shape for n in (0, 1) for stream in ("x", "context")
              for layer, shape in BLOCK.items() if (n, stream) != (1, "context") or "qkv" in layer}  # fmt: skip
    shapes |= {"joint_blocks.1.context_block.adaLN_modulation.1": (64, 32), **OUTSIDE}
    if dual:
        shapes |= {"joint_blocks.0.x_block.attn2.qkv": (96, 32), "joint_blocks.0.x_block.attn2.proj": (32, 32)}
        shapes["joint_blocks.0.x_block.adaLN_modulation.1"] = (288, 32)
    for name, (high, wide) in shapes.items():
        down, up = (rng.normal(size=shape).astype(np.float32) * 0.3 for shape in ((4, wide), (high, 4)))
        if form == "kohya":
            key, ends = f"lora_unet_{name.replace('.', '_')}", ("lora_down", "lora_up")
            tensors[f"{key}.alpha"] = np.array(2.0, np.float32)
        else:
            key, ends = f"diffusion_model.{name}", ("lora_A", "lora_B")
        tensors |= {f"{key}.{ends[0]}.weight": down, f"{key}.{ends[1]}.weight": up}
        added[f"{name}.weight"] = up @ down * (0.5 if form == "kohya" else 1.0)
    return tensors, added


# Layers of a block, and those outside of blocks, of the miniature: rows and columns.
BLOCK = {
    "attn.qkv": (96, 32), "attn.proj": (32, 32), "mlp.fc1": (128, 32), "mlp.fc2": (32, 128),
    "adaLN_modulation.1": (192, 32),
}  # fmt: skip
OUTSIDE = {
    "context_embedder": (32, 32), "final_layer.linear": (64, 32), "final_layer.adaLN_modulation.1": (64, 32),
    "t_embedder.mlp.0": (32, 256), "t_embedder.mlp.2": (32, 32), "y_embedder.mlp.0": (32, 24),
    "y_embedder.mlp.2": (32, 32),
}  # fmt: skip


def converted(added: dict[str, np.ndarray], dual: bool) -> dict[str, Any]:
    """What is added to weights of original names, as diffusers' own converter of checkpoints places it."""
    import torch
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    whole = {name: torch.from_numpy(value) for name, value in added.items()}
    whole |= {f"{name.removesuffix('.weight')}.bias": torch.zeros(len(value)) for name, value in added.items()}
    whole |= {
        "pos_embed": torch.zeros(1),
        "x_embedder.proj.weight": torch.zeros(1),
        "x_embedder.proj.bias": torch.zeros(1),
    }
    if dual:
        norms = [f"{n}.{stream}_block.attn" for n in (0, 1) for stream in ("x", "context")]
        for each in (*norms, "0.x_block.attn2"):
            whole |= {f"joint_blocks.{each}.{norm}.weight": torch.zeros(1) for norm in ("ln_q", "ln_k")}
    made = convert_sd3_transformer_checkpoint_to_diffusers(whole)
    return {name: value for name, value in made.items() if value.ndim == 2}


@pytest.mark.parametrize(("name", "form"), [("sd3", "kohya"), ("sd35", "kohya"), ("sd3", "comfyui")])
def test_a_lora_in_original_names_changes_what_diffusers_converter_would_have_it(
    sources: Sources, tmp_path: Path, name: str, form: str
) -> None:
    from safetensors.numpy import save_file

    tensors, added = original_lora(form, name == "sd35")
    save_file(tensors, tmp_path / "original.safetensors")
    expected = converted(added, name == "sd35")
    modules = read_lora(tmp_path / "original.safetensors").modules
    assert {key for _, key in modules} == {each.removesuffix(".weight").replace(".", "_") for each in expected}
    assert {part for part, _ in modules} == {"transformer"}
    for each, value in expected.items():
        found = modules["transformer", each.removesuffix(".weight").replace(".", "_")].of(tuple(value.shape))
        np.testing.assert_allclose(found, value.numpy(), rtol=1e-5, atol=1e-6)


def test_a_lora_of_kohyas_draws_what_diffusers_draws_with_its_weights(
    sources: Sources, bundle: ModelBundle, tmp_path: Path
) -> None:
    import torch
    from safetensors.numpy import save_file

    tensors, added = original_lora("kohya", dual=False)
    # diffusers drops what a file has for T5.
    key, rng = "lora_te3_encoder_block_1_layer_1_DenseReluDense_wo", np.random.default_rng(3)
    down, up = (rng.normal(size=shape).astype(np.float32) for shape in ((4, 48), (32, 4)))
    tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": np.array(4.0, np.float32)}
    save_file(tensors, tmp_path / "kohya.safetensors")
    pipeline, plain = loaded(sources("sd3")), theirs(sources("sd3"))
    models = pipeline.transformer, pipeline.text_encoder_3
    before = [{name: value.clone() for name, value in model.state_dict().items()} for model in models]
    try:
        with torch.no_grad():
            for name, value in converted(added, dual=False).items():
                pipeline.transformer.get_parameter(name).add_(value * 0.6)
            wo = pipeline.text_encoder_3.get_submodule("encoder.block.1.layer.1.DenseReluDense.wo")
            wo.weight.add_(torch.from_numpy(up @ down) * 0.6)
        expected = theirs(sources("sd3"))
    finally:
        for model, state in zip(models, before, strict=True):
            model.load_state_dict(state)
    assert psnr(plain, expected, peak=255) < 40, "it matters"
    for folder in (sources("sd3"), bundle.root):
        assert psnr(ours(folder, loras={tmp_path / "kohya.safetensors": 0.6}), expected, peak=255) >= 40


def test_a_lokr_of_joined_layers_is_refused_in_one_line(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    key, ones = "lora_unet_joint_blocks_0_x_block_attn_qkv", np.ones((4, 4), np.float32)
    save_file({f"{key}.lokr_w1": ones, f"{key}.lokr_w2": np.ones((24, 8), np.float32)}, tmp_path / "kron.safetensors")
    with pytest.raises(InvalidModel, match="joins layers in one product of Kronecker's"):
        read_lora(tmp_path / "kron.safetensors")
