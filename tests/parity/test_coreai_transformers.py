"""SD 3.5 medium's and FLUX.2 klein's miniatures as Apple's Swift package loads them, and as its runtime computes them.

The contracts are tables as in test_coreai.py, with file and line of apple/coreai-models at 86b363d.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("coreai_torch", reason="coreai-core and coreai-torch need Python 3.11 to 3.14")

import torch
from torch.nn import functional

from edge_sd import InvalidRequest, ModelBundle, Pipeline, Request
from edge_sd.backends.base import Device, LoadRequest
from edge_sd.backends.coreai import CoreAIBackend
from edge_sd.backends.coreai.runtime import Asset, InputPort, Loop, array
from edge_sd.components.rotary import turned
from edge_sd.converters.build import build
from edge_sd.converters.coreai import bundle as apples
from edge_sd.converters.coreai import transformers
from edge_sd.converters.parity import psnr
from edge_sd.converters.recipes import RECIPES, recipe_named
from edge_sd.converters.sources.source import Source
from edge_sd.converters.targets import form_named

from ..transformers import save_klein, save_sd3
from .test_coreai import BUNDLE, DESCRIPTOR, FLOATS, FUNCTION, READING, Loaded, read

PROMPT, SEED, SIDE = "a red apple, glossy style", 3, 64
VARIANT = "coreai-gpu-64x64-fp16"
REFERENCE = Device("coreai-reference", "coreai", "")
SD3 = "CoreAIDiffusionPipeline/Pipelines/SD3Pipeline.swift"
SD3_LOADER = "CoreAIDiffusionPipeline/Pipelines/SD3Pipeline+Resources.swift"
FLUX2 = "CoreAIDiffusionPipeline/Pipelines/Flux2Pipeline.swift"
FLUX2_LOADER = "CoreAIDiffusionPipeline/Pipelines/Flux2Pipeline+Resources.swift"
EXPORTER = "coreai_models/diffusion/pipeline.py"


def converted(source: Path, target: Path, precision: str = "fp16") -> ModelBundle:
    form = form_named("coreai", sizes=((SIDE, SIDE),))
    return build(source, target, form, recipe_named(precision), lambda what, share: None)


@pytest.fixture(scope="module")
def sd3_source(emoji: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SD 3.5 medium's kind with T5; texts of 77 tokens, as Apple's pipeline has them."""
    home = tmp_path_factory.mktemp("sd3")
    shutil.copytree(emoji / "tokenizer", home / "tokenizer")
    config = home / "tokenizer/tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_max_length": 77}))
    return save_sd3(home / "sd35", home, dual=True)


@pytest.fixture(scope="module")
def sd3(sd3_source: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    return converted(sd3_source, tmp_path_factory.mktemp("made") / "sd35")


@pytest.fixture(scope="module")
def klein_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_klein(tmp_path_factory.mktemp("klein") / "klein")


@pytest.fixture(scope="module")
def klein(klein_source: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    """Its text encoder in float32: 28 layers of 512 tokens in float16 take Apple's runtime a minute on a CPU."""
    return converted(klein_source, tmp_path_factory.mktemp("made") / "klein", "fp16,text=fp32")


KLEIN_VARIANT = f"{VARIANT}_text-fp32"


@pytest.fixture(scope="module")
def loaded(sd3: ModelBundle) -> Loaded:
    return read(sd3.root / VARIANT)


@pytest.fixture(scope="module")
def loaded_klein(klein: ModelBundle) -> Loaded:
    return read(klein.root / KLEIN_VARIANT)


def has_block(block: dict[str, Any], **fields: Any) -> bool:
    return block | fields == block


CONTRACT: list[tuple[str, str, Callable[[Loaded], bool]]] = [
    (f"{BUNDLE}:179, BundleKind.swift:14", "version and kind",
     lambda x: (x.metadata["metadata_version"], x.metadata["kind"]) == ("0.2", "diffusion")),
    (f"{DESCRIPTOR}:219", "type", lambda x: x.diffusion["type"] == "stable-diffusion-3"),
    (f"{DESCRIPTOR}:77, PNDMScheduler.swift:19", "prediction_type", lambda x: x.diffusion["prediction_type"] == "flow"),
    (f"{DESCRIPTOR}:81", "scale factors",
     lambda x: has_block(x.diffusion, encoder_scale_factor=1.5305, decoder_scale_factor=1.5305)),
    (f"{SD3}:153", "shift factor", lambda x: x.diffusion["decoder_shift_factor"] == 0.0609),
    (f"{SD3}:31", "image_size", lambda x: x.diffusion["image_size"] == SIDE),
    (f"{DESCRIPTOR}:255", "scheduler: all four fields",
     lambda x: {*x.diffusion["scheduler"]} == {"training_steps", "beta_start", "beta_end", "beta_schedule"}),
    (f"{DESCRIPTOR}:87", "default guidance and steps",
     lambda x: has_block(x.diffusion, default_guidance_scale=4.5, default_steps=40)),
    (f"{DESCRIPTOR}:158, {SD3_LOADER}:19", "assets.transformer", lambda x: x.asset("transformer") == "MMDiT.aimodel"),
    (f"{SD3_LOADER}:22", "assets.text_encoder", lambda x: x.asset("text_encoder") == "TextEncoder.aimodel"),
    (f"{SD3_LOADER}:25", "assets.text_encoder_2", lambda x: x.asset("text_encoder_2") == "TextEncoder2.aimodel"),
    (f"{SD3_LOADER}:28", "assets.vae_decoder", lambda x: x.asset("vae_decoder") == "VAEDecoder.aimodel"),
    (f"{DESCRIPTOR}:196", "T5 is no asset, and has no name that a scan takes for a text encoder",
     lambda x: "T5Encoder" in x.inputs and not any("3" in part for part in x.metadata["assets"])),
    (f"{SD3_LOADER}:42, 57", "tokenizer/", lambda x: (x.folder / "tokenizer/merges.txt").is_file()),
    (f"{SD3_LOADER}:44, {READING}:14", "tokenizer_2/",
     lambda x: type(json.loads((x.folder / "tokenizer_2/vocab.json").read_text())["!"]) is int),
    (f"{FUNCTION}:29", "a function main in all", lambda x: all("main" in names for names in x.functions.values())),
    (f"{SD3}:216", "77 tokens", lambda x: x.inputs["TextEncoder"]["input_ids"].shape == (1, 77)),
    (f"{SD3}:222, 230", "text encoders: one input of int32",
     lambda x: all([*x.inputs[name].values()] == [InputPort("int32", (1, 77))]
                   for name in ("TextEncoder", "TextEncoder2"))),
    (f"{SD3}:239", "text encoders: one output of rank 3, one of rank 2",
     lambda x: all(sorted(len(port.shape) for port in x.outputs[name].values()) == [2, 3]
                   for name in ("TextEncoder", "TextEncoder2"))),
    (f"{FUNCTION}:50, {SD3}:126", "MMDiT: order of inputs",
     lambda x: [*x.inputs["MMDiT"]] == ["sample", "timestep", "encoder_hidden_states", "pooled_projections"]),
    (f"{SD3}:93", "MMDiT: two rows of 16 channels",
     lambda x: x.inputs["MMDiT"]["sample"].shape == (2, 16, SIDE // 8, SIDE // 8)),
    (f"{SD3}:124", "MMDiT: timesteps of float32",
     lambda x: x.inputs["MMDiT"]["timestep"] == InputPort("float32", (2,))),
    (f"{SD3}:106", "MMDiT: 154 rows of text",
     lambda x: x.inputs["MMDiT"]["encoder_hidden_states"].shape == (2, 154, 32)),
    (f"{SD3}:107", "MMDiT: pooled text", lambda x: x.inputs["MMDiT"]["pooled_projections"].shape == (2, 24)),
    (f"{FUNCTION}:136", "MMDiT: one output", lambda x: [*x.outputs["MMDiT"]] == ["noise_pred"]),
    (f"{FUNCTION}:55, 161", "floats",
     lambda x: x.types("MMDiT", "VAEDecoder") | {p.dtype for o in x.outputs.values() for p in o.values()} <= FLOATS),
    (f"{SD3}:155", "VAEDecoder: 16 channels",
     lambda x: x.inputs["VAEDecoder"]["z"].shape == (1, 16, SIDE // 8, SIDE // 8)),
    (f"{SD3}:159", "VAEDecoder: pixels", lambda x: x.outputs["VAEDecoder"]["image"].shape == (1, 3, SIDE, SIDE)),
]  # fmt: skip

KLEINS: list[tuple[str, str, Callable[[Loaded], bool]]] = [
    (f"{DESCRIPTOR}:158", "assets.transformer", lambda x: x.asset("transformer") == "Transformer.aimodel"),
    (f"{DESCRIPTOR}:156, {FLUX2_LOADER}:33", "assets.text_encoder",
     lambda x: x.asset("text_encoder") == "TextEncoder.aimodel"),
    (f"{DESCRIPTOR}:159, {FLUX2_LOADER}:133", "assets.vae_decoder: the mode is full",
     lambda x: x.asset("vae_decoder") == "VAEDecoder.aimodel"),
    (f"{FLUX2_LOADER}:82", "assets.vae_encoder", lambda x: x.asset("vae_encoder") == "VAEEncoder.aimodel"),
    (f"{FLUX2_LOADER}:41, 58", "Transformer.aimodel and VAEDecoder.aimodel by these names",
     lambda x: all((x.folder / f"{name}.aimodel").is_dir() for name in ("Transformer", "VAEDecoder"))),
    (f"{FLUX2_LOADER}:97", "tokenizer/ with tokenizer.json and config.json",
     lambda x: all((x.folder / "tokenizer" / name).is_file() for name in ("tokenizer.json", "config.json"))),
    (f"{EXPORTER}:239", "tokenizer_class as swift-transformers has it",
     lambda x: json.loads((x.folder / "tokenizer/tokenizer_config.json").read_text())["tokenizer_class"]
     == "GPT2Tokenizer"),
    (f"{FLUX2}:341", "the template of a chat", lambda x: any((x.folder / "tokenizer").glob("chat_template*"))),
    (f"{FLUX2}:363", "a token to fill up with",
     lambda x: "<|endoftext|>" in (x.folder / "tokenizer/tokenizer.json").read_text()),
    (f"{FLUX2_LOADER}:143", "statistics: .npy of version 1, float32",
     lambda x: all((raw := (x.folder / f"vae_bn_{name}.npy").read_bytes())[:7] == b"\x93NUMPY\x01"
                   and b"'<f4'" in raw and len(raw) == 10 + raw[8] + 256 * raw[9] + 4 * 16
                   for name in ("mean", "var"))),
    (f"{FLUX2}:375", "TextEncoder: ids, then the mask, of int32",
     lambda x: [*x.inputs["TextEncoder"].items()]
     == [(name, InputPort("int32", (1, 512))) for name in ("input_ids", "attention_mask")]),
    (f"{FLUX2}:384", "TextEncoder: three layers side by side, alone",
     lambda x: {name: port.shape for name, port in x.outputs["TextEncoder"].items()}
     == {"hidden_states": (1, 512, 48)}),
    (f"{FLUX2}:220", "Transformer: order of inputs",
     lambda x: [*x.inputs["Transformer"]] == ["hidden_states", "encoder_hidden_states", "timestep", "guidance",
                                              "rotary_emb_cos", "rotary_emb_sin"]),
    (f"{FLUX2}:221", "Transformer: tokens", lambda x: x.inputs["Transformer"]["hidden_states"].shape == (1, 16, 16)),
    (f"{FLUX2}:223", "Transformer: one timestep, of float32",
     lambda x: x.inputs["Transformer"]["timestep"] == InputPort("float32", (1,))),
    (f"{FLUX2}:215", "Transformer: tables of all tokens, of float32",
     lambda x: {x.inputs["Transformer"][f"rotary_emb_{name}"] for name in ("cos", "sin")}
     == {InputPort("float32", (512 + 16, 16))}),
    (f"{FUNCTION}:136", "Transformer: one output, as large",
     lambda x: {name: port.shape for name, port in x.outputs["Transformer"].items()} == {"output": (1, 16, 16)}),
    (f"{FLUX2}:256", "VAEDecoder: a quarter of the channels, twice the side",
     lambda x: x.inputs["VAEDecoder"]["z"].shape == (1, 4, 8, 8)),
    (f"{FLUX2}:307", "VAEEncoder: pixels", lambda x: x.inputs["VAEEncoder"]["image"].shape == (1, 3, SIDE, SIDE)),
    (f"{FLUX2}:309", "VAEEncoder: the mean alone",
     lambda x: {name: port.shape for name, port in x.outputs["VAEEncoder"].items()} == {"latent_params": (1, 4, 8, 8)}),
]  # fmt: skip


@pytest.mark.parametrize(("where", "what", "check"), CONTRACT, ids=[f"{where} {what}" for where, what, _ in CONTRACT])
def test_apples_loader_of_sd3_finds_what_it_reads(
    loaded: Loaded, where: str, what: str, check: Callable[[Loaded], bool]
) -> None:
    assert check(loaded), f"{what} ({where})"


@pytest.mark.parametrize(("where", "what", "check"), KLEINS, ids=[f"{where} {what}" for where, what, _ in KLEINS])
def test_apples_loader_of_klein_finds_what_it_reads(
    loaded_klein: Loaded, where: str, what: str, check: Callable[[Loaded], bool]
) -> None:
    assert check(loaded_klein), f"{what} ({where})"


def test_the_block_of_klein_as_it_is_published(klein_source: Path, loaded_klein: Loaded) -> None:
    """Of 128 channels; the miniature has fewer, which Apple's pipeline would write beyond (Flux2Pipeline.swift:37)."""
    source = Source.open(klein_source)
    assert "16 latent channels, not 128" in loaded_klein.metadata["user_data"]["no_diffusion_block"]
    latents = replace(source.facts.latents, channels=128, mean=(), std=())
    facts = replace(source.facts, latents=latents)

    def told(**changes: Any) -> dict[str, Any]:
        given = {"size": (1024, 1024), "batch": 1, "template": True, "facts": facts, **changes}
        return apples.metadata(given["facts"], {"Transformer", "VAEDecoder"}, given["size"], given["batch"], "x",
                               apples.rope(source), given["template"])  # fmt: skip

    # Descriptor: 220, 77, 78, 81, 31 to 36; Flux2Pipeline.swift:205 and +Resources.swift:102.
    assert has_block(
        told()["diffusion"], type="flux2", prediction_type="flow_matching", image_size=1024, encoder_scale_factor=1.0,
        batch_norm_eps=1e-4, guidance_embeds=False, rope_axes_dims=[4, 4, 4, 4], rope_theta=2000.0,
        default_guidance_scale=1.0, default_steps=4,
    )  # fmt: skip
    base = replace(facts, defaults=replace(facts.defaults, guidance=4.0))
    for changes, why in (({"facts": base}, "a negative prompt"), ({"size": (64, 32)}, "no squares"),
                         ({"batch": 2}, "2 rows"), ({"template": False}, "without the template")):  # fmt: skip
        assert why in told(**changes)["user_data"]["no_diffusion_block"]


def test_what_apples_pipeline_of_sd3_refuses_or_draws_wrong_is_named(sd3: ModelBundle, loaded: Loaded) -> None:
    assert "text encoders of 16 and 12 numbers" in loaded.metadata["user_data"]["limits"]
    for changes, why in (({"flow_shift": 1.0}, "shifted by 1,"), ({"flow_mu": "linear"}, "by the picture's size,"),
                         ({"num_train_timesteps": 500}, "500 timesteps")):  # fmt: skip
        facts = replace(sd3.facts, schedule=replace(sd3.facts.schedule, **changes))
        found = apples.metadata(facts, {"MMDiT"}, (64, 64), 2, "x")
        assert why in found["user_data"]["no_diffusion_block"]
        assert "diffusion" not in found


def test_components_in_float16_keep_55_db(sd3: ModelBundle, klein: ModelBundle) -> None:
    """By Apple's runtime, as the conversion measured them; T5 among them, whose last layers stay float32."""
    found = {part: each.parity.psnr for part, each in sd3.variant(VARIANT).artifacts.items() if each.parity}
    assert set(found) == {
        "text_encoder",
        "text_encoder_2",
        "text_encoder_3",
        "transformer",
        "vae_decoder",
        "vae_encoder",
    }
    assert min(found.values()) >= 55, found
    found = {part: each.parity.psnr for part, each in klein.variant(KLEIN_VARIANT).artifacts.items() if each.parity}
    assert set(found) == {"text_encoder", "transformer", "vae_decoder", "vae_encoder"}
    assert min(found.values()) >= 55, found
    assert found["text_encoder"] >= 100, "float32"


def drawn(model: Path, device: str, **wishes: Any) -> np.ndarray:
    with Pipeline.open(model, device=device) as pipeline:
        *_, last = pipeline.steps(Request(PROMPT, seed=SEED, steps=4, width=SIDE, height=SIDE, **wishes))
        return pipeline.decode(last.latents)


def test_pictures_are_torchs(sd3: ModelBundle, sd3_source: Path, klein: ModelBundle, klein_source: Path) -> None:
    """Four steps, SD 3.5 with guidance."""
    for made, source in ((sd3, sd3_source), (klein, klein_source)):
        exact = drawn(source, "torch-cpu")
        assert exact.std() > 1
        assert psnr(drawn(made.root, "coreai-reference"), exact, peak=255) >= 40


def test_the_text_as_apples_pipeline_gives_it(sd3: ModelBundle, sd3_source: Path) -> None:
    """Both CLIPs one after the other: main puts them side by side, with zeros for T5, as diffusers does without it."""
    source = Source.open(sd3_source)
    transformer, rng = source.load("transformer"), np.random.default_rng(4)
    given = {
        "sample": rng.standard_normal((2, 16, 8, 8)), "timestep": np.array([700.0, 700.0]),
        "encoder_hidden_states": np.zeros((2, 154, 32)), "pooled_projections": rng.standard_normal((2, 24)),
    }  # fmt: skip
    states = [rng.standard_normal((2, 77, width)) for width in (16, 12)]
    for n, each in enumerate(states):
        given["encoder_hidden_states"][:, 77 * n : 77 * (n + 1), : each.shape[2]] = each
    tensors = {name: torch.from_numpy(value).float() for name, value in given.items()}
    whole = functional.pad(torch.from_numpy(np.concatenate(states, axis=2)).float(), (0, 4, 0, 256))
    with torch.no_grad():
        wanted = transformer(tensors["sample"], whole, tensors["pooled_projections"], tensors["timestep"]).sample
    asset = Asset(sd3.root / VARIANT / "MMDiT.aimodel", Loop())
    ports = asset.functions["main"]
    found = asset.call("main", {name: array(value.astype(ports[name].dtype)) for name, value in given.items()})
    asset.close()
    assert psnr(found["noise_pred"].astype(np.float32), wanted.numpy()) >= 55


def test_texts_filled_up_with_their_end_are_filled_up_as_the_model_was_trained(sd3: ModelBundle) -> None:
    """BPETokenizer.swift:38 fills up with the end; the second encoder of SD 3 was trained with "!"."""
    ids, filled = np.full((1, 77), 5, np.int32), np.full((1, 77), 5, np.int32)
    asset = Asset(sd3.root / VARIANT / "TextEncoder2.aimodel", Loop())
    tokens = json.loads((sd3.root / VARIANT / "tokenizer_2/vocab.json").read_text())
    ids[0, 9:], filled[0, 9], filled[0, 10:] = tokens["<|endoftext|>"], tokens["<|endoftext|>"], tokens["!"]
    found = [asset.call("main", {"input_ids": array(each)}) for each in (ids, filled)]
    asset.close()
    for name, value in found[0].items():
        assert np.array_equal(value, found[1][name])


def test_a_language_model_in_float16(klein_source: Path) -> None:
    """Three layers of Qwen3 with padding, traced in float16: its tables of turns stay exact."""
    from edge_sd.converters.coreai import convert
    from edge_sd.converters.coreai.wrappers import AppleComponent, Function

    model = Source.open(klein_source).load("text_encoder")
    model.config.num_hidden_layers = 3
    ids, mask = torch.arange(24, dtype=torch.int32)[None], (torch.arange(24) < 17).int()[None]
    with torch.no_grad():
        out = model(ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
    wanted = torch.cat([out.hidden_states[1], out.hidden_states[2]], dim=2)[:, :17].numpy()
    read = transformers.LanguageModel(transformers.lowered(model, torch.float16), (1, 2), 24, torch.float16)
    program = convert.convert(
        AppleComponent("TextEncoder", (Function("main", read, {"input_ids": ids, "attention_mask": mask}, ("x",)),))
    )
    folder = klein_source.parent / "TextEncoder.aimodel"
    convert.save(program, folder, "", "")
    asset = Asset(folder, Loop())
    found = asset.call("main", {"input_ids": array(ids.numpy()), "attention_mask": array(mask.numpy())})
    asset.close()
    assert psnr(found["x"].astype(np.float32)[:, :17], wanted) >= 55


def test_tables_of_turns_are_diffusers() -> None:
    from diffusers.models.transformers.transformer_flux2 import Flux2PosEmbed

    rng = np.random.default_rng(0)
    texts, pictures = (rng.integers(0, 1024, (1, n, 4)).astype(np.float32) for n in (512, 64))
    places = torch.from_numpy(np.concatenate([texts[0], pictures[0]]))
    found = turned({"txt_ids": texts, "img_ids": pictures, "timestep": np.ones(1)}, 128)
    assert set(found) == {"timestep", "rotary_emb_cos", "rotary_emb_sin"}
    for name, table in zip(("cos", "sin"), Flux2PosEmbed(2000, [32] * 4)(places), strict=True):
        assert np.abs(found[f"rotary_emb_{name}"] - table.numpy()).max() < 1e-6


def test_what_layers_hold_beyond_float16_stays_float32(sd3_source: Path) -> None:
    """T5's `wo`, whatever its weights are stored in."""
    from edge_sd.converters.coreai.compress import compress

    model = Source.open(sd3_source).load("text_encoder_3")
    transformers.lowered(compress(model, RECIPES["int8"]), torch.float16)
    kinds = {name: each.weight.dtype for name, each in model.named_modules() if name.endswith((".wo", ".wi_0"))}
    assert {kind for name, kind in kinds.items() if name.endswith("wo")} == {torch.float32}
    assert {kind for name, kind in kinds.items() if name.endswith("wi_0")} == {torch.float16}


def test_what_has_no_form_is_refused_in_one_line(
    klein: ModelBundle, klein_source: Path, sd3: ModelBundle, sd3_source: Path, tmp_path: Path
) -> None:
    from PIL import Image

    picture = Image.radial_gradient("L").convert("RGB").resize((64, 64))
    with pytest.raises(InvalidRequest, match="takes 16 tokens of pictures, 16x16 pixels each, not 32"):
        drawn(klein.root, "coreai-reference", references=[picture])
    with (
        Pipeline.open(sd3.root, device="coreai-reference") as pipeline,
        pytest.raises(InvalidRequest, match=r"MMDiT\.aimodel draws 64x64 only, not 96x64"),
    ):
        pipeline.generate(Request(PROMPT, width=96, height=64, steps=1))
    # As many rows as Apple's pipeline gives, which are others: after `blank_rows` was edited.
    few = replace(sd3, facts=replace(sd3.facts, texts=sd3.facts.texts[:2], blank_rows=77))
    shapes = {"hidden_states": (2, 16, 8, 8), "encoder_hidden_states": (2, 154, 32)}
    with pytest.raises(InvalidRequest, match="takes 333 tokens of text, not 154"):
        CoreAIBackend().load(LoadRequest(few, sd3.variant(VARIANT), "transformer", REFERENCE, shapes))
    for source, wishes, why in (
        (sd3_source, {"compute": "ane"}, "arranges for the GPU alone; valid: --compute gpu"),
        (sd3_source, {"sizes": ((72, 64),)}, "width 72 is not a multiple of 16, as this model's transformer needs"),
        (sd3_source, {"sizes": ((400, 64),)}, "width 400 is beyond this model's limit of 384"),
        (klein_source, {"batch": 2}, "one row at a time; valid: --batch 1"),
    ):
        with pytest.raises(InvalidRequest, match=why):
            build(source, tmp_path / "b", form_named("coreai", **wishes), RECIPES["fp16"], lambda what, share: None)
    other = tmp_path / "other"
    shutil.copytree(klein_source, other)
    config = other / "transformer/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"axes_dims_rope": [2, 2, 6, 6]}))
    with pytest.raises(InvalidRequest, match="turns places by axes of"):
        converted(other, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_what_steers_all_of_a_transformer_keeps_8_bits(sd3_source: Path, klein_source: Path) -> None:
    from edge_sd.converters.coreai.compress import Blocks, Stored, compress
    from edge_sd.converters.sources.wrappers import wrap

    for folder, steering in ((sd3_source, {"norm1.linear", "context_embedder"}), (klein_source, {"x_embedder"})):
        source = Source.open(folder)
        module = compress(wrap("transformer", source.load("transformer"), source.facts).module, RECIPES["int4"])
        bits = {
            name: 8 if each.stored.dtype == torch.int8 else 4
            for name, each in module.named_modules()
            if isinstance(each, Stored) and isinstance(each.stored, Blocks)
        }
        found = {name for name, each in bits.items() if each == 8}
        assert set(bits.values()) <= {4, 8}
        assert 4 in bits.values()
        assert not any(".to_q" in name or ".ff" in name for name in found), found
        assert all(bits[name] == 8 for name in bits if name.endswith(tuple(steering)))
