"""Edits of Core ML packages: LoRAs, textual inversions and CLIP skip, in a copy with other weights or connections.

Core ML takes no weights as inputs, so a copy is made in the cache, named by all that decides it: the package's files
and the edits. The last few stay, so going back to one costs little. Weights that a LoRA changes are float16, or
float32, there, however many bits they had; a word's vectors are rows after the last of the table of embeddings.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...bundle.mlpackage.constexpr import Constants
from ...bundle.mlpackage.package import Function, Package
from ...bundle.mlpackage.rewrite import rewrite
from ...caches import cache_folder, code_digest
from ...components.edits import Edits
from ...components.lora import Change, changes_of
from ...errors import InvalidModel, InvalidRequest, OutputError
from ...files import FileRecord, record_file, scratch, sweep
from ...text.conditioning import HIDDEN
from ...text.textual_inversion import FIRST

Array = NDArray[Any]
# Copies that are kept, of all models together: a few LoRAs on a UNet and its text encoder.
KEPT = 8
RECORD = "files.json"
# What a converter calls a weight: torch's name, "_" for ".", between the names of modules that it was wrapped in and
# what became of it ("_to_fp16", "_palettized").
_WEIGHT = re.compile(
    r"(?:^|_)((?:down_blocks|up_blocks|mid_block|conv_in|conv_out|time_embedding|add_embedding|encoder_layers"
    r"|text_projection)(?:_\w+?)?)_weight(?:_|$)"
)
_TABLE = re.compile(r"token_embedding_weight(?:_|$)")
# Names in the Neural Engine's form (converters/coreml/ane.py) -> diffusers'.
_NEURAL_ENGINE = (
    (r"(attentions_\d+)_blocks_", r"\1_transformer_blocks_"),
    (r"(attn\d_to_out)$", r"\1_0"),
    (r"ff_proj_in$", "ff_net_0_proj"),
    (r"ff_proj_out$", "ff_net_2"),
    (r"(embedding_linear_\d|time_emb_proj)_conv$", r"\1"),
)
# What Apple's layout calls the states before the last layer of SDXL's encoders.
HIDDEN_EMBEDS = "hidden_embeds"
# Queries of that form have the softmax scale in them.
_SCALED = re.compile(r"attentions_\d+_blocks_\d+_attn\d_to_q_weight")


def edited(packages: Sequence[Path], digest: str, edits: Edits, name: str) -> list[Path]:
    """`packages` (the chunks of a component `name`) with `edits`, out of the cache or made there.

    `digest` is of the packages' files; with the edits and the code it is the key of a copy. Raises InvalidRequest for
    edits that have no place, OutputError where the cache can't hold the copies.
    """
    loras = "".join(f"{lora.sha256}{factor!r}" for lora, factor in edits.loras)
    vectors = b"" if edits.vectors is None else edits.vectors.tobytes()
    named = f"{code_digest()} {digest} {loras} {edits.clip_skip} {edits.states} "
    key = hashlib.sha256(named.encode() + vectors).hexdigest()[:16]
    home = cache_folder("edited")
    kept = home / key
    # Also where the copy exists: this finds the modules without a place and refuses a LoRA for another model.
    plans = _plans(packages, edits, name)
    if not _is_whole(kept):
        try:
            home.mkdir(parents=True, exist_ok=True)
            sweep(home)
            # Written beside and renamed, so that a reader never sees half of it.
            with scratch(kept) as beside:
                made = beside / key
                made.mkdir()
                for package, plan in zip(packages, plans, strict=True):
                    rewrite(package, made / package.name, plan.names, plan.value, plan.wires)
                files = [path for path in sorted(made.rglob("*")) if path.is_file()]
                records = {path.relative_to(made).as_posix(): asdict(record_file(path)) for path in files}
                (made / RECORD).write_text(json.dumps(records), "utf-8")
                if kept.exists():
                    os.replace(kept, beside / "damaged")
                os.replace(made, kept)
        except OSError as error:
            # Another process may have written it meanwhile.
            if not _is_whole(kept):
                raise OutputError(f"{home} cannot keep {name} with its changes ({error.strerror or error})") from error
    os.utime(kept)
    for old in sorted(home.glob("[0-9a-f]*"), key=lambda path: path.stat().st_mtime)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return [kept / package.name for package in packages]


def _is_whole(folder: Path) -> bool:
    """Whether a copy still has the sizes and hashes that were written."""
    try:
        records = {name: FileRecord(**row) for name, row in json.loads((folder / RECORD).read_text("utf-8")).items()}
        return all(record_file(folder / name) == record for name, record in records.items())
    except (OSError, ValueError, TypeError, AttributeError):
        return False


class _Plan:
    """The changes of one package: new values of constants, and operations that read another value."""

    def __init__(self, package: Path, name: str) -> None:
        self.name = name
        self.functions = list(Package.open(package).functions.values())
        self.constants = [Constants(function) for function in self.functions]
        self.modules: dict[str, list[str]] = {}
        self.changes: dict[str, list[Change]] = {}
        self.vectors: Array | None = None
        self.table = ""
        self.wires: dict[str, str] = {}
        for constants in self.constants:
            for constant in constants.operations:
                if module := _module(constant):
                    self.modules.setdefault(module, []).append(constant)

    @property
    def names(self) -> list[str]:
        changed = [constant for module in self.changes for constant in self.modules[module]]
        return list(dict.fromkeys([*changed, *([self.table] if self.table else [])]))

    def value(self, constant: str) -> Array:
        """The new value of one of `names`. Raises InvalidRequest for a difference of another shape."""
        place = next(n for n, each in enumerate(self.constants) if constant in each.operations)
        weight = self.constants[place].read(constant)
        if constant == self.table:
            assert self.vectors is not None
            return np.concatenate([weight, self.vectors.astype(weight.dtype)])
        weight = weight.astype(np.float32)
        module = _module(constant)
        factor = _query_scale(self.functions[place], constant) if _SCALED.search(constant) else 1.0
        for lora, share, difference in self.changes[module]:
            try:
                weight = weight + difference.of(weight.shape, share * factor)
            except ValueError as error:
                raise InvalidRequest(f"the LoRA {lora.name!r} does not fit this model: {module} is {error}") from error
        return weight

    def add_table(self, vectors: Array) -> bool:
        """Append rows to the embedding table. False where the package has no such table."""
        names = {name for each in self.constants for name in each.operations if _TABLE.search(name)}
        if not names:
            return False
        (self.table,) = names
        rows, width = self.constants[0].operations[self.table].outputs[0][1].shape
        if width != vectors.shape[1]:
            raise InvalidRequest(f"{self.name} has embeddings of {width} numbers, not {vectors.shape[1]}")
        self.vectors = vectors
        return rows + len(vectors) <= self._most_rows()

    def skip_layers(self, edits: Edits) -> None:
        """Let the final norm, or the output of states where there is one, read those of an earlier layer.

        The layers after it stay in the graph, unused.
        """
        for function in self.functions:
            norms = [each for each in function.operations if each.kind == "layer_norm"]
            # hidden_states.N is what the first of layer N's two norms reads; the last is what the final norm does.
            states = [each.inputs["x"][0] for each in norms[::2]]
            name = HIDDEN_EMBEDS if edits.states else norms[-1].name if norms else ""
            readers = [each for each in function.operations if each.name == name]
            if len(norms) % 2 == 0 or not readers or readers[0].inputs.get("x", [""])[0] not in states:
                raise InvalidRequest(f"{self.name} has no layers that CLIP skip knows")
            last = len(states) - 1
            if edits.clip_skip > last:
                raise InvalidRequest(
                    f"CLIP skip {edits.clip_skip} is beyond this model's text encoder; valid: 1 to {last}"
                )
            wanted = int(edits.states.removeprefix(HIDDEN)) if edits.states else last - edits.clip_skip + 1
            self.wires[name] = str(states[wanted])

    def _most_rows(self) -> int:
        """Largest table that the lookup can index: some targets use integers of 16 bits."""
        kinds = {"int8": 1 << 7, "uint8": 1 << 8, "int16": 1 << 15, "uint16": 1 << 16}
        types = {name: kind.dtype for f in self.functions for each in f.operations for name, kind in each.outputs}
        most = [
            kinds.get(types.get(index, ""), 1 << 24)
            for function in self.functions
            for each in function.operations
            if self.table in each.inputs.get("x", ())
            for index in each.inputs.get("indices", ())
            if isinstance(index, str)
        ]
        return min(most, default=0)


def _plans(packages: Sequence[Path], edits: Edits, name: str) -> list[_Plan]:
    plans = [_Plan(package, name) for package in packages]
    if edits.vectors is not None and not any(plan.add_table(edits.vectors) for plan in plans):
        raise InvalidRequest(f"{name} has no table of embeddings with room for words of your own")
    if edits.clip_skip > 1 or edits.states:
        for plan in plans:
            plan.skip_layers(edits)
    modules = [module for plan in plans for module in plan.modules]
    for module, changes in changes_of(edits.loras, edits.part, modules, name, edits.unplaced).items():
        for plan in plans:
            if module in plan.modules:
                plan.changes[module] = changes
    return plans


def _module(constant: str) -> str:
    """The module whose weight a constant is, as diffusers and transformers name it with "_" for "."; "" if none."""
    found = _WEIGHT.search(constant)
    if found is None:
        return ""
    name = found[1]
    for pattern, ours in _NEURAL_ENGINE:
        name = re.sub(pattern, ours, name)
    return name


def _query_scale(function: Function, constant: str) -> float:
    """1 / sqrt(d) of the heads that the queries of this weight are cut into; one head is not cut."""
    (reader,) = [each for each in function.operations if constant in each.inputs.get("weight", ())]
    channels = reader.outputs[0][1].shape[1]
    for each in function.operations:
        if each.kind == "split" and reader.name in each.inputs["x"]:
            channels = min(channels, each.outputs[0][1].shape[1])
    return float(channels**-0.5)


def known_ids(ids: Array, rows: int) -> Array:
    """Ids from text.textual_inversion.FIRST on, as the rows after a table's `rows`."""
    return np.where(ids >= FIRST, ids - FIRST + rows, ids)


def table_rows(package: Path) -> int:
    """How many rows a text encoder's table of embeddings has, before words are added. Raises InvalidModel."""
    for function in Package.open(package).functions.values():
        for each in function.operations:
            if _TABLE.search(each.name):
                return each.outputs[0][1].shape[0]
    raise InvalidModel(f"{package} has no table of embeddings")
