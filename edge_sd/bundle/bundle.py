"""ModelBundle: a folder with a manifest, edge_sd.json, and one folder for each variant of the model.

    edge_sd.json        what is true of the weights, and of each variant and its files
    tokenizer/          vocab.json and merges.txt, CLIP's byte-pair encoding
    openvino-fp16/      a variant, in the layout of its own ecosystem (optimum-intel's, Apple's)

A variant exists once the manifest names it. The manifest is replaced in one rename after all files of a variant are on
disk, so what `variants` lists is whole. Every path in it is relative, uses "/", and may not leave the folder.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from ..errors import InvalidModel, VariantNotFound, choices
from ..files import FileRecord, hash_file, inside, parse_json, refuse_pointer, write_atomically
from ..sampling.schedule import NoiseSchedule
from .apple_resources import is_resources, read_resources
from .diffusers import diffusers_facts, exported_variants, torch_variants
from .facts import Defaults, Facts, LatentSpace, TextPart
from .library import MANIFEST, find_model
from .seen import Seen
from .variants import Artifact, Parity, Variant

T = TypeVar("T")
# In a variant's folder: what torch float32 drew of the same weights, with the request inside.
REFERENCE = "reference.png"
# Format 2 has a checksum of the manifest itself; format 1, which older versions wrote, has none.
FORMAT, OLDER = 2, (1,)
MANIFEST_LIMIT = 8 << 20
# Fields of a schedule that every manifest has; what later versions added has a default.
FIRST_FIELDS = {"num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
                "timestep_spacing", "steps_offset", "set_alpha_to_one", "rescale_betas_zero_snr"}  # fmt: skip
# Facts that manifests of the first versions do not have.
LATER: dict[str, Any] = {"conditioning": "", "pooled_width": 0, "zero_negative": False, "guidance_width": 0,
                         "inpainting": False, "instructed": False, "vae_float32": False, "denoiser": "unet",
                         "patch": 1, "blank_rows": 0, "text_only": False, "text_mask": False,
                         "guidance_factor": 0.0, "time_factor": 1.0,
                         "image_prompt": "", "image_tokens": 0, "image_side": 0}  # fmt: skip
# Up to this size a variant is hashed at every open (about 0.1 s); larger ones when asked.
ALWAYS_HASHED = 128 << 20


@dataclass(frozen=True)
class ModelBundle:
    """A model on disk. `open` reads it, `verify` hashes it, `write_manifest` publishes a change of it.

    Args:
        root: The model's folder.
        facts: What is true of the weights, whatever runs them.
        variants: Name -> a backend's form of the model in one precision.
        files: Path below `root` -> bytes and sha256 of the files that all variants share.
        others: The same of what no variant is drawn with: configs for other programs, the embedded model's judge.

    Example:
        bundle = ModelBundle.open("emoji")
        print(list(bundle.variants), bundle.defaults.steps, bundle.verify())
    """

    root: Path
    facts: Facts
    variants: dict[str, Variant]
    files: dict[str, FileRecord] = field(default_factory=dict)
    others: dict[str, FileRecord] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.facts.name

    @property
    def defaults(self) -> Defaults:
        return self.facts.defaults

    @classmethod
    def open(cls, model: str | Path) -> ModelBundle:
        """Open a model by installed name or folder: a bundle, an OpenVINO export, or torch weights (diffusers).

        Raises ModelNotFound, or InvalidModel when the folder is damaged or no model.
        """
        root = find_model(model)
        return with_torch(read_manifest(root)) if (root / MANIFEST).is_file() else open_foreign(root)

    def defaults_of(self, variant: str) -> Defaults:
        """Defaults of `variant` for fields that a request leaves None."""
        return self.variant(variant).defaults or self.defaults

    def variant(self, name: str) -> Variant:
        if name not in self.variants:
            raise VariantNotFound(f"{self.name} has no variant {name!r}; it has: {choices(self.variants)}")
        return self.variants[name]

    def reference(self, variant: str) -> Path | None:
        """The picture that `variant` was measured beside when it was converted, where it was kept."""
        name = f"{variant}/{REFERENCE}"
        return self.path(name) if name in self.variant(variant).files else None

    def path(self, relative: str) -> Path:
        """The place of a path out of the manifest; InvalidModel if it would lead out of the folder."""
        return inside(self.root, relative)

    def check(self, variant: str) -> list[str]:
        """Refuse files that are missing, cut short or damaged; which files without a hash were replaced, as notes.

        A small variant is hashed. A large one, and another program's export, is hashed at first use here, and then
        compared by its size and a sample (seen.py).
        """
        records = {**self.files, **self.variant(variant).files}
        thorough = sum(record.bytes for record in records.values()) <= ALWAYS_HASHED
        problems, notes = list(self._problems(records, thorough)), []
        sampled = {name: record for name, record in records.items() if not (thorough and record.sha256)}
        if sampled and not problems:
            found = Seen.of(self.root).open(sampled)
            problems, notes = found.problems, found.notes
        for problem in problems:
            raise InvalidModel(f"{self.name}: {problem}; install or convert the model again")
        return notes

    def verify(self, variant: str | None = None) -> list[str]:
        """Every difference between the files and the manifest, one line each; empty when all is well."""
        wanted = self.variants if variant is None else {variant: self.variant(variant)}
        records = {**self.files, **self.others}
        for each in wanted.values():
            records |= each.files
        return list(self._problems(records, True))

    def unhashed(self) -> list[str]:
        """Files of variants that no manifest has hashed, such as another program's exports: `verify` passes them."""
        records = {name: record for each in self.variants.values() for name, record in each.files.items()}
        return sorted(name for name, record in records.items() if not record.sha256)

    def require(self, prefix: str) -> None:
        """Refuse damage in those of `others` whose path begins so. Raises InvalidModel."""
        records = {name: record for name, record in self.others.items() if name.startswith(prefix)}
        for problem in self._problems(records, True):
            raise InvalidModel(f"{self.name}: {problem}; install the model again")

    def _problems(self, records: Mapping[str, FileRecord], thorough: bool) -> Iterator[str]:
        with ThreadPoolExecutor(4) as pool:
            lines = pool.map(lambda item: _problem(self.path(item[0]), item[0], item[1], thorough), records.items())
            yield from (line for line in lines if line)

    def fingerprint(self, variant: str) -> str:
        """Ten hex digits that name the exact files of a variant; written into every picture."""
        digest = hashlib.sha256(self.variant(variant).sample.encode())
        for path, record in sorted({**self.files, **self.variant(variant).files}.items()):
            # Folders that others wrote have no hashes; their sizes tell most of them apart.
            digest.update(f"{path}\0{record.sha256 or record.bytes}\n".encode())
        return digest.hexdigest()[:10]

    def write_manifest(self) -> None:
        """Publish this state of the bundle in one rename."""
        document = {
            "format": FORMAT,
            **asdict(self.facts),
            "files": {path: asdict(record) for path, record in sorted(self.files.items())},
            "others": {path: asdict(record) for path, record in sorted(self.others.items())},
            # What torch runs is there as long as the weights are, and is recorded nowhere.
            "variants": {name: asdict(each) for name, each in sorted(self.variants.items()) if each.backend != "torch"},
        }
        document["checksum"] = checksum(document)
        write_atomically(self.root / MANIFEST, (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())


def open_foreign(root: Path) -> ModelBundle:
    """An optimum-intel export, torch weights as diffusers saves them, or Apple's `Resources/`, without hashes."""
    for folder in (root, root / "Resources"):
        if is_resources(folder):
            return ModelBundle(folder, *read_resources(folder))
    facts = diffusers_facts(root)
    return ModelBundle(root, facts, exported_variants(root, facts) or torch_variants(root))


def with_torch(bundle: ModelBundle) -> ModelBundle:
    """`bundle` with the torch weights that lie in its folder, if they do, as variants."""
    known = {**bundle.others, **{n: record for each in bundle.variants.values() for n, record in each.files.items()}}
    try:
        return replace(bundle, variants={**bundle.variants, **torch_variants(bundle.root, known)})
    except InvalidModel:
        return bundle


def _problem(path: Path, name: str, record: FileRecord, thorough: bool) -> str | None:
    try:
        size = path.stat().st_size
        if size != record.bytes:
            refuse_pointer(path)
            return f"{name} has {size} bytes, its manifest says {record.bytes}"
        if not path.is_file():
            return f"{name} is no file"
        if thorough and record.sha256 and hash_file(path) != record.sha256:
            return f"{name} is damaged (its sha256 differs from the manifest)"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    return None


def checksum(document: dict[str, Any]) -> str:
    """sha256 of a manifest's values, however its lines are broken; its own field is left out."""
    rest = {key: value for key, value in document.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_manifest(root: Path) -> ModelBundle:
    """Open the bundle in `root`; InvalidModel names what is wrong in its manifest."""
    path = root / MANIFEST
    try:
        if path.stat().st_size > MANIFEST_LIMIT:
            raise InvalidModel(f"{path} is larger than {MANIFEST_LIMIT >> 20} MB, which is no manifest")
        document = parse_json(path.read_text("utf-8"))
    except OSError as error:
        raise InvalidModel(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise InvalidModel(f"{path} is not valid JSON: {error}") from error
    if not isinstance(document, dict) or document.get("format") not in (FORMAT, *OLDER):
        found = document.get("format") if isinstance(document, dict) else type(document).__name__
        raise InvalidModel(f"{path} has format {found!r}; this version of edge-sd reads format {FORMAT}")
    if document["format"] == FORMAT and document.get("checksum") != checksum(document):
        raise InvalidModel(f"{path} is damaged (its checksum differs); install or convert the model again")
    try:
        bundle = _parse(root, document)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        detail = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise InvalidModel(f"{path}: {detail}") from error
    for name in [
        *(text.tokenizer for text in bundle.facts.encoders),
        *bundle.files,
        *bundle.others,
        *(f for v in bundle.variants.values() for f in v.files),
    ]:
        bundle.path(name)
    for variant in bundle.variants.values():
        for artifact in variant.artifacts.values():
            for name in artifact.files():
                bundle.path(name)
    return bundle


def _fixed(value: Any) -> Any:
    """A list as a tuple, so that it can't change."""
    return tuple(value) if isinstance(value, list) else value


def _typed(kind: type[T], row: Any) -> T:
    """A dataclass of plain values out of a JSON object. Raises TypeError for a value of another type than its default.

    A whole number is taken for a float; true and false are no numbers.
    """
    if not isinstance(row, dict):
        raise TypeError(f"{kind.__name__} is {row!r}, no object")
    types = {each.name: str(each.type) for each in fields(kind)}  # type: ignore[arg-type]
    allowed = {"int": (int,), "float": (int, float), "str": (str,)}
    for name, value in row.items():
        wanted = types.get(name)
        if wanted in allowed and (isinstance(value, bool) or not isinstance(value, allowed[wanted])):
            raise TypeError(f"{name!r} is {value!r}, no {wanted}")
        if isinstance(value, int | float) and not math.isfinite(value):
            raise ValueError(f"{name!r} is {value!r}")
    return kind(**row)


def _names(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(each, str) for each in values):
        raise TypeError(f"{values!r} is no list of names")
    return tuple(values)


def _records(rows: Any) -> dict[str, FileRecord]:
    if not isinstance(rows, dict):
        raise TypeError(f"{rows!r} is no object of files")
    return {str(path): _typed(FileRecord, row) for path, row in rows.items()}


def _parse(root: Path, document: dict[str, Any]) -> ModelBundle:
    for key in ("schedule", "latents", "defaults", "variants", "files"):
        if not isinstance(document[key], dict):
            raise TypeError(f"{key!r} is no object")
    if missing := FIRST_FIELDS - set(document["schedule"]):
        raise ValueError(f"'schedule' lacks {choices(missing)}")
    for key in ("max_tokens", "text_width"):
        if type(document[key]) is not int or document[key] < 1:
            raise ValueError(f"{key!r} is no positive number")
    facts = Facts(
        name=str(document["name"]),
        family=document["family"],
        schedule=NoiseSchedule.from_config(document["schedule"]),
        latents=_typed(LatentSpace, {key: _fixed(value) for key, value in document["latents"].items()}),
        defaults=_typed(Defaults, document["defaults"]),
        tokenizer=str(document["tokenizer"]),
        max_tokens=document["max_tokens"],
        text_width=document["text_width"],
        license=str(document["license"]),
        texts=tuple(_typed(TextPart, text) for text in document.get("texts", [])),
        pooled_nets=_names(document.get("pooled_nets", [])),
        **{name: type(default)(document.get(name, default)) for name, default in LATER.items()},
    )
    variants = {}
    for name, entry in document["variants"].items():
        artifacts = {
            component: Artifact(
                graph=str(row["graph"]),
                weights=_names(row["weights"]),
                inputs=_names(row["inputs"]),
                outputs=_names(row["outputs"]),
                parity=_typed(Parity, row["parity"]) if row.get("parity") else None,
                lora=str(row["lora"]) if row.get("lora") else None,
                pieces=str(row["pieces"]) if row.get("pieces") else None,
                chunks=_names(row.get("chunks", [])),
                precision=str(row.get("precision", "")),
                quantized=str(row.get("quantized", "")),
            )
            for component, row in entry["artifacts"].items()
        }
        files = _records(entry["files"])
        variants[name] = Variant(
            str(entry["backend"]),
            str(entry["precision"]),
            artifacts,
            files,
            str(entry.get("source", "")),
            str(entry.get("compute", "")),
            _typed(Defaults, entry["defaults"]) if entry.get("defaults") else None,
            str(entry.get("target", "")),
        )
    shared, others = (_records(document.get(key, {})) for key in ("files", "others"))
    return ModelBundle(root, facts, variants, shared, others)
