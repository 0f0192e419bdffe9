"""What the recipe shows besides single drawings, and the judges of it: colours, scenes, captions, pixels."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from PIL import Image

from edge_sd.converters.training import autoencoder, composition, data, lessons, measures, recolour, scenes, widen
from edge_sd.converters.training.data import SIZE, Artwork
from edge_sd.converters.training.scenes import Scene

LABELS = ["red apple", "rocket", "cat face", "house"]
PAINT = {"red apple": (200, 40, 30), "rocket": (60, 120, 220), "cat face": (250, 200, 60), "house": (150, 90, 50)}
RNG = np.random.default_rng


def disc(colour: tuple[int, int, int], radius: int = 50) -> NDArray[np.uint8]:
    rows, columns = np.indices((SIZE, SIZE)) - SIZE / 2 + 0.5
    rgba = np.zeros((SIZE, SIZE, 4), np.uint8)
    rgba[rows**2 + columns**2 < radius**2] = (*colour, 255)
    return rgba


@pytest.fixture
def artwork(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Artwork:
    """Four concepts, discs of a colour each."""
    for module in (lessons, scenes, composition):
        monkeypatch.setattr(module, "core_vocabulary", lambda: LABELS)
    monkeypatch.setattr(data, "core_vocabulary", lambda: LABELS)
    pixels = np.stack([np.stack([disc(PAINT[label])] * 4) for label in LABELS])
    np.savez_compressed(tmp_path / "artwork.npz", pixels=pixels)
    concepts = [{"label": label, "group": 0, "keywords": []} for label in LABELS]
    (tmp_path / "artwork.json").write_text(json.dumps({"concepts": concepts, "words": []}))
    return Artwork(tmp_path)


def as_pixels(x: NDArray[np.float32]) -> NDArray[np.uint8]:
    return ((x.transpose(1, 2, 0) + 1) * 127.5).round().astype(np.uint8)


@pytest.mark.parametrize("colour", recolour.COLOURS)
def test_a_drawing_takes_the_colour_and_keeps_its_shading_and_its_outline(colour: str) -> None:
    drawing = disc((200, 60, 50))
    drawing[:, 80:, :3] = drawing[:, 80:, :3] // 2  # a side in the shade
    drawing[60:68, 20:30, :3] = 0  # an eye
    painted = recolour.recoloured(drawing, colour)
    assert painted is not None
    np.testing.assert_array_equal(painted[..., 3], drawing[..., 3])
    np.testing.assert_array_equal(painted[60:68, 20:30, :3], 0)
    paper = np.where(painted[..., 3:] > 0, painted[..., :3], 120).astype(np.uint8)
    inside = (painted[..., 3] > 0) & (np.arange(SIZE) < 78)
    found = recolour.dominant_colour(paper, inside)
    wanted = recolour.lab_of(np.array([[recolour.COLOURS[colour]]], np.uint8))[0, 0]
    assert measures.difference(found, wanted) < 12
    light, dark = (recolour.lab_of(paper)[64, x, 0] for x in (50, 90))
    assert light > dark


def test_a_drawing_of_many_colours_is_not_named_by_one() -> None:
    drawing = disc((200, 60, 50))
    for n, paint in enumerate([(50, 200, 60), (60, 60, 220), (240, 220, 60)]):
        drawing[:, 40 + 20 * n : 60 + 20 * n, :3] = paint
    assert recolour.recoloured(drawing, "blue") is None


def test_colour_differences_are_those_of_sharma_et_al() -> None:
    """Pairs 1, 7 and 17 of the supplementary data to Sharma, Wu & Dalal 2005."""
    for a, b, wanted in (
        ((50, 2.6772, -79.7751), (50, 0, -82.7485), 2.0425),
        ((50, 0, 0), (50, -1, 2), 2.3669),
        ((50, 2.5, 0), (73, 25, -18), 27.1492),
    ):
        assert measures.difference(np.array(a), np.array(b)) == pytest.approx(wanted, abs=1e-4)


def test_things_are_counted_and_a_mottled_background_is_measured(artwork: Artwork) -> None:
    for count in (1, 2, 3, 4):
        scene = scenes.several("rocket", count, "3d", "white", RNG(0))
        rgb = as_pixels(scene.picture(artwork))
        assert len(measures.things(rgb)) == count
        assert measures.colour_name(rgb) == "blue"
        assert measures.unevenness(rgb, np.zeros((SIZE, SIZE), bool)) == 0
    noisy = (rgb - RNG(0).uniform(0, 12, rgb.shape)).clip(0, 255).astype(np.uint8)
    assert 1 < measures.unevenness(noisy, np.zeros((SIZE, SIZE), bool)) < 5
    same = np.repeat(np.eye(8, dtype=np.float32)[:1], 3, 0)
    assert measures.variety(same) == 0
    assert measures.variety(np.eye(8, dtype=np.float32)) == pytest.approx(2**0.5)


def test_two_things_stand_as_the_caption_says(artwork: Artwork) -> None:
    colours = {"cat": (250, 200, 60), "rocket": (60, 120, 220)}
    for seed in range(40):
        rng = RNG(seed)
        scene = scenes.two("cat face", "rocket", "3d", "white", rng)
        words = scene.words(rng)
        rgb = as_pixels(scene.picture(artwork)).astype(int)
        place = {name: np.argwhere(np.abs(rgb - colour).sum(2) < 12).mean(0) for name, colour in colours.items()}
        cat_first = words.index("cat") < words.index("rocket")
        a, b = (place["cat"], place["rocket"])[:: 1 if cat_first else -1]
        if " left " in words:
            assert a[1] < b[1] - 20
        elif " right " in words:
            assert a[1] > b[1] + 20
        elif "above" in words or "over" in words:
            assert a[0] < b[0] - 20
        elif "below" in words or "under" in words:
            assert a[0] > b[0] + 20
        else:
            assert " and " in words
        sizes = [thing.side for thing in scene.things]
        assert ("small" in words) == ("large" in words) == (sizes[0] != sizes[1])


def test_what_is_held_out_is_in_no_lesson(artwork: Artwork) -> None:
    plan = lessons.plan(artwork, 0)
    captions = [lesson.caption(artwork, RNG(n)) for n, lesson in enumerate(plan)]
    assert 0.05 < sum(not caption for caption in captions) / len(captions) < 0.15
    for lesson in plan:
        if isinstance(lesson, Scene):
            named = [thing.label for thing in lesson.things]
            assert not any(data.is_held_out(label, lesson.style) for label in named)
            assert len(set(named)) == 1 or not scenes.is_held_out_pair(*named)
            assert len(set(named)) > 1 or not scenes.is_held_out_count(len(named), named[0])
        else:
            assert not data.is_held_out(lesson.label, lesson.style)
            assert not (lesson.adjective and recolour.is_held_out_colour(lesson.adjective, lesson.label))
            assert not (lesson.adjective and recolour.has_colour_word(lesson.label))
    assert lessons.plan(artwork, 0) == plan
    for kind, asked in composition.questions(artwork, 5).items():
        assert all(question.kind == kind for question in asked)


def test_the_lessons_pictures_are_whole(artwork: Artwork) -> None:
    plain = lessons.Shown("rocket", "3d", "white", (255, 255, 255))
    np.testing.assert_allclose(plain.picture(artwork), artwork.picture("rocket", "3d", (255, 255, 255)), atol=0.02)
    small = lessons.Shown("rocket", "3d", "white", (255, 255, 255), scale=0.5, shift=(-20, 10), adjective="red")
    rgb = as_pixels(small.picture(artwork))
    where = np.argwhere(measures.foreground(rgb))
    assert where.mean(0) == pytest.approx([SIZE / 2 - 20, SIZE / 2 + 10], abs=1.5)
    assert np.ptp(where[:, 0]) == pytest.approx(50, abs=3)
    assert measures.colour_name(rgb) == "red"
    assert "red rocket" in small.caption(artwork, RNG(3))
    for ground in scenes.GROUNDS:
        picture = scenes.several("rocket", 1, "3d", ground, RNG(0)).picture(artwork)
        assert picture.min() >= -1.001
        assert picture.max() <= 1.001


def test_the_judge_of_crops_finds_what_stands_where(artwork: Artwork) -> None:
    class Painter(composition.Namer):
        """Names a crop by the colour of its middle: an oracle for these four discs."""

        def __init__(self) -> None: ...

        def knows(self, crops: list[Image.Image], label: str, among: int = 3) -> list[bool]:
            return [np.abs(np.asarray(c)[64, 64].astype(int) - PAINT[label]).sum() < 30 for c in crops]

    for kind in ("two things", "positions"):
        scene = scenes.two("cat face", "house", "3d", "white", RNG(0), "above", ("", ""))
        image = Image.fromarray(as_pixels(scene.picture(artwork)))
        upside_down = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(composition, "is_held_out_pair", lambda a, b: (a, b) == ("cat face", "house"))
            patch.setattr(composition, "UNSURE", ())
            question = composition.pair_questions(kind, 1, np.random.default_rng(1))[0]
        order = "above" if "above" in question.prompt or kind == "two things" else "beside"
        if order == "beside":
            image, upside_down = (each.rotate(90) for each in (image, upside_down))
        assert question.is_answered(image, Painter())
        assert question.is_answered(upside_down, Painter()) == (kind == "two things")
        one = Image.fromarray(as_pixels(scenes.several("house", 1, "3d", "white", RNG(0)).picture(artwork)))
        assert not question.is_answered(one, Painter())


def test_names_in_other_languages_mean_the_concepts_of_their_english_ones() -> None:
    names = {
        "de": {"cat": "Katze", "cat face": "Katzengesicht", "house": "Haus", "home": "Haus", "zebra": "Zebra"},
        "fr": {"cat": "chat", "rocket": "fusée"},
    }
    assert sorted(widen.foreign_names(names, LABELS)) == [
        ("de", "haus", "house"), ("de", "katze", "cat face"), ("de", "katzengesicht", "cat face"),
        ("fr", "chat", "cat face"), ("fr", "fusée", "rocket"),
    ]  # fmt: skip
    assert widen.foreign_names({"de": {"cat": "Ding", "house": "Ding"}}, LABELS) == [], "of two concepts, of none"


def test_an_autoencoder_at_another_scale_draws_the_same() -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(16,), norm_num_groups=4, scaling_factor=0.44696)
    x = torch.rand(2, 3, 16, 16) * 2 - 1

    def seen() -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            q, factor = vae.encode(x).latent_dist, vae.config.scaling_factor
            scaled = (q.mean * factor, q.std * factor, vae.decode(q.mean).sample)
            return (*scaled, autoencoder.kl_from_normal(q, factor))

    before = seen()
    autoencoder.rescale(vae, autoencoder.SCALE)
    assert vae.config.scaling_factor == 0.18215
    for now, then in zip(seen(), before, strict=True):
        torch.testing.assert_close(now, then, atol=1e-5, rtol=1e-4)
    q = vae.encode(x).latent_dist
    torch.testing.assert_close(autoencoder.kl_from_normal(q, 1.0), q.kl().mean() / q.mean[0].numel())
