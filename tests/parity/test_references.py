"""Pictures that a prompt refers to, of a miniature of FLUX.2 klein, beside diffusers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edge_sd import InvalidRequest, ModelBundle, Pipeline, Queue, Request
from edge_sd.converters.parity import psnr
from edge_sd.images.references import shown
from edge_sd.pipeline import references
from edge_sd.pipeline.recorded import read_recorded

from ..conftest import convert
from ..families import drawing
from ..transformers import diffusers_klein, save_klein

PROMPT, SEED, STEPS = "put the apple on the table", 3, 3


APPLE, TABLE = drawing(64, 96, "#c22"), drawing(101, 72, "#27a")
WISHES: list[dict[str, Any]] = [
    {"references": [APPLE]},
    {"references": [APPLE, TABLE], "width": 80, "height": 64},
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_klein(tmp_path_factory.mktemp("source") / "klein")


@pytest.fixture(scope="module")
def bundle(source: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    return convert(source, tmp_path_factory.mktemp("bundle") / "klein", "fp32")


def theirs(pipeline: Any, wishes: dict[str, Any], guidance: float = 4.0) -> np.ndarray:
    import torch

    found = pipeline(
        image=list(wishes["references"]), prompt=PROMPT, num_inference_steps=STEPS, guidance_scale=guidance,
        generator=torch.Generator().manual_seed(SEED), height=wishes.get("height"), width=wishes.get("width"),
    )  # fmt: skip
    return np.asarray(found.images[0])


def asked(wishes: dict[str, Any]) -> Request:
    return Request(PROMPT, seed=SEED, steps=STEPS, **wishes)


def ours(folder: Path, wishes: dict[str, Any], **options: Any) -> np.ndarray:
    with Pipeline.open(folder, **options) as pipeline:
        return np.asarray(pipeline.generate(asked(wishes)).pictures[0].image)


@pytest.mark.parametrize("size", [(64, 64), (75, 100), (512, 64), (1300, 1000), (1000, 4000)])
def test_a_picture_is_prepared_as_in_diffusers(size: tuple[int, int]) -> None:
    from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor

    image = drawing(*size, "#c22")
    their = Flux2ImageProcessor(vae_scale_factor=16)
    scaled = their._resize_if_exceeds_area(their.check_image_input(image))
    width, height = (side // 16 * 16 for side in scaled.size)
    expected = their.preprocess(scaled, height=height, width=width, resize_mode="crop")
    found, note = shown(image, 16, "the reference picture")
    assert np.array_equal(np.asarray(found), ((expected[0].numpy().transpose(1, 2, 0) + 1) * 127.5).round())
    assert bool(note) == (scaled.size != found.size)


@pytest.mark.parametrize("wishes", WISHES, ids=["one", "two"])
def test_what_is_referred_to_is_drawn_as_in_diffusers(
    source: Path, bundle: ModelBundle, wishes: dict[str, Any]
) -> None:
    expected = theirs(diffusers_klein(source), wishes)
    for folder in (source, bundle.root):
        found = ours(folder, wishes)
        assert found.shape == expected.shape
        assert psnr(found, expected, peak=255) >= 40
    # With random weights a picture is much like another.
    without = {"width": expected.shape[1], "height": expected.shape[0]}
    assert psnr(ours(source, without), expected, peak=255) < 40


def test_a_base_model_is_guided_with_them(tmp_path: Path) -> None:
    base = save_klein(tmp_path / "base", distilled=False)
    assert psnr(ours(base, WISHES[1]), theirs(diffusers_klein(base), WISHES[1]), peak=255) >= 40


def test_the_order_and_each_of_them_count(source: Path) -> None:
    expected, size = ours(source, WISHES[1]), {"width": 80, "height": 64}
    for changed in ([TABLE, APPLE], [APPLE, drawing(101, 72, "#fff")], [APPLE]):
        assert not np.array_equal(ours(source, {"references": changed, **size}), expected)


def test_the_same_ones_are_encoded_once(bundle: ModelBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = []
    encode_mean = references.encode_mean

    def counted(encoder: Any, pixels: np.ndarray) -> np.ndarray:
        encoded.append(pixels.shape)
        return encode_mean(encoder, pixels)

    monkeypatch.setattr(references, "encode_mean", counted)
    with Pipeline.open(bundle.root) as pipeline:
        first, second = pipeline.generate(asked({**WISHES[1], "count": 2})).pictures
        assert encoded == [(96, 64, 3), (64, 96, 3)]
        assert not np.array_equal(np.asarray(first.image), np.asarray(second.image))
        swapped = pipeline.generate(asked({**WISHES[1], "references": [TABLE, APPLE]})).pictures[0]
        assert len(encoded) == 2
        plain = pipeline.generate(asked({"width": 80, "height": 64})).pictures[0]
    assert not np.array_equal(np.asarray(swapped.image), np.asarray(first.image))
    assert np.array_equal(np.asarray(plain.image), ours(bundle.root, {"width": 80, "height": 64})), "nothing is left"


def test_in_low_memory_they_are_the_same(bundle: ModelBundle) -> None:
    found = ours(bundle.root, WISHES[1], low_memory=True)
    assert psnr(found, ours(bundle.root, WISHES[1]), peak=255) >= 50


def test_requests_that_differ_in_them_are_not_drawn_together(bundle: ModelBundle) -> None:
    wishes = [{"references": [each], "width": 64, "height": 64} for each in (APPLE, drawing(64, 96, "#fff"))]
    with Pipeline.open(bundle.root) as pipeline:
        assert pipeline.gathers(pipeline.resolve(asked({"width": 64, "height": 64})))
        with Queue(pipeline) as queue:
            futures = [queue.submit(asked(each)) for each in wishes]
            found = [np.asarray(each.result().pictures[0].image) for each in futures]
    for picture, each in zip(found, wishes, strict=True):
        assert np.array_equal(picture, ours(bundle.root, each))


def test_their_tokens_are_part_of_the_estimate(source: Path) -> None:
    size = {"width": 80, "height": 64}
    with Pipeline.open(source) as pipeline:

        def cost(part: str, **wishes: Any) -> float:
            return pipeline.expected(pipeline.run(asked({**size, **wishes}))).parts[part].cost.draw

        own, seen = 80 * 64, 64 * 96 + 96 * 64
        more = cost("transformer", references=[APPLE, TABLE]) / cost("transformer")
        assert more == pytest.approx((own + seen) / own)
        assert cost("vae_decoder", references=[APPLE]) > cost("vae_decoder")
        alone, twice = (cost("vae_decoder", count=count) for count in (1, 2))
        given = [cost("vae_decoder", references=[APPLE], count=count) for count in (1, 2)]
        assert given[0] - alone == pytest.approx(given[1] - twice), "encoded once, however many are drawn"


def test_a_picture_records_them_and_is_drawn_again(bundle: ModelBundle, tmp_path: Path) -> None:
    """The command itself, in a process of its own."""

    def edge_sd(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "edge_sd", "generate", *words, "--model", str(bundle.root)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ})

    APPLE.save(tmp_path / "apple.png")
    TABLE.save(tmp_path / "table.png")
    both = ("--reference", "apple.png", "--reference", "table.png")
    done = edge_sd(PROMPT, *both, "--size", "80x64", "--seed", "3", "--steps", "3", "-o", "a.png")
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "a.png") as drawn:
        assert np.array_equal(np.asarray(drawn), ours(bundle.root, WISHES[1]))
    assert "note: 16% of reference picture 2 was cut off: its sides are multiples of 16" in done.stderr
    recorded = read_recorded(tmp_path / "a.png").settings["references"]
    assert [(each["width"], each["height"]) for each in recorded] == [(64, 96), (96, 64)]

    assert edge_sd("--from", "a.png", *both, "-o", "b.png").returncode == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    hashes = ", ".join(each["image"] for each in recorded)
    for words, said in (
        ((), f"a.png was made with 2 reference pictures whose pixels hash to {hashes}; give them again"),
        (both[:2], "give them again"),
        ((*both[2:], *both[:2]), f"made with another reference picture: its pixels hash to {hashes}"),
    ):
        done = edge_sd("--from", "a.png", *words, "-o", "c.png")
        assert done.returncode == 2
        assert said in done.stderr
    assert not (tmp_path / "c.png").exists()


def test_what_cannot_be_referred_to_is_said(source: Path, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"references": [APPLE.crop((0, 0, 63, 96))]}, "the reference picture has 63x96 pixels; at least 64 a side"),
        ({"references": [APPLE, Image.new("RGB", (64, 520))]}, "reference picture 2 has 64x520 pixels; its longer"),
        ({"references": [tmp_path / "no.png"]}, "reference picture .* cannot be read"),
        ({"references": [tmp_path / "text.png"]}, "is no picture that can be read"),
        ({"references": [APPLE], "tile": 64}, "reference pictures go with no tile"),
        ({"references": [APPLE], "reference_weight": 0.5}, "takes no reference weight: the prompt says what becomes"),
        ({"image": APPLE}, "takes no image to go on from, but reference pictures"),
    ]
    with Pipeline.open(source) as pipeline:
        for wishes, said in cases:
            with pytest.raises(InvalidRequest, match=said):
                pipeline.resolve(asked(wishes))
        # One that is longer than the model draws is drawn in its proportions.
        long = pipeline.resolve(asked({"references": [Image.new("RGB", (2896, 362))]}))
        assert long.width <= 2048
        assert long.width / long.height == pytest.approx(8, rel=0.05)
