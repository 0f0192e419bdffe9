"""What a client's picture says of how it was made. It is read as text: nothing that it names is opened."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from edge_sd.errors import InvalidRequest
from edge_sd.pipeline.recorded import Recorded, read_recorded

from .failure import public
from .wish import PICTURES, PLACE, Wish, open_raw


def read(data: bytes) -> Recorded:
    """The parameters of a picture given as bytes. Raises InvalidRequest, without the name of any file."""
    open_raw(data, "image")
    with tempfile.TemporaryDirectory(prefix="edge-sd-") as folder:
        path = Path(folder) / "picture"
        path.write_bytes(data)
        try:
            return read_recorded(path)
        except InvalidRequest as error:
            raise InvalidRequest(public(str(error).replace(str(path), "the picture"))) from None


def recall(data: bytes) -> dict[str, Any]:
    """For JSON: fields that a wish can have, and what has to be given anew. Raises InvalidRequest for no picture."""
    open_raw(data, "image")
    try:
        found = read(data)
    except InvalidRequest as error:
        return {
            "reason": str(error),
            "exact": False,
            "model": "",
            "variant": "",
            "text": "",
            "wish": {},
            "left_out": [],
        }
    fields = set(Wish.model_fields) - {*PICTURES, *PLACE, "loras"}
    wish = {name: value for name, value in found.settings.items() if name in fields and value is not None}
    left_out = [name for name, ours in PICTURES.items() if found.settings.get(ours)]
    left_out += [f"LoRA {public(str(name))}" for name in found.settings.get("loras") or {}]
    left_out += [f"embedding {public(str(name))}" for name in found.settings.get("embeddings") or {}]
    return {"reason": "", "exact": found.exact, "model": public(found.model), "variant": public(found.variant),
            "text": found.text, "wish": wish, "left_out": left_out}  # fmt: skip
