"""Variant: one backend's form of a model in one precision, and the files of each of its components."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..files import FileRecord
from .facts import Defaults


@dataclass(frozen=True)
class Parity:
    """How close an artifact is to torch float32 on the same inputs: PSNR in dB against the reference's range."""

    psnr: float
    max_error: float


@dataclass(frozen=True)
class Artifact:
    """One converted component: its graph, the files of its weights, and the names of its inputs and outputs.

    The weights of a graph are the bytes of `weights`, one file after the other: usually one `.bin`; in the embedded
    model the safetensors files that diffusers reads, then the few constants that are not in them. `lora` is a file of
    low-rank differences that are added to such weights. `pieces` is there where a graph, a Core ML package, comes
    without its weight file: it tells how that is put together of `weights` (see assembly.py). `chunks` are graphs that
    follow the first, as one component. `precision` is the component's own, where it has not the variant's. `quantized`
    is what most of its weights were quantized to before it was made of them, as Q4_K.
    """

    graph: str
    weights: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    parity: Parity | None = None
    lora: str | None = None
    pieces: str | None = None
    chunks: tuple[str, ...] = ()
    precision: str = ""
    quantized: str = ""

    def files(self) -> tuple[str, ...]:
        """Every path that is named here."""
        named = (self.graph, *self.chunks, *self.weights, self.lora, self.pieces)
        return tuple(name for name in named if name is not None)


@dataclass(frozen=True)
class Variant:
    """One backend's form of the model in one precision.

    source     the hash of the weights that it was made from
    compute    the device that its arithmetic was arranged for ("ane", "gpu"), where a backend tells them apart
    defaults   stand in for the model's where they differ, as those of a few-step variant do
    target     the oldest system that runs it ("iOS18", "macOS13"); "" is any that its backend runs on
    sample     a hash of parts of its files, where those are large and no manifest has hashed them
    """

    backend: str
    precision: str
    artifacts: dict[str, Artifact]
    files: dict[str, FileRecord] = field(default_factory=dict)
    source: str = ""
    compute: str = ""
    defaults: Defaults | None = None
    target: str = ""
    sample: str = ""

    @property
    def origin(self) -> str:
        """What its weights were quantized to before it was made of them, as Q4_K or Q4_K+Q8_0; "" for whole ones."""
        return "+".join(sorted({each.quantized for each in self.artifacts.values()} - {""}))

    @property
    def static(self) -> bool:
        """Whether the shapes of its components were fixed when it was converted."""
        return self.backend in ("coreml", "coreai")

    @property
    def changeable(self) -> bool:
        """Whether its graphs can be rewritten as they are read, as shortcuts need."""
        return self.backend not in ("coreml", "coreai", "torch")

    def precision_of(self, part: str) -> str:
        """How the weights of one component are stored."""
        artifact = self.artifacts.get(part)
        # "float32" is what an Apple form computes in where float16 overflows.
        own = artifact.precision if artifact is not None and artifact.precision != "float32" else ""
        return own or self.precision

    def size(self) -> int:
        """Bytes on disk."""
        return sum(record.bytes for record in self.files.values())

    def part_files(self, part: str) -> set[str]:
        """The files of one component: its graphs (files, or what is in the folders of packages) and its weights."""
        artifact = self.artifacts.get(part)
        if artifact is None:
            return set()
        packages = tuple(f"{graph}/" for graph in (artifact.graph, *artifact.chunks))
        return {name for name in self.files if name in artifact.files() or name.startswith(packages)}

    def part_size(self, part: str) -> int:
        """Bytes on disk of one component."""
        return sum(self.files[name].bytes for name in self.part_files(part))
