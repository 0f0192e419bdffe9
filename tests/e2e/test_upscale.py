"""`edge-sd upscale`: a model of few pixels harms no photograph."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edge_sd.apps.cli import app

from .test_cli import edge_sd


def photo(path: Path) -> Image.Image:
    ramp = np.add.outer(np.arange(96), np.arange(128)).astype(np.uint8)
    image = Image.fromarray(np.stack([ramp, ramp[::-1], 255 - ramp], axis=2))
    image.save(path)
    return image


def test_a_model_of_few_pixels_resamples_and_says_so(tmp_path: Path) -> None:
    image = photo(tmp_path / "photo.png")
    done = edge_sd("upscale", "photo.png", "--scale", "2.5", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "photo-x2.5.png\n"), done.stderr
    assert "emoji draws 128x128 pixels" in done.stderr
    with Image.open(tmp_path / "photo-x2.5.png") as large:
        assert np.array_equal(large, image.resize((320, 240), Image.Resampling.LANCZOS))
    again = edge_sd("upscale", "photo.png", "-o", "photo-x2.5.png", "--json", cwd=tmp_path)
    assert again.returncode == 2, "a file that is there is not replaced"
    document = json.loads(edge_sd("upscale", "photo.png", "-o", "b.webp", "--json", cwd=tmp_path).stdout)
    assert document["pictures"] == [{"path": "b.webp", "width": 256, "height": 192}]
    assert "Lanczos" in document["notes"][0]


def test_a_strength_draws_and_a_size_far_beyond_the_models_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    image = photo(tmp_path / "photo.png")
    app(["upscale", "photo.png", "--strength", "0.3", "--steps", "4", "--seed", "1"], standalone_mode=False)
    with Image.open("photo-x2.png") as large:
        assert large.size == (256, 192)
        assert not np.array_equal(large, image.resize((256, 192), Image.Resampling.LANCZOS))
    assert "was made for" not in capsys.readouterr().err, "pieces have the model's size"
    app(["generate", "a cat", "--size", "256", "--steps", "1", "--seed", "1"], standalone_mode=False)
    assert "emoji was made for 128x128: at 256x256 shapes may repeat or come apart" in capsys.readouterr().err
