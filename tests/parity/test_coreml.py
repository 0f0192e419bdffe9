"""Core ML packages as they are on disk: what Apple's programs expect of them, and what the executor makes of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edge_sd.bundle.bundle import ModelBundle
from edge_sd.bundle.mlpackage.package import Package
from edge_sd.converters.coreml import convert, quantize, wrappers
from edge_sd.converters.coreml.mil import Program
from edge_sd.converters.parity import psnr
from edge_sd.converters.recipes import RECIPES
from edge_sd.converters.sources.wrappers import TinyDecoder
from edge_sd.converters.static import Sizes
from edge_sd.errors import ConversionError, InvalidRequest

from ..conftest import convert as to_openvino
from ..unit.test_coreml_ane import SMALL, randomized
from ..unit.test_coreml_mil import build as build_package

HALF, FLOAT = 65552, 65568  # FeatureTypes.proto: FLOAT16, FLOAT32


def ports(package: Path) -> tuple[dict[str, tuple[int, list[int]]], dict[str, tuple[int, list[int]]]]:
    """Inputs and outputs as coremltools reads them."""
    import coremltools as ct

    description = ct.utils.load_spec(str(package)).description
    inputs, outputs = (
        {each.name: (each.type.multiArrayType.dataType, list(each.type.multiArrayType.shape)) for each in side}
        for side in (description.input, description.output)
    )
    return inputs, outputs


def test_every_package_has_apples_names_shapes_and_types(coreml_bundle: ModelBundle) -> None:
    folder = coreml_bundle.root / "coreml-ane-fp16"
    assert ports(folder / "TextEncoder.mlpackage") == (
        {"input_ids": (FLOAT, [1, 32])},
        {"last_hidden_state": (FLOAT, [1, 32, 32]), "pooled_outputs": (FLOAT, [1, 32])},
    )
    assert ports(folder / "Unet.mlpackage") == (
        {
            "sample": (HALF, [2, 4, 8, 8]),
            "timestep": (HALF, [2]),
            "encoder_hidden_states": (HALF, [2, 32, 1, 32]),
        },
        {"noise_pred": (FLOAT, [2, 4, 8, 8])},
    )
    assert ports(folder / "VAEDecoder.mlpackage") == ({"z": (HALF, [1, 4, 8, 8])}, {"image": (FLOAT, [1, 3, 16, 16])})
    assert ports(folder / "VAEEncoder.mlpackage") == ({"x": (HALF, [1, 3, 16, 16])}, {"latent": (FLOAT, [1, 8, 8, 8])})
    vocabulary = json.loads((folder / "vocab.json").read_text("utf-8"))
    assert vocabulary["<|startoftext|>"] >= 0
    assert (folder / "merges.txt").read_text("utf-8").startswith("#version: 0.2\n")
    assert sorted(path.name for path in (folder / "Unet.mlpackage").iterdir()) == ["Data", "Manifest.json"]


def test_the_neural_engines_unet_is_known_as_such(coreml_bundle: ModelBundle) -> None:
    """Swift programs look for the einsum of iOS16; linear layers and wide attention would leave the engine."""
    import coremltools as ct

    spec = ct.utils.load_spec(str(coreml_bundle.root / "coreml-ane-fp16/Unet.mlpackage"))
    assert spec.specificationVersion == ct.target.iOS16
    block = next(iter(spec.mlProgram.functions["main"].block_specializations.values()))
    kinds = [operation.type for operation in block.operations]
    # One block: two attentions of two heads, scores and sums.
    assert kinds.count("einsum") == 8
    assert not {"linear", "matmul", "scaled_dot_product_attention"} & set(kinds)


def test_every_component_is_near_torch_and_the_manifest_says_so(coreml_bundle: ModelBundle) -> None:
    variant = coreml_bundle.variant("coreml-ane-fp16")
    assert (variant.backend, variant.precision, variant.compute) == ("coreml", "fp16", "ane")
    whole = {"text_encoder", "unet", "vae_decoder", "vae_encoder", "controlnet", "controlled_unet"}
    assert set(variant.artifacts) == whole
    for part, artifact in variant.artifacts.items():
        assert artifact.parity is not None
        assert 45 <= artifact.parity.psnr < 120, part
    assert coreml_bundle.verify() == []


def through_the_executor(component: wrappers.AppleComponent, target: str, folder: Path) -> dict[str, float]:
    """PSNR of each output, in fp16 mode, on random inputs of the example's shapes."""
    package = folder / f"{component.name}-{target}.mlpackage"
    convert.save(convert.convert(component, target), package)
    torch.manual_seed(3)
    given = {
        name: torch.full_like(value, 441.0) if name == "timestep" else torch.randn_like(value).half().float()
        for name, value in component.example.items()
    }
    with torch.no_grad():
        wanted = component.module(*given.values())
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    program = Program.open(package)
    found = program.predict({name: value.numpy() for name, value in given.items()})
    assert program.overflow is None
    assert set(found) == set(component.outputs)
    return {name: psnr(found[name], value.numpy()) for name, value in zip(component.outputs, wanted, strict=True)}


@pytest.fixture(scope="module")
def facts(emoji: Path) -> Any:
    from dataclasses import replace

    return replace(ModelBundle.open(emoji).facts, max_tokens=9)


SIZES = Sizes(64, 64)


def small_unet(**options: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return randomized(UNet2DConditionModel(up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **SMALL, **options))


def test_the_gpus_unet_is_fused_attention_and_near_torch(facts: Any, tmp_path: Path) -> None:
    """Of SD 2's shape: linear projections, heads of one width."""
    unet = small_unet(attention_head_dim=(2, 4), use_linear_projection=True)
    component = wrappers.wrap("unet", unet, facts, SIZES)
    assert through_the_executor(component, "iOS18", tmp_path)["noise_pred"] > 45
    graph = (tmp_path / "Unet-iOS18.mlpackage/Data/com.apple.CoreML/model.mlmodel").read_bytes()
    assert b"scaled_dot_product_attention" in graph


def test_a_tiny_decoder(facts: Any, tmp_path: Path) -> None:
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
    ).eval()
    component = wrappers.wrap("tiny_decoder", TinyDecoder(tiny), facts, SIZES)
    assert through_the_executor(component, "iOS16", tmp_path)["image"] > 45


@pytest.mark.parametrize("recipe", ["p8", "p6", "p4", "p2", "p1", "int8"])
def test_smaller_weights_stay_as_near_as_their_bits_allow(tmp_path: Path, recipe: str) -> None:
    """A linear layer of 64x64 normal weights: about 6 dB a bit, and the bytes that were promised."""
    import coremltools as ct

    weight = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float16)
    plain = build_package(tmp_path / "plain.mlpackage", lambda mb, x: mb.linear(x=x, weight=weight, name="out"))
    model = quantize.compress(ct.models.MLModel(str(plain), skip_model_load=True), RECIPES[recipe], "iOS16")
    convert.save(model, tmp_path / "small.mlpackage")
    x = {"x": np.random.default_rng(1).normal(size=(2, 64)).astype(np.float16)}
    wanted = x["x"].astype(np.float32) @ weight.astype(np.float32).T
    found = Program.open(tmp_path / "small.mlpackage").predict(x)["out"]
    bits = RECIPES[recipe].bits
    assert psnr(found, wanted) > min(60, 6 * bits + 5)
    stored = (tmp_path / "small.mlpackage/Data/com.apple.CoreML/weights/weight.bin").stat().st_size
    assert stored < 64 * 64 * bits / 8 + 2**bits * 2 + 1024


def test_grouped_channels_have_palettes_of_their_own(tmp_path: Path) -> None:
    import coremltools as ct

    weight = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float16)
    weight[16:] *= np.float16(0.01)

    def body(mb: Any, x: Any) -> Any:
        return mb.linear(x=x, weight=weight, name="out")

    plain = build_package(tmp_path / "plain.mlpackage", body, "iOS18")
    x = {"x": np.eye(2, 64, dtype=np.float16)}
    errors = {}
    for name in ("p4", "p4g16"):
        model = ct.models.MLModel(str(plain), skip_model_load=True)
        convert.save(quantize.compress(model, RECIPES[name], "iOS18"), tmp_path / f"{name}.mlpackage")
        found = Program.open(tmp_path / f"{name}.mlpackage").predict(x)["out"][:, 16:]
        errors[name] = np.abs(found - weight.T[:2, 16:]).max()
    assert errors["p4g16"] < errors["p4"] / 5


def test_a_mask_of_infinities_survives_a_palette(tmp_path: Path) -> None:
    """k-means would make a NaN of it, and the text encoder's pictures black."""
    import coremltools as ct

    mask = np.where(np.tri(64, dtype=bool), 0, -np.inf).astype(np.float16)
    weight = (np.random.default_rng(0).normal(size=(64, 64)) / 8).astype(np.float16)

    def body(mb: Any, x: Any) -> Any:
        scores = mb.expand_dims(x=mb.linear(x=x, weight=weight), axes=[1])
        return mb.softmax(x=mb.add(x=scores, y=mask), axis=-1, name="out")

    plain = build_package(tmp_path / "plain.mlpackage", body)
    model = ct.models.MLModel(str(plain), skip_model_load=True)
    convert.save(quantize.compress(model, RECIPES["p6"], "iOS16"), tmp_path / "p6.mlpackage")
    x = {"x": np.ones((2, 64), np.float16)}
    found = Program.open(tmp_path / "p6.mlpackage").predict(x)["out"]
    assert np.isfinite(found).all()
    assert np.abs(found - Program.open(plain).predict(x)["out"]).max() < 0.1
    assert (found[:, 0, 1:] == 0).all()


def make_text_encoder(miniature: Path, recipe: str, staging: Path) -> dict[str, Any]:
    """The miniature's text encoder, as `build` makes and measures it; its row."""
    from edge_sd.converters.build import _make_part
    from edge_sd.converters.sources.source import Source
    from edge_sd.converters.targets import form_named
    from edge_sd.text.tokenizer import TextTokenizer

    source = Source.open(miniature)
    tokenizer = TextTokenizer(miniature / "tokenizer", source.facts.max_tokens)
    row, _ = _make_part(
        source, form_named("coreml"), RECIPES[recipe], "text_encoder", staging, {"text_encoder": tokenizer}, {},
        lambda *_: None,
    )  # fmt: skip
    return row


def test_a_component_that_overflows_float16_is_kept_in_float32(
    miniature: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its hidden states are multiplied by 9e5 and divided by it; in float32 all is well."""
    from edge_sd.converters.sources import wrappers as stock

    real = stock.TextEncoder.forward

    def overflowing(self: Any, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        hidden, pooled, *rest = real(self, input_ids)
        return hidden * 3e4 * 30 / 9e5, pooled, *rest

    monkeypatch.setattr(stock.TextEncoder, "forward", overflowing)
    row = make_text_encoder(miniature, "fp16", tmp_path)
    assert row["made"]["precision"] == "float32"
    assert row["parity"]["psnr"] > 100
    graph = tmp_path / "TextEncoder.mlpackage"
    inputs, outputs = ports(graph)
    assert {kind for kind, _ in (*inputs.values(), *outputs.values())} == {FLOAT}
    made = [kind.dtype for each in Package.open(graph).functions["main"].operations for _, kind in each.outputs]
    assert "float32" in made
    assert "float16" not in made
    assert sorted(path.name for path in tmp_path.iterdir()) == ["TextEncoder.mlpackage"]


def test_an_overflow_that_is_met_while_measuring_is_an_error(coreml_bundle: ModelBundle) -> None:
    """Never a figure made of infinities."""
    from edge_sd.converters.form import Made
    from edge_sd.converters.parity import Recording
    from edge_sd.converters.targets import form_named

    made = Made((), "VAEDecoder.mlpackage", (), (), ())
    z = {"latent_sample": np.full((1, 4, 8, 8), 6e4, np.float32)}
    recording = Recording([z], [{"sample": np.zeros((1, 3, 16, 16), np.float32)}])
    with pytest.raises(ConversionError, match=r"VAEDecoder\.mlpackage overflows float16: .* reaches"):
        form_named("coreml").measure("vae_decoder", made, coreml_bundle.root / "coreml-ane-fp16", recording)


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory, shallow: Path) -> ModelBundle:
    """Two sizes, a UNet in two chunks of batch 1, weights of 8 bits, for the GPU."""
    from edge_sd.converters.build import build
    from edge_sd.converters.targets import form_named

    form = form_named("coreml", compute="gpu", sizes=((16, 16), (24, 16)), batch=1, chunks=True)
    folder = tmp_path_factory.mktemp("several")
    # Without its ControlNet: what is done to a UNet is done to the one that takes control, by the same code.
    shutil.copytree(shallow, folder / "source", ignore=shutil.ignore_patterns("controlnet"))
    return build(folder / "source", folder / "b", form, RECIPES["int8"], lambda what, share: None)


SEVERAL = "coreml-gpu-16x16-24x16-b1-chunks-int8"


@pytest.mark.long
def test_several_sizes_are_functions_that_share_their_weights(several: ModelBundle) -> None:
    variant = several.variant(SEVERAL)
    for part, artifact in variant.artifacts.items():
        package = Package.open(several.path(artifact.graph))
        sizes = ["size_16x16", "size_24x16"] if part != "text_encoder" else ["main"]
        assert sorted(package.functions) == sizes
        assert package.default == sizes[0]
        assert artifact.parity is not None
        assert artifact.parity.psnr >= 30
    decoder = Package.open(several.path(variant.artifacts["vae_decoder"].graph))
    shapes = {function: body.inputs["z"].shape for function, body in decoder.functions.items()}
    assert shapes == {"size_16x16": (1, 4, 8, 8), "size_24x16": (1, 4, 8, 12)}
    weights = [
        kind.shape
        for function in decoder.functions.values()
        for operation in function.operations
        for _, kind in operation.outputs
        if operation.kind.startswith("constexpr")
    ]
    stored = several.path(variant.artifacts["vae_decoder"].weights[0]).stat().st_size
    twice = sum(int(np.prod(shape)) for shape in weights)
    # Twice the numbers, and the records and biases beside them, would be more.
    assert stored < twice, "a byte for each number, once for both sizes"
    assert several.verify() == []


@pytest.mark.long
def test_a_unet_in_chunks_is_named_and_fed_as_swift_programs_do(several: ModelBundle) -> None:
    artifact = several.variant(SEVERAL).artifacts["unet"]
    graphs = [several.path(graph) for graph in (artifact.graph, *artifact.chunks)]
    assert [graph.name for graph in graphs] == ["UnetChunk1.mlpackage", "UnetChunk2.mlpackage"]
    first, second = (Package.open(graph).functions["size_24x16"] for graph in graphs)
    assert set(first.inputs) == {"sample", "timestep", "encoder_hidden_states"}
    assert first.inputs["sample"].shape == (1, 4, 8, 12)
    # The second takes what the first gives out, by name, or what the UNet is given.
    assert set(second.inputs) <= {*first.outputs, *first.inputs}
    assert second.outputs == ["noise_pred"]
    one, other = (several.path(each).stat().st_size for each in artifact.weights)
    assert 0.3 < one / (one + other) < 0.7


@pytest.mark.long
def test_the_pipeline_draws_at_each_size(several: ModelBundle, shallow: Path, tmp_path: Path) -> None:
    from edge_sd import Pipeline, Request

    drawn = to_openvino(shallow, tmp_path / "b", "fp32")
    with Pipeline.open(several.root, "coreml-reference") as pipeline:
        for width in (16, 24):
            request = Request("a red apple", seed=7, steps=2, guidance=5.0, width=width, height=16)
            found = pipeline.generate(request).pictures[0].image
            with Pipeline.open(drawn.root, "cpu") as reference:
                wanted = reference.generate(request).pictures[0].image
            assert found.size == (width, 16)
            assert psnr(np.asarray(found), np.asarray(wanted), 255) > 30
        with pytest.raises(InvalidRequest, match="draws 16x16, 24x16 only, not 32x16"):
            pipeline.generate(Request("a red apple", width=32, height=16))


def test_chunks_of_the_neural_engines_form(coreml_bundle: ModelBundle, tmp_path: Path) -> None:
    from edge_sd.bundle.apple_layout import Chain

    package = coreml_bundle.root / "coreml-ane-fp16/Unet.mlpackage"
    whole = Program.open(package)
    chain = Chain([Program.open(piece) for piece in convert.bisect(package, tmp_path)])
    rng = np.random.default_rng(3)
    given = {name: rng.normal(size=kind.shape).astype(np.float16) for name, kind in whole.inputs.items()}
    assert set(chain.inputs) == set(given)
    assert np.array_equal(chain.predict(given)["noise_pred"], whole.predict(given)["noise_pred"])


def test_what_a_controlnet_gives_out_the_unet_beside_it_takes(coreml_bundle: ModelBundle) -> None:
    from edge_sd.bundle.apple_layout import layout_of

    artifacts = coreml_bundle.variant("coreml-ane-fp16").artifacts
    net, unet = artifacts["controlnet"], artifacts["controlled_unet"]
    assert net.graph == "coreml-ane-fp16/controlnet/ControlNet.mlpackage"
    assert unet.graph == "coreml-ane-fp16/ControlledUnet.mlpackage"
    (taken, given), (accepted, out) = (ports(coreml_bundle.path(each.graph)) for each in (net, unet))
    assert taken["controlnet_cond"] == (HALF, [2, 3, 16, 16])
    plain, _ = ports(coreml_bundle.root / "coreml-ane-fp16/Unet.mlpackage")
    assert {name: port for name, port in accepted.items() if name in plain} == plain
    residuals = {name: port for name, port in accepted.items() if name not in plain}
    assert residuals == {name: (HALF, shape) for name, (_, shape) in given.items()}
    assert {kind for kind, _ in given.values()} == {FLOAT}
    assert out == {"noise_pred": (FLOAT, [2, 4, 8, 8])}
    names = list(layout_of("controlnet", (*net.inputs, *net.outputs)).outputs)
    assert names == [f"additional_residual_{n}" for n in range(len(residuals))]


def test_a_component_of_mixed_bits_comes_with_its_recipe(miniature: Path, tmp_path: Path) -> None:
    """Near enough to torch, smaller than at 8 bits, and the file beside it says which weight got how many."""
    from edge_sd.converters.coreml.mixed import BitRecipe

    row = make_text_encoder(miniature, "mixed", tmp_path)
    assert 45 <= row["parity"]["psnr"] < 60
    recipe = BitRecipe.open(tmp_path / "TextEncoder.bits.json")
    assert {"TextEncoder.bits.json", "TextEncoder.mlpackage/Manifest.json"} <= set(row["files"])
    assert len(set(recipe.bits.values())) > 1
    weights = tmp_path / "TextEncoder.mlpackage/Data/com.apple.CoreML/weights/weight.bin"
    assert weights.stat().st_size < next(point.bytes for point in recipe.fixed if point.name == "p8")


def test_a_module_that_cannot_be_converted_is_one_error_with_its_name() -> None:
    class Strange(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.qr(x)[0]

    component = wrappers.AppleComponent("Strange", Strange(), {"x": torch.ones(3, 3)}, ("y",))
    with pytest.raises(ConversionError, match="Strange could not be converted") as caught:
        convert.convert(component, "iOS16")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("wishes", "recipe", "message"),
    [
        ({"compute": "npu"}, "fp16", "unknown compute 'npu'; valid: ane, gpu"),
        ({"target": "iOS15"}, "fp16", "unknown deployment target 'iOS15'; valid: iOS16"),
        ({"compute": "gpu", "target": "macOS13"}, "fp16", r"fused attention .* needs the target iOS18 \(macOS15\)"),
        ({}, "p4g16", r"a palette for each group .* needs the target iOS18 \(macOS15\) or newer, not iOS16"),
        ({"sizes": ((100, 64),)}, "fp16", "width 100 is not a multiple of 16"),
        ({"sizes": ((64, 64), (64, 8)), "target": "iOS18"}, "fp16", "height 8 is not a multiple of 16"),
        ({"sizes": ((64, 64), (64, 96))}, "fp16", r"several sizes in one package needs the target iOS18"),
        ({"batch": 3}, "fp16", "batch 3 is neither 1 nor 2"),
        ({}, "fp32", "coreml-ane has no precision 'fp32'; valid: fp16"),
    ],
)
def test_a_wish_that_cannot_be_is_refused_before_any_work(
    miniature: Path, tmp_path: Path, wishes: dict[str, Any], recipe: str, message: str
) -> None:
    from edge_sd.converters.build import build
    from edge_sd.converters.targets import form_named

    with pytest.raises(InvalidRequest, match=message):
        build(miniature, tmp_path / "b", form_named("coreml", **wishes), RECIPES[recipe], lambda what, share: None)
    assert list(tmp_path.iterdir()) == []


def test_w8a8_keeps_the_activations_of_a_controlnet_and_its_unet(shallow: Path, tmp_path: Path) -> None:
    """Both have 8-bit weights, so that sizes are compared part by part, and what follows lines is not rounded."""
    from edge_sd.converters.parity import TorchComponent, record
    from edge_sd.converters.sources.source import Source
    from edge_sd.converters.sources.wrappers import wrap
    from edge_sd.converters.targets import form_named

    source, form = Source.open(shallow), form_named("coreml", compute="gpu")
    rng = np.random.default_rng(0)
    states = rng.normal(size=(2, source.facts.max_tokens, source.facts.text_width)).astype(np.float32)
    before = {
        "text_encoder": {"last_hidden_state": states},
        "unet": {"latents": rng.normal(size=(1, 4, 8, 8)).astype(np.float32)},
        "vae_decoder": {"picture": rng.uniform(-1, 1, (1, 3, 16, 16)).astype(np.float32)},
    }
    for part in ("controlnet", "controlled_unet"):
        wrapped = wrap(part, source.load(part), source.facts)
        stored = sum(each.numel() for each in wrapped.module.parameters())
        component = TorchComponent(wrapped.module, tuple(wrapped.example), wrapped.outputs)
        before[part] = record(part, component, source.facts, {}, before, (8, 8))
        made = form.convert(wrapped, source, RECIPES["w8a8"], tmp_path, component.recording, lambda *_: None)
        kinds = {each.kind for each in Package.open(tmp_path / made.graph).functions["main"].operations}
        assert "quantize" not in kinds
        assert (tmp_path / made.weights[0]).stat().st_size < 1.5 * stored
        assert form.measure(part, made, tmp_path, component.recording).psnr >= 40
