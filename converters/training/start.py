"""A published model as the start of a training: its parts, in float32, where the stages look for finished ones."""

from __future__ import annotations

import shutil
from pathlib import Path

from edge_sd.errors import InvalidRequest

from ..sources import Source


def start_from(model: str | Path, work: Path) -> None:
    """Unpack `model` into `work`: tokenizer, text_encoder, unet, vae. Raises InvalidRequest where parts are there."""
    source = Source.open(model)
    folders = {"text_encoder": "text_encoder", "unet": "unet", "vae_decoder": "vae"}
    there = [folder for folder in ("tokenizer", *folders.values()) if (work / folder).exists()]
    if there:
        raise InvalidRequest(f"{work} already holds {', '.join(there)}; start in another folder")
    for part, folder in folders.items():
        source.load(part).save_pretrained(work / folder)
    shutil.copytree(source.folder / "tokenizer", work / "tokenizer")
