"""Pictures beside the words, of miniatures with IP-Adapters as they are published, beside diffusers."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from edge_sd import InvalidModel, InvalidRequest, ModelBundle, Pipeline, Queue, Request
from edge_sd.apps.cli import app
from edge_sd.backends.openvino import loading
from edge_sd.converters.parity import psnr
from edge_sd.converters.sources.parts import composed
from edge_sd.converters.targets import form_named
from edge_sd.pipeline.control import Control
from edge_sd.pipeline.recorded import read_recorded

from ..adapters import PLUS_TOKENS, SIDE, save_adapter
from ..conftest import convert
from ..families import drawing, picture, save_family

PROMPT, SEED, STEPS = "a red apple", 3, 3


APPLE, TABLE = drawing(64, 96, "#c22"), drawing(101, 72, "#27a")


class Made:
    """A miniature with an adapter: the folder without it, the adapter, the folder with it, what it is converted to."""

    def __init__(self, source: Path, folder: Path, kind: str) -> None:
        self.source, self.kind = source, kind
        self.adapter = save_adapter(source, folder / "published", kind)
        self.folder = folder / "whole"
        with composed(source, folder / "bundle", {"ip_adapter": self.adapter}) as whole:
            shutil.copytree(whole, self.folder)
            self.bundle = convert(Path(whole), folder / "bundle", "fp32")

    def theirs(self, kind: str = "Pipeline", *, shown: Any = APPLE, weight: float = 1.0, **wishes: Any) -> Any:
        """What diffusers draws with the published files."""
        import diffusers
        import torch

        family = "StableDiffusionXL" if self.bundle.facts.family == "sdxl" else "StableDiffusion"
        pipeline = getattr(diffusers, f"{family}{kind}").from_pretrained(self.source)
        pipeline.set_progress_bar_config(disable=True)
        if hasattr(pipeline, "watermark"):
            pipeline.watermark = None
        if shown is not None:
            pipeline.load_ip_adapter(str(self.adapter.parent), subfolder="", weight_name=self.adapter.name)
            pipeline.set_ip_adapter_scale(weight)
            wishes["ip_adapter_image"] = shown
        if lora := wishes.pop("lora", None):
            pipeline.load_lora_weights(lora.parent, weight_name=lora.name)
        generator = torch.Generator().manual_seed(SEED)
        size = {"width": 64, "height": 64} if "image" not in wishes else {}
        return np.asarray(pipeline(PROMPT, num_inference_steps=STEPS, generator=generator, **size, **wishes).images[0])


Models = Callable[[str, str], Made]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, emoji: Path) -> Models:
    """Family and kind -> a miniature with an adapter of that kind."""

    @cache
    def source(family: str) -> Path:
        return save_family(family, tmp_path_factory.mktemp("source") / family, emoji)

    @cache
    def made(family: str, kind: str) -> Made:
        return Made(source(family), tmp_path_factory.mktemp(f"{family}-{kind}"), kind)

    return made


@pytest.fixture(scope="module", autouse=True)
def closing() -> Iterator[None]:
    """Pipelines stay open while there are tests."""
    yield
    for pipeline in OPENED.values():
        pipeline.close()
    OPENED.clear()


OPENED: dict[Path, Pipeline] = {}


def asked(**wishes: Any) -> Request:
    return Request(PROMPT, **{"seed": SEED, "steps": STEPS, "width": 64, "height": 64, **wishes})


def ours(folder: Path, **wishes: Any) -> np.ndarray:
    if folder not in OPENED:
        OPENED[folder] = Pipeline.open(folder)
    return drawn(OPENED[folder], **wishes)


def drawn(pipeline: Pipeline, **wishes: Any) -> np.ndarray:
    return np.asarray(pipeline.generate(asked(**wishes)).pictures[0].image)


def decibels(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    return psnr(found, expected, peak=255)


@pytest.mark.parametrize(("family", "kind"), [("shuffle", "base"), ("sd1", "plus"), ("sdxl", "base")])
def test_pictures_are_attended_to_as_in_diffusers(models: Models, family: str, kind: str) -> None:
    made = models(family, kind)
    facts = made.bundle.facts
    assert (facts.family, facts.image_prompt, facts.image_side) == ("sdxl" if family == "sdxl" else "sd1", kind, SIDE)
    assert facts.image_tokens == (4 if kind == "base" else PLUS_TOKENS)
    plain = made.theirs(shown=None)
    for folder in (made.bundle.root, made.folder):
        without = ours(folder)
        assert decibels(without, plain) >= 40
        assert np.array_equal(ours(folder, references=[APPLE], reference_weight=0), without)
    for weight in (1.0, 0.4):
        expected = made.theirs(weight=weight)
        assert decibels(plain, expected) < 25
        for folder in (made.bundle.root, made.folder):
            assert decibels(ours(folder, references=[APPLE], reference_weight=weight), expected) >= 40


def test_they_go_with_an_image(models: Models) -> None:
    made = models("sd1", "plus")
    wishes = {"image": picture(), "strength": 0.7}
    expected = made.theirs("Img2ImgPipeline", **wishes)
    for folder in (made.bundle.root, made.folder):
        assert decibels(ours(folder, references=[APPLE], **wishes), expected) >= 40
    assert decibels(ours(made.folder, **wishes), expected) < 30


def test_several_are_attended_to_together(models: Models) -> None:
    made = models("shuffle", "base")
    expected = made.theirs(shown=[[APPLE, TABLE]], weight=0.8)
    wishes = {"references": [APPLE, TABLE], "reference_weight": 0.8}
    for folder in (made.bundle.root, made.folder):
        assert decibels(ours(folder, **wishes), expected) >= 40
    alone = ours(made.folder, references=[APPLE], reference_weight=0.8)
    assert decibels(alone, expected) < 35


def test_they_go_without_guidance(models: Models) -> None:
    made = models("shuffle", "base")
    expected = made.theirs(guidance_scale=1.0)
    assert decibels(ours(made.bundle.root, references=[APPLE], guidance=1.0), expected) >= 40


def test_they_go_with_a_controlnet(models: Models) -> None:
    made = models("shuffle", "base")
    image = picture()
    expected = made.theirs("ControlNetPipeline", image=image, width=64, height=64, weight=0.7)
    wishes = {"controls": [Control(image, reading="grey")], "references": [APPLE], "reference_weight": 0.7}
    lines = np.asarray(image, np.float32)
    for folder in (made.bundle.root, made.folder):
        with Pipeline.open(folder) as pipeline:
            run = pipeline.run(asked(**wishes))
            # diffusers follows the picture as it is.
            run.source.lines[:] = lines.transpose(2, 0, 1)[None] / 255
            found = np.asarray(pipeline.draw(run).pictures[0].image)
        assert decibels(found, expected) >= 40


def test_they_go_with_a_lora(models: Models, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    made = models("shuffle", "base")
    random = torch.Generator().manual_seed(5)
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.{}.lora_{}.weight"
    tensors = {}
    for layer in ("to_k", "to_q", "to_out.0"):
        tensors[name.format(layer, "A")] = torch.randn(2, 32, generator=random)
        tensors[name.format(layer, "B")] = torch.randn(32, 2, generator=random) * 0.5
    path = tmp_path / "style.safetensors"
    save_file(tensors, path)
    expected = made.theirs(lora=path)
    for folder in (made.bundle.root, made.folder):
        assert decibels(ours(folder, references=[APPLE], loras={path: 1.0}), expected) >= 40
    assert decibels(ours(made.folder, references=[APPLE]), expected) < 40


def test_what_depends_on_them_alone_is_computed_once(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a large UNet, whose weights also stay in their file."""
    made = models("sd1", "plus")
    expected = ours(made.bundle.root, references=[APPLE])
    monkeypatch.setattr(loading, "LARGE", 0)
    with Pipeline.open(made.bundle.root) as pipeline:
        found = [drawn(pipeline, references=[each]) for each in (APPLE, TABLE)]
    assert decibels(found[0], expected) >= 50
    assert decibels(found[1], ours(made.bundle.root, references=[TABLE])) >= 50


def test_in_low_memory_they_are_the_same(models: Models) -> None:
    folder = models("shuffle", "base").bundle.root
    with Pipeline.open(folder, low_memory=True) as pipeline:
        found = drawn(pipeline, references=[APPLE])
        assert decibels(found, ours(folder, references=[APPLE])) >= 50
        assert pipeline.components["image_encoder"]._component is None, "it is closed once it was used"


def test_one_after_the_other_and_together(models: Models) -> None:
    """What was shown for one picture is no part of the next; pictures without any are drawn together."""
    folder = models("shuffle", "base").bundle.root
    plain, apple, table = ours(folder), ours(folder, references=[APPLE]), ours(folder, references=[TABLE])
    assert decibels(apple, table) < 30
    with Pipeline.open(folder) as pipeline:
        for wishes, expected in (([TABLE], table), ([], plain), ([APPLE], apple), ([TABLE], table)):
            assert np.array_equal(drawn(pipeline, references=wishes), expected)
        assert pipeline.gathers(pipeline.resolve(asked()))
        assert not pipeline.gathers(pipeline.resolve(asked(references=[APPLE])))
        with Queue(pipeline) as queue:
            futures = [queue.submit(asked(seed=seed)) for seed in range(4)]
            several = [np.asarray(each.result().pictures[0].image) for each in futures]
    assert decibels(several[SEED], plain) >= 50


def test_a_variant_is_a_model_by_itself(models: Models) -> None:
    made = models("shuffle", "base")
    facts = ModelBundle.open(made.bundle.root / "openvino-fp32").facts
    assert (facts.image_prompt, facts.image_tokens, facts.image_side) == ("base", 4, SIDE)
    found = ours(made.bundle.root / "openvino-fp32", references=[APPLE])
    # An export does not say that it is to be computed in float32.
    assert decibels(found, ours(made.bundle.root, references=[APPLE])) >= 30


def test_eight_bits_are_near(models: Models, tmp_path: Path) -> None:
    made = models("sd1", "plus")
    bundle = convert(made.folder, tmp_path / "bundle", "int8")
    assert decibels(ours(bundle.root, references=[APPLE]), ours(made.folder, references=[APPLE])) >= 25


def test_their_encoder_is_part_of_the_estimate(models: Models) -> None:
    with Pipeline.open(models("shuffle", "base").bundle.root) as pipeline:

        def cost(part: str, **wishes: Any) -> Any:
            return pipeline.expected(pipeline.run(asked(**wishes))).parts[part].cost

        none, one, two = (cost("text_encoder", references=[APPLE] * n) for n in range(3))
        assert two.draw - one.draw == pytest.approx(one.draw - none.draw)
        assert none.draw < one.draw
        assert none.load < one.load == two.load
        assert cost("unet") == cost("unet", references=[APPLE])
        assert cost("vae_decoder") == cost("vae_decoder", references=[APPLE])


def test_a_picture_records_them_and_is_drawn_again(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands themselves."""
    made = models("sd1", "plus")
    monkeypatch.chdir(tmp_path)

    def edge_sd(*words: str) -> Any:
        return CliRunner().invoke(app, list(words))

    encoder = str(made.adapter.parent / "image_encoder")
    words = (str(made.source), "made", "--precision", "fp32", "--ip-adapter", str(made.adapter))
    done = edge_sd("convert", *words, "--image-encoder", encoder)
    assert done.exit_code == 0, done.output
    assert "image_encoder" in done.stderr
    APPLE.save(tmp_path / "apple.png")
    shown = ("--reference", "apple.png")
    wishes = ("--reference-weight", "0.6", "--size", "64x64", "--seed", "3", "--steps", "3")
    done = edge_sd("generate", PROMPT, *shown, *wishes, "--model", "made", "-o", "a.png")
    assert done.exit_code == 0, done.output
    assert "note: 33% of the reference picture was cut off: the model sees a square" in done.stderr
    with Image.open(tmp_path / "a.png") as drawn:
        expected = ours(made.bundle.root, references=[APPLE], reference_weight=0.6)
        assert np.array_equal(np.asarray(drawn), expected)
    recorded = read_recorded(tmp_path / "a.png").settings
    assert recorded["reference_weight"] == 0.6
    assert [(each["width"], each["height"]) for each in recorded["references"]] == [(SIDE, SIDE)]
    assert edge_sd("generate", "--from", "a.png", *shown, "--model", "made", "-o", "b.png").exit_code == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    done = edge_sd("generate", "--from", "a.png", "--model", "made", "-o", "c.png")
    assert "was made with a reference picture whose pixels hash to" in str(done.exception)
    assert not (tmp_path / "c.png").exists()


def test_what_cannot_be_asked_for_is_said(models: Models, emoji: Path) -> None:
    with Pipeline.open(models("shuffle", "base").folder) as pipeline:
        for wishes, said in (
            ({"references": [APPLE], "reference_weight": 2.5}, "reference weight 2.5 is not a number from 0 to 2"),
            ({"reference_weight": 0.5}, "reference weight needs a reference picture"),
        ):
            with pytest.raises(InvalidRequest, match=said):
                pipeline.resolve(asked(**wishes))
    with Pipeline.open(emoji) as pipeline, pytest.raises(InvalidRequest, match="converted with --ip-adapter FILE"):
        pipeline.resolve(Request(PROMPT, references=[APPLE]))


def test_files_that_are_no_adapter_of_this_model_are_named(models: Models, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    made, other = models("shuffle", "base"), models("sdxl", "base")
    tensors = load_file(made.adapter)
    encoder = made.adapter.parent / "image_encoder"

    def changed(name: str, **changes: Any) -> Path:
        kept = {key: value for key, value in tensors.items() if changes.get(key, value) is not None}
        save_file({**kept, **{key: value for key, value in changes.items() if value is not None}}, tmp_path / name)
        return tmp_path / name

    torch.save(tensors, tmp_path / "pickle.bin")
    (tmp_path / "short.safetensors").write_bytes(made.adapter.read_bytes()[:-5])
    keys, fewer = "ip_adapter.3.to_k_ip.weight", {f"ip_adapter.5.to_{each}_ip.weight": None for each in "kv"}
    narrow = tensors["image_proj.proj.weight"][:, :9].contiguous()
    cases: list[tuple[Path, str]] = [
        (other.adapter, "is for text of width 80; this model has 32"),
        (tmp_path / "pickle.bin", "pickle.bin is a pickle, which can run code when opened; only safetensors"),
        (tmp_path / "short.safetensors", "short.safetensors is damaged"),
        (tmp_path / "none.safetensors", "none.safetensors cannot be read"),
        (changed("full.safetensors", **{"image_proj.proj.3.weight": torch.ones(3)}), "an adapter of the kind full"),
        (changed("face.safetensors", **{"image_proj.proj.2.weight": torch.ones(3)}), "is a FaceID adapter"),
        (changed("lora.safetensors", **{"ip_adapter.0.to_q_lora.down.weight": torch.ones(2, 2)}), "it holds ip_adap"),
        (changed("few.safetensors", **fewer), "is for another UNet, of 3 cross-attentions; this one has"),
        (changed("thin.safetensors", **{keys: torch.ones(3, 32)}), r"ip_adapter.3.to_k_ip.weight is \[3, 32\], not"),
        (changed("nan.safetensors", **{keys: tensors[keys] * float("nan")}), "holds NaN or infinity"),
        (changed("clip.safetensors", **{"image_proj.proj.weight": narrow}), "for a CLIP that makes 9 numbers .* makes"),
        (made.source / "unet/diffusion_pytorch_model.safetensors", "is no IP-Adapter .base or plus.: it holds"),
    ]  # fmt: skip
    for path, said in cases:
        with pytest.raises((InvalidModel, InvalidRequest), match=said):
            build_with(made.source, tmp_path / "bundle", ip_adapter=path, image_encoder=encoder)
        assert not (tmp_path / "bundle").exists()
    shutil.copy(made.adapter, tmp_path / "alone.safetensors")
    for parts, said in (
        ({"ip_adapter": tmp_path / "alone.safetensors"}, "alone.safetensors needs the CLIP .*--image-encoder FOLDER"),
        ({"image_encoder": encoder}, "goes with an IP-Adapter: give --ip-adapter FILE"),
        ({"ip_adapter": made.adapter, "image_encoder": made.source / "text_encoder"}, "is CLIPTextModel; a image_enc"),
    ):
        with pytest.raises((InvalidModel, InvalidRequest), match=said):
            build_with(made.source, tmp_path / "bundle", **parts)


def build_with(source: Path, target: Path, **parts: Any) -> None:
    with composed(source, target, parts) as whole:
        convert(Path(whole), target, "fp32")


def test_packages_of_apples_and_bundles_of_other_weights_are_refused(models: Models, tmp_path: Path) -> None:
    from edge_sd.converters.build import build
    from edge_sd.converters.recipes import RECIPES

    made = models("shuffle", "base")
    for form in ("coreml", "coreai"):
        with pytest.raises(InvalidRequest, match=f"has an IP-Adapter, of which {form} has no form yet"):
            build(made.folder, tmp_path / "apple", form_named(form), RECIPES["fp16"], lambda what, share: None)
    with pytest.raises(InvalidRequest, match="holds another model"):
        convert(made.source, made.bundle.root, "fp16")
