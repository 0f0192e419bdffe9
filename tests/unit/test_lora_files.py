"""Files of a request are read once, whatever the count of its pictures, and again when they have changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from edge_sd import Pipeline, Request
from edge_sd.backends.fake import WIDTH, FakeBackend, fake_bundle
from edge_sd.devices.choose import choose
from edge_sd.pipeline import prompting
from edge_sd.pipeline.loader import Components

MODULE = "unet.down_blocks.0.attentions.0.proj_in"


def save_lora(path: Path, prefix: str = "", rank: int = 2) -> Path:
    rng = np.random.default_rng(rank)
    halves = {f"{prefix}{MODULE}.lora_{name}.weight": rng.normal(size=shape).astype(np.float32)
              for name, shape in (("A", (rank, 5)), ("B", (6, rank)))}  # fmt: skip
    save_file(halves, path)
    return path


@pytest.fixture
def pipeline() -> Pipeline:
    bundle, backend = fake_bundle(), FakeBackend()
    return Pipeline(Components(bundle, choose(bundle, backend.devices()), backend))


def counted(monkeypatch: pytest.MonkeyPatch, name: str) -> list[Path]:
    """Paths that a reader of prompting.py was called with."""
    reader: Callable[..., Any] = getattr(prompting, name)
    paths: list[Path] = []

    def read(path: Path, *rest: Any) -> Any:
        paths.append(path)
        return reader(path, *rest)

    monkeypatch.setattr(prompting, name, read)
    return paths


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    return counted(monkeypatch, "read_lora")


def test_a_lora_is_read_once_for_all_pictures(reads: list[Path], pipeline: Pipeline, tmp_path: Path) -> None:
    path = save_lora(tmp_path / "style.safetensors")
    request = Request("a cat", seed=1, steps=1, count=4, loras={path: 0.5})
    pipeline.generate(request)
    pipeline.generate(request)
    assert reads == [path]


def test_an_embedding_is_read_once_for_all_pictures(
    monkeypatch: pytest.MonkeyPatch, pipeline: Pipeline, tmp_path: Path
) -> None:
    paths, path = counted(monkeypatch, "read_embedding"), tmp_path / "a (b).safetensors"
    save_file({"emb_params": np.ones((1, WIDTH), np.float32)}, path)
    for word in ("cat", "dog"):
        pipeline.generate(Request(f"a {word}", seed=1, steps=1, count=4, embeddings={word: path}))
    assert paths == [path], "whatever the word"


def test_a_file_that_changed_is_read_again(reads: list[Path], pipeline: Pipeline, tmp_path: Path) -> None:
    path = save_lora(tmp_path / "style.safetensors")
    request = Request("a cat", seed=1, steps=1, loras={path: 0.5})
    before = pipeline.resolve(request).loras["style"]
    save_lora(path, rank=3)
    assert pipeline.resolve(request).loras["style"] != before
    assert len(reads) == 2


def test_another_config_beside_it_is_another_lora(pipeline: Pipeline, tmp_path: Path) -> None:
    """Its strength stands there, so a hash of the weights alone would take one for the other."""
    path, found = save_lora(tmp_path / "adapter_model.safetensors", "base_model.model."), []
    for alpha in (2, 8):
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": alpha}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        found.append(pipeline.resolve(Request("a cat", seed=1, steps=1, loras={path: 0.5})).loras["adapter_model"])
    assert found[0] != found[1]
