"""Core ML: runs `.mlpackage`s in Apple's layout; on macOS by Core ML itself, elsewhere by an executor in torch.

On macOS the devices are ane, gpu and cpu. Elsewhere there is one, coreml-reference: the same packages, computed
operation by operation with float16 rounding. It tells what a device would draw, not how fast.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ..apple import LAYOUTS, Layout, call
from ..assembly import whole_package
from ..bundle import Artifact, ModelBundle, Variant, hash_file, models_home
from ..errors import DeviceError, InvalidModel, InvalidRequest, MissingExtra, NumericalError
from .base import Array, Component, Device, Shapes

REFERENCE = "coreml-reference"
UNITS = {"ane": "CPU_AND_NE", "gpu": "CPU_AND_GPU", "cpu": "CPU_ONLY"}
# Where an installed package offers something that runs .mlpackages: our own executor, which the runtime cannot know.
EXECUTORS = "edge_sd.executors"


class CoreMLBackend:
    """The engines of a Mac, or the reference anywhere else."""

    name = "coreml"

    def __init__(self) -> None:
        wanted, extra = ("coremltools", "coreml") if sys.platform == "darwin" else ("torch", "convert")
        if not find_spec(wanted):
            raise MissingExtra("running Core ML packages", extra)

    def devices(self) -> list[Device]:
        if sys.platform != "darwin":
            return [Device(REFERENCE, self.name, "Core ML packages computed by torch with float16 rounding: slow")]
        return [
            Device("ane", self.name, "Apple Neural Engine (Core ML)"),
            Device("gpu", self.name, "Apple GPU (Core ML)"),
            Device("cpu", self.name, "CPU (Core ML)"),
        ]

    def load(
        self, bundle: ModelBundle, variant: Variant, artifact: Artifact, device: Device, shapes: Shapes
    ) -> Component:
        """Load a package. Raises InvalidRequest for other sizes than its own, InvalidModel or DeviceError."""
        (part,) = [name for name, each in variant.artifacts.items() if each is artifact]
        package = whole_package(bundle, artifact) if artifact.pieces else bundle.path(artifact.graph)
        if device.name == REFERENCE:
            program = _open_executor(package)
        else:
            hashes = [
                record.sha256
                for name, record in sorted(variant.files.items())
                if name == artifact.pieces or name.startswith(f"{artifact.graph}/")
            ]
            program = CompiledProgram(package, hashes, UNITS[device.name])
        component = CoreMLComponent(artifact.graph, program, LAYOUTS[part])
        component.check(shapes, bundle.facts.latents.factor)
        return component


def _open_executor(package: Path) -> Any:
    found = list(entry_points(group=EXECUTORS, name="coreml"))
    if not found:
        raise DeviceError(f"{REFERENCE} needs the converters of edge-sd; install it again from its wheel or a clone")
    return found[0].load().open(package)


class CoreMLComponent:
    """A program with `inputs` (name -> dtype and shape) and `predict`, called by our names and shapes."""

    def __init__(self, name: str, program: Any, layout: Layout) -> None:
        self.name, self.program, self.layout = name, program, layout
        self._bound: dict[str, Array] = {}
        if missing := set(layout.inputs.values()) - set(program.inputs):
            raise InvalidModel(f"{name} has no input {min(missing)}; it is not in Apple's layout")

    def check(self, shapes: Shapes, factor: int) -> None:
        """Raise InvalidRequest where the package is fixed to other sizes than these."""
        for name, wanted in shapes.items():
            fixed = self.program.inputs[self.layout.inputs[name]].shape
            if name in ("sample", "latent_sample") and tuple(wanted[1:]) != fixed[1:]:
                scale = 1 if fixed[1] == 3 else factor
                raise InvalidRequest(
                    f"{self.name} draws {fixed[3] * scale}x{fixed[2] * scale} only, "
                    f"not {wanted[3] * scale}x{wanted[2] * scale}; convert a variant of that size"
                )

    def bind(self, **constants: Array) -> None:
        self._bound |= constants

    def __call__(self, **inputs: Array) -> dict[str, Array]:
        outputs = call(self.program.predict, self.program.inputs, self.layout, {**self._bound, **inputs})
        overflow = getattr(self.program, "overflow", None)
        if overflow is not None and not all(np.isfinite(value).all() for value in outputs.values()):
            raise NumericalError(f"{self.name} overflows float16: {overflow}")
        return outputs

    def close(self) -> None:
        self._bound.clear()
        self.program = None


@dataclass(frozen=True)
class InputPort:
    dtype: str
    shape: tuple[int, ...]


class CompiledProgram:
    """A package compiled by Core ML, on macOS. The compiled form is kept: compiling takes minutes for large models.

    Written against coremltools' documented contract and tested against a stand-in of it; it has not run on a Mac.
    """

    def __init__(self, package: Path, hashes: list[str], units: str) -> None:
        import coremltools as ct

        try:
            spec = ct.utils.load_spec(str(package))
            self.inputs = {each.name: _port(each.type.multiArrayType) for each in spec.description.input}
            hashes = hashes or [hash_file(path) for path in sorted(package.rglob("*")) if path.is_file()]
            compiled = self._compiled(package, hashlib.sha256("".join(hashes).encode()).hexdigest()[:16])
            self.model = ct.models.CompiledMLModel(str(compiled), getattr(ct.ComputeUnit, units))
        except (RuntimeError, OSError, ValueError) as error:
            raise DeviceError(f"Core ML refused {package.name}: {str(error).strip()[:300]}") from error

    def _compiled(self, package: Path, key: str) -> Path:
        import coremltools as ct

        home = models_home().parent / "compiled"
        kept = home / f"{package.stem}-{key}.mlmodelc"
        if kept.is_dir():
            return kept
        home.mkdir(parents=True, exist_ok=True)
        # Compiled beside and renamed: whoever finds it finds it whole, and two at once make one.
        with tempfile.TemporaryDirectory(dir=home, prefix=f".{package.stem}-") as beside:
            made = ct.models.utils.compile_model(str(package), str(Path(beside) / kept.name))
            if not kept.is_dir():
                os.replace(made, kept)
        return kept

    def predict(self, inputs: dict[str, Array]) -> dict[str, Array]:
        """float16 arrays go in as they are; outputs are float32. Raises DeviceError."""
        try:
            found: dict[str, Array] = self.model.predict(inputs)
        except RuntimeError as error:
            raise DeviceError(f"Core ML failed: {str(error).strip()[:300]}") from error
        return found


def _port(array: Any) -> InputPort:
    # FeatureTypes.proto: ArrayDataType
    dtypes = {65552: "float16", 65568: "float32", 65600: "float64", 131104: "int32"}
    return InputPort(dtypes.get(array.dataType, "float32"), tuple(int(n) for n in array.shape))
