"""Torch component -> `.aimodel`, by Apple's coreai-torch: a program of static shapes, a function for each size.

Nearest-neighbour upsampling is written as a broadcast. Apple's segmenter for the GPU refuses `interpolate` of that mode
and computes it on the CPU; Apple's own exporter repeats rows and columns for the same reason.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edge_sd.errors import ConversionError

from .wrappers import AppleComponent, Function


def convert(component: AppleComponent) -> Any:
    """The component as an AIProgram, not yet saved. Raises ConversionError."""
    try:
        with quiet():
            import coreai_torch

            # RELEASE leaves out torch's stack traces, which would hold paths of this machine.
            converter = coreai_torch.TorchConverter(mode=coreai_torch.TorchConverter.Mode.RELEASE)
            for function in component.functions:
                converter.add_exported_program(
                    _exported(function),
                    input_names=list(function.example),
                    output_names=list(function.outputs),
                    entrypoint_name=function.name,
                )
            return converter.to_coreai()
    except Exception as error:  # Both libraries raise errors of any type.
        raise ConversionError(f"{component.name} could not be converted: {first_line(error)}") from error


def save(program: Any, path: Path, description: str, license_: str) -> None:
    """Write the asset. Raises ConversionError for what the disk refuses."""
    from coreai.runtime import AIModelAssetMetadata

    metadata = AIModelAssetMetadata()
    metadata.model_description, metadata.license = description, license_
    try:
        program.save_asset(path, metadata)
    except Exception as error:  # The library wraps errors of any type.
        cause = error.__cause__ or error
        raise ConversionError(f"{path} could not be written: {first_line(cause)}") from error


def first_line(error: BaseException) -> str:
    """What an error of another library says, as one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _exported(function: Function) -> Any:
    import coreai_torch

    table = coreai_torch.get_decomp_table()
    table[torch.ops.aten.upsample_nearest2d.vec] = _upsample
    table[torch.ops.aten.pixel_unshuffle.default] = _fold
    with torch.no_grad():
        program = torch.export.export(function.module, tuple(function.example.values()), strict=False)
        return program.run_decompositions(table)


def _upsample(x: Tensor, output_size: Any, scale_factors: Any) -> Tensor:
    """Nearest-neighbour upsampling by whole numbers as two broadcasts: (B, C, H, W) -> (B, C, n H, m W).

    One for rows and one for columns: the Neural Engine takes at most five dimensions.
    """
    b, c, h, w = x.shape
    height, width = output_size or (round(h * scale_factors[0]), round(w * scale_factors[1]))
    if height % h or width % w:
        raise ConversionError(f"{h}x{w} is upsampled to {height}x{width}, which is no whole multiple")
    n, m = height // h, width // w
    rows = x[:, :, :, None].expand(b, c, h, n, w).reshape(b, c, height, w)
    return rows[..., None].expand(b, c, height, w, m).reshape(b, c, height, width)


def _fold(x: Tensor, n: int) -> Tensor:
    """Pixels as channels, (B, C, H, W) -> (B, C n n, H / n, W / n), rows and columns one after the other.

    torch's own way has six dimensions; the Neural Engine takes at most five.
    """
    b, c, h, w = x.shape
    rows = x.reshape(b, c, h // n, n, w).transpose(2, 3).reshape(b, c * n, h // n, w)
    return rows.reshape(b, c * n, h // n, w // n, n).permute(0, 1, 4, 2, 3).reshape(b, c * n * n, h // n, w // n)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the library's banner, since stdout belongs to the command, and its version warnings."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
