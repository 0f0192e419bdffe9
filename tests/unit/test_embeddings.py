"""Words of one's own: their files, and the text encoder that takes them, beside transformers with the same rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from edge_sd import ModelBundle, Pipeline, Request
from edge_sd.backends import LoadRequest
from edge_sd.backends.openvino import OpenVINOBackend
from edge_sd.components.edits import Edits
from edge_sd.errors import InvalidModel, InvalidRequest
from edge_sd.text.textual_inversion import FIRST, read_embedding

from ..conftest import final_norm


def rows(count: int, width: int = 192) -> np.ndarray:
    return np.random.default_rng(count).normal(0, 0.1, (count, width)).astype(np.float32)


def encode(bundle: ModelBundle, ids: np.ndarray, edits: Edits) -> np.ndarray:
    backend = OpenVINOBackend()
    variant = bundle.variant("openvino-fp16")
    shapes = {"input_ids": ids.shape}
    component = backend.load(LoadRequest(bundle, variant, "text_encoder", backend.devices()[0], shapes, edits))
    return component(input_ids=ids)["last_hidden_state"]


@pytest.fixture(scope="module")
def clip(emoji: Path) -> Any:
    import torch
    from transformers import CLIPTextModel

    return CLIPTextModel.from_pretrained(emoji / "text_encoder", dtype=torch.float32).eval()


IDS = np.array([[4035, 5, 6, 7, 8, 4036, *[4036] * 26], [4035, 9, 9, 9, 4036, *[4036] * 27]])


def test_vectors_are_what_rows_of_the_table_would_be(emoji: Path, clip: Any) -> None:
    import torch

    added = rows(3)
    ids = IDS.copy()
    ids[0, 2:4], ids[1, 1] = (FIRST + 2, FIRST), FIRST + 1
    with torch.no_grad():
        table = clip.get_input_embeddings()
        inputs = table(torch.from_numpy(np.where(ids < FIRST, ids, 0)))
        inputs[0, 2], inputs[0, 3], inputs[1, 1] = (torch.from_numpy(added[n]) for n in (2, 0, 1))
        hook = table.register_forward_hook(lambda *_: inputs)
        expected = clip(torch.from_numpy(IDS)).last_hidden_state.numpy()
        hook.remove()
        plain = clip(torch.from_numpy(IDS)).last_hidden_state.numpy()
    bundle = ModelBundle.open(emoji)
    np.testing.assert_allclose(encode(bundle, ids, Edits("x", vectors=added)), expected, atol=5e-4)
    np.testing.assert_allclose(encode(bundle, IDS, Edits("x", vectors=added)), plain, atol=5e-4)
    assert np.abs(expected - plain).max() > 0.1


@pytest.mark.parametrize("skip", [1, 2, 4])
def test_clip_skip_is_an_earlier_layer_and_the_final_norm(emoji: Path, clip: Any, skip: int) -> None:
    import torch

    with torch.no_grad():
        states = clip(torch.from_numpy(IDS), output_hidden_states=True).hidden_states
        expected = final_norm(clip)(states[-skip]).numpy()
    np.testing.assert_allclose(encode(ModelBundle.open(emoji), IDS, Edits(clip_skip=skip)), expected, atol=5e-4)


def test_skipping_more_layers_than_there_are_names_the_valid_range(emoji: Path) -> None:
    with Pipeline.open(emoji, variant="openvino-fp16") as opened, pytest.raises(InvalidRequest, match="valid: 1 to 4"):
        opened.generate(Request("a cat", clip_skip=5, steps=1, seed=1))


@pytest.mark.parametrize(
    ("tensors", "word", "shapes"),
    [
        ({"emb_params": rows(2)}, "style", {"": (2, 192)}),
        ({"<cat>": rows(1)[0]}, "<cat>", {"": (1, 192)}),
        ({"clip_l": rows(2, 768), "clip_g": rows(2, 1280)}, "style",
         {"text_encoder": (2, 768), "text_encoder_2": (2, 1280)}),
        ({"text_encoders_0": rows(2, 768), "text_encoders_1": rows(2, 1280)}, "style",
         {"text_encoder": (2, 768), "text_encoder_2": (2, 1280)}),
        ({"clip_l": rows(2, 768)}, "style", {"": (2, 768)}),
    ],
)  # fmt: skip
def test_every_form_of_file_is_read(
    tmp_path: Path, tensors: dict[str, np.ndarray], word: str, shapes: dict[str, tuple[int, ...]]
) -> None:
    save_file({name: each.astype(np.float16) for name, each in tensors.items()}, tmp_path / "style.safetensors")
    found = read_embedding(tmp_path / "style.safetensors")
    assert found.word == word
    assert {part: each.shape for part, each in found.vectors.items()} == shapes
    assert read_embedding(tmp_path / "style.safetensors", "mine").word == "mine"


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, InvalidRequest, "cannot be read"),
        (b"PK\x03\x04", InvalidModel, "is a pickle"),
        (b"\x10", InvalidModel, "damaged"),
        ({"a": rows(1), "b": rows(1)}, InvalidModel, "it holds a, b; expected emb_params"),
        ({"emb_params": rows(2) * np.float32(np.nan)}, InvalidModel, "finite"),
        ({"emb_params": rows(80)}, InvalidModel, "1 to 75"),
        ({"clip_l": rows(1), "clip_g": rows(2)}, InvalidModel, "same number"),
    ],
)
def test_what_is_no_embedding_is_said(tmp_path: Path, content: Any, error: type[Exception], message: str) -> None:
    path = tmp_path / "x.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        save_file(content, path)
    with pytest.raises(error, match=message):
        read_embedding(path)


def test_an_embedding_of_another_family_says_found_and_expected(emoji: Path, tmp_path: Path) -> None:
    save_file({"emb_params": rows(2, 768)}, tmp_path / "x.safetensors")
    save_file({"clip_l": rows(2, 768), "clip_g": rows(2, 1280)}, tmp_path / "xl.safetensors")
    with Pipeline.open(emoji) as opened:
        for name, widths in (("x", "768"), ("xl", "768 and 1280")):
            with pytest.raises(InvalidRequest, match=f"vectors of {widths} numbers, this model's .* take 192"):
                opened.resolve(Request("a x", embeddings={"x": tmp_path / f"{name}.safetensors"}))


def test_a_word_changes_the_picture_and_is_recorded(emoji: Path, tmp_path: Path) -> None:
    save_file({"emb_params": rows(3)}, tmp_path / "x.safetensors")
    wishes = {"seed": 1, "steps": 1, "width": 64, "height": 64}
    with Pipeline.open(emoji, variant="openvino-fp16") as opened:
        plain = opened.generate(Request("a zork apple", **wishes)).pictures[0]
        result = opened.generate(Request("a zork apple", embeddings={"zork": tmp_path / "x.safetensors"}, **wishes))
        unused = opened.generate(Request("a cat", embeddings={"zork": tmp_path / "x.safetensors"}, **wishes))
        again = opened.generate(Request("a zork apple", **wishes)).pictures[0]
    assert not np.array_equal(np.asarray(plain.image), np.asarray(result.pictures[0].image))
    assert np.array_equal(np.asarray(plain.image), np.asarray(again.image))
    assert result.pictures[0].settings.embeddings.keys() == {"zork"}
    assert (result.notes, unused.notes) == ([], ["the embedding 'zork' is in no prompt"])
