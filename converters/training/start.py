"""A published model as the start of a training: its parts, in float32, where the stages look for finished ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from edge_sd.errors import InvalidRequest

from ..sources.source import Source
from .card import LOGS


def start_from(model: str | Path, work: Path) -> None:
    """Unpack `model` into `work`: tokenizer, text_encoder, unet, vae, and what is trained beside them, if it is there.

    Raises InvalidRequest where parts are there.
    """
    source = Source.open(model)
    folders = {"text_encoder": "text_encoder", "unet": "unet", "vae_decoder": "vae"}
    there = [folder for folder in ("tokenizer", *folders.values()) if (work / folder).exists()]
    if there:
        raise InvalidRequest(f"{work} already holds {', '.join(there)}; start in another folder")
    for part, folder in folders.items():
        source.load(part).save_pretrained(work / folder)
    shutil.copytree(source.folder / "tokenizer", work / "tokenizer")
    for name in ("evaluator", "lcm", "controlnet", "vae_tiny"):
        if (source.folder / name).is_dir() and not (work / name).exists():
            shutil.copytree(source.folder / name, work / name)
    if (source.folder / LOGS).is_file():
        for name, rows in json.loads((source.folder / LOGS).read_text("utf-8")).items():
            (work / f"{name}.log.json").write_text(json.dumps(rows), "utf-8")
