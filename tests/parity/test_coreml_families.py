"""Components of SD 2's and SDXL's shapes, scaled down, with random weights: converted, and run beside torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edge_sd.backends.coreml.edits import edited
from edge_sd.bundle.bundle import ModelBundle
from edge_sd.components.edits import Edits
from edge_sd.converters.coreml import ane, convert, wrappers
from edge_sd.converters.coreml.mil import Program
from edge_sd.converters.parity import psnr
from edge_sd.converters.sources import wrappers as stock
from edge_sd.converters.static import Sizes

from ..unit.test_coreml_ane import randomized
from .test_coreml import FLOAT, HALF, ports

SIZES = Sizes(64, 64)


@pytest.fixture(scope="module")
def facts(emoji: Path) -> Any:
    return replace(ModelBundle.open(emoji).facts, family="sdxl", max_tokens=9)


def measured(component: wrappers.AppleComponent, target: str, folder: Path, **given: Any) -> dict[str, float]:
    """PSNR of each output against torch float32, in fp16 mode; random inputs but those `given`."""
    package = folder / f"{component.name}.mlpackage"
    convert.save(convert.convert(component, target), package)
    torch.manual_seed(3)
    inputs = {name: torch.randn_like(value).half().float() for name, value in component.example.items()}
    inputs |= {name: torch.tensor(value, dtype=torch.float32) for name, value in given.items()}
    with torch.no_grad():
        wanted = component.module(*inputs.values())
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    program = Program.open(package)
    found = program.predict({name: value.numpy() for name, value in inputs.items()})
    assert program.overflow is None
    return {name: psnr(found[name], value.numpy()) for name, value in zip(component.outputs, wanted, strict=True)}


def text_model(kind: str, **options: Any) -> Any:
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=9, eos_token_id=98, bos_token_id=97, pad_token_id=0, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    return getattr(transformers, kind)(config).eval().requires_grad_(False)


IDS = [[97, 5, 17, 98, 0, 0, 0, 0, 0]]


def test_sd2s_text_encoder_is_openclips(facts: Any, tmp_path: Path) -> None:
    """Exact GELU instead of the quick one, and padding that is not the end of the text."""
    model = stock.TextEncoder(text_model("CLIPTextModel", hidden_act="gelu"))
    component = wrappers.wrap("text_encoder", model, replace(facts, family="sd2"), SIZES)
    found = measured(component, "iOS16", tmp_path, input_ids=IDS)
    assert set(found) == {"last_hidden_state", "pooled_outputs"}
    assert min(found.values()) > 45


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_sdxls_text_encoders_give_the_states_before_the_last_layer(
    facts: Any, tmp_path: Path, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if part == "text_encoder":
        model: Any = stock.TextEncoder(text_model("CLIPTextModel"))
    else:
        model = stock.TextEncoder2(text_model("CLIPTextModelWithProjection", hidden_act="gelu", projection_dim=24))
    component = wrappers.wrap(part, model, facts, SIZES)
    assert min(measured(component, "iOS16", tmp_path, input_ids=IDS).values()) > 45
    package = tmp_path / f"{'TextEncoder' if part == 'text_encoder' else 'TextEncoder2'}.mlpackage"
    width = 32 if part == "text_encoder" else 24
    assert ports(package) == (
        {"input_ids": (FLOAT, [1, 9])},
        {"hidden_embeds": (FLOAT, [1, 9, 32]), "pooled_outputs": (FLOAT, [1, width])},
    )
    # The oracle is the library's own list of hidden states.
    ids = torch.tensor(IDS)
    wanted = model.model(ids, output_hidden_states=True).hidden_states[-2].numpy()
    given = {"input_ids": np.array(IDS, np.float32)}
    found = Program.open(package).predict(given)
    assert psnr(found["hidden_embeds"], wanted) > 45
    # CLIP skip 2: the output reads a layer less, and the pooled text is that of all.
    monkeypatch.setenv("EDGE_SD_CACHE", str(tmp_path / "home"))
    (copy,) = edited([package], "digest", Edits(states="hidden_states.1"), "TextEncoder")
    earlier = Program.open(copy).predict(given)
    wanted = model.model(ids, output_hidden_states=True).hidden_states[1].numpy()
    assert psnr(earlier["hidden_embeds"], wanted) > 45
    assert psnr(found["hidden_embeds"], wanted) < 40
    assert np.array_equal(earlier["pooled_outputs"], found["pooled_outputs"])


def xl_unet() -> Any:
    """A first block without attention, two transformers deep below, linear projections, a projection of conditions."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return randomized(
        UNet2DConditionModel(
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=8,
            cross_attention_dim=24,
            attention_head_dim=(1, 2),
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 20,
        )
    )


@pytest.mark.parametrize(("compute", "target"), [("ane", "iOS16"), ("gpu", "iOS18")])
def test_sdxls_unet_takes_sizes_and_the_pooled_text(facts: Any, tmp_path: Path, compute: str, target: str) -> None:
    """Sizes of 1024 go through a sine: in float16 that would be noise."""
    unet = ane.rewrite(xl_unet()) if compute == "ane" else xl_unet()
    component = wrappers.wrap("unet", unet, facts, SIZES, channel_first=compute == "ane")
    sizes = [[1024, 1016, 0, 8, 1024, 1016]] * 2
    assert measured(component, target, tmp_path, timestep=[981, 981], time_ids=sizes)["noise_pred"] > 45
    inputs, outputs = ports(tmp_path / "Unet.mlpackage")
    assert inputs == {
        "sample": (HALF, [2, 4, 8, 8]),
        "timestep": (HALF, [2]),
        "encoder_hidden_states": (HALF, [2, 24, 1, 9]),
        "time_ids": (HALF, [2, 6]),
        "text_embeds": (HALF, [2, 20]),
    }
    assert outputs == {"noise_pred": (FLOAT, [2, 4, 8, 8])}


def test_a_safety_checker_blackens_what_is_near_a_concept(facts: Any, tmp_path: Path) -> None:
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    torch.manual_seed(0)
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 32, "patch_size": 8}  # fmt: skip
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=12)).eval()
    checker.requires_grad_(False)
    checker.special_care_embeds.data = torch.randn(3, 12)
    checker.concept_embeds.data = torch.randn(17, 12)
    checker.special_care_embeds_weights.data = torch.full((3,), 1.5)
    clip_input, images = torch.randn(1, 3, 32, 32), torch.rand(1, 64, 64, 3)
    embeds = checker.visual_projection(checker.vision_model(clip_input)[1])
    # No concept is near enough, and each would be 0.005 nearer. Where one of special care is found, all are, by 0.01.
    checker.concept_embeds_weights.data = torch.cosine_similarity(embeds, checker.concept_embeds) + 0.005
    package = tmp_path / "SafetyChecker.mlpackage"
    convert.save(convert.convert(wrappers.wrap("safety_checker", checker, facts, SIZES), "iOS16"), package)
    program = Program.open(package)
    pixels = {"clip_input": clip_input.numpy(), "images": images.numpy()}
    for adjustment in (0.0, 3.0):
        found = program.predict({**pixels, "adjustment": np.full(1, adjustment, np.float32)})
        # The library has no such input: it is a lower threshold.
        checker.special_care_embeds_weights.data[:] = 1.5 - adjustment
        _, wanted = checker(clip_input, [np.ones((8, 8, 3), np.float32)])
        assert [bool(flag) for flag in found["has_nsfw_concepts"]] == wanted == [adjustment > 0]
        assert np.abs(found["filtered_images"] - (0 if wanted[0] else images.numpy())).max() < 1e-3
        assert found["concept_scores"].shape == (1, 17)
        assert np.abs(found["concept_scores"] - (0.005 if adjustment else -0.005)).max() < 3e-3


def test_a_vae_that_float16_cannot_hold_is_float32_inside_and_out(facts: Any, tmp_path: Path) -> None:
    """SDXL's: its activations pass 65504."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )
    vae.decoder.conv_in.weight.data *= 2e5
    vae.eval().requires_grad_(False)
    component = wrappers.wrap("vae_decoder", stock.VAEDecoder(vae), facts, SIZES)
    z = {"z": torch.randn(1, 4, 8, 8)}
    wanted = component.module(z["z"]).numpy()
    convert.save(convert.convert(component, "iOS16"), tmp_path / "half.mlpackage")
    half = Program.open(tmp_path / "half.mlpackage")
    half.predict({"z": z["z"].numpy()})
    assert half.overflow is not None
    convert.save(convert.convert(component, "iOS16", float32=True), tmp_path / "full.mlpackage")
    full = Program.open(tmp_path / "full.mlpackage")
    assert psnr(full.predict({"z": z["z"].numpy()})["image"], wanted) > 100
    assert full.overflow is None
    assert ports(tmp_path / "full.mlpackage")[0] == {"z": (FLOAT, [1, 4, 8, 8])}


@pytest.mark.slow
def test_an_sdxl_bundle_draws_what_diffusers_draws(
    emoji: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two text encoders, sizes and pooled text, and an autoencoder in float32."""
    from edge_sd import Pipeline, Request
    from edge_sd.converters.build import build
    from edge_sd.converters.recipes import RECIPES
    from edge_sd.converters.targets import form_named

    from ..families import save_family
    from .test_families import theirs

    source = save_family("sdxl", tmp_path / "source", emoji)
    form = form_named("coreml", compute="gpu")
    bundle = build(source, tmp_path / "b", form, RECIPES["fp16"], lambda what, share: None)
    artifacts = bundle.variant("coreml-gpu-fp16").artifacts
    assert {part: each.precision for part, each in artifacts.items()} == {
        "text_encoder": "", "text_encoder_2": "", "unet": "", "vae_decoder": "float32", "vae_encoder": "float32",
    }  # fmt: skip
    assert ports(bundle.path(artifacts["vae_decoder"].graph))[0] == {"z": (FLOAT, [1, 4, 8, 8])}
    assert ports(bundle.path(artifacts["unet"].graph))[0]["text_embeds"] == (HALF, [2, 24])
    assert set(ports(bundle.path(artifacts["text_encoder_2"].graph))[1]) == {"hidden_embeds", "pooled_outputs"}
    expected = theirs(source, num_inference_steps=3, guidance_scale=5.0, width=64, height=64)
    request = Request("a red apple", seed=3, steps=3, guidance=5.0, width=64, height=64)
    # Without guidance: diffusers skips no layers for the negative prompt.
    wishes = {"num_inference_steps": 3, "guidance_scale": 1.0, "width": 64, "height": 64}
    skipped, whole = theirs(source, clip_skip=1, **wishes), theirs(source, **wishes)
    monkeypatch.setenv("EDGE_SD_CACHE", str(tmp_path / "home"))
    with Pipeline.open(bundle.root, "coreml-reference") as pipeline:
        found = np.asarray(pipeline.generate(request).pictures[0].image)
        assert psnr(found, expected, peak=255) > 35
        found = np.asarray(pipeline.generate(replace(request, guidance=1.0, clip_skip=2)).pictures[0].image)
        assert psnr(found, skipped, peak=255) >= 50
        assert psnr(found, whole, peak=255) < 45


@pytest.mark.slow
def test_an_inpainting_unet_sees_the_mask(emoji: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine channels; computed in float32, so that the difference is what the conversion lost."""
    from edge_sd import Pipeline, Request
    from edge_sd.converters.build import build
    from edge_sd.converters.recipes import RECIPES
    from edge_sd.converters.targets import form_named

    from ..families import half, picture, save_family
    from .test_families import theirs

    source = save_family("inpaint", tmp_path / "source", emoji)
    bundle = build(source, tmp_path / "b", form_named("coreml"), RECIPES["fp16"], lambda what, share: None)
    variant = bundle.variant("coreml-ane-fp16")
    assert ports(bundle.path(variant.artifacts["unet"].graph))[0]["sample"] == (HALF, [2, 9, 8, 8])
    facts = ModelBundle.open(bundle.root / "coreml-ane-fp16").facts
    assert (facts.inpainting, facts.latents.channels) == (True, 4), "as Resources, too"
    rounded = Program.open
    exact = staticmethod(lambda path, function: rounded(path, "exact", function))
    monkeypatch.setattr(Program, "open", exact)
    wishes = {"image": picture(), "strength": 0.75, "width": 64, "height": 64}
    expected = theirs(source, num_inference_steps=4, guidance_scale=5.0, mask_image=half(), **wishes)
    with Pipeline.open(bundle.root, "coreml-reference") as pipeline:
        *_, last = pipeline.steps(Request("a red apple", seed=3, steps=4, guidance=5.0, mask=half(), **wishes))
        assert psnr(pipeline.decode(last.latents), expected, peak=255) >= 40
