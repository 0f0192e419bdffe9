"""Source + form -> bundle. Resumable, atomic, and every component measured before the variant is listed.

A variant is made in `BUNDLE/.NAME.partial/`, a component at a time, so that only one is in memory. Each finished one
leaves a record there; a conversion that was stopped skips what is recorded. When all are there and close enough to
torch float32, the folder is renamed to its name and the manifest, rewritten in one rename, lists it.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from edge_sd.backends.openvino.mapping import forgetting
from edge_sd.bundle.bundle import REFERENCE, ModelBundle, read_manifest
from edge_sd.bundle.library import MANIFEST
from edge_sd.bundle.parts import kind_of
from edge_sd.bundle.variants import Artifact, Parity, Variant
from edge_sd.errors import ConversionError, InvalidRequest, MissingExtra, ParityError, choices
from edge_sd.files import FileRecord, is_partial, locked, record_file, write_atomically
from edge_sd.text.tokenizer import read_vocabulary
from edge_sd.text.whole import FILE as WHOLE
from edge_sd.text.whole import PromptTokenizer, open_tokenizer

from .form import Form, Made, Report
from .parity import CALIBRATION_STEPS, PROMPTS, ROUNDING, STEPS, STEPS_OF_HUGE, Arrays
from .recipes import PARTS, QuantRecipe
from .sources.source import Source
from .targets import form_named


def require_extra() -> None:
    """Raise MissingExtra unless all that conversion imports is installed."""
    from importlib.util import find_spec

    if not all(find_spec(name) for name in ("torch", "diffusers", "transformers", "safetensors", "nncf")):
        raise MissingExtra("converting models", "convert")


def build(source: Path | str, target: Path, form: Form | str, recipe: QuantRecipe, report: Report) -> ModelBundle:
    """Add the variant `FORM-RECIPE` of `source` to the bundle in `target`, which is made if it is not there.

    `form` is a backend's name where nothing else is wished. `report(what, share)` is told what is being done and how
    much is done, 0 to 1. A whole variant of the same source that exists already is kept.

    Raises InvalidModel (source), InvalidRequest (what the form cannot be), ParityError or ConversionError; the bundle
    is then as it was.
    """
    form = form_named(form) if isinstance(form, str) else form
    for each in recipe.each:
        if each.name not in form.recipes:
            raise InvalidRequest(f"{form.name} has no precision {each.name!r}; valid: {choices(form.recipes)}")
    require_extra()
    opened = Source.open(source)
    for each in recipe.each:
        form.check(opened, each)
    _check_named(opened, recipe)
    name = variant_name(form, recipe, opened.origin)
    with _translate_os_errors(target), _locked(target):
        fingerprint = opened.fingerprint()
        bundle = _existing(target, opened, name)
        # What is made of weights that were quantized already stands beside what is made of whole ones.
        if any(each.source != fingerprint for each in bundle.variants.values() if each.origin == opened.origin):
            raise InvalidRequest(f"{target} was made from other weights than {source}; give a new folder")
        if name in bundle.variants and not bundle.verify(name):
            report(f"{name} is already there", 1.0)
            return bundle
        staging = target / f".{name}.partial"
        with _hidden_if_fresh(target, staging):
            parts = opened.parts
            _check_space(opened, parts, recipe, target)
            # Writing to the disk goes on while the next component is made.
            with ThreadPoolExecutor(1) as disk:
                artifacts, records = _make_parts(opened, parts, fingerprint, form, recipe, staging, report, disk)
                form.finish(opened, staging)
                report("flushing to disk", 0.98)
            files = {}
            for path in _files(staging):
                _flush(path)
                own = path.relative_to(staging).as_posix()
                files[f"{name}/{own}"] = records.get(own) or record_file(path)
            shared = _publish_tokenizer(opened, target)
            others = {other: variant for other, variant in bundle.variants.items() if other != name}
            if name in bundle.variants:
                # It was damaged. Unlist it before its files are removed, so that every listed variant is whole.
                replace(bundle, variants=others).write_manifest()
            shutil.rmtree(target / name, ignore_errors=True)
            os.replace(staging, target / name)
            made = Variant(
                form.backend, recipe.base.name, artifacts, files, fingerprint, form.compute, target=form.lowest
            )
            variants = {**others, name: made}
            bundle = replace(bundle, variants=variants, files=shared)
            try:
                bundle.write_manifest()
            except OSError:
                # Not listed is not added.
                shutil.rmtree(target / name, ignore_errors=True)
                raise
    report(f"{name} is ready", 1.0)
    return bundle


def variant_name(form: Form, recipe: QuantRecipe, origin: str = "") -> str:
    """Name of the variant in the manifest, for this form and recipe, and what its weights were quantized to before."""
    return f"{form.name}-{recipe.name}{origin and f'_from-{origin}'}"


@contextlib.contextmanager
def _translate_os_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConversionError(f"{target}: {error.strerror or error}; nothing was added to the bundle") from error


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    """One conversion into a bundle at a time; a second waits, and then finds the work done."""
    if target.exists() and not target.is_dir():
        raise InvalidRequest(f"{target} is a file; give a folder for the bundle")
    if not target.absolute().parent.is_dir():
        raise InvalidRequest(f"the folder {str(target.absolute().parent)!r}, where the bundle would go, does not exist")
    with locked(target):
        yield


@contextlib.contextmanager
def _hidden_if_fresh(target: Path, staging: Path) -> Iterator[None]:
    """Clean up after an error (a kill leaves the staging folder, to go on from): no half variant, no empty bundle."""
    fresh = not target.exists()
    staging.mkdir(parents=True, exist_ok=True)
    for path in [*target.glob(".*.partial"), *staging.rglob(".*.partial")]:
        if path.is_file():
            path.unlink(missing_ok=True)
    try:
        yield
    except Exception:  # Whatever it is. Ctrl-C leaves the folder as a kill does, to go on from.
        shutil.rmtree(staging if not fresh else target, ignore_errors=True)
        raise


def _existing(target: Path, source: Source, name: str) -> ModelBundle:
    if (target / MANIFEST).is_file():
        bundle = read_manifest(target)
        theirs = replace(bundle.facts, name=source.facts.name)
        if theirs != source.facts:
            raise InvalidRequest(f"{target} holds another model ({bundle.name}); give a new folder")
        return bundle
    visible = {path.name for path in target.iterdir() if not path.name.startswith(".")} if target.is_dir() else set()
    # A kill just before the manifest was written leaves these two.
    if strange := visible - {*(text.tokenizer for text in source.facts.encoders), name}:
        raise InvalidRequest(f"{target} is neither empty nor a bundle (it holds {min(strange)}); give a new folder")
    return ModelBundle(target, source.facts, {})


def _check_named(source: Source, recipe: QuantRecipe) -> None:
    """Refuse a precision of its own for a part that the model does not have."""
    there = [name for name, parts in PARTS.items() if any(kind_of(part) in parts for part in source.parts)]
    for name, _ in recipe.parts:
        if name not in there:
            raise InvalidRequest(f"{source.facts.name} has no {name} that a precision is for; it has: {choices(there)}")


def _check_space(source: Source, parts: tuple[str, ...], recipe: QuantRecipe, target: Path) -> None:
    """Refuse up front a variant that would not fit the disk, by torch's bytes rescaled to the recipe's bits."""
    from safetensors import safe_open

    need = 0
    # Files that several components are of are written once, or nearly so.
    stored = {path: recipe.of(part).bits for part in reversed(parts) for path in source.weights(part)[0]}
    for path, bits in stored.items():
        with safe_open(path, "np") as file:
            for key in file.keys():  # noqa: SIM118 - not a mapping
                slice_ = file.get_slice(key)
                need += int(np.prod(slice_.get_shape(), dtype=np.int64)) * max(bits, 8) // 8
    free = shutil.disk_usage(target).free
    if free < need:
        raise ConversionError(
            f"{target} has {free >> 20} MB free, the variant needs about {need >> 20} MB; nothing was added"
        )


def _make_parts(
    source: Source,
    parts: tuple[str, ...],
    fingerprint: str,
    form: Form,
    recipe: QuantRecipe,
    staging: Path,
    report: Report,
    disk: Executor,
) -> tuple[dict[str, Artifact], dict[str, FileRecord]]:
    """The artifacts, and the records of their files; `disk` writes each file in the background as it is finished."""
    from .parity import save_reference

    name = variant_name(form, recipe, source.origin)
    state_path = staging / ".state.json"
    state = _resume(state_path, staging, {"source": fingerprint, "recipe": repr(recipe), "form": repr(form)})
    facts = source.facts
    tokenizers = {text.part: open_tokenizer(source.folder / text.tokenizer, text, facts) for text in facts.encoders}
    artifacts: dict[str, Artifact] = {}
    returned: dict[str, list[Arrays]] = {}
    for n, part in enumerate(parts):
        kept = staging / f".{part}.npz"
        if part in state["parts"]:
            with np.load(kept) as held:
                returned[part] = [{} for _ in _cases(source, form, recipe)]
                for index, each in (key.split(".", 1) for key in held):
                    returned[part][int(index)][each] = held[f"{index}.{each}"]
        else:

            def within(what: str, share: float, n: int = n, part: str = part) -> None:
                report(f"{name}: {part}{what and ', '}{what}", (n + share) / len(parts))

            within("", 0.0)
            row, returned[part] = _make_part(source, form, recipe, part, staging, tokenizers, returned, within)
            flat: dict[str, Any] = {f"{i}.{key}": x for i, each in enumerate(returned[part]) for key, x in each.items()}
            np.savez(kept, **flat)
            state["parts"][part] = row
            for file in row["files"]:
                disk.submit(_flush, staging / file)
            write_atomically(state_path, json.dumps(state).encode())
        row = state["parts"][part]
        made = Made(**row["made"])
        artifacts[part] = Artifact(
            graph=f"{name}/{made.graph}",
            weights=tuple(f"{name}/{weights}" for weights in made.weights),
            inputs=tuple(made.inputs),
            outputs=tuple(made.outputs),
            parity=Parity(**row["parity"]),
            chunks=tuple(f"{name}/{chunk}" for chunk in made.chunks),
            precision=made.precision or (own.name if (own := recipe.of(part)) != recipe.base else ""),
            quantized=source.quantized(part),
        )
    (_, _, steps), *_ = _cases(source, form, recipe)
    save_reference(returned["vae_decoder"][0]["picture"], source.facts, staging / REFERENCE, fingerprint, steps)
    for part in parts:
        (staging / f".{part}.npz").unlink()
    state_path.unlink()
    records = {name: FileRecord(**record) for row in state["parts"].values() for name, record in row["files"].items()}
    return artifacts, records


def _resume(state_path: Path, staging: Path, key: dict[str, Any]) -> dict[str, Any]:
    """The state of an interrupted run for the same source and wish, its files still whole; else an empty one."""
    empty: dict[str, Any] = {"key": key, "parts": {}}
    try:
        state: dict[str, Any] = json.loads(state_path.read_text("utf-8"))
        if state["key"] != key:
            return empty
        for part, row in list(state["parts"].items()):
            whole = all((staging / f).is_file() and record_file(staging / f) == FileRecord(**r)
                        for f, r in row["files"].items())  # fmt: skip
            if not whole or not (staging / f".{part}.npz").is_file():
                return empty
    except (OSError, ValueError, KeyError, TypeError):
        return empty
    return state


def _make_part(
    source: Source,
    form: Form,
    recipe: QuantRecipe,
    part: str,
    staging: Path,
    tokenizers: dict[str, PromptTokenizer],
    before: dict[str, list[Arrays]],
    report: Report,
) -> tuple[dict[str, Any], list[Arrays]]:
    """Convert one component and measure it; its row for the state file, and for each size what the next ones need."""
    from .parity import TorchComponent, record
    from .sources.mapped import places_of_module
    from .sources.wrappers import wrap

    own = recipe.of(part)
    wrapped = wrap(part, source.load(part, form.halves and own.bits <= 16), source.facts)
    component = TorchComponent(wrapped.module, tuple(wrapped.example), wrapped.outputs)
    results = []
    recording = replace(component.recording, facts=source.facts)
    # Of weights that are read from their file only what is computed with is in memory.
    with forgetting(places_of_module(wrapped.module)):
        for n, case in enumerate(_cases(source, form, recipe)):
            told = {name: each[n] for name, each in before.items()}
            results.append(record(part, component, source.facts, tokenizers, told, *case))
            if n + 1 == len(_measured(source, form, recipe)):
                recording = replace(recording, measured=len(recording.inputs))
        made = form.convert(wrapped, source, recipe, staging, recording, report)
    del wrapped, component.module
    # Torch's modules hold reference cycles, and measuring needs as much memory again, so collect now.
    gc.collect()
    parity = form.measure(part, made, staging, recording)
    if not parity.psnr >= own.floor:
        raise ParityError(
            f"{part} in {own.name} reaches {parity.psnr:.1f} dB against torch float32, "
            f"its floor is {own.floor:g} dB; nothing was added to the bundle"
        )
    paths = [path for place in made.places for path in _files(staging / place)]
    files = {path.relative_to(staging).as_posix(): asdict(record_file(path)) for path in paths}
    return {"made": asdict(made), "parity": asdict(parity), "files": files}, results


def _cases(source: Source, form: Form, recipe: QuantRecipe) -> list[tuple[tuple[int, int], str, int]]:
    """The pictures whose calls are recorded: sizes of latents, prompts, steps. First those that are measured on."""
    cases = _measured(source, form, recipe)
    if any(each.learns or (form.rounding and each.bits < 8) for each in recipe.each):
        cases += [(form.latents(source, recipe)[0], *picture) for picture in ROUNDING[:: _share(source)]]
    return cases


def _measured(source: Source, form: Form, recipe: QuantRecipe) -> list[tuple[tuple[int, int], str, int]]:
    """Those on which components are measured."""
    pictures = [(PROMPTS[0], _steps(source))]
    if recipe.calibrated:
        pictures = list(zip(PROMPTS, CALIBRATION_STEPS, strict=True))[:: _share(source)]
    return [(latents, *picture) for picture in pictures for latents in form.latents(source, recipe)]


def _steps(source: Source) -> int:
    """Steps of the picture that components are measured on: of one whose step takes a minute, the fewest."""
    return STEPS_OF_HUGE if source.is_huge else STEPS


def _share(source: Source) -> int:
    """Of models that take seconds for a step, a third as many pictures; of those that take a minute, one."""
    if source.is_huge:
        return len(PROMPTS)
    return 3 if source.is_large(source.facts.denoiser) else 1


def _publish_tokenizer(source: Source, target: Path) -> dict[str, FileRecord]:
    """The tokenizers of the bundle itself, which the runtime reads, whatever variants come and go."""
    records: dict[str, FileRecord] = {}
    for text in source.facts.encoders:
        folder = target / text.tokenizer
        folder.mkdir(exist_ok=True)
        if text.kind == "clip":
            vocabulary, merges = read_vocabulary(source.folder / text.tokenizer)
            lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
            write_atomically(folder / "vocab.json", json.dumps(vocabulary, ensure_ascii=False).encode())
            write_atomically(folder / "merges.txt", ("\n".join(lines) + "\n").encode())
        for name in (*([] if text.kind == "clip" else [WHOLE]), "tokenizer_config.json", "special_tokens_map.json"):
            if (source.folder / text.tokenizer / name).is_file():
                write_atomically(folder / name, (source.folder / text.tokenizer / name).read_bytes())
        records |= {f"{text.tokenizer}/{path.name}": record_file(path) for path in _files(folder)}
    return records


def _files(folder: Path) -> list[Path]:
    """Every file in a folder; a file is its own only one. What a killed process left half written is none."""
    paths = [folder] if folder.is_file() else sorted(path for path in folder.rglob("*") if path.is_file())
    return [path for path in paths if not is_partial(path)]


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
