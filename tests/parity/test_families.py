"""Every model of the family beside diffusers: the same random weights, prompt and seed, in float32."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_sd import ModelBundle, Pipeline, Request
from edge_sd.converters.build import build
from edge_sd.converters.parity import psnr
from edge_sd.converters.recipes import RECIPES
from edge_sd.converters.targets import form_named
from edge_sd.errors import InvalidRequest
from edge_sd.pipeline.control import Control

from ..conftest import convert
from ..families import half, picture, save_family

PROMPT, SEED = "a red apple", 3
Families = Callable[[str], tuple[Path, ModelBundle]]


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory, emoji: Path) -> Families:
    """name -> a miniature's diffusers folder, and what it was converted to."""

    @cache
    def made(name: str) -> tuple[Path, ModelBundle]:
        folder = tmp_path_factory.mktemp(name)
        source = save_family(name, folder / "source", emoji)
        return source, convert(source, folder / "bundle", "fp32")

    return made


def theirs(source: Path, kind: str = "DiffusionPipeline", **wishes: Any) -> np.ndarray:
    import diffusers
    import torch

    pipeline = getattr(diffusers, kind).from_pretrained(source, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if hasattr(pipeline, "watermark"):
        pipeline.watermark = None
    generator = torch.Generator().manual_seed(SEED)
    return np.asarray(pipeline(PROMPT, generator=generator, **wishes).images[0])


def ours(bundle: ModelBundle, **wishes: Any) -> np.ndarray:
    """As decoded, before anything is pasted."""
    with Pipeline.open(bundle.root) as pipeline:
        *_, last = pipeline.steps(Request(PROMPT, seed=SEED, **wishes))
        return pipeline.decode(last.latents)


@pytest.mark.parametrize(
    ("name", "guidance"),
    [("sd2", 5.0), ("sdxl", 5.0), ("playground", 3.0), ("turbo", 1.0), ("lcm", 8.5), ("distilled", 5.0)],
)
def test_it_draws_what_diffusers_draws(families: Families, name: str, guidance: float) -> None:
    source, bundle = families(name)
    expected = theirs(source, num_inference_steps=4, guidance_scale=guidance, width=64, height=64)
    assert psnr(ours(bundle, steps=4, guidance=guidance, width=64, height=64), expected, peak=255) >= 40


@pytest.mark.parametrize("name", ["sdxl", "lcm"])
def test_torch_draws_it_as_it_is(families: Families, name: str) -> None:
    source, _ = families(name)
    expected = theirs(source, num_inference_steps=3, guidance_scale=5.0, width=64, height=64)
    with Pipeline.open(source, "torch-cpu") as pipeline:
        *_, last = pipeline.steps(Request(PROMPT, seed=SEED, steps=3, guidance=5.0, width=64, height=64))
        assert psnr(pipeline.decode(last.latents), expected, peak=255) >= 40


def test_the_manifest_says_what_a_family_needs(families: Families) -> None:
    facts = ModelBundle.open(families("sdxl")[1].root).facts
    assert (facts.family, facts.conditioning, facts.pooled_width, facts.text_width) == ("sdxl", "size", 24, 80)
    assert [(text.part, text.tokenizer, text.states) for text in facts.encoders] == [
        ("text_encoder", "tokenizer", "hidden_states.2"), ("text_encoder_2", "tokenizer_2", "hidden_states.2"),
    ]  # fmt: skip
    assert (facts.zero_negative, facts.vae_float32) == (True, True)
    turbo = families("turbo")[1].defaults
    assert (turbo.steps, turbo.guidance, turbo.sampler) == (4, 1.0, "euler")
    lcm = families("lcm")[1]
    assert (lcm.facts.guidance_width, lcm.defaults.sampler, lcm.defaults.steps) == (16, "lcm", 4)
    assert families("inpaint")[1].facts.inpainting


def test_a_negative_prompt_is_read_by_both_encoders(families: Families) -> None:
    source, bundle = families("sdxl")
    wishes = {"width": 64, "height": 64}
    expected = theirs(source, num_inference_steps=4, guidance_scale=5.0, negative_prompt="a green pear", **wishes)
    found = ours(bundle, steps=4, guidance=5.0, negative="a green pear", **wishes)
    assert psnr(found, expected, peak=255) >= 40
    assert psnr(ours(bundle, steps=4, guidance=5.0, **wishes), expected, peak=255) < 40, "no words are zeros"


@pytest.mark.parametrize(("skip", "theirs_skips"), [(2, 1), (3, 2)])
def test_clip_skip_reads_an_earlier_layer_of_both(families: Families, skip: int, theirs_skips: int) -> None:
    source, bundle = families("sdxl")
    wishes = {"width": 64, "height": 64}
    expected = theirs(source, num_inference_steps=3, guidance_scale=1.0, clip_skip=theirs_skips, **wishes)
    assert psnr(ours(bundle, steps=3, guidance=1.0, clip_skip=skip, **wishes), expected, peak=255) >= 40


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_an_inpainting_unet_sees_the_mask(families: Families, strength: float) -> None:
    source, bundle = families("inpaint")
    wishes = {"image": picture(), "strength": strength, "width": 64, "height": 64}
    expected = theirs(source, num_inference_steps=4, guidance_scale=5.0, mask_image=half(), **wishes)
    assert psnr(ours(bundle, steps=4, guidance=5.0, mask=half(), **wishes), expected, peak=255) >= 40


@pytest.mark.parametrize("wishes", [{"guidance": 5.0}, {"guidance": 3.0, "image_guidance": 2.5}, {"guidance": 1.0}])
def test_an_instruction_edits_a_picture(families: Families, wishes: dict[str, float]) -> None:
    source, bundle = families("instruct")
    scales = {"guidance_scale": wishes["guidance"], "image_guidance_scale": wishes.get("image_guidance", 1.5)}
    told = {"negative_prompt": "a green pear"}
    expected = theirs(
        source, "StableDiffusionInstructPix2PixPipeline", image=picture(), num_inference_steps=4, **scales, **told
    )
    found = ours(bundle, steps=4, image=picture(), negative="a green pear", **wishes)
    assert psnr(found, expected, peak=255) >= 40
    with Pipeline.open(source, "torch-cpu") as pipeline:
        request = Request(PROMPT, "a green pear", seed=SEED, steps=4, image=picture(), **wishes)
        *_, last = pipeline.steps(request)
        assert psnr(pipeline.decode(last.latents), expected, peak=255) >= 40


def test_what_an_instruction_can_not_do_is_refused(families: Families) -> None:
    (_, editor), (_, other) = families("instruct"), families("turbo")
    image = {"image": picture()}
    cases = [
        (editor, {}, "edits a picture by instruction: it needs an image"),
        (editor, {**image, "mask": half()}, "takes no mask"),
        (editor, {**image, "strength": 0.5}, "takes no strength below 1"),
        (other, {**image, "image_guidance": 2.0}, "image guidance is for models that edit by instruction"),
    ]
    for bundle, wishes, said in cases:
        with Pipeline.open(bundle.root) as pipeline, pytest.raises(InvalidRequest, match=said):
            pipeline.resolve(Request(PROMPT, **wishes))
    with Pipeline.open(editor.root) as pipeline:
        request = Request(PROMPT, seed=SEED, steps=1, image=picture())
        drawn = pipeline.generate(request).pictures[0]
        assert drawn.settings.image_guidance == 1.5
        assert "Image CFG scale: 1.5" in drawn.texts()[0]


@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_a_controlnet_that_returns_means_is_given_to_the_prompt_alone(families: Families, guidance: float) -> None:
    """The folder is StableDiffusionControlNetPipeline's own."""
    source, bundle = families("shuffle")
    wishes = {"num_inference_steps": 4, "guidance_scale": guidance, "width": 64, "height": 64}
    expected = theirs(source, "StableDiffusionControlNetPipeline", image=picture(), **wishes)
    controls = [Control(picture(), reading="tile")]
    request = Request(PROMPT, seed=SEED, steps=4, guidance=guidance, width=64, height=64, controls=controls)
    assert bundle.facts.pooled_nets == ("controlnet",)
    for opened in (Pipeline.open(bundle.root), Pipeline.open(source, "torch-cpu")):
        with opened as pipeline:
            *_, last = pipeline.steps(request)
            assert psnr(pipeline.decode(last.latents), expected, peak=255) >= 40


def test_a_folder_of_several_controlnets_converts_whole(families: Families, tmp_path: Path) -> None:
    """As StableDiffusionControlNetPipeline saves them: controlnet, controlnet_1."""
    source, bundle = families("two-nets")
    assert {"controlnet", "controlnet_1", "controlled_unet"} <= set(bundle.variant("openvino-fp32").artifacts)
    lines = [picture(), half().convert("RGB")]
    wishes = {"num_inference_steps": 4, "guidance_scale": 5.0, "width": 64, "height": 64}
    scales = {"controlnet_conditioning_scale": [0.9, 0.5]}
    expected = theirs(source, "StableDiffusionControlNetPipeline", image=lines, **scales, **wishes)
    controls = [Control(lines[0], 0.9, reading="tile"), Control(lines[1], 0.5, reading="tile", net="1")]
    found = ours(bundle, steps=4, guidance=5.0, width=64, height=64, controls=controls)
    assert psnr(found, expected, peak=255) >= 40
    with pytest.raises(InvalidRequest, match=r"one ControlNet; .* also has controlnet_1; valid: --to openvino"):
        build(source, tmp_path / "b", form_named("coreml"), RECIPES["fp16"], lambda what, share: None)


def test_a_controlnet_beside_an_inpainting_unet_sees_the_latents_alone(families: Families) -> None:
    """The folder is StableDiffusionControlNetInpaintPipeline's own."""
    source, bundle = families("controlled-inpaint")
    wishes = {"num_inference_steps": 4, "guidance_scale": 5.0, "width": 64, "height": 64, "strength": 0.8}
    expected = theirs(
        source, "StableDiffusionControlNetInpaintPipeline", image=picture(), mask_image=half(),
        control_image=picture(), controlnet_conditioning_scale=1.0, **wishes,
    )  # fmt: skip
    found = ours(
        bundle, steps=4, guidance=5.0, image=picture(), mask=half(), strength=0.8,
        controls=[Control(picture(), reading="tile")],
    )  # fmt: skip
    assert psnr(found, expected, peak=255) >= 40


def test_an_inpainting_model_without_a_mask_is_refused(families: Families) -> None:
    with Pipeline.open(families("inpaint")[1].root) as pipeline:
        for wishes in ({}, {"image": picture()}):
            with pytest.raises(InvalidRequest, match="model for inpainting: it needs an image and a mask"):
                pipeline.resolve(Request(PROMPT, **wishes))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sdxl", "StableDiffusionXLImg2ImgPipeline"),
        ("sdxl", "StableDiffusionXLInpaintPipeline"),
        ("playground", "StableDiffusionXLImg2ImgPipeline"),
    ],
)
def test_sdxl_goes_on_from_a_picture(families: Families, name: str, kind: str) -> None:
    source, bundle = families(name)
    inpaint = kind.endswith("InpaintPipeline")
    more = {"mask_image": half(), "width": 64, "height": 64} if inpaint else {}
    expected = theirs(source, kind, image=picture(), strength=0.6, num_inference_steps=5, guidance_scale=5.0, **more)
    found = ours(bundle, steps=5, guidance=5.0, image=picture(), strength=0.6, mask=half() if inpaint else None)
    assert psnr(found, expected, peak=255) >= 40


def test_optimum_loads_what_was_written(families: Families) -> None:
    import torch
    from optimum.intel import OVStableDiffusionXLPipeline

    source, bundle = families("sdxl")
    pipeline = OVStableDiffusionXLPipeline.from_pretrained(bundle.root / "openvino-fp32", device="CPU")
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(
        PROMPT, num_inference_steps=4, guidance_scale=5.0, width=64, height=64,
        generator=torch.Generator().manual_seed(SEED),
    ).images[0]  # fmt: skip
    expected = theirs(source, num_inference_steps=4, guidance_scale=5.0, width=64, height=64)
    assert psnr(np.asarray(image), expected, peak=255) >= 40


def test_a_folder_of_optimums_layout_opens_as_it_is(families: Families) -> None:
    source, bundle = families("sdxl")
    found = ours(ModelBundle.open(bundle.root / "openvino-fp32"), steps=4, guidance=5.0, width=64, height=64)
    expected = theirs(source, num_inference_steps=4, guidance_scale=5.0, width=64, height=64)
    assert psnr(found, expected, peak=255) >= 40


@pytest.mark.parametrize("start", [0.5, 0.8])
def test_a_refiner_draws_the_last_steps(families: Families, start: float) -> None:
    import torch
    from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline

    (base, bundle), (refiner, refiner_bundle) = families("sdxl"), families("refiner")
    generator = torch.Generator().manual_seed(SEED)
    told = {"num_inference_steps": 5, "guidance_scale": 5.0, "generator": generator}
    first = StableDiffusionXLPipeline.from_pretrained(base)
    second = StableDiffusionXLImg2ImgPipeline.from_pretrained(refiner)
    for pipeline in (first, second):
        pipeline.watermark = None
        pipeline.set_progress_bar_config(disable=True)
    latents = first(PROMPT, denoising_end=start, output_type="latent", width=64, height=64, **told).images
    # The refiner's autoencoder is another miniature's; what is compared are the base model's pictures.
    latents = second(PROMPT, image=latents, denoising_start=start, output_type="latent", **told).images
    with torch.no_grad():
        image = first.vae.decode(latents / first.vae.config.scaling_factor).sample
    expected = np.asarray(first.image_processor.postprocess(image)[0])
    wishes = {"steps": 5, "guidance": 5.0, "width": 64, "height": 64}
    found = ours(bundle, **wishes, refiner=refiner_bundle.root, refiner_start=start)
    assert psnr(found, expected, peak=255) >= 40
    assert not np.array_equal(found, ours(bundle, **wishes)), "the refiner takes part"


def test_a_refiner_without_a_base_and_a_base_without_a_refiner_are_refused(families: Families) -> None:
    (_, base), (_, refiner), (_, other) = families("sdxl"), families("refiner"), families("turbo")
    cases = [
        (refiner, {}, "is a refiner: it goes on from an image, or from a base model"),
        (base, {"refiner": other.root}, "is no refiner"),
        (other, {"refiner": refiner.root}, "takes no refiner: that goes with the base model of SDXL"),
    ]
    for bundle, wishes, said in cases:
        with Pipeline.open(bundle.root) as pipeline, pytest.raises(InvalidRequest, match=said):
            pipeline.resolve(Request(PROMPT, **wishes))
    with pytest.raises(InvalidRequest, match="refiner_start needs a refiner"):
        Request(PROMPT, refiner_start=0.5)
