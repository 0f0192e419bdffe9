"""The recipe of the embedded model, run from artwork to a published model on a handful of made-up drawings."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from edge_sd import ModelBundle, Pipeline, Request
from edge_sd.converters.training import autoencoder, data, diffusion, publish, unet
from edge_sd.converters.training.loop import Budget, Run, learning_rate
from edge_sd.errors import InvalidRequest

LABELS = ["red apple", "rocket", "cat face"]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A prepared folder of three concepts: coloured discs in place of artwork."""
    monkeypatch.setattr(data, "core_vocabulary", lambda: LABELS)
    monkeypatch.setattr("edge_sd.converters.training.card.core_vocabulary", lambda: LABELS)
    monkeypatch.setattr(unet, "VARIANTS", 2)
    folder = tmp_path / "work"
    folder.mkdir()
    rows, columns = np.indices((data.SIZE, data.SIZE)) - data.SIZE / 2
    pixels = np.zeros((20, 4, data.SIZE, data.SIZE, 4), np.uint8)
    for n in range(20):
        pixels[n, :, rows**2 + columns**2 < (20 + 2 * n) ** 2] = (10 * n, 255 - 10 * n, 80, 255)
    np.savez_compressed(folder / "artwork.npz", pixels=pixels)
    labels = [*LABELS, *(f"thing {n}" for n in range(17))]
    concepts = [{"label": label, "group": 0, "keywords": ["thing"]} for label in labels]
    (folder / "artwork.json").write_text(json.dumps({"concepts": concepts, "words": ["thing", "apples"]}))
    return folder


@pytest.mark.slow
def test_the_recipe_runs_from_artwork_to_a_picture(work: Path, tmp_path: Path) -> None:
    autoencoder.train(work, Budget(steps=2))
    unet.train(work, Budget(steps=2))
    autoencoder.train_decoder(work, Budget(steps=2))
    publish.publish(work, tmp_path / "model")
    bundle = ModelBundle.open(tmp_path / "model")
    assert bundle.verify() == []
    assert bundle.variants["openvino-fp16"].artifacts["unet"].weights[0] == "unet/diffusion_pytorch_model.safetensors"
    constants = tmp_path / "model/openvino-fp16/unet/openvino_model.constants"
    assert constants.stat().st_size < 10_000, "the weights stand in the safetensors file alone"
    with Pipeline.open(tmp_path / "model") as pipeline:
        assert pipeline.generate(Request("red apple", seed=0, steps=2)).pictures[0].image.size == (128, 128)
    card = (tmp_path / "model/README.md").read_text()
    assert "| 2 |" in card
    assert (tmp_path / "model/held_out.txt").read_text().count("\n") == sum(
        data.is_held_out(label, style) for label in LABELS for style in data.STYLES
    )


def test_a_stage_before_its_turn_names_the_one_that_is_missing(work: Path, tmp_path: Path) -> None:
    for stage in (unet.train, autoencoder.train_decoder):
        with pytest.raises(InvalidRequest, match="edge-sd train autoencoder"):
            stage(work, Budget(steps=1))
    with pytest.raises(InvalidRequest, match="edge-sd train data"):
        autoencoder.train(tmp_path / "empty", Budget(steps=1))


def test_forward_diffusion_is_diffusers() -> None:
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(**diffusion.SCHEDULE)
    generator = torch.Generator().manual_seed(0)
    x_0, eps = (torch.randn(5, 4, 16, 16, generator=generator) for _ in range(2))
    t = torch.tensor([0, 10, 500, 900, 999])
    x_t, v_t = diffusion.diffuse(x_0, eps, diffusion.alphas_cumprod()[t])
    torch.testing.assert_close(x_t, theirs.add_noise(x_0, eps, t), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(v_t, theirs.get_velocity(x_0, eps, t), atol=1e-5, rtol=1e-4)


def test_the_published_model_has_the_recipes_schedule(emoji: Path) -> None:
    schedule = ModelBundle.open(emoji).facts.schedule
    np.testing.assert_allclose(schedule.compute_alphas_cumprod(), diffusion.alphas_cumprod(), rtol=1e-4)
    assert schedule.prediction_type == diffusion.SCHEDULE["prediction_type"]


def test_one_pair_in_ten_is_held_out_and_the_file_lists_them(emoji: Path) -> None:
    pairs = [(label, style) for label in data.core_vocabulary() for style in data.STYLES]
    held_out = [pair for pair in pairs if data.is_held_out(*pair)]
    assert 0.07 < len(held_out) / len(pairs) < 0.13
    listed = [tuple(line.rsplit(", ", 1)) for line in (emoji / "held_out.txt").read_text("utf-8").splitlines()]
    assert listed == held_out


def test_a_shifted_drawing_leaves_nothing_on_the_other_side() -> None:
    drawing = np.full((data.SIZE, data.SIZE, 4), 255, np.uint8)
    for dy, dx in ((5, 0), (-5, 3), (0, -7), (0, 0)):
        moved = data._shifted(drawing, dy, dx)
        assert moved.sum() == 255 * 4 * (data.SIZE - abs(dy)) * (data.SIZE - abs(dx))


def test_a_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    def run(steps: int) -> Run:
        torch.manual_seed(0)
        module = torch.nn.Linear(3, 1)
        trained = Run("line", tmp_path, {"line": module}, Budget(steps=steps), peak=0.1)
        x = torch.arange(12.0).reshape(4, 3) / 12
        trained.train(lambda step: ((module(x) - 1).square().mean(), {}), every=10, report=lambda line: None)
        return trained

    first = run(20)
    again = run(400)
    assert (first.step, again.step) == (20, 400)
    assert again.log[0]["step"] == 10
    assert again.log[-1]["loss"] < again.log[0]["loss"] / 10
    again.use_average()
    assert torch.isfinite(again.modules["line"].weight).all()


def test_the_learning_rate_warms_up_and_falls() -> None:
    rates = [learning_rate(1.0, step, step / 1000, warmup=100) for step in range(1001)]
    assert rates[0] == pytest.approx(0.01, rel=0.1)
    assert max(rates) <= 1
    assert rates[-1] == pytest.approx(0.01)
    with pytest.raises(ValueError, match="either"):
        Budget()
