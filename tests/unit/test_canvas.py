"""Pictures to start from: what is kept, what is drawn anew, and what can't be."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from edge_sd import Request
from edge_sd.errors import InvalidRequest
from edge_sd.images.canvas import Canvas, content_hash, cropped, make_canvas, proportioned
from edge_sd.images.lines import read_lines
from edge_sd.images.opening import open_mask, open_picture
from edge_sd.pipeline.control import Control
from edge_sd.sampling.samplers import SAMPLERS

from .test_pipeline import pipeline


def picture(width: int = 64, height: int = 64, seed: int = 0) -> Image.Image:
    """Blocks of 8x8 pixels, which the fake autoencoder keeps exactly."""
    blocks = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return Image.fromarray(blocks.repeat(8, 0).repeat(8, 1))


def half(width: int = 64, height: int = 64) -> Image.Image:
    """A mask of the right half."""
    mask = Image.new("L", (width, height))
    mask.paste(255, (width // 2, 0, width, height))
    return mask


def draw(request: Request) -> np.ndarray:
    with pipeline() as opened:
        return np.asarray(opened.generate(request).pictures[0].image).astype(float)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_outside_the_mask_the_picture_stays_byte_for_byte(sampler: str) -> None:
    before = picture()
    request = Request("a cat", seed=1, steps=6, sampler=sampler, image=before, mask=half(), mask_blur=0)
    after = draw(request)
    assert np.array_equal(after[:, :32], np.asarray(before)[:, :32])
    assert np.abs(after[:, 32:] - np.asarray(before)[:, 32:]).mean() > 10


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_latents_outside_the_mask_are_the_pictures_own(sampler: str) -> None:
    """Not only pasted over: the model sees them, at every level, so that what it draws goes with them."""
    before = picture()
    request = Request("a cat", seed=1, steps=8, sampler=sampler, image=before, mask=half())
    with pipeline() as opened:
        *_, last = opened.steps(request)
        decoded = opened.decode(last.latents).astype(float)
    # PNDM's, TCD's and DEIS' schedules end above sigma 0: what is left of the noise is in the picture, as in diffusers.
    left = 24 if sampler in ("pndm", "tcd", "deis") else 3
    assert np.abs(decoded[:, :32] - np.asarray(before)[:, :32]).max() < left


def test_less_strength_keeps_more_of_the_picture() -> None:
    """Of a model that knows its own picture exactly only the noise it started with can keep anything; steps show it."""
    before = picture()
    with pipeline() as opened:
        for strength, steps in ((0.25, 2), (0.5, 4), (1.0, 8)):
            request = Request("a cat", seed=1, steps=8, sampler="euler", image=before, strength=strength)
            assert len(list(opened.steps(request))) == steps


def test_the_same_seed_gives_the_same_picture_and_counts_go_on() -> None:
    request = {"seed": 5, "steps": 4, "image": picture(), "strength": 0.5}
    with pipeline() as opened:
        two = opened.generate(Request("a cat", count=2, **request)).pictures
    assert np.array_equal(draw(Request("a cat", **request)), np.asarray(two[0].image))
    assert not np.array_equal(np.asarray(two[0].image), np.asarray(two[1].image))


def test_settings_name_the_picture_by_its_pixels_and_no_path(tmp_path: Path) -> None:
    picture().save(tmp_path / "secret-name.png")
    with pipeline() as opened:
        drawn = opened.generate(Request("a cat", image=tmp_path / "secret-name.png", mask=half())).pictures[0]
    assert drawn.settings.image == content_hash(picture())
    assert (drawn.settings.strength, drawn.settings.mask_blur) == (1.0, 0.5)
    written = drawn.save(tmp_path / "out.png").read_bytes()
    assert b"secret-name" not in written
    assert b"Denoising strength: 1" in written


@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from([64, 512, 1024]))
def test_a_size_of_the_same_proportions_fits_the_model(width: int, height: int, side: int) -> None:
    w, h = proportioned((width, height), side * side, 8, 2048)
    assert w % 8 == h % 8 == 0
    assert 8 <= w <= 2048
    assert 8 <= h <= 2048
    assert w * h <= side**2
    # Rounding each side alone, down so that they fit, crops more or draws less.
    scale = side / (width * height) ** 0.5
    alone = (int(width * scale / 8) * 8, int(height * scale / 8) * 8)
    if min(alone) >= 8 and max(alone) <= 2048:
        costs = [cropped((width, height), pair) + (1 - pair[0] * pair[1] / side**2) / 10 for pair in ((w, h), alone)]
        assert costs[0] <= costs[1] + 1e-9


@pytest.mark.parametrize(
    ("size", "side", "multiple", "expected"),
    [
        ((640, 480), 128, 32, (128, 96)),
        ((480, 640), 128, 32, (96, 128)),
        ((4032, 3024), 512, 64, (512, 384)),
        ((1920, 1080), 512, 64, (576, 320)),
        ((1000, 1000), 512, 64, (512, 512)),
        ((1500, 1000), 1024, 64, (1152, 768)),
        ((5000, 100), 128, 32, (512, 32)),
    ],
)
def test_photographs_lose_little(size: tuple[int, int], side: int, multiple: int, expected: tuple[int, int]) -> None:
    assert proportioned(size, side * side, multiple, 2048 if side > 128 else 512) == expected


@given(st.integers(0, 63), st.integers(0, 63))
def test_every_pixel_of_the_mask_has_its_latent(row: int, column: int) -> None:
    mask = np.zeros((64, 64), bool)
    mask[row, column] = True
    latents = Canvas(np.zeros((64, 64, 3), np.uint8), mask).latent_mask(8)
    assert latents is not None
    assert latents.sum() == 1
    assert latents[0, 0, row // 8, column // 8] == 1


def test_transparent_pixels_are_white_and_turned_pictures_are_turned_back(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (10, 20, 30, 0)).save(tmp_path / "clear.png")
    assert open_picture(tmp_path / "clear.png", "image").getpixel((0, 0)) == (255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (16, 8)).save(tmp_path / "turned.jpg", exif=exif)
    assert open_picture(tmp_path / "turned.jpg", "image").size == (8, 16)


@pytest.mark.parametrize(
    ("wish", "told"),
    [
        ({"strength": 0.5}, "strength needs an image"),
        ({"mask": half()}, "mask needs an image"),
        ({"image": picture(), "mask_blur": 2}, "mask_blur needs a mask"),
        ({"image": picture(), "strength": 0}, "strength 0 is not"),
        ({"image": picture(), "strength": float("nan")}, "strength nan is not"),
        ({"image": picture(), "mask": half(32, 64)}, "mask has 32x64 pixels, the image 64x64"),
        ({"image": picture(), "mask": Image.new("L", (64, 64))}, "all black"),
        ({"image": picture(), "steps": 4, "strength": 0.2}, "less than one"),
        ({"image": "no/such.png"}, "cannot be read"),
        ({"image": __file__}, "no picture that can be read"),
    ],
)
def test_what_cannot_be_is_told(wish: dict[str, object], told: str) -> None:
    with pipeline() as opened, pytest.raises(InvalidRequest, match=told):
        opened.generate(Request("a cat", **wish))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wish", "told"),
    [
        ({}, "has no controlnet, which a control picture needs"),
        ({"weight": 3}, "control weight 3 is not"),
        ({"start": 0.5, "end": 0.5}, "no part of the steps"),
        ({"reading": "depth"}, "unknown control reading 'depth'; valid: auto, canny"),
    ],
)
def test_control_that_cannot_be_is_told(wish: dict[str, object], told: str) -> None:
    with pipeline() as opened, pytest.raises(InvalidRequest, match=told):
        opened.generate(Request("a cat", controls=[Control(picture(), **wish)]))  # type: ignore[arg-type]


def test_a_drawing_is_read_by_its_background_and_a_picture_by_its_edges() -> None:
    strokes = Image.new("L", (64, 64), 255)
    strokes.paste(0, (20, 20, 44, 23))
    on_paper = read_lines(strokes.convert("RGB"), 64, 64)
    assert on_paper.shape == (1, 3, 64, 64)
    assert on_paper[0, 0, 21, 30] == 1
    assert on_paper.mean() < 0.05
    on_black = read_lines(ImageOps.invert(strokes).convert("RGB"), 64, 64)
    assert np.array_equal(on_paper, on_black)
    photograph = read_lines(picture(), 64, 64)
    assert set(np.unique(photograph)) == {0, 1}
    assert 0.05 < photograph.mean() < 0.5


def test_a_model_without_an_encoder_says_so(tmp_path: Path) -> None:
    with pipeline() as opened:
        del opened.bundle.variants["fake"].artifacts["vae_encoder"]
        with pytest.raises(InvalidRequest, match="has no vae_encoder"):
            opened.generate(Request("a cat", image=picture()))


def test_a_canvas_is_cut_to_the_proportions_asked_for() -> None:
    canvas = make_canvas(picture(128, 64), half(128, 64), 64, 64)
    assert canvas.pixels.shape == (64, 64, 3)
    assert canvas.mask is not None
    assert canvas.mask[:, 32:].all()
    assert not canvas.mask[:, :32].any()


def test_depth_maps_of_16_bits_keep_their_steps(tmp_path: Path) -> None:
    depth = np.linspace(0, 65535, 64 * 64, dtype=np.uint16).reshape(64, 64)
    Image.fromarray(depth).save(tmp_path / "depth.png")
    found = np.asarray(open_picture(tmp_path / "depth.png", "control picture"))
    assert np.abs(found[..., 0] - depth / 257).max() <= 0.5
    assert np.array_equal(np.asarray(open_picture(Image.fromarray(depth), "image")), found)


def test_a_mask_painted_on_a_transparent_layer_is_what_was_painted(tmp_path: Path) -> None:
    layer = Image.new("RGBA", (64, 64), (255, 255, 255, 0))
    layer.paste((255, 255, 255, 255), (32, 0, 64, 64))
    layer.save(tmp_path / "mask.png")
    assert np.array_equal(np.asarray(open_mask(tmp_path / "mask.png").convert("L")), np.asarray(half()))
    wishes = {"image": picture(), "seed": 1, "steps": 2}
    assert np.array_equal(draw(Request("a cat", mask=layer, **wishes)), draw(Request("a cat", mask=half(), **wishes)))


def test_a_photograph_comes_back_at_its_own_size_and_the_rest_stays() -> None:
    photo, mask = picture(640, 480), Image.new("L", (640, 480))
    mask.paste(255, (200, 100, 400, 300))
    with pipeline() as opened:
        result = opened.generate(Request("a cat", image=photo, mask=mask, seed=1, steps=2, mask_blur=0.0))
    found = np.asarray(result.pictures[0].image)
    assert found.shape == (480, 640, 3)
    outside = np.asarray(mask) == 0
    assert np.array_equal(found[outside], np.asarray(photo)[outside])
    assert not np.array_equal(found[~outside], np.asarray(photo)[~outside])
    assert any("enlarged" in note for note in result.notes)


def test_what_is_cut_of_an_image_is_told() -> None:
    with pipeline() as opened:
        result = opened.generate(Request("a cat", image=picture(128, 64), width=64, height=64, seed=1, steps=2))
        assert "50% of the image was cut to fit 64x64" in result.notes
        result = opened.generate(Request("a cat", image=picture(128, 96), seed=1, steps=2))
        assert not any("cut" in note for note in result.notes)


@pytest.mark.parametrize("kind", ["BMP", "GIF", "TIFF", "PPM", "ICO"])
def test_other_formats_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    picture().save(tmp_path / "x.png", kind)
    with pytest.raises(InvalidRequest, match="PNG, JPEG, WEBP"):
        open_picture(tmp_path / "x.png", "image")


def test_a_small_file_of_many_pixels_is_refused_before_they_are_decoded(tmp_path: Path) -> None:
    Image.new("1", (13_300, 13_300)).save(tmp_path / "bomb.png")
    tracemalloc.start()
    with pytest.raises(InvalidRequest, match="at most 50 MP"):
        open_picture(tmp_path / "bomb.png", "image")
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()
