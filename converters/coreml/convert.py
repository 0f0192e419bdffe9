"""Torch component -> `.mlpackage`: an ML Program of static shapes, float16 inside, for a deployment target.

A component goes through torch.export and its decompositions to coremltools: `torch.jit.trace` fails in coremltools 9
with numpy 2.4. The target decides which operations and compressions are legal; others are refused by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_sd.errors import ConversionError, InvalidRequest, choices

if TYPE_CHECKING:
    from .wrappers import AppleComponent


# Each target and the macOS of the same year, oldest first. Older ones know no float16 inputs.
TARGETS = {"iOS16": "macOS13", "iOS17": "macOS14", "iOS18": "macOS15", "iOS26": "macOS26"}


def target_named(name: str) -> str:
    """The iOS name of a target given by either name. Raises InvalidRequest."""
    for ios, macos in TARGETS.items():
        if name.lower() in (ios.lower(), macos.lower()):
            return ios
    raise InvalidRequest(f"unknown deployment target {name!r}; valid: {choices([*TARGETS, *TARGETS.values()])}")


def require_target(what: str, target: str, lowest: str) -> None:
    """Raise InvalidRequest if `target` is older than `lowest`, from which on `what` exists."""
    order = list(TARGETS)
    if order.index(target) < order.index(lowest):
        raise InvalidRequest(f"{what} needs the target {lowest} ({TARGETS[lowest]}) or newer, not {target}")


def convert(component: AppleComponent, target: str, float32: bool = False) -> Any:
    """The component as a coremltools MLModel, not yet saved; all `float32` where asked. Raises ConversionError."""
    import coremltools as ct
    import numpy as np
    import torch

    _know_alias()
    inputs = [
        ct.TensorType(name, tuple(value.shape), np.float32 if float32 or name in component.float32 else np.float16)
        for name, value in component.example.items()
    ]
    precision = ct.precision.FLOAT32 if float32 else ct.transform.FP16ComputePrecision(op_selector=_FloatSixteen())
    try:
        with torch.no_grad():
            program = torch.export.export(component.module, tuple(component.example.values()), strict=False)
            program = program.run_decompositions({})
        return ct.convert(
            program,
            inputs=inputs,
            outputs=[ct.TensorType(name, dtype=np.float32) for name in component.outputs],
            minimum_deployment_target=getattr(ct.target, target),
            compute_precision=precision,
            skip_model_load=True,
        )
    except Exception as error:  # Both libraries raise errors of any type.
        raise ConversionError(f"{component.name} could not be converted: {first_line(error)}") from error


def opened(path: Path) -> Any:
    """A saved package as coremltools holds it, to be changed and saved elsewhere."""
    import coremltools as ct

    return ct.models.MLModel(str(path), skip_model_load=True)


def bisect(package: Path, folder: Path) -> list[Path]:
    """A package as two of about half the weights each, in `folder`, for devices that cannot hold it at once.

    The second takes what the first gives out, by name, beside inputs of the whole. Raises ConversionError.
    """
    import coremltools as ct

    try:
        ct.models.utils.bisect_model(str(package), str(folder), check_output_correctness=False)
    except Exception as error:  # The library raises whatever it stumbles over.
        raise ConversionError(f"{package.stem} could not be cut into chunks: {first_line(error)}") from error
    return [folder / f"{package.stem}_chunk{n}.mlpackage" for n in (1, 2)]


def join(packages: dict[str, Path], path: Path) -> None:
    """One package with a function for each, the first the default; equal weights are stored once."""
    import coremltools as ct

    descriptor = ct.utils.MultiFunctionDescriptor()
    for name, package in packages.items():
        descriptor.add_function(str(package), "main", name)
    descriptor.default_function_name = next(iter(packages))
    try:
        ct.utils.save_multifunction(descriptor, str(path))
    except Exception as error:  # The library raises whatever it stumbles over.
        raise ConversionError(f"{path.stem} could not be joined: {first_line(error)}") from error


def save(model: Any, path: Path) -> None:
    """Write the package. Raises ConversionError for what the disk refuses."""
    try:
        model.save(str(path))
        # A debugger's file for another runtime, as large as the graph; it is no part of a package.
        (path / "executorch_debug_handle_mapping.json").unlink(missing_ok=True)
        for file in path.rglob("*"):
            # The library writes the graph through a private temporary file and leaves it unreadable to others.
            file.chmod(0o755 if file.is_dir() else 0o644)
    except Exception as error:  # The storage library raises RuntimeError, the rest OSError.
        raise ConversionError(f"{path} could not be written: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """What an error of another library says, as one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class _FloatSixteen:
    """Which operations become float16: all but those between the timestep and its sine and cosine.

    Float16 has steps of 0.5 at 999: the sine of such a number is noise, and with it the time embedding.
    """

    def __call__(self, operation: Any) -> bool:
        return not self._leads_to_a_wave(operation, 4)

    def _leads_to_a_wave(self, operation: Any, depth: int) -> bool:
        if operation.op_type in ("sin", "cos"):
            return True
        if depth == 0 or operation.op_type == "const":
            return False
        return any(
            self._leads_to_a_wave(child, depth - 1) for output in operation.outputs for child in output.child_ops
        )


def _know_alias() -> None:
    """Teach coremltools torch.export's `alias`, a second name for a tensor."""
    from coremltools.converters.mil.frontend.torch.torch_op_registry import _TORCH_OPS_REGISTRY, register_torch_op

    if "alias" in _TORCH_OPS_REGISTRY.name_to_func_mapping:
        return

    def alias(context: Any, node: Any) -> None:
        from coremltools.converters.mil import Builder

        context.add(Builder.identity(x=context[node.inputs[0]], name=node.name))

    register_torch_op(alias)
