"""What of a repository's files is a model: which files are pulled, and where they go in the model's folder.

A repository may hold the same model in several forms. Each form is found by the names of its files alone:

openvino    an export of optimum-intel: openvino_model.xml in unet/ or transformer/, at the top or in one folder
coreml      packages in Apple's layout (apple/ml-stable-diffusion): Unet.mlmodelc, or ..._unet.mlpackage
torch       a diffusers folder with safetensors; or one component of it, such as an autoencoder
checkpoint  one .safetensors file
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from posixpath import commonpath

from ..errors import InvalidModel, InvalidRequest, choices
from ..files import hash_file
from .parts import DENOISERS, TEXT_ENCODERS

INDEX = "model_index.json"
# Folders of a diffusers repository that are components; others hold samples, older weights, other programs' forms.
FOLDERS = frozenset({*TEXT_ENCODERS, "tokenizer", "tokenizer_2", "tokenizer_3", *DENOISERS, "vae", "vae_tiny",
                     "vae_large", "scheduler", "safety_checker", "feature_extractor"})  # fmt: skip
# SDXS has an AutoencoderTiny in vae/, and the autoencoder that it imitates here.
LARGE_VAE = "vae_large"
# Folders of an OpenVINO export: those with a graph, and those with texts alone.
GRAPHS = (*TEXT_ENCODERS, *DENOISERS, "vae_decoder", "vae_encoder")
TEXTS = ("tokenizer", "tokenizer_2", "tokenizer_3", "scheduler")
# The denoiser's folder, and its graph, which show what a repository holds.
WEIGHTED = tuple(f"{name}/" for name in DENOISERS)
EXPORTED = tuple(f"{name}/openvino_model.xml" for name in DENOISERS)
PICKLES = (".ckpt", ".pt", ".pth", ".pkl")
# Names of pickles that end in .bin, as OpenVINO's and Core ML's weights do.
PICKLED_BIN = re.compile(
    r"(?:pytorch_model|diffusion_pytorch_model|model|adapter_model|pytorch_lora_weights)[\w.-]*\.bin"
)
# The weights of a component that has a repository of its own, such as an autoencoder, or a CLIP for `compare`.
PART_WEIGHTS = ("diffusion_pytorch_model.", "model.")
# In the name of a weight file in float16 that lies beside the same in float32.
HALF = ".fp16"
# Apple's converter names a package ..._unet.mlpackage; its Swift programs want Unet.mlpackage or Unet.mlmodelc.
PACKAGES = {
    "text_encoder": "TextEncoder", "text_encoder_2": "TextEncoder2", "unet": "Unet", "unet_chunk1": "UnetChunk1",
    "unet_chunk2": "UnetChunk2", "vae_decoder": "VAEDecoder", "vae_encoder": "VAEEncoder",
    "safety_checker": "SafetyChecker",
}  # fmt: skip
PACKAGE = re.compile(r"(?P<folder>.*/|)(?P<stem>[^/]+)(?P<suffix>\.mlmodelc|\.mlpackage)/(?P<rest>.+)")
VOCABULARY = ("vocab.json", "merges.txt")
# The forms of a model, in the order in which `models pull` takes them.
FORMS = ("torch", "openvino", "checkpoint", "coreml")


@dataclass(frozen=True)
class Remote:
    """A file of a repository.

    size     bytes
    sha256   its hash, where it is stored as a large file; "" where not
    git      the hash that git has of it, where it is small
    place    where it goes in the model's folder, if not to its own name
    """

    name: str
    size: int
    sha256: str = ""
    git: str = ""
    place: str = ""

    @property
    def at(self) -> str:
        """Its path in the model's folder."""
        return self.place or self.name

    def matches(self, path: Path) -> bool:
        """Whether the file in `path` is this one, byte for byte."""
        if path.stat().st_size != self.size:
            return False
        if self.sha256:
            return hash_file(path) == self.sha256
        data = path.read_bytes()
        return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest() == self.git


@dataclass(frozen=True)
class Wish:
    """What of a repository is wanted.

    forms     the forms that are taken, the best first
    half      float16 weights where there are both
    file      the checkpoint of a repository that has several
    layouts   words in the folders of Core ML packages, the best first: split_einsum for the Neural Engine, original
              for the GPU
    compiled  whether compiled Core ML models, which macOS alone reads, go before packages; None takes packages alone
    """

    forms: tuple[str, ...] = FORMS
    half: bool = False
    file: str | None = None
    layouts: tuple[str, ...] = ("split_einsum", "original")
    compiled: bool | None = None


@dataclass(frozen=True)
class Selection:
    """The files of a model, and the form that they are."""

    form: str
    files: tuple[Remote, ...]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(each.size for each in self.files)


def forms_of(files: Iterable[Remote]) -> set[str]:
    """The forms that a repository holds, by the names of its files."""
    there = {each.name for each in files}
    found = set()
    if INDEX in there and any(each.startswith(WEIGHTED) and ".safetensors" in each for each in there):
        found.add("torch")
    if not found and _is_part(there):
        found.add("torch")
    if any(each.endswith(EXPORTED) for each in there):
        found.add("openvino")
    if any(_package_folders(there)):
        found.add("coreml")
    if any(each.endswith(".safetensors") and "/" not in each for each in there):
        found.add("checkpoint")
    return found


def select(name: str, files: Iterable[Remote], wish: Wish | None = None) -> Selection:
    """The model in repository `name`, in the first form of `wish` that it has.

    Raises InvalidRequest (several checkpoints and none named, or a form that it has not), InvalidModel (no form of a
    model in files that are safe to open).
    """
    wish = wish or Wish()
    there = {each.name: each for each in files}
    if wish.file is not None:
        return Selection("checkpoint", (_checkpoint(name, there, wish.file),))
    found = forms_of(there.values())
    for form in wish.forms:
        if form not in found:
            continue
        if form == "openvino":
            return Selection(form, tuple(_export(name, there)))
        if form == "coreml":
            packages = _packages(name, there, wish)
            if packages:
                return Selection(form, tuple(packages))
        elif form == "checkpoint":
            return Selection(form, (_checkpoint(name, there, None),))
        elif INDEX in there:
            return Selection(form, tuple(_components(name, there, wish.half)))
        else:
            # Beside a component lies, now and then, a checkpoint of the same.
            own = [each for each in sorted(there) if "/" not in each]
            own = [each for each in own if ".safetensors" not in each or each.startswith(PART_WEIGHTS)]
            return Selection(form, tuple(there[each] for each in _of_folder(name, "", own, wish.half)))
    if found:
        raise InvalidRequest(f"{name} has no {' or '.join(wish.forms)}; it has: {choices(found)}")
    if INDEX in there:
        # It names the pickle, where that is what a component has.
        return Selection("torch", tuple(_components(name, there, wish.half)))
    raise InvalidModel(f"{name} has no safetensors: it has {_instead(there)}")


def _is_part(there: Iterable[str]) -> bool:
    names = set(there)
    return "config.json" in names and INDEX not in names and any(
        each.startswith(PART_WEIGHTS) and ".safetensors" in each for each in names
    )  # fmt: skip


def _instead(there: Mapping[str, Remote]) -> str:
    """What a repository without a model holds, for the message."""
    if pickled := next(filter(is_pickle, there), ""):
        return f"only {pickled}, a pickle, which can run code when opened"
    if archive := next((each for each in there if each.endswith((".zip", ".tar", ".gz"))), ""):
        return f"only {archive}, an archive: unpack it yourself, and give the folder with --model"
    if gguf := next((each for each in there if each.endswith((".gguf", ".onnx"))), ""):
        return f"only {gguf}, which this program does not read"
    return "no weights"


def is_pickle(path: str) -> bool:
    """Whether a file's name is one that torch gives to pickles; OpenVINO and Core ML name weights .bin, too."""
    name = PurePosixPath(path).name
    if name == "openvino_model.bin" or ".mlpackage/" in path or ".mlmodelc/" in path:
        return False
    return name.endswith(PICKLES) or PICKLED_BIN.fullmatch(name) is not None


def _checkpoint(name: str, there: Mapping[str, Remote], file: str | None) -> Remote:
    checkpoints = [each for each in there if each.endswith(".safetensors")]
    if file is not None and file not in checkpoints:
        raise InvalidRequest(f"{name} has no safetensors file {file!r}; it has: {choices(checkpoints)}")
    if file is None and len(checkpoints) > 1:
        raise InvalidRequest(f"{name} has several checkpoints; give --file with one of: {choices(checkpoints)}")
    return there[file or checkpoints[0]]


def _components(name: str, there: Mapping[str, Remote], half: bool) -> list[Remote]:
    folders: dict[str, list[str]] = {}
    for each in sorted(there):
        parts = PurePosixPath(each).parts
        if len(parts) == 2 and (parts[0] in FOLDERS or parts[0].startswith("controlnet")):
            folders.setdefault(parts[0], []).append(each)
    kept = [INDEX]
    for folder, names in folders.items():
        kept += _of_folder(name, folder, names, half)
    if LARGE_VAE not in folders:
        return [there[each] for each in kept]
    # The decoder that the others call small is ours to take with --decoder tiny.
    moved = {"vae": "vae_tiny", LARGE_VAE: "vae"}
    split = [(each, *each.partition("/")) for each in kept]
    return [replace(there[each], place=f"{moved.get(top, top)}{slash}{rest}") for each, top, slash, rest in split]


def _of_folder(name: str, folder: str, names: list[str], half: bool) -> list[str]:
    """The weights of one component in one type, its configs and texts."""
    weights = [each for each in names if ".safetensors" in each and "non_ema" not in each]
    small = [each for each in weights if HALF in each]
    plain = [each for each in weights if HALF not in each]
    pickled = [each for each in names if is_pickle(each)]
    if pickled and not weights:
        where = f" in {folder}" if folder else ""
        raise InvalidModel(
            f"{name} has no safetensors{where}: it has {pickled[0]}, a pickle, which can run code when opened"
        )
    kept = small if small and (half or not plain) else plain
    return kept + [each for each in names if each.endswith((".json", ".txt")) and ".index." not in each]


def _export(name: str, there: Mapping[str, Remote]) -> Iterator[Remote]:
    """The files of an OpenVINO export; one in a folder of the repository goes to the top of the model's."""
    found = min((each for each in there if each.endswith(EXPORTED)), key=len)
    prefix = found[: -len(next(each for each in EXPORTED if found.endswith(each)))]
    index = next((each for each in (f"{prefix}{INDEX}", INDEX) if each in there), None)
    if index is None:
        raise InvalidModel(f"{name} has {found}, but no {INDEX}, which says what it is an export of")
    yield replace(there[index], place=INDEX)
    for folder in (*GRAPHS, *TEXTS):
        own = f"{prefix}{folder}/"
        for each in sorted(there):
            rest = each.removeprefix(own)
            if not each.startswith(own) or "/" in rest:
                continue
            graph = folder in GRAPHS and rest in ("openvino_model.xml", "openvino_model.bin")
            if graph or rest.endswith((".json", ".txt")):
                yield replace(there[each], place=f"{folder}/{rest}")
    for folder in (*DENOISERS, "text_encoder", "vae_decoder"):
        if f"{prefix}{folder}/openvino_model.xml" in there and f"{prefix}{folder}/openvino_model.bin" not in there:
            raise InvalidModel(f"{name} has no {prefix}{folder}/openvino_model.bin")


def _package_folders(there: Iterable[str]) -> dict[tuple[str, str], dict[str, str]]:
    """(folder, suffix) -> Apple's name of a package -> its own, for folders that hold a whole model."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for each in there:
        match = PACKAGE.fullmatch(each)
        if match is None:
            continue
        stem = match["stem"]
        for ending, title in PACKAGES.items():
            if stem == title or stem.lower().endswith(f"_{ending}"):
                found.setdefault((match["folder"], match["suffix"]), {})[title] = stem
    whole = {}
    for place, packages in found.items():
        unet = "Unet" in packages or {"UnetChunk1", "UnetChunk2"} <= set(packages)
        if unet and {"TextEncoder", "VAEDecoder"} <= set(packages):
            whole[place] = packages
    return whole


def _packages(name: str, there: Mapping[str, Remote], wish: Wish) -> list[Remote]:
    """The packages of one Core ML model under the names that Apple's programs load, with the tokenizer's files."""
    suffixes = {True: (".mlmodelc", ".mlpackage"), False: (".mlpackage", ".mlmodelc"), None: (".mlpackage",)}
    order = suffixes[wish.compiled]
    whole = {place: each for place, each in _package_folders(there).items() if place[1] in order}
    if not whole:
        return []

    def rank(place: tuple[str, str]) -> tuple[int, int, str]:
        folder, suffix = place
        words = [n for n, word in enumerate(wish.layouts) if word in folder]
        return (min(words, default=len(wish.layouts)), order.index(suffix), folder)

    folder, suffix = min(whole, key=rank)
    chosen = whole[folder, suffix]
    if "Unet" in chosen:
        # Chunks are the same UNet in two, for telephones.
        chosen = {title: stem for title, stem in chosen.items() if not title.startswith("UnetChunk")}
    files = []
    for title, stem in chosen.items():
        own = f"{folder}{stem}{suffix}/"
        files += [
            replace(there[each], place=f"{title}{suffix}/{each.removeprefix(own)}")
            for each in sorted(there)
            if each.startswith(own)
        ]
    for text in VOCABULARY:
        found = [each for each in there if PurePosixPath(each).name == text and "tokenizer_2" not in each]
        if not found:
            raise InvalidModel(f"{name} has Core ML packages in {folder or '.'}, but no {text} for the tokenizer")
        nearest = max(sorted(found), key=lambda each: len(commonpath((each, folder))))
        files.append(replace(there[nearest], place=text))
    return files
