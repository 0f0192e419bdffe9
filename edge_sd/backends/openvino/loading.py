"""From a model's files to a component: graphs are read, rewritten, compiled and cached."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ...caches import code_digest
from ...components.base import SAMPLES, Array, Shapes
from ...components.image_prompt import PIXELS, TOKENS
from ...components.lora import read_lora
from ...errors import DeviceError, InvalidModel
from ..base import LoadRequest
from . import cache
from .adapters import Adapters, adapt
from .component import Graph, OpenVINOComponent
from .edits import add_loras, apply
from .graph import fold_upsampling, hoist, joins, merge_tokens, pad_heads, products_in_convolutions, split_deep
from .mapping import OFTEN, Place, forget, forgetting, place_of_array, places_of_model, trim
from .reading import accept_fractional_timesteps, first_line, read_model, reshape
from .streaming import constants, stream

# Inputs that stay the same while others change, over the steps of a picture or, the timestep, over pictures.
INVARIANT = ("encoder_hidden_states", TOKENS, "controlnet_cond", "timestep")
# Instruction sets with which the plugin multiplies matrices of 8 bits fast.
INTEGER_PRODUCTS = frozenset({"VNNI", "AVX-VNNI", "AMX-INT8", "I8MM", "DOTPROD"})
# Instruction sets for which 8-bit products of two inputs are as fast as products with constants. Not known for Arm.
PACKING_PRODUCTS = frozenset({"VNNI", "AVX-VNNI", "AMX-INT8"})
# Instruction set with tiles for 16-bit products.
TILES = "AMX-BF16"
# Positions from which a batch of two is no faster than two of one: 512 x 512 pixels.
LARGE_LATENTS = 64 * 64
# Properties: the type that is computed in, and how many calls share the device.
PRECISION, STREAMS = "INFERENCE_PRECISION_HINT", "NUM_STREAMS"
# Weights in bytes below which hoisting costs more than it saves: it removes about 1 % of the arithmetic.
LARGE = 128 << 20
# Bytes of components whose compiled graphs are kept. Smaller ones compile as fast; while a graph is written, OpenVINO
# holds it in memory three times.
KEEP_FROM, KEEP_TO = 2 << 20, 256 << 20
# Bytes of a transformer's weights, or its text encoder's, that stay in their file whatever they are: packed as well,
# they would be in memory twice, and a step computes for so long that to convert them at each call takes little of it.
HUGE = 1 << 30
# Names of a component's own graphs: the whole, and the one that takes `DEEP`. Others have that of the input they read.
GRAPHS = ("whole", "shallow")


@dataclass(frozen=True)
class Loading:
    """One component that is being loaded; `flags` and `cores` are the machine's.

    places   where its weights, or what was compiled of them, are mapped; filled as they are read
    """

    core: Any
    version: str
    flags: frozenset[str]
    cores: int
    request: LoadRequest
    places: list[Place] = field(default_factory=list, compare=False)

    def open(self) -> OpenVINOComponent:
        """Raises InvalidModel, InvalidRequest or DeviceError."""
        try:
            key = self.key
        except OSError as error:
            raise InvalidModel(f"{self.request.artifact.graph} cannot be read ({error.strerror})") from error
        return self._kept(key) or self._made(key)

    def _kept(self, key: str) -> OpenVINOComponent | None:
        """The cached component; None where it has to be compiled."""
        blobs = cache.read(key) if self.keeps else None
        if blobs is None:
            return None
        try:
            compiled = {name: self._imported(blob) for name, blob in blobs.items()}
        except RuntimeError:
            cache.drop(key)
            return None
        asked = {name for each in compiled.values() for port in each.inputs for name in port.names}
        weights = constants(self._read(), asked) if self._streams else {}
        self.places.extend(map(place_of_array, blobs.values()))
        return self._component(compiled, weights, held=blobs)

    def _made(self, key: str) -> OpenVINOComponent:
        graphs, adapters = self.graphs()
        weights: dict[str, Any] = {}
        # The source graph is not needed after compiling.
        with forgetting(self.places, OFTEN):
            for model in graphs.values() if self._streams else ():
                weights |= stream(model, self._lean)
            compiled = {name: self._compiled(model) for name, model in graphs.items()}
        if self.keeps:
            _keep(key, compiled)
        del graphs
        trim()
        return self._component(compiled, weights, adapters)

    @property
    def keeps(self) -> bool:
        """Whether compiled graphs are cached. Trials are not, since they would push out graphs in daily use."""
        if self.request.edits.loras or self.request.edits.vectors is not None:
            return False
        return self._streams or KEEP_FROM <= self.bytes <= KEEP_TO

    @property
    def _streams(self) -> bool:
        """Whether weights stay in their file: where that costs nothing, or where memory is to be saved."""
        if self.request.device.kind != "cpu" or self.bytes < LARGE:
            return False
        return self._lean or bool(PACKING_PRODUCTS & self.flags)

    @property
    def _lean(self) -> bool:
        """Whether all weights stay in their file, not only those for which that costs nothing."""
        huge = self.request.bundle.facts.denoiser == "transformer" and self.bytes >= HUGE
        return self.request.edits.shortcuts.lean or huge

    @property
    def rows(self) -> int:
        """How many rows a call has."""
        return max(shape[0] for shape in self.request.shapes.values())

    @property
    def shapes(self) -> Shapes:
        """Those that it is compiled for: large latents are no slower row by row, side by side or in turn."""
        rows, shortcuts = self.rows, self.request.edits.shortcuts
        sample = next((self.request.shapes[name] for name in SAMPLES if name in self.request.shapes), None)
        if sample is not None:
            # Latents [B, C, h, w], or the row of a transformer's tokens [B, S, C].
            large = (sample[2] * sample[3] if len(sample) == 4 else sample[1]) >= LARGE_LATENTS
            rows = 1 if shortcuts.apart or shortcuts.lean or large else sample[0]
        return {name: (min(shape[0], rows), *shape[1:]) for name, shape in self.request.shapes.items()}

    @property
    def lanes(self) -> int:
        """How many rows run side by side, each on its share of the cores.

        The cores then wait for each other once a call, not at every layer. A single row would use only its share.
        """
        shortcuts, split = self.request.edits.shortcuts, max(shape[0] for shape in self.shapes.values()) < self.rows
        in_turn = shortcuts.apart or shortcuts.lean or self.cores % self.rows
        return self.rows if split and self.request.device.kind == "cpu" and not in_turn else 1

    @property
    def config(self) -> dict[str, Any]:
        """OpenVINO's properties."""
        import openvino as ov
        import openvino.properties.hint as hints

        config: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
        precision = self.request.artifact.precision or self.request.variant.precision
        # Text, and what an IP-Adapter is shown, steers every step and takes 1 % of the time: it is never rounded to
        # bfloat16 as CPUs with AMX would.
        overflows = self.request.bundle.facts.vae_float32 and set(self.request.shapes) in (
            {"latent_sample"},
            {"sample"},
        )
        read = {"input_ids", PIXELS} & set(self.request.shapes)
        if precision == "fp32" or read or overflows:
            config[PRECISION] = ov.Type.f32
        if self.lanes > 1:
            # The call would wait for a row on slow cores.
            config |= {STREAMS: self.lanes, "SCHEDULING_CORE_TYPE": hints.SchedulingCoreType.PCORE_ONLY}
        return config

    @property
    def bytes(self) -> int:
        return sum(self.request.bundle.path(name).stat().st_size for name in self.request.artifact.files())

    @property
    def key(self) -> str:
        """What decides the bytes of the compiled graphs, as a name. Raises OSError."""
        files = {**self.request.bundle.files, **self.request.variant.files}
        hashes = []
        for name in self.request.artifact.files():
            path = self.request.bundle.path(name)
            told = path.stat()
            # Folders that others wrote have no hashes.
            known = files[name].sha256 if name in files else ""
            hashes.append(known or f"{path.resolve()} {told.st_size} {told.st_mtime_ns}")
        where = (
            self.request.device.name,
            self.request.device.description,
            self.request.device.driver,
            self.version,
            sorted(self.flags),
        )
        compiled = (sorted(self.shapes.items()), sorted((name, str(value)) for name, value in self.config.items()))
        edits, loras = self.request.edits, [(lora.sha256, factor) for lora, factor in self.request.edits.loras]
        changes = (edits.key, loras, edits.part, edits.clip_skip, edits.states, edits.shortcuts)
        decides = (code_digest(), hashes, where, compiled, changes)
        return hashlib.sha256(repr(decides).encode()).hexdigest()[:24]

    def _read(self) -> Any:
        graph = self.request.bundle.path(self.request.artifact.graph)
        files = [self.request.bundle.path(name) for name in self.request.artifact.weights]
        model = read_model(self.core, graph, files)
        self.places.extend(places_of_model(model, files))
        return model

    def _model(self) -> tuple[Any, Adapters | None]:
        """The graph, with its edits, in its shapes, and its inputs for LoRAs; what is rewritten changes no number."""
        try:
            model = self._read()
            if self.request.artifact.lora:
                add_loras(
                    model,
                    [(read_lora(self.request.bundle.path(self.request.artifact.lora)), 1.0)],
                    "unet",
                    self.request.artifact.graph,
                )
            accept_fractional_timesteps(model)
            edits, adapters = self.request.edits, None
            if edits.loras and self._adaptable:
                adapters = adapt(model, edits, self.request.artifact.graph)
                edits = edits if adapters is None else replace(edits, loras=())
            apply(model, edits, self.request.artifact.graph)
            reshape(model, self.shapes, self.request.artifact.graph, self.request.bundle.facts.latents.factor)
            if self.request.device.kind == "cpu":
                # Where the CPU's plugin was measured; other plugins get the graph as it is.
                if not self.request.edits.shortcuts.lean:
                    # Four thirds of these weights' bytes.
                    fold_upsampling(model)
                if not INTEGER_PRODUCTS & self.flags:
                    products_in_convolutions(model)
            if self.request.edits.shortcuts.merge:
                merge_tokens(model)
            if self.request.device.kind == "cpu" and TILES in self.flags and PRECISION not in self.config:
                pad_heads(model)
            return model, adapters
        except (RuntimeError, OSError) as error:
            path = self.request.bundle.path(self.request.artifact.graph)
            raise InvalidModel(f"{path} cannot be read by OpenVINO: {first_line(error)}") from error

    @property
    def _adaptable(self) -> bool:
        """Whether LoRAs are better inputs than part of the weights: small networks are compiled in no time."""
        return self.request.device.kind == "cpu" and self.bytes >= LARGE

    def graphs(self) -> tuple[dict[str, Any], Adapters | None]:
        """What is compiled, by name: GRAPHS, and one for each input that much depends on. And the inputs for LoRAs."""
        model, adapters = self._model()
        before = {}
        if self.bytes >= LARGE:
            hoisted = {name: hoist(model, name) for name in INVARIANT if name in self.shapes}
            before = {name: each for name, each in hoisted.items() if each is not None}
        # A ControlNet has no way up, and nothing to keep.
        deep = [split_deep(model)] if self.request.edits.shortcuts.deep and joins(model) else []
        return {**dict(zip(GRAPHS, [model, *deep], strict=False)), **before}, adapters

    def _compiled(self, model: Any) -> Any:
        try:
            return self.core.compile_model(model, self.request.device.name.upper(), self.config)
        except RuntimeError as error:
            raise DeviceError(
                f"{self.request.device.name} refused {self.request.artifact.graph}: {first_line(error)}"
            ) from error

    def _imported(self, blob: Array) -> Any:
        import openvino as ov

        return self.core.import_model(
            ov.Tensor(blob, shared_memory=True), self.request.device.name.upper(), self.config
        )

    def _component(
        self,
        compiled: Mapping[str, Any],
        weights: Mapping[str, Any],
        adapters: Adapters | None = None,
        held: Mapping[str, Array] | None = None,
    ) -> OpenVINOComponent:
        graphs = [Graph(compiled[name], self.lanes, weights) for name in GRAPHS if name in compiled]
        before = {name: Graph(model, weights=weights) for name, model in compiled.items() if name not in GRAPHS}
        component = OpenVINOComponent(
            self.request.artifact.graph, graphs, before, self.shapes, self.request.edits, adapters
        )
        # What is read where it is mapped.
        component.held = {**weights, **(held or {})}
        component.places = tuple(self.places)
        forget(component.places)
        return component


def _keep(key: str, compiled: Mapping[str, Any]) -> None:
    blobs = {}
    for name, each in compiled.items():
        stream = io.BytesIO()
        try:
            each.export_model(stream)
        except RuntimeError:
            # A device that can't export compiles every time.
            return
        blobs[name] = stream.getbuffer()
    cache.write(key, blobs)
