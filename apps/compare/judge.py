"""The judge that ships with the embedded model, in numpy: what does a picture show, and is it what was asked for?

It is the network of converters/training/evaluator.py, read from the same two files, so that a plain install has it. It
was trained on the embedded model's artwork and says nothing about other models' pictures.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edge_sd.bundle.bundle import ModelBundle, read_manifest
from edge_sd.bundle.library import MANIFEST
from edge_sd.bundle.safetensors import parse
from edge_sd.errors import EdgeSDError
from edge_sd.paths import embedded_models
from edge_sd.text.tokenizer import TextTokenizer

Array = NDArray[np.float32]
GROUPS, EPSILON = 8, 1e-5


@dataclass(frozen=True)
class Opinion:
    """The concept that comes first, and a unit vector in the space of the prompts' vectors."""

    concept: str
    vector: Array


class Judge:
    """Reads config.json and model.safetensors of an evaluator's folder. Raises InvalidModel."""

    def __init__(self, folder: Path) -> None:
        if (folder.parent / MANIFEST).is_file():
            # The comparison's agreement rests on these two files.
            read_manifest(folder.parent).require(f"{folder.name}/")
        config: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
        self.labels: list[str] = config["labels"]
        path = folder / "model.safetensors"
        self.weights = {
            name: tensor.astype(np.float32)
            for name, tensor in parse(np.fromfile(path, np.uint8), str(path)).tensors.items()
        }

    def look(self, picture: Image.Image) -> Opinion:
        """What a picture of any size shows."""
        x = np.asarray(picture.convert("RGB").resize((128, 128)), np.float32).transpose(2, 0, 1) / 127.5 - 1
        h = self._trunk(x.reshape(3, 64, 2, 64, 2).mean(axis=(2, 4)))
        features = np.concatenate([h.mean(axis=(1, 2)), h.max(axis=(1, 2))])
        concept = self.weights["concept.weight"] @ features + self.weights["concept.bias"]
        return Opinion(self.labels[int(concept.argmax())], _unit(self.weights["image_projection.weight"] @ features))

    def read(self, pooled: Array) -> Array:
        """The unit vector of a prompt out of the text encoder's pooled output [C]."""
        return _unit(self.weights["text_projection.weight"] @ pooled)

    def _trunk(self, x: Array) -> Array:
        """A convolution; then for each width twice: normalise, rectify, convolve, the first time with stride 2."""
        layers = sorted({int(name.split(".")[1]) for name in self.weights if name.startswith("trunk.")})
        strides = 0
        for n in layers:
            weight, bias = self.weights[f"trunk.{n}.weight"], self.weights[f"trunk.{n}.bias"]
            if weight.ndim == 1:
                x = np.maximum(_normalised(x) * weight[:, None, None] + bias[:, None, None], 0)
            else:
                x = _convolved(x, weight, bias, stride=2 if strides % 2 else 1)
                strides += 1
        return x


def _normalised(x: Array) -> Array:
    grouped = x.reshape(GROUPS, -1)
    centred = grouped - grouped.mean(axis=1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + np.float32(EPSILON))
    return np.asarray(scaled.reshape(x.shape), np.float32)


def _convolved(x: Array, weight: Array, bias: Array, stride: int) -> Array:
    """3 x 3, padded by one: [C, H, W] -> [D, H / stride, W / stride]."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))[:, ::stride, ::stride]
    return np.asarray(np.tensordot(weight, windows, ((1, 2, 3), (0, 3, 4))) + bias[:, None, None], np.float32)


def _unit(vector: Array) -> Array:
    return np.asarray(vector / max(float(np.linalg.norm(vector)), 1e-12), np.float32)


def open_judge(bundle: ModelBundle) -> tuple[Judge | None, str]:
    """The judge for pictures of `bundle`, or None and why there is none."""
    embedded = ModelBundle.open(embedded_models() / "emoji")
    if not (embedded.root / "evaluator" / "config.json").is_file():
        return None, "agreement: not measured, since this build of edge-sd ships no judge"
    if replace(bundle.facts, name=embedded.name) != embedded.facts:
        return None, "agreement: not measured, since the judge knows the embedded model's pictures only"
    return Judge(embedded.root / "evaluator"), ""


@lru_cache(maxsize=1)
def _text_encoder() -> Any:
    """The embedded model's text encoder and its tokenizer: the space that the judge's prompts are in."""
    from edge_sd.backends import LoadRequest
    from edge_sd.pipeline.pipeline import Pipeline

    pipeline = Pipeline.open(embedded_models() / "emoji")
    bundle, place = pipeline.bundle, pipeline.plan.parts["text_encoder"]
    variant, facts = bundle.variant(place.variant), bundle.facts
    shapes = {"input_ids": (1, facts.max_tokens)}
    encoder = pipeline.components.backend.load(LoadRequest(bundle, variant, "text_encoder", place.device, shapes))
    return encoder, TextTokenizer(bundle.path(facts.tokenizer), facts.max_tokens)


def read_prompts(judge: Judge, prompts: list[str]) -> dict[str, Array] | None:
    """The vectors of prompts; None where no backend here gives a pooled output (Core ML packages hold none)."""
    try:
        encoder, tokenizer = _text_encoder()
        pooled = {prompt: encoder(input_ids=tokenizer(prompt).ids)["pooler_output"][0] for prompt in prompts}
    except (EdgeSDError, KeyError):
        return None
    return {prompt: judge.read(vector) for prompt, vector in pooled.items()}
