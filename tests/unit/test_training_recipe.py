"""The recipe's sums and words, without a training: codes, diffusion, consistency, WordNet, captions, rates."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from edge_sd.converters.training import (
    codes,
    controlnet,
    coordinates,
    data,
    diffusion,
    distill,
    widen,
    wordnet,
)
from edge_sd.converters.training.loop import Budget, learning_rate


def test_pca_is_numpy_s_and_no_code_of_its_size_is_nearer() -> None:
    x = torch.randn(60, 12, generator=torch.Generator().manual_seed(0)) @ torch.randn(12, 12)
    wide = torch.randn(10, 50, generator=torch.Generator().manual_seed(1))
    for rows, count in ((x, 4), (wide, 6)):
        u, s, vt = np.linalg.svd((rows - rows.mean(0)).numpy(), full_matrices=False)
        best = rows.mean(0).numpy() + (u[:, :count] * s[:count]) @ vt[:count]
        torch.testing.assert_close(
            codes.PCA.fit(rows, count).round_trip(rows), torch.from_numpy(best), atol=1e-3, rtol=0
        )
    pictures_ = torch.randn(2, 3, 16, 24)
    torch.testing.assert_close(codes.from_patches(codes.to_patches(pictures_), pictures_.shape), pictures_)


def test_the_consistency_function_is_the_picture_at_t_0_and_lcm_schedulers() -> None:
    from diffusers import LCMScheduler

    theirs = LCMScheduler(**diffusion.SCHEDULE)
    generator = torch.Generator().manual_seed(0)
    x, v = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    abar = diffusion.alphas_cumprod()
    torch.testing.assert_close(distill.consistency(x, torch.tensor([0, 0]), v, abar), x)
    theirs.set_timesteps(4)
    for time in theirs.timesteps:
        ours = distill.consistency(x, time.expand(2), v, abar)
        torch.testing.assert_close(ours, theirs.step(v, time, x, return_dict=False)[1], atol=1e-4, rtol=1e-3)
        theirs._step_index = None


def test_words_are_of_the_kind_that_wordnet_says(tmp_path: Path) -> None:
    """Lines in the form of wndb(5WN): a beagle is a hound is a dog; a bank is no dog; "dog" itself needs no lesson."""
    lines = ["  1 This software", ""]
    senses = [
        ("dog domestic_dog", 5, [], "a member of the genus Canis"), ("hound", 5, [0], "a dog for hunting"),
        ("beagle", 5, [1], "a small hound; \"her beagle barked\""),
        ("bank", 17, [], "sloping land"), ("wienerwurst dog", 13, [], "a sausage"),
    ]  # fmt: skip
    places, text_ = [], "  1 This software\n"
    for words, category, parents, said in senses:
        places.append(len(text_))
        names = words.split()
        pointers = "".join(f" @ {places[parent]:08d} n 0000" for parent in parents)
        listed = " ".join(f"{name} 0" for name in names)
        text_ += (
            f"{places[-1]:08d} {category:02d} n {len(names):02x} {listed} {len(parents):03d}{pointers} | {said}  \n"
        )
    (tmp_path / "data.noun").write_text(text_)
    index = {"dog": [0, 4], "domestic_dog": [0], "hound": [1], "beagle": [2], "bank": [3], "wienerwurst": [4]}
    lines = [f"{word} n {len(rows)} 1 @ {len(rows)} 1 {' '.join(f'{places[n]:08d}' for n in rows)}  "
             for word, rows in index.items()]  # fmt: skip
    (tmp_path / "index.noun").write_text("  1 This software\n" + "\n".join(lines) + "\n")
    words = wordnet.read(tmp_path)
    assert words.senses[places[2]] == wordnet.Sense(("beagle",), 5, (places[1],), "a small hound")
    kinds = words.kinds([("dog", "dog face"), ("hot wienerwurst", "hot dog")])
    assert kinds == dict.fromkeys(("dog", "domestic dog", "hound", "beagle"), "dog face") | {"wienerwurst": "hot dog"}
    assert words.singular("dogs") == "dog"
    assert words.singular("dragon") is None


@pytest.mark.parametrize(
    ("word", "many"),
    [
        ("cherry", "cherries"),
        ("key", "keys"),
        ("bus", "buses"),
        ("cactus", "cacti"),
        ("snowman", "snowmen"),
        ("box", "boxes"),
    ],
)
def test_plurals_follow_english(word: str, many: str) -> None:
    assert wordnet.plural(word) == many


def test_a_drawing_is_turned_whole() -> None:
    """A disc in the middle stays a disc of nearly its size, whichever way it is turned; nothing lends it a colour."""
    rows, columns = np.indices((data.SIZE, data.SIZE)) - data.SIZE / 2 + 0.5
    disc = np.zeros((data.SIZE, data.SIZE, 4), np.uint8)
    disc[rows**2 + columns**2 < 30**2] = (200, 40, 90, 255)
    for seed in range(8):
        moved = controlnet.turned(disc, np.random.default_rng(seed))
        area = (moved[..., 3] > 127).sum() / (np.pi * 30**2)
        assert 1 / 1.5**2 - 0.05 < area < 1 / 0.9**2 + 0.05
        inside = moved[moved[..., 3] > 250][:, :3]
        assert np.abs(inside.astype(int) - (200, 40, 90)).max() <= 2


def test_states_of_captions_are_compared_place_by_place() -> None:
    states = torch.arange(8.0)[:, None].repeat(1, 3)
    known, new = torch.tensor([9, 1, 2, 5, 0, 0, 0, 0]), torch.tensor([9, 1, 3, 4, 5, 0, 0, 0])
    assert float(widen.difference(states, states, known, known)) == 0
    moved = states.clone()
    moved[4:] = states[3:7]  # the same states, one place later
    moved[2:4] = torch.tensor([[1.0], [3.0]]).repeat(1, 3)  # two tokens with the mean of the one they stand for
    assert float(widen.difference(moved, states, new, known)) == 0
    moved[5] += 1
    assert float(widen.difference(moved, states, new, known)) > 0


def test_common_words_come_more_often_but_not_alone() -> None:
    """By the square root: a hundred times as common is ten times as often; what nobody writes still comes."""
    dog, beagle, none = widen.commonness(["dog", "beagle", "xyzzyplugh qwrt"])
    assert dog > 10 * beagle > 10 * none > 0


def test_forward_diffusion_is_diffusers() -> None:
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(**diffusion.SCHEDULE)
    generator = torch.Generator().manual_seed(0)
    x_0, eps = (torch.randn(5, 4, 16, 16, generator=generator) for _ in range(2))
    t = torch.tensor([0, 10, 500, 900, 999])
    x_t, v_t = diffusion.diffuse(x_0, eps, diffusion.alphas_cumprod()[t])
    torch.testing.assert_close(x_t, theirs.add_noise(x_0, eps, t), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(v_t, theirs.get_velocity(x_0, eps, t), atol=1e-5, rtol=1e-4)


def test_a_network_of_v_answers_in_epsilon_on_another_schedule() -> None:
    """An oracle that knows the one picture there is, asked for v at noise levels between its own timesteps."""
    from diffusers import DDIMScheduler

    own, sd1 = (DDIMScheduler(**coordinates.schedule(kind)).alphas_cumprod for kind in ("v_prediction", "epsilon"))
    x_0, eps = torch.randn(2, 6, 4, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()

    def oracle(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        between = np.interp(t.numpy(), np.arange(1000), torch.log(own / (1 - own)).double().numpy())
        level = torch.from_numpy(1 / (1 + np.exp(-between))).float().view(-1, 1, 1, 1)
        noise = (x_t - level.sqrt() * x_0) / (1 - level).sqrt()
        return level.sqrt() * noise - (1 - level).sqrt() * x_0

    t = torch.tensor([0, 1, 250, 500, 900, 999])
    x_t = DDIMScheduler(**coordinates.schedule("epsilon")).add_noise(x_0, eps, t)
    found = coordinates.as_epsilon(oracle, own, sd1)(x_t, t)
    torch.testing.assert_close(found, eps, atol=2e-2, rtol=0)


def test_a_shifted_drawing_leaves_nothing_on_the_other_side() -> None:
    drawing = np.full((data.SIZE, data.SIZE, 4), 255, np.uint8)
    for dy, dx in ((5, 0), (-5, 3), (0, -7), (0, 0)):
        moved = data._shifted(drawing, dy, dx)
        assert moved.sum() == 255 * 4 * (data.SIZE - abs(dy)) * (data.SIZE - abs(dx))


def test_the_learning_rate_warms_up_and_falls() -> None:
    rates = [learning_rate(1.0, step, step / 1000, warmup=100) for step in range(1001)]
    assert rates[0] == pytest.approx(0.01, rel=0.1)
    assert max(rates) <= 1
    assert rates[-1] == pytest.approx(0.01)
    with pytest.raises(ValueError, match="either"):
        Budget()
