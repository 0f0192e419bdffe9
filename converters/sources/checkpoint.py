"""Single-file checkpoints (single_file.py) -> a diffusers folder, which is what a Source is.

A file of a denoiser alone becomes one with the rest of a `base`, a diffusers folder of its family.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from edge_sd.bundle.library import HUB_RECORD, MANIFEST, find_model, find_pulled
from edge_sd.errors import ConversionError, InvalidModel, InvalidRequest
from edge_sd.files import read_json, scratch
from edge_sd.text.tokenizer import END, START, read_vocabulary

from .components import write_json
from .parts import link
from .plain import opened
from .sdnq import decoded
from .single_file import CLIP_L, KINDS, SD3_L, SD3_T5, VAE, XL_L, Checkpoint
from .single_file_configs import denoiser_config, model_index, scheduler_config, text_config, vae_config
from .vocabulary import installed_vocabulary

# The second tokenizers of SDXL and SD 2's fill up with "!", id 0, SD 1's with the end of the text.
PADDED_WITH_ZERO = "!"


@contextmanager
def unpacked(
    source: str | Path,
    beside: Path,
    *,
    tokenizer: Path | None = None,
    prediction: str | None = None,
    base: str | None = None,
) -> Iterator[str | Path]:
    """`source` if it is no file; else a diffusers folder of the checkpoint, beside `beside` and removed at the end.

    Raises InvalidModel (the checkpoint) or InvalidRequest (what a folder does not take, or a checkpoint needs).
    """
    path = _file_of(source)
    if path is None:
        if tokenizer is not None or prediction is not None or base is not None:
            raise InvalidRequest(
                "--tokenizer, --prediction and --base belong to single-file checkpoints; a folder has all three"
            )
        folder = Path(source) if Path(source).is_dir() else find_pulled(str(source))
        if folder is None or not (folder / "model_index.json").is_file():
            yield source
            return
        with _decoded(folder, beside) as whole:
            # By its own name, where nothing was to be decoded: a name may stand for more than a folder.
            yield source if whole == folder else whole
        return
    parent = beside.absolute().parent
    if not parent.is_dir():
        raise InvalidRequest(f"the folder {str(parent)!r}, where the bundle would go, does not exist")
    with scratch(parent / f"{beside.name}.unpacked") as folder:
        try:
            made = unpack(path, folder / path.stem, tokenizer=tokenizer, prediction=prediction, base=base)
            for place in list(path.parents)[:2]:
                if (place / HUB_RECORD).is_file():
                    # Its licence, and what the catalogue knows of how to draw with it.
                    shutil.copyfile(place / HUB_RECORD, made / HUB_RECORD)
        except OSError as error:
            raise ConversionError(f"{parent}: {error.strerror or error}; nothing was made") from error
        with _decoded(made, beside) as whole:
            yield whole


@contextmanager
def _decoded(folder: Path, beside: Path) -> Iterator[Path]:
    """As sdnq.decoded, with a disk's errors as ConversionError."""
    with ExitStack() as stack:
        try:
            made = stack.enter_context(decoded(folder, beside))
        except OSError as error:
            parent = beside.absolute().parent
            raise ConversionError(f"{parent}: {error.strerror or error}; nothing was made") from error
        yield made


def _file_of(source: str | Path) -> Path | None:
    """The checkpoint that `source` is: a file, or the only one of a model that was pulled from the hub."""
    if Path(source).is_file():
        return Path(source)
    folder = Path(source) if Path(source).is_dir() else find_pulled(str(source))
    if folder is None or (folder / "model_index.json").is_file() or not (folder / HUB_RECORD).is_file():
        return None
    files = [path for path in folder.rglob("*.safetensors") if path.is_file()]
    return files[0] if len(files) == 1 else None


def unpack(
    path: Path,
    folder: Path,
    *,
    tokenizer: Path | None = None,
    prediction: str | None = None,
    base: str | Path | None = None,
) -> Path:
    """Write the checkpoint in `path` as a diffusers folder; weights keep their type. Raises as `unpacked`."""
    with opened(path, folder) as weights:
        return _unpack(Checkpoint.of(weights), folder, tokenizer, prediction, base)


def _unpack(
    checkpoint: Checkpoint, folder: Path, tokenizer: Path | None, prediction: str | None, base: str | Path | None
) -> Path:
    if base is not None:
        if tokenizer is not None or prediction is not None:
            raise InvalidRequest("--base has a tokenizer and a scheduler; leave --tokenizer and --prediction out")
        return _unpack_onto(checkpoint, find_model(base, weights=True), folder)
    kind = KINDS[checkpoint.kind]
    prediction = checkpoint.prediction(prediction)
    denoiser, vae = denoiser_config(checkpoint), vae_config(checkpoint, kind)
    texts = {part: text_config(checkpoint, prefix) for part, prefix in checkpoint.texts.items()}
    vocabulary = _vocabulary(checkpoint, tokenizer, next(iter(texts.values()))["vocab_size"])
    t5 = _t5_tokenizer(checkpoint, tokenizer) if "text_encoder_3" in texts else None
    folder.mkdir(parents=True)
    checkpoint.write_denoiser(folder / checkpoint.denoiser.part, denoiser)
    checkpoint.write_vae(folder / "vae", vae)
    for part, prefix in checkpoint.texts.items():
        if prefix == SD3_T5:
            checkpoint.write_text(folder / part, texts[part], prefix)
            shutil.copytree(str(t5), folder / "tokenizer_3")
            continue
        first = prefix in (CLIP_L, XL_L, SD3_L) or PADDED_WITH_ZERO not in vocabulary[0]
        pad = END if first else PADDED_WITH_ZERO
        ids = {"bos_token_id": START, "eos_token_id": END, "pad_token_id": pad}
        texts[part] |= {name: vocabulary[0][token] for name, token in ids.items()}
        checkpoint.write_text(folder / part, texts[part], prefix)
        length = texts[part]["max_position_embeddings"]
        _write_tokenizer(folder / part.replace("text_encoder", "tokenizer"), vocabulary, pad, length)
    scheduler = scheduler_config(checkpoint, prediction)
    write_json(folder / "scheduler/scheduler_config.json", scheduler)
    write_json(folder / "model_index.json", model_index(kind, denoiser, scheduler["_class_name"], texts))
    return folder


def _unpack_onto(checkpoint: Checkpoint, base: Path, folder: Path) -> Path:
    """The denoiser of a checkpoint, in a folder of links to the rest of `base`.

    Raises InvalidModel for a base of another family, InvalidRequest where the checkpoint has more than a denoiser.
    """
    if not (base / "model_index.json").is_file():
        raise InvalidModel(f"{base} is no base: it has no model_index.json, as a diffusers folder has")
    denoiser = checkpoint.denoiser
    named = read_json(base / "model_index.json").get(denoiser.part)
    found = named[1] if isinstance(named, list) and len(named) == 2 else None
    if found != denoiser.kind:
        raise InvalidModel(
            f"{checkpoint.name} is of {denoiser.title}, a {denoiser.kind}; the {denoiser.part} of {base} is "
            f"{found or 'not there'}"
        )
    own = base / denoiser.part / "config.json"
    config = denoiser_config(checkpoint, read_json(own) if own.is_file() else None)
    parts = {denoiser.part}
    folder.mkdir(parents=True)
    checkpoint.write_denoiser(folder / denoiser.part, config)
    if checkpoint.has(VAE) and (base / "vae/config.json").is_file():
        checkpoint.write_vae(folder / "vae", read_json(base / "vae/config.json"))
        parts.add("vae")
    for part, prefix in checkpoint.texts.items():
        if (base / part / "config.json").is_file():
            checkpoint.write_text(folder / part, read_json(base / part / "config.json"), prefix)
            parts.add(part)
    for each in base.iterdir():
        if each.name not in parts and each.name != MANIFEST:
            link(each, folder / each.name)
    return folder


def _t5_tokenizer(checkpoint: Checkpoint, given: Path | None) -> Path:
    """The folder of T5's tokenizer, which no package has. Raises InvalidRequest."""
    if given is not None:
        folder = given if given.is_dir() else find_model(str(given))
        if (folder / "tokenizer_3/tokenizer.json").is_file():
            return folder / "tokenizer_3"
    raise InvalidRequest(
        f"{checkpoint.name} has a T5, but not its tokenizer: give --tokenizer FOLDER with tokenizer/ and tokenizer_3/, "
        "or --base FOLDER with the rest of the model"
    )


def _vocabulary(checkpoint: Checkpoint, given: Path | None, size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token -> id and the merges: of a folder, or of a package that is installed. Raises InvalidRequest."""
    found = read_vocabulary(_tokenizer_in(given)) if given is not None else installed_vocabulary()
    if found is None:
        raise InvalidRequest(
            f"{checkpoint.name} has no tokenizer inside, as no checkpoint has: give --tokenizer FOLDER "
            "(vocab.json and merges.txt, or a model that has one), or pip install --no-deps open_clip_torch"
        )
    if len(found[0]) != size or not {START, END} <= set(found[0]):
        raise InvalidRequest(
            f"the tokenizer has {len(found[0])} tokens, the text encoder of {checkpoint.name} {size}: "
            "give --tokenizer FOLDER with the one that it was trained with"
        )
    return found


def _tokenizer_in(given: Path) -> Path:
    """The folder itself, or the tokenizer of a model that was named."""
    folder = given if given.is_dir() else find_model(str(given))
    return folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder


def _write_tokenizer(
    folder: Path, vocabulary: tuple[dict[str, int], list[tuple[str, str]]], pad: str, length: int
) -> None:
    write_json(folder / "vocab.json", vocabulary[0])
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in vocabulary[1])]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
    marks = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    write_json(
        folder / "tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, **marks}
    )
