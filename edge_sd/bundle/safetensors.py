"""Tensors of safetensors files, read with numpy alone: the runtime does not have the library of that name."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidModel, InvalidRequest

# numpy has no bfloat16; its bits are the upper half of a float32's.
DTYPES = {"F16": np.float16, "F32": np.float32, "F64": np.float64, "BF16": np.uint16, "I64": np.int64, "I32": np.int32}
HEADER_LIMIT = 64 << 20
Bytes = NDArray[np.uint8]


def tensors(data: Bytes, name: str) -> dict[str, NDArray[Any]]:
    """The tensors of a safetensors file's bytes: views into them, but copies in float32 of bfloat16's.

    Raises InvalidModel.
    """
    try:
        (length,) = struct.unpack("<Q", data[:8].tobytes())
        if length > min(HEADER_LIMIT, len(data)):
            raise ValueError(f"a header of {length} bytes")
        header: dict[str, Any] = json.loads(data[8 : 8 + length].tobytes())
        found = {}
        for key, row in header.items():
            if key != "__metadata__":
                start, stop = row["data_offsets"]
                if not 0 <= start <= stop <= len(data) - 8 - length:
                    raise ValueError(f"{key} lies outside the file")
                body = data[8 + length + start : 8 + length + stop].view(DTYPES[row["dtype"]])
                if row["dtype"] == "BF16":
                    body = (body.astype(np.uint32) << 16).view(np.float32)
                found[key] = body.reshape(row["shape"])
        return found
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidModel(f"{name} is damaged or no safetensors file of floating point") from error


def read_tensors(path: Path) -> dict[str, NDArray[Any]]:
    """Those of a file that a person gave. Raises InvalidRequest (no such file) or InvalidModel (damaged)."""
    try:
        with path.open("rb") as file:
            pickled = file.read(2) in (b"\x80\x02", b"PK")
        if pickled:
            raise InvalidModel(f"{path.name} is a pickle, which can run code when opened; only safetensors are read")
        return tensors(np.fromfile(path, np.uint8), path.name)
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read ({error.strerror})") from error
