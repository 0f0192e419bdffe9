"""LPIPS: computed where both files lie on the disk, beside torchmetrics; elsewhere a reason, and never a download."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edge_sd.apps.compare import perceptual
from edge_sd.apps.compare.score import LESS_IS_BETTER, METRICS, summary

CHANNELS = (64, 192, 384, 256, 256)


@pytest.fixture
def alexnet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Sequential:
    """torchvision's AlexNet.features with random weights, saved where torch.hub keeps what it fetched."""
    torch.manual_seed(0)
    features = nn.Sequential(
        nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(),
        nn.MaxPool2d(3, 2), nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(), nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2),
    )  # fmt: skip
    folder = tmp_path / "hub/checkpoints"
    folder.mkdir(parents=True)
    torch.save({f"features.{name}": each for name, each in features.state_dict().items()}, folder / perceptual.NETWORK)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return features


@pytest.fixture
def linear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Random linear weights in a package of the name of one that brings them."""
    path = tmp_path / "packages/lpips/weights/v0.1/alex.pth"
    path.parent.mkdir(parents=True)
    torch.manual_seed(1)
    torch.save({f"lin{n}.model.1.weight": torch.rand(1, width, 1, 1) for n, width in enumerate(CHANNELS)}, path)
    (tmp_path / "packages/lpips/__init__.py").write_text("raise RuntimeError('it is found, and never imported')")
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    monkeypatch.setattr(perceptual, "LINEAR", {"lpips": perceptual.LINEAR["lpips"]})
    return path


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (72, 96, 3), np.uint8)


def test_it_is_torchmetrics(alexnet: nn.Sequential, monkeypatch: pytest.MonkeyPatch) -> None:
    lpips = pytest.importorskip("torchmetrics.functional.image.lpips")
    monkeypatch.setattr(lpips, "_get_tv_model_features", lambda net, pretrained: alexnet)
    monkeypatch.setattr(perceptual, "LINEAR", {"torchmetrics": perceptual.LINEAR["torchmetrics"]})
    ours, why = perceptual.open_perceptual()
    assert ours, why
    theirs = lpips._LPIPS(net="alex")
    for n in range(3):
        x, y = (torch.from_numpy(picture(n + m)).permute(2, 0, 1)[None] / 127.5 - 1 for m in (0, 10))
        assert ours.distance(picture(n), picture(n + 10)) == pytest.approx(float(theirs(x, y)), rel=1e-5)


def test_equal_pictures_are_at_0_and_others_further_the_more_they_differ(alexnet: nn.Sequential, linear: Path) -> None:
    found, why = perceptual.open_perceptual()
    assert found, why
    x = picture(0)
    nearer, further = (np.uint8(x * share + picture(1) * (1 - share)) for share in (0.9, 0.5))
    assert found.distance(x, x) == 0
    assert 0 < found.distance(x, nearer) < found.distance(x, further) == pytest.approx(found.distance(further, x))


def test_what_is_missing_or_damaged_is_a_reason(alexnet: nn.Sequential, linear: Path, tmp_path: Path) -> None:
    weights = tmp_path / "hub/checkpoints" / perceptual.NETWORK
    whole = weights.read_bytes()
    for damaged in (whole[:1000], b"", b"<html>404</html>"):
        weights.write_bytes(damaged)
        found, why = perceptual.open_perceptual()
        assert found is None
        assert why.startswith("LPIPS: not measured, since its weights cannot be read (")
    weights.unlink()
    found, why = perceptual.open_perceptual()
    assert found is None
    assert why.endswith(f"edge-sd downloads nothing and {perceptual.NETWORK} is not in torch.hub's cache")
    linear.unlink()
    assert "lpips is installed" in perceptual.open_perceptual()[1]


def test_a_file_that_would_run_code_is_not_opened(alexnet: nn.Sequential, linear: Path, tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self) -> object:
            return Path.touch, (tmp_path / "it ran",)

    torch.save({"features.0.weight": Runs()}, tmp_path / "hub/checkpoints" / perceptual.NETWORK)
    assert perceptual.open_perceptual()[0] is None
    assert not (tmp_path / "it ran").exists()


def test_the_worst_of_what_is_better_small_is_the_largest() -> None:
    assert set(LESS_IS_BETTER) <= set(METRICS)
    assert summary([0.1, 0.4, 0.2], max)["worst"] == 0.4
