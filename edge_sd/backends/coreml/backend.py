"""Core ML: runs `.mlpackage`s in Apple's layout; on macOS by Core ML itself, elsewhere by an executor in torch.

On macOS the devices are ane, gpu and cpu. Elsewhere there is one, coreml-reference: the same packages, computed
operation by operation with float16 rounding. It tells what a device would draw, not how fast.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ...bundle.apple_layout import Chain, Layout, call, layout_of, pick
from ...bundle.assembly import whole_package
from ...bundle.mlpackage.compiled import COMPILED, interface
from ...bundle.variants import Artifact, Variant
from ...caches import cache_folder
from ...components.base import Array, last_rows
from ...errors import DeviceError, InvalidModel, InvalidRequest, MissingExtra, NumericalError, install_line
from ...files import hash_file, scratch, sweep
from ..base import Device, LoadRequest
from .edits import edited, known_ids, table_rows
from .plan import placements

REFERENCE = "coreml-reference"
UNITS = {"ane": "CPU_AND_NE", "gpu": "CPU_AND_GPU", "cpu": "CPU_ONLY"}
# Entry point for a program that runs .mlpackages: our executor, which the runtime may not import.
EXECUTORS = "edge_sd.executors"
# The part of coremltools that is not Python.
NATIVE = "libcoremlpython"
# Name of the function in a package of one function.
MAIN = "main"


class CoreMLBackend:
    """The engines of a Mac, or the reference anywhere else."""

    name = "coreml"

    def __init__(self) -> None:
        wanted, extra = ("coremltools", "coreml") if sys.platform == "darwin" else ("torch", "convert")
        if not find_spec(wanted):
            raise MissingExtra("running Core ML packages", extra)
        # Where coremltools has no wheel for this Python it installs without its library, and fails at the first model.
        if sys.platform == "darwin" and not _has_native_library():
            version = ".".join(map(str, sys.version_info[:2]))
            raise DeviceError(
                f"coremltools has no native library for Python {version}: take Python 3.10 to 3.13, or draw with "
                f"OpenVINO, which runs on macOS: {install_line('openvino')}"
            )

    def devices(self) -> list[Device]:
        if sys.platform != "darwin":
            return [Device(REFERENCE, self.name, "Core ML packages computed by torch with float16 rounding: slow")]
        return [
            Device("ane", self.name, "Apple Neural Engine (Core ML)"),
            Device("gpu", self.name, "Apple GPU (Core ML)"),
            Device("cpu", self.name, "CPU (Core ML)"),
        ]

    def load(self, request: LoadRequest) -> CoreMLComponent:
        """Load a package. Raises InvalidRequest for other sizes than its own, InvalidModel or DeviceError."""
        bundle, artifact, device, edits = request.bundle, request.artifact, request.device, request.edits
        first = whole_package(bundle, artifact) if artifact.pieces else bundle.path(artifact.graph)
        packages = [first, *(bundle.path(graph) for graph in artifact.chunks)]
        hashes = [_hashes(package, request.variant, artifact, graph)
                  for package, graph in zip(packages, (artifact.graph, *artifact.chunks), strict=True)]  # fmt: skip
        compiled = [package.name for package in packages if package.suffix == COMPILED]
        if compiled and device.name == REFERENCE:
            raise DeviceError(
                f"{compiled[0]} is compiled for Core ML, which is on macOS alone; {REFERENCE} runs the .mlpackage that "
                "it was made of"
            )
        changed = bool(edits.loras or edits.vectors is not None or edits.clip_skip > 1 or edits.states)
        if compiled and changed:
            raise InvalidRequest(f"{compiled[0]} is compiled: LoRAs, embeddings and CLIP skip need its .mlpackage")
        rows = None
        if changed:
            rows = table_rows(first) if edits.vectors is not None else None
            packages = edited(packages, "".join(one for each in hashes for one in each), edits, artifact.graph)
            hashes = [[package.parent.name, package.name] for package in packages]
        kind: Any = _executor() if device.name == REFERENCE else CompiledProgram
        states = edits.states or next((text.states for text in bundle.facts.encoders if text.part == request.part), "")
        layout = layout_of(request.part, (*artifact.inputs, *artifact.outputs), states)
        functions = kind.functions(packages[0])
        function = pick(artifact.graph, functions, layout, request.shapes, bundle.facts.latents.factor)
        if device.name == REFERENCE:
            programs = [kind.open(package, function=function) for package in packages]
        else:
            programs = [
                CompiledProgram(package, each, UNITS[device.name], function)
                for package, each in zip(packages, hashes, strict=True)
            ]
        program = Chain(programs) if len(programs) > 1 else programs[0]
        return CoreMLComponent(artifact.graph, program, layout, rows)


def _hashes(package: Path, variant: Variant, artifact: Artifact, graph: str) -> list[str]:
    """Hashes of a package's files: from the manifest, or computed for a folder of another program."""
    known = [
        record.sha256
        for name, record in sorted(variant.files.items())
        if name == artifact.pieces or name.startswith(f"{graph}/")
    ]
    if known and all(known):
        return known
    return [hash_file(path) for path in sorted(package.rglob("*")) if path.is_file()]


def _executor() -> Any:
    found = list(entry_points(group=EXECUTORS, name="coreml"))
    if not found:
        raise DeviceError(f"{REFERENCE} needs the converters of edge-sd; install it again from its wheel or a clone")
    return found[0].load()


class CoreMLComponent:
    """A program with `inputs` (name -> dtype and shape) and `predict`, called by our names and shapes.

    `rows` is the size of a text encoder's embedding table before textual inversions were appended.
    """

    def __init__(self, name: str, program: Any, layout: Layout, rows: int | None = None) -> None:
        self.name, self.program, self.layout, self.rows = name, program, layout, rows
        self._bound: dict[str, Array] = {}
        if missing := set(layout.inputs.values()) - set(program.inputs):
            raise InvalidModel(f"{name} has no input {min(missing)}; it is not in Apple's layout")

    def bind(self, **constants: Array) -> None:
        self._bound |= constants

    def __call__(self, **inputs: Array) -> dict[str, Array]:
        given = last_rows({**self._bound, **inputs})
        given = {name: value for name, value in given.items() if name in self.layout.inputs}
        if self.rows is not None:
            given["input_ids"] = known_ids(given["input_ids"], self.rows)
        outputs = call(self.program.predict, self.program.inputs, self.layout, given)
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


def _has_native_library() -> bool:
    """Whether coremltools came with its library, by its files: importing it takes seconds."""
    spec = find_spec("coremltools")
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    return not places or any(True for place in places for _ in Path(place).glob(f"{NATIVE}*"))


class CompiledProgram:
    """A package compiled by Core ML, on macOS. The compiled form is kept: compiling takes minutes for large models.

    Written against coremltools' documented contract and tested against a stand-in of it; it has not run on a Mac.
    """

    def __init__(self, package: Path, hashes: list[str], units: str, function: str = MAIN) -> None:
        import coremltools as ct

        try:
            if package.suffix == COMPILED:
                ports, outputs, _ = interface(package)
                self.inputs: dict[str, Any] = dict(ports)
                self.outputs: dict[str, Any] = dict.fromkeys(outputs)
                compiled = package
            else:
                described = _described(package)[function]
                self.inputs, self.outputs = ({p.name: _port(p.type.multiArrayType) for p in side} for side in described)
                key = hashlib.sha256("".join(hashes).encode()).hexdigest()[:16]
                compiled = self._compiled(package, key)
            # A model of one function does not name its functions.
            named = {} if function == MAIN else {"function_name": function}
            self.model = ct.models.CompiledMLModel(str(compiled), getattr(ct.ComputeUnit, units), **named)
            self.compiled, self.units, self.function = compiled, units, function
        except (RuntimeError, OSError, ValueError) as error:
            raise DeviceError(f"Core ML refused {package.name}: {str(error).strip()[:300]}") from error

    @classmethod
    def functions(cls, package: Path) -> dict[str, dict[str, InputPort]]:
        """The functions of a package and the inputs of each. Raises DeviceError."""
        if package.suffix == COMPILED:
            return {MAIN: {name: InputPort(p.dtype, p.shape) for name, p in interface(package)[0].items()}}
        try:
            described = _described(package)
        except (RuntimeError, OSError, ValueError) as error:
            raise DeviceError(f"Core ML refused {package.name}: {str(error).strip()[:300]}") from error
        return {name: {p.name: _port(p.type.multiArrayType) for p in inputs} for name, (inputs, _) in described.items()}

    def _compiled(self, package: Path, key: str) -> Path:
        import coremltools as ct

        home = cache_folder("compiled")
        kept = home / f"{package.stem}-{key}.mlmodelc"
        if kept.is_dir():
            return kept
        home.mkdir(parents=True, exist_ok=True)
        sweep(home)
        # Compiled beside and renamed, so that a reader never sees half of it and two processes leave one copy.
        with scratch(kept) as beside:
            made = ct.models.utils.compile_model(str(package), str(beside / kept.name))
            if not kept.is_dir():
                os.replace(made, kept)
        return kept

    def placements(self) -> Counter[str]:
        """Which engine runs how many of its operations (plan.py)."""
        return placements(self.compiled, self.units, self.function)

    def predict(self, inputs: dict[str, Array]) -> dict[str, Array]:
        """float16 arrays go in as they are; outputs are float32. Raises DeviceError."""
        try:
            found: dict[str, Array] = self.model.predict(inputs)
        except RuntimeError as error:
            raise DeviceError(f"Core ML failed: {str(error).strip()[:300]}") from error
        return found


def _described(package: Path) -> dict[str, tuple[Any, Any]]:
    """Function -> its inputs and outputs as coremltools describes them; the default one first."""
    import coremltools as ct

    description = ct.utils.load_spec(str(package)).description
    if not description.functions:
        return {MAIN: (description.input, description.output)}
    rows = sorted(description.functions, key=lambda row: row.name != description.defaultFunctionName)
    return {row.name: (row.input, row.output) for row in rows}


def _port(array: Any) -> InputPort:
    # FeatureTypes.proto: ArrayDataType
    dtypes = {65552: "float16", 65568: "float32", 65600: "float64", 131104: "int32"}
    return InputPort(dtypes.get(array.dataType, "float32"), tuple(int(n) for n in array.shape))
