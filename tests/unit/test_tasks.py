"""What else is done with a picture: parts of it, more of it, variations, colours, tiles, grids."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edge_sd import Request
from edge_sd.errors import InvalidRequest
from edge_sd.images.canvas import grain, grown
from edge_sd.images.grids import animation, grid
from edge_sd.pipeline.recorded import read_recorded
from edge_sd.sampling.noise import TorchNoise, slerp

from .test_canvas import half, picture
from .test_pipeline import pipeline


def drawn(**wishes: Any) -> np.ndarray:
    with pipeline() as opened:
        wishes = {"prompt": "a cat", "seed": 1, "steps": 4, **wishes}
        return np.asarray(opened.generate(Request(**wishes)).pictures[0].image)


def spot(width: int, height: int, box: tuple[int, int, int, int]) -> Image.Image:
    mask = Image.new("L", (width, height))
    mask.paste(255, box)
    return mask


def test_only_the_mask_and_its_padding_are_drawn_and_at_the_models_size() -> None:
    before, mask = picture(256, 192), spot(256, 192, (100, 80, 116, 96))
    after = drawn(image=before, mask=mask, mask_padding=8, mask_blur=0)
    inside = np.asarray(mask) > 0
    assert after.shape == (192, 256, 3)
    assert np.array_equal(after[~inside], np.asarray(before)[~inside])
    assert np.abs(after[inside].astype(int) - np.asarray(before)[inside]).mean() > 10
    # Drawn at 64x64 of a 32x32 part, it has finer detail than the same at the whole's size.
    with pipeline() as opened:
        settings = opened.resolve(Request("a cat", image=before, mask=mask, mask_padding=8))
    assert (settings.width, settings.height) == (64, 64)


@pytest.mark.parametrize("box", [(0, 0, 8, 8), (250, 100, 256, 192), (3, 90, 253, 100)])
def test_a_box_grows_to_the_shape_of_the_drawing_and_stays_in_the_picture(box: tuple[int, int, int, int]) -> None:
    left, top, right, bottom = grown(box, 2.0, (256, 192))
    assert 0 <= left <= box[0]
    assert 0 <= top <= box[1]
    assert box[2] <= right <= 256
    assert box[3] <= bottom <= 192
    assert right - left == min(256, 2 * (bottom - top))


@pytest.mark.parametrize("sides", [(0, 40, 0, 0), (16, 0, 0, 24), (8, 8, 8, 8)])
def test_an_extended_picture_is_so_many_pixels_larger_and_the_old_part_stays(sides: tuple[int, ...]) -> None:
    left, right, top, bottom = sides
    before = picture()
    after = drawn(image=before, extend=sides, mask_blur=0)
    assert after.shape == (64 + top + bottom, 64 + left + right, 3)
    assert np.array_equal(after[top : top + 64, left : left + 64], np.asarray(before))
    new = np.ones(after.shape[:2], bool)
    new[top : top + 64, left : left + 64] = False
    assert after[new].std() > 5, "something is drawn there"


def test_an_extension_is_made_again_from_its_file(tmp_path: Path) -> None:
    with pipeline() as opened:
        request = Request("a cat", seed=1, steps=3, image=picture(), extend=(0, 16, 0, 0), mask_blur=1.0)
        first = opened.generate(request).pictures[0]
        again = read_recorded(first.save(tmp_path / "x.png")).request(image=picture())
        assert np.array_equal(np.asarray(opened.generate(again).pictures[0].image), np.asarray(first.image))


def test_variations_go_from_one_seed_to_the_other() -> None:
    first, second = drawn(seed=5, steps=2), drawn(seed=9, steps=2)
    for strength, other in ((0.0, None), (1e-6, 9), (1.0, 9)):
        found = drawn(seed=5, steps=2, variation_strength=strength, variation_seed=other)
        assert np.abs(found.astype(int) - (second if strength == 1 else first)).max() <= 1
    halfway = drawn(seed=5, steps=2, variation_strength=0.5, variation_seed=9)
    assert not np.array_equal(halfway, first)
    assert not np.array_equal(halfway, second)


def test_a_count_of_variations_keeps_the_first_seed() -> None:
    with pipeline() as opened:
        request = Request("a cat", seed=5, steps=2, variation_strength=0.3, variation_seed=9, count=3)
        pictures = opened.generate(request).pictures
    assert [(each.settings.seed, each.settings.variation_seed) for each in pictures] == [(5, 9), (5, 10), (5, 11)]
    assert Request(**asdict(pictures[1].settings)).variation_seed == 10


def test_slerp_is_automatic1111s() -> None:
    torch = pytest.importorskip("torch")
    low, high = (torch.from_numpy(TorchNoise(seed).normal((4, 8, 6))) for seed in (1, 2))
    angle = torch.acos((torch.nn.functional.normalize(low, dim=1) * torch.nn.functional.normalize(high, dim=1)).sum(1))
    weights = [(torch.sin(share * angle) / torch.sin(angle)).unsqueeze(1) for share in (0.7, 0.3)]
    expected = weights[0] * low + weights[1] * high
    found = slerp(0.3, low[None].numpy(), high[None].numpy())
    np.testing.assert_allclose(found[0], expected.numpy(), atol=1e-5)
    assert slerp(0.5, found, found) == pytest.approx(found)


def test_between_two_prompts_lies_what_goes_from_one_to_the_other() -> None:
    """The middle of two contexts, bound as one; a longer prompt at either end is heard whole."""
    first, last = drawn(steps=2), drawn(prompt="a dog " * 30, steps=2)
    ends = [drawn(steps=2, toward="a dog " * 30, toward_share=share) for share in (0.0, 0.5, 1.0)]
    assert np.abs(ends[0].astype(int) - first).mean() < np.abs(ends[1].astype(int) - first).mean()
    assert np.abs(ends[2].astype(int) - last).max() <= 1
    assert not np.array_equal(ends[1], ends[0])


def test_a_coloured_picture_has_the_light_and_dark_of_the_grey_one() -> None:
    grey = picture().convert("L").convert("RGB")
    after = drawn(image=grey, strength=0.8, steps=10, colour=True)
    luma = np.asarray(Image.fromarray(after).convert("L")).astype(int)
    error = np.abs(luma - np.asarray(grey.convert("L")))
    # Colours outside of RGB are cut off; the rest keeps its luma to rounding.
    assert np.median(error) <= 1
    assert np.ptp(after.astype(int), axis=2).mean() > 5, "there are colours"


def test_a_grid_has_all_pictures_and_is_made_again_by_its_file(tmp_path: Path) -> None:
    with pipeline() as opened:
        result = opened.generate(Request("a cat", seed=3, steps=2, count=5))
        path = result.save_grid(tmp_path / "grid.png")
        request = read_recorded(path).request()
        assert (request.seed, request.count) == (3, 5)
    with Image.open(path) as sheet:
        assert sheet.size == (192, 128)
        pixels = np.asarray(sheet)
    for n, (row, column) in enumerate([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]):
        part = pixels[row * 64 : row * 64 + 64, column * 64 : column * 64 + 64]
        assert np.array_equal(part, np.asarray(result.pictures[n].image))
    assert (pixels[64:, 128:] == 255).all()


def test_an_animation_goes_there_and_back(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), (n * 80, 0, 0)) for n in range(4)]
    (tmp_path / "x.gif").write_bytes(animation(frames, 2.0))
    with Image.open(tmp_path / "x.gif") as image:
        assert image.n_frames == 6
        assert image.info["duration"] == 500
    with pytest.raises(InvalidRequest, match="too many for one file"):
        grid([Image.new("L", (30_000, 10))] * 3, columns=3)


@pytest.mark.parametrize(("side", "found"), [(64, 16), (128, 32), (512, 64), (1024, 64), (100, 8)])
def test_sizes_that_are_chosen_are_multiples_that_a_unet_can_halve(side: int, found: int) -> None:
    assert grain(side, 8) == found


@pytest.mark.parametrize(
    ("wishes", "told"),
    [
        ({"mask_padding": 8}, "mask_padding needs a mask"),
        ({"extend": (0, 8, 0, 0)}, "extend needs an image"),
        ({"image": picture(), "extend": (0, 0, 0, 0)}, "extend 0,0,0,0 is not left,right,top,bottom"),
        ({"image": picture(), "extend": (1, 2, 3)}, "extend 1,2,3 is not"),
        ({"image": picture(), "extend": (-8, 0, 0, 0)}, "whole numbers to 4096"),
        ({"image": picture(), "mask": half(), "mask_padding": -1}, "mask padding -1"),
        ({"colour": True}, "colour needs an image"),
        ({"variation_seed": 3}, "needs a variation strength"),
        ({"variation_strength": 1.5}, "variation strength 1.5"),
        ({"variation_strength": 0.1, "variation_seed": -3}, "variation seed -3"),
        ({"tile": 100}, "tile 100 is not a multiple of 8"),
        ({"vae_tile": 32}, "vae_tile 32 is not"),
    ],
)
def test_what_makes_no_sense_is_told(wishes: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidRequest, match=told):
        Request("a cat", **wishes)
