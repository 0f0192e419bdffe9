"""Miniatures of SANA and SANA-Sprint beside diffusers and optimum-intel: the same random weights, prompt and seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edge_sd import Control, InvalidModel, InvalidRequest, ModelBundle, Pipeline, Request
from edge_sd.backends.base import LoadRequest
from edge_sd.backends.openvino.loading import Loading
from edge_sd.backends.torch import TorchBackend, TorchComponent
from edge_sd.bundle.diffusers import GRAPH
from edge_sd.components.autoencoder import to_pixels
from edge_sd.converters.build import build
from edge_sd.converters.parity import psnr
from edge_sd.converters.recipes import RECIPES

from ..conftest import convert
from ..families import half, picture
from ..transformers import save_sana
from .test_sd3 import edited

PROMPT, SEED = " A red Apple, glossy style", 3
SIZE = {"width": 64, "height": 96}
NAMES = ["sana", "sprint"]
Sources = Callable[[str], Path]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """Name -> a miniature's diffusers folder: "sana" or "sprint"."""

    @cache
    def made(name: str) -> Path:
        return save_sana(tmp_path_factory.mktemp(name) / name, sprint=name == "sprint")

    return made


@cache
def loaded(source: Path, kind: str = "") -> Any:
    import diffusers

    kind = kind or ("SanaSprintPipeline" if source.name == "sprint" else "SanaPipeline")
    pipeline = getattr(diffusers, kind).from_pretrained(source)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn(pipeline: Any, prompt: str = PROMPT, **wishes: Any) -> np.ndarray:
    """A picture of diffusers or optimum-intel, in the size that is asked for and no near one."""
    import torch

    sprint = "Sprint" in type(pipeline).__name__
    given = {"num_inference_steps": 2 if sprint else 4, "guidance_scale": 4.5, **SIZE, **wishes}
    generator = torch.Generator().manual_seed(SEED)
    return np.asarray(pipeline(prompt, generator=generator, use_resolution_binning=False, **given).images[0])


@cache
def theirs(source: Path, prompt: str = PROMPT, **wishes: Any) -> np.ndarray:
    return drawn(loaded(source), prompt, **wishes)


def ours(folder: Path, prompt: str = PROMPT, **wishes: Any) -> np.ndarray:
    with Pipeline.open(folder, variant=wishes.pop("variant", None)) as pipeline:
        steps = 2 if pipeline.bundle.facts.guidance_factor else 4
        *_, last = pipeline.steps(Request(prompt, **{"seed": SEED, "steps": steps, **SIZE, **wishes}))
        return pipeline.decode(last.latents)


def likeness(found: np.ndarray, expected: np.ndarray) -> float:
    return psnr(found, expected, peak=255)


@pytest.mark.parametrize("name", NAMES)
def test_torch_draws_a_folder_as_it_is(sources: Sources, name: str) -> None:
    source = sources(name)
    assert likeness(ours(source), theirs(source)) >= 60
    other = "the green pear"
    assert likeness(ours(source, other), theirs(source, other)) >= 60
    assert likeness(theirs(source, other), theirs(source)) < 30, "the prompt matters"


def test_a_negative_prompt_is_read_without_the_instruction(sources: Sources) -> None:
    source, negative = sources("sana"), "The green pear, not glossy at all"
    expected = theirs(source, negative_prompt=negative)
    assert likeness(ours(source, negative=negative), expected) >= 60
    assert likeness(ours(source), expected) < 30
    assert likeness(ours(source, guidance=1.0), theirs(source, guidance_scale=1.0)) >= 60


def test_the_end_of_a_long_prompt_is_cut_where_diffusers_cuts_it(sources: Sources) -> None:
    long = "the red apple, glossy, " * 60
    assert (
        likeness(ours(sources("sana"), long, negative=long), theirs(sources("sana"), long, negative_prompt=long)) >= 60
    )
    with Pipeline.open(sources("sana")) as pipeline:
        notes = pipeline.wording.notes(pipeline.resolve(Request(long, negative=long, seed=1)), "torch")
    assert notes[0].startswith("text_encoder takes 300 tokens of the prompt; it does not read: ")
    assert notes[1].startswith("text_encoder takes 300 tokens of the negative prompt; it does not read: ")


@pytest.mark.parametrize("steps", [1, 3, 4])
def test_sprint_takes_any_number_of_steps(sources: Sources, steps: int) -> None:
    wishes = {"num_inference_steps": steps, "intermediate_timesteps": None}
    source = sources("sprint")
    assert likeness(ours(source, steps=steps), theirs(source, **wishes)) >= 60


def test_sprint_takes_the_guidance_scale_as_a_number(sources: Sources) -> None:
    source = sources("sprint")
    expected = theirs(source, guidance_scale=9.0)
    assert likeness(ours(source, guidance=9.0), expected) >= 60
    assert likeness(ours(source), expected) < 40
    assert likeness(ours(source, guidance=1.0), theirs(source, guidance_scale=1.0)) >= 60


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_sprint_goes_on_from_a_picture(sources: Sources, strength: float) -> None:
    """Its autoencoder has no distribution of latents, so that there is no noise for it."""
    source, size = sources("sprint"), {"width": 64, "height": 64}
    pipeline = loaded(source, "SanaSprintImg2ImgPipeline")
    expected = drawn(pipeline, image=picture(), strength=strength, **size)
    assert likeness(ours(source, image=picture(), strength=strength, **size), expected) >= 60


@pytest.mark.parametrize("name", NAMES)
def test_only_what_the_mask_hides_is_drawn_anew(sources: Sources, name: str) -> None:
    """diffusers has no pipeline for it; outside of the mask the picture is as it was, byte for byte."""
    request = Request(PROMPT, seed=1, image=picture(), mask=half(), mask_blur=0, strength=0.5)
    with Pipeline.open(sources(name)) as pipeline:
        found = np.asarray(pipeline.generate(request).pictures[0].image)
    before, mask = np.asarray(picture().convert("RGB")), np.asarray(half().convert("L")) > 127
    assert (found[~mask] == before[~mask]).all()
    assert (found[mask] != before[mask]).any()


def test_the_manifest_says_what_the_family_needs(sources: Sources) -> None:
    sana, sprint = (ModelBundle.open(sources(name)).facts for name in NAMES)
    (text,) = sana.encoders
    tokenizer = loaded(sources("sana")).tokenizer
    assert text.tokens == len(tokenizer.encode(text.before)) + 298
    assert (text.kind, text.states, text.rows, text.bare_negative) == ("gemma2", "last_hidden_state", 300, True)
    assert sprint.texts == sana.texts
    assert (sana.family, sana.grain, sana.latents.factor, sana.latents.scale) == ("sana", 32, 32, 0.41407)
    assert (sana.defaults.steps, sana.defaults.guidance, sana.defaults.sampler) == (20, 4.5, "dpmpp_2m")
    assert (sprint.defaults.steps, sprint.defaults.guidance, sprint.defaults.sampler) == (2, 4.5, "lcm")
    assert (sana.guidance_factor, sana.time_factor) == (0.0, 1.0)
    assert (sprint.guidance_factor, sprint.time_factor) == (0.1, 0.001)
    assert (sana.schedule.flow_grid, sana.schedule.flow_shift, sprint.schedule.flow_grid) == ("dpm", 3.0, "trig")


def test_the_instruction_is_that_of_diffusers(sources: Sources) -> None:
    import inspect

    from diffusers import SanaPipeline, SanaSprintImg2ImgPipeline, SanaSprintPipeline

    (text,) = ModelBundle.open(sources("sana")).facts.encoders
    for kind in (SanaPipeline, SanaSprintPipeline, SanaSprintImg2ImgPipeline):
        lines = inspect.signature(kind.__call__).parameters["complex_human_instruction"].default
        assert text.before == "\n".join(lines)


@pytest.mark.parametrize(
    ("wishes", "said"),
    [
        ({"width": 80}, "width 80 is not a multiple of 32, as this model needs"),
        ({"width": 4096}, "width 4096 is beyond this model's limit of 2048"),
        ({"controls": [Control(Image.new("RGB", (64, 64)))]}, "has no controlnet, which a control picture needs"),
        ({"image_guidance": 1.5, "image": picture()}, "image guidance is for models that edit by instruction"),
        ({"sampler": "pndm"}, "PNDM is no sampler for a flow-matching model"),
        ({"prompt": "a pear AND an apple"}, "AND needs a negative prompt, which sprint does not take"),
        ({"decoder": "tiny"}, "has no tiny decoder"),
    ],
)
def test_what_the_family_cannot_do_is_said_by_name(sources: Sources, wishes: dict[str, Any], said: str) -> None:
    with Pipeline.open(sources("sprint")) as pipeline, pytest.raises(InvalidRequest, match=said):
        pipeline.resolve(Request(**{"prompt": PROMPT, **wishes}))


def test_a_folder_that_does_not_fit_together_is_refused_in_one_line(sources: Sources, tmp_path: Path) -> None:
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("", {"transformer": {"caption_channels": 8}}, "attends to 8 numbers, its text encoder has 16"),
        ("", {"transformer": {"in_channels": 8}}, "its transformer takes 8 channels, its autoencoder has 4"),
        ("", {"transformer": {"out_channels": 8}}, "takes 4 channels and returns 8"),
        ("", {"transformer": {"guidance_embeds": True}}, "a guidance scale, and its scheduler is a DPMSolverMultistep"),
        ("tokenizer.json", {}, "has no tokenizer.json"),
    ]
    for n, (part, changes, said) in enumerate(cases):
        folder = edited(tmp_path / str(n), sources("sana"), part, **changes)
        with pytest.raises(InvalidModel, match=said) as caught:
            ModelBundle.open(folder)
        assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def bundles(sources: Sources, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ModelBundle]:
    """Name -> the miniature in OpenVINO's fp32."""

    @cache
    def made(name: str) -> ModelBundle:
        return convert(sources(name), tmp_path_factory.mktemp(name) / f"bundle-{name}", "fp32")

    return made


@pytest.mark.parametrize("name", NAMES)
def test_openvino_draws_what_diffusers_draws(
    sources: Sources, bundles: Callable[[str], ModelBundle], name: str
) -> None:
    bundle, expected = bundles(name), theirs(sources(name))
    assert bundle.facts == replace(ModelBundle.open(sources(name)).facts, name=bundle.facts.name)
    assert likeness(ours(bundle.root), expected) >= 60
    # As an export its transformer is computed in bfloat16 where the CPU has it.
    assert likeness(ours(bundle.root / "openvino-fp32"), expected) >= 30


def test_openvino_goes_on_from_a_picture(sources: Sources, bundles: Callable[[str], ModelBundle]) -> None:
    wishes = {"image": picture(), "strength": 0.5, "width": 64, "height": 64}
    expected = drawn(loaded(sources("sprint"), "SanaSprintImg2ImgPipeline"), **wishes)
    assert likeness(ours(bundles("sprint").root, **wishes), expected) >= 60


@pytest.mark.parametrize("name", NAMES)
def test_optimum_loads_what_was_written(sources: Sources, bundles: Callable[[str], ModelBundle], name: str) -> None:
    from optimum.intel import OVPipelineForText2Image

    pipeline = OVPipelineForText2Image.from_pretrained(
        bundles(name).root / "openvino-fp32", device="CPU", ov_config={"INFERENCE_PRECISION_HINT": "f32"}
    )
    pipeline.set_progress_bar_config(disable=True)
    assert likeness(drawn(pipeline), theirs(sources(name))) >= 60


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_an_export_of_optimum_opens_as_a_model(
    sources: Sources, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from optimum.intel.openvino import OVSanaPipeline, OVSanaSprintPipeline

    kind = OVSanaSprintPipeline if name == "sprint" else OVSanaPipeline
    kind.from_pretrained(sources(name), export=True, compile=False).save_pretrained(tmp_path)
    # It says nothing of its precision, and is computed in bfloat16 where the CPU has it.
    monkeypatch.setattr(Loading, "config", {"INFERENCE_PRECISION_HINT": "f32"})
    assert likeness(ours(tmp_path), theirs(sources(name))) >= 60
    if name == "sprint":
        wishes = {"image": picture(), "strength": 0.5, "width": 64, "height": 64}
        expected = drawn(loaded(sources(name), "SanaSprintImg2ImgPipeline"), **wishes)
        assert likeness(ours(tmp_path, **wishes), expected) >= 60


@pytest.mark.parametrize("precision", ["int4", pytest.param("fp16", marks=pytest.mark.long)])
def test_other_precisions_are_measured(sources: Sources, tmp_path: Path, precision: str) -> None:
    bundle = convert(sources("sprint"), tmp_path / "bundle", precision)
    artifacts = bundle.variants[f"openvino-{precision}"].artifacts
    floor = {"int4": 20, "fp16": 45}[precision]
    assert all(each.parity is not None and each.parity.psnr >= floor for each in artifacts.values())
    assert likeness(ours(bundle.root), theirs(sources("sprint"))) >= 20


def test_the_sums_of_linear_attention_stay_in_float32(bundles: Callable[[str], ModelBundle]) -> None:
    """Where the CPU computes in bfloat16, they alone of the products do not."""
    import openvino as ov

    folder = bundles("sprint").root / "openvino-fp32"
    for part, block in (("transformer", r"attn1/"), ("vae_decoder", r"attn/"), ("vae_encoder", r"attn/")):
        compiled = ov.Core().compile_model(folder / part / GRAPH, "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
        rows = [op.get_rt_info() for op in compiled.get_runtime_model().get_ops()]
        told = [{key: str(row[key].astype(str)) for key in row if key in KEYS} for row in rows]
        sums = [row for row in told if row.get("layerType") == "MatMul" and f"{block}aten::matmul" in row[KEYS[0]]]
        assert len(sums) >= 4
        assert {row["runtimePrecision"] for row in sums} == {"f32"}


# What OpenVINO says of an operation that runs: the names that it had, its kind, and the type that it computes in.
KEYS = ("originalLayersNames", "layerType", "runtimePrecision")


def test_what_overflows_float16_is_computed_in_bfloat16(sources: Sources) -> None:
    bundle, backend = ModelBundle.open(sources("sprint")), TorchBackend()
    (device,) = [each for each in backend.devices() if each.name == "torch-cpu"]
    variant = bundle.variant("torch-fp16")
    found = {}
    for part in ("text_encoder", "transformer", "vae_decoder", "vae_encoder"):
        component = backend.load(LoadRequest(bundle, variant, part, device, {}))
        assert isinstance(component, TorchComponent)
        found[part] = str(component.dtype)
    wide = {"text_encoder", "vae_decoder", "vae_encoder"}
    assert {part for part, dtype in found.items() if dtype == "torch.bfloat16"} == wide
    assert found["transformer"] == "torch.float16"
    assert likeness(ours(sources("sprint"), variant="torch-fp16"), theirs(sources("sprint"))) >= 25


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of attention, a convolution and the text's layer, in the keys that diffusers writes for SANA."""
    from safetensors.numpy import save_file

    rng, tensors = np.random.default_rng(1), {}
    layers: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
        "transformer_blocks.0.attn1.to_q": ((4, 16), (16, 4)),
        "transformer_blocks.1.attn2.to_out.0": ((4, 16), (16, 4)),
        "transformer_blocks.1.ff.conv_inverted": ((4, 16, 1, 1), (80, 4, 1, 1)),
        "caption_projection.linear_1": ((4, 16), (16, 4)),
    }  # fmt: skip
    for name, (down, up) in layers.items():
        for end, shape in (("lora_A", down), ("lora_B", up)):
            tensors[f"transformer.{name}.{end}.weight"] = rng.normal(size=shape).astype(np.float32)
    path = tmp_path_factory.mktemp("lora") / "style.safetensors"
    save_file(tensors, path)
    return path


def test_a_lora_of_the_family_changes_what_it_changes_in_diffusers(
    sources: Sources, bundles: Callable[[str], ModelBundle], lora: Path
) -> None:
    pipeline, plain = loaded(sources("sana")), theirs(sources("sana"))
    pipeline.load_lora_weights(lora.parent, weight_name=lora.name)
    try:
        expected = drawn(pipeline, attention_kwargs={"scale": 0.6})
    finally:
        pipeline.unload_lora_weights()
    assert likeness(plain, expected) < 40, "it matters"
    for folder in (sources("sana"), bundles("sana").root):
        assert likeness(ours(folder, loras={lora: 0.6}), expected) >= 40


@pytest.mark.parametrize("form", ["coreml", "coreai"])
def test_forms_without_a_layout_of_transformers_are_refused(sources: Sources, tmp_path: Path, form: str) -> None:
    with pytest.raises(InvalidRequest, match=f"a transformer, of which {form} has no form yet; valid: --to openvino"):
        build(sources("sana"), tmp_path / "b", form, RECIPES["fp16"], lambda what, share: None)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("precision", ["w8a8", "hybrid"])
def test_activations_of_linear_attention_are_not_rounded(sources: Sources, tmp_path: Path, precision: str) -> None:
    with pytest.raises(
        InvalidRequest, match=f"linear attention, which {precision} does not round; valid: fp16, fp32, fp8, int4, "
    ):
        convert(sources("sana"), tmp_path / "b", precision)
    assert not (tmp_path / "b").exists()


def test_what_has_no_effect_is_said(sources: Sources) -> None:
    request = Request(PROMPT, negative="a pear", clip_skip=2, seed=1, steps=1, **SIZE)
    with Pipeline.open(sources("sprint")) as pipeline:
        notes = pipeline.generate(request).notes
    assert notes == [
        "sprint has no CLIP: clip_skip 2 skips nothing",
        "sprint takes the guidance scale itself: the negative prompt is not used",
    ]


@pytest.mark.parametrize("converts", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_tiny_decoder_of_so_many_pixels_is_taken(sources: Sources, tmp_path: Path, converts: bool) -> None:
    """One of AutoencoderTiny's class, with 32 pixels for a latent."""
    import shutil

    import torch
    from diffusers import AutoencoderTiny

    torch.manual_seed(1)
    blocks: dict[str, Any] = {f"{side}_block_out_channels": (8,) * 6 for side in ("encoder", "decoder")}
    counts: dict[str, Any] = {f"num_{side}_blocks": (1,) * 6 for side in ("encoder", "decoder")}
    tiny = AutoencoderTiny(latent_channels=4, **blocks, **counts)
    folder = shutil.copytree(sources("sprint"), tmp_path / "source")
    tiny.save_pretrained(folder / "vae_tiny")
    opened = convert(folder, tmp_path / "bundle", "fp32").root if converts else folder
    with Pipeline.open(opened) as pipeline:
        *_, last = pipeline.steps(Request(PROMPT, seed=SEED, steps=2, decoder="tiny", **SIZE))
        found = pipeline.decode(last.latents, "tiny")
    with torch.no_grad():
        expected = tiny.decode(torch.from_numpy(last.latents)).sample[0].numpy()
    assert likeness(found, to_pixels(expected)) >= 60


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("lora_unet_blocks_0_attn_qkv.lora_{}.weight", "it changes a unet, this model has a transformer"),
        ("transformer.blocks.0.attn.qkv.lora_{}.weight", "changes nothing that transformer/config.json has"),
    ],
)
def test_a_lora_of_other_names_is_refused(sources: Sources, tmp_path: Path, key: str, said: str) -> None:
    from safetensors.numpy import save_file

    ends = ("down", "up") if key.startswith("lora_") else ("A", "B")
    tensors = {key.format(end): np.ones(shape, np.float32) for end, shape in zip(ends, ((4, 16), (48, 4)), strict=True)}
    save_file(tensors, tmp_path / "other.safetensors")
    with Pipeline.open(sources("sana")) as pipeline, pytest.raises(InvalidRequest, match=said):
        pipeline.generate(Request(PROMPT, seed=1, steps=1, loras={tmp_path / "other.safetensors": 1.0}, **SIZE))
