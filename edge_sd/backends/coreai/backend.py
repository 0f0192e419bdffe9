"""The devices of Core AI, and from an asset to a component.

On macOS 27 the devices are ane, gpu and cpu, by the system's framework. Elsewhere there is one, coreai-reference:
Apple's own runtime of the same package, on the CPU. It tells what a device would draw, not how fast.
"""

from __future__ import annotations

import os
import platform
import sys
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import numpy as np

from ...bundle.apple_layout import TABLES, Layout
from ...bundle.assembly import whole_package
from ...bundle.coreai_layout import LAYERS, layout_of, outputs_of, pick, rows_of, runs
from ...components.base import Array, last_rows
from ...components.edits import Edits
from ...components.rotary import COSINES, turned
from ...errors import InvalidRequest, MissingExtra
from ..base import Device, LoadRequest
from .runtime import Asset, Loop, array, check_finite

REFERENCE = "coreai-reference"
# Device -> the method of coreai.runtime.ComputeUnitKind that names it.
UNITS = {"ane": "neural_engine", "gpu": "gpu", "cpu": "cpu"}
# The first macOS with the framework, and what makes the package use its own runtime there all the same.
FIRST_MACOS, LOCAL = 27, "USE_LOCAL_COREAI"


class CoreAIBackend:
    """The engines of a Mac with macOS 27, or Apple's CPU runtime anywhere else."""

    name = "coreai"

    def __init__(self) -> None:
        if not find_spec("coreai"):
            raise MissingExtra("running Core AI models", "coreai")
        try:
            self.version = version("coreai-core")
        except PackageNotFoundError:
            self.version = ""

    @cached_property
    def loop(self) -> Loop:
        """The one event loop of this backend's components."""
        return Loop()

    def devices(self) -> list[Device]:
        if not has_framework():
            told = "Core AI models by Apple's own runtime on the CPU: slow"
            return [Device(REFERENCE, self.name, told, driver=self.version)]
        return [
            Device("ane", self.name, "Apple Neural Engine (Core AI)", driver=self.version),
            Device("gpu", self.name, "Apple GPU (Core AI)", driver=self.version),
            Device("cpu", self.name, "CPU (Core AI)", driver=self.version),
        ]

    def load(self, request: LoadRequest) -> CoreAIComponent:
        """Load an asset. Raises InvalidRequest for other sizes than its own or edits, InvalidModel or DeviceError."""
        bundle, part, artifact, edits = request.bundle, request.part, request.artifact, request.edits
        refuse(edits, artifact.graph)
        path = whole_package(bundle, artifact) if artifact.pieces else bundle.path(artifact.graph)
        asset = Asset(path, self.loop, UNITS.get(request.device.name, ""))
        try:
            layout, space = layout_of(part, (*artifact.inputs, *artifact.outputs), bundle.facts), bundle.facts.latents
            factor = space.own_factor if part.startswith("vae") else space.factor
            function = pick(artifact.graph, asset.functions, layout, request.shapes, factor)
            if edits.clip_skip > 1 or edits.states:
                function, layout = LAYERS, _of_layers(asset, layout, edits, artifact.graph)
            return CoreAIComponent(artifact.graph, asset, function, layout)
        except BaseException:
            asset.close()
            raise


def has_framework() -> bool:
    """Whether this is a Mac whose system has Core AI, and the package uses it (coreai.runtime decides alike)."""
    if sys.platform != "darwin" or os.environ.get(LOCAL) is not None:
        return False
    major = platform.mac_ver()[0].split(".")[0]
    return major.isdigit() and int(major) >= FIRST_MACOS


def refuse(edits: Edits, name: str) -> None:
    """Raise InvalidRequest for edits that a compiled program has no place for."""
    if edits.loras:
        raise InvalidRequest(
            f"{name} is a Core AI program and takes no LoRA ({', '.join(lora.name for lora, _ in edits.loras)}); "
            "valid: a variant of OpenVINO, Core ML or torch"
        )
    if edits.vectors is not None:
        raise InvalidRequest(
            f"{name} is a Core AI program and takes no embeddings; valid: a variant of OpenVINO, Core ML or torch"
        )


def _of_layers(asset: Asset, layout: Layout, edits: Edits, name: str) -> Layout:
    """The layout of a text encoder whose states are those of another layer than its last."""
    outputs = asset.outputs(LAYERS) if LAYERS in asset.functions else {}
    ours, theirs = (
        (edits.states, edits.states) if edits.states else ("last_hidden_state", f"clip_skip.{edits.clip_skip}")
    )
    if theirs not in outputs:
        there = ", ".join(outputs) or "those of its last layer"
        raise InvalidRequest(f"{name} has no states {theirs}; it has: {there}")
    pooled = {key: value for key, value in layout.outputs.items() if value == "pooled_outputs"}
    return Layout(layout.package, layout.inputs, {ours: theirs, **pooled})


class CoreAIComponent:
    """One function of an asset, called by our names with any number of rows."""

    def __init__(self, name: str, asset: Asset, function: str, layout: Layout) -> None:
        self.name, self.asset, self.function, self.layout = name, asset, function, layout
        self.ports = asset.functions[function]
        self._bound: dict[str, Array] = {}
        # Bound inputs as the runtime takes them, by name, rows of the call and first row of the run.
        self._held: dict[tuple[str, int, int], Any] = {}

    def bind(self, **constants: Array) -> None:
        self._bound |= constants
        self._held.clear()

    def __call__(self, **inputs: Array) -> dict[str, Array]:
        given = last_rows({**self._bound, **inputs})
        if COSINES in self.layout.inputs:
            given = turned(given, self.ports[COSINES].shape[1])
        given = {name: value for name, value in given.items() if name in self.layout.inputs}
        total = max(len(value) for name, value in given.items() if name not in TABLES)
        called = []
        for run in runs(total, rows_of(self.ports, self.layout)):
            arrays = {name: array(np.full(self.ports[name].shape, value, self.ports[name].dtype))
                      for name, value in self.layout.fixed.items()}  # fmt: skip
            for name, value in given.items():
                key = (name, total, run.start)
                theirs = self.layout.inputs[name]
                bound = name in self._bound and name not in inputs
                made = self._held.get(key) if bound else None
                if made is None:
                    made = array(run.of(value, self.ports[theirs].dtype, name in TABLES))
                if bound:
                    self._held[key] = made
                arrays[theirs] = made
            called.append(self.asset.call(self.function, arrays))
        for outputs in called:
            check_finite(self.name, outputs)
        return outputs_of(self.layout, called, total)

    def close(self) -> None:
        self._bound.clear()
        self._held.clear()
        self.asset.close()
