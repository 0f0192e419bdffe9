"""Differences of a model's weights, out of files that people share: LoRA and its kin.

    LoRA   (Hu et al. 2022, arXiv:2106.09685)       W + s B A                         A: down, B: up
    LoHa   (Hyeon-Woo et al. 2022, arXiv:2108.06098)  W + s (w1_a w1_b) * (w2_a w2_b)   * entry by entry
    LoKr   (Yeh et al. 2024, arXiv:2309.14859)      W + s kron(w1, w2)                either may be w_a w_b
    full                                            W + diff

s is alpha / rank: alpha is a tensor of the file, or stands in its config (lora_strength.py); without either s is 1. The
keys are read in lora_names.py.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..bundle.parts import DENOISERS
from ..bundle.safetensors import read
from ..errors import InvalidModel, InvalidRequest, choices
from ..files import hash_file
from .lora_names import Key, flat, refused_form, split
from .lora_original import is_sd3, of_rows, placed
from .lora_strength import CONFIG_FILE, Strength, config_strength, header_strengths

Array = NDArray[np.float32]
# One number, or one for each part.
Weight = TypeVar("Weight")
# Parts with the same weight names: a UNet that takes control has the UNet's.
SAME = {"controlled_unet": "unet"}


@dataclass(frozen=True)
class Difference:
    """What is added to one weight: the tensors of its form by name, and the factor s."""

    tensors: Mapping[str, Array]
    scale: float

    def of(self, shape: tuple[int, ...], factor: float = 1.0) -> Array:
        """`factor` times the difference for a weight of `shape`, [out, in] or [out, in, k, k].

        Raises ValueError where the tensors make another shape.
        """
        # Shapes are compared before anything is multiplied: equal counts may be another model's weight.
        if (made_shape := product_shape(self.tensors)) != (shape[0], math.prod(shape[1:])):
            raise ValueError(f"{list(made_shape)} where the weight is {list(shape)}")
        t, thin = self.tensors, self.factors(factor)
        factor *= self.scale
        if "diff" in t:
            made = t["diff"]
        elif "mid" in t:
            up, down = (t[name].reshape(len(t[name]), -1) for name in ("up", "down"))
            made = np.einsum("or,rskl,si->oikl", up, t["mid"], down)
        elif thin is not None:
            made, factor = thin[1] @ thin[0], 1.0
        elif "hada_w1_a" in t:
            made = _hada(t, "1") * _hada(t, "2")
        else:
            made = _kron(t, shape)
        made = made.reshape(shape)
        return np.asarray(made if factor == 1 else made * np.float32(factor), np.float32)

    def factors(self, factor: float = 1.0) -> tuple[Array, Array] | None:
        """The difference as `up @ down`, times `factor`: down [r, n], up [out, r]; None for other forms.

        The factor is applied to `up`, the smaller matrix.
        """
        t = self.tensors
        if "up" not in t or "mid" in t:
            return None
        down, up = (t[name].reshape(len(t[name]), -1) for name in ("down", "up"))
        return np.asarray(down, np.float32), np.asarray(up * np.float32(self.scale * factor), np.float32)


def _hada(t: Mapping[str, Array], n: str) -> Array:
    a, b, core = t[f"hada_w{n}_a"], t[f"hada_w{n}_b"], t.get(f"hada_t{n}")
    return a @ b if core is None else np.einsum("ij...,jr,ip->pr...", core, b, a)


def _kron(t: Mapping[str, Array], shape: tuple[int, ...]) -> Array:
    w1 = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    if "lokr_w2" in t:
        w2 = t["lokr_w2"]
    elif "lokr_t2" in t:
        w2 = np.einsum("ij...,ip,jr->pr...", t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"])
    else:
        w2 = t["lokr_w2_a"] @ t["lokr_w2_b"].reshape(len(t["lokr_w2_b"]), -1)
    if len(shape) == 4:
        w2 = w2.reshape(len(w2), -1, *shape[2:])
        w1 = w1[:, :, None, None]
    return np.kron(w1, w2)


@dataclass(frozen=True)
class Lora:
    """A file of differences.

    Args:
        name: The file's name, as a prompt writes it.
        sha256: Hash of the file; of the file and of the config beside it where the strength is read there.
        modules: (part, name of a module with "_" for ".") -> its difference.
        unknown: Keys in none of the forms above.
        remarks: Assumptions made while reading it, as notes.

    Example:
        lora = read_lora("style.safetensors")
        print(lora.has("unet"), lora.unknown)
    """

    name: str
    sha256: str
    modules: Mapping[tuple[str, str], Difference] = field(compare=False, repr=False)
    unknown: tuple[str, ...] = field(default=(), compare=False)
    remarks: tuple[str, ...] = field(default=(), compare=False)

    def check(self, text_width: int, denoiser: str = "unet") -> None:
        """Raise InvalidRequest where it was made for another kind of denoiser, or one that attends to another text."""
        other = next((part for part, _ in self.modules if part in DENOISERS and part != denoiser), None)
        if other is not None:
            raise InvalidRequest(
                f"the LoRA {self.name!r} is for another family: it changes a {other}, this model has a {denoiser}"
            )
        for (part, module), difference in self.modules.items():
            if part == "unet" and module.endswith("attn2_to_k") and "down" in difference.tensors:
                found = difference.tensors["down"].shape[1]
                if found != text_width:
                    raise InvalidRequest(
                        f"the LoRA {self.name!r} is for another family: its cross attention reads text of {found} "
                        f"numbers, this model's {text_width}"
                    )

    def has(self, part: str) -> bool:
        """Whether it changes anything of that part."""
        return any(where == SAME.get(part, part) for where, _ in self.modules)

    def differences(self, part: str, names: Iterable[str]) -> dict[str, Difference]:
        """Module -> its difference, for those of a component's modules `names` that the file changes."""
        known = {flat(name): name for name in names}
        mine = self._of_part(part)
        return {known[module]: each for module, each in mine.items() if module in known}

    def unplaced(self, part: str, names: Iterable[str]) -> tuple[str, ...]:
        """Modules of the file that a component with the modules `names` lacks."""
        return tuple(sorted(set(self._of_part(part)) - {flat(name) for name in names}))

    def _of_part(self, part: str) -> dict[str, Difference]:
        return {module: each for (where, module), each in self.modules.items() if where == SAME.get(part, part)}

    def notes(self, parts: Iterable[str], unplaced: Iterable[str] = ()) -> list[str]:
        """What of the file had no effect on a model of `parts`, by name; `unplaced` are modules that they lack."""
        absent = [f"{part} {module}" for part, module in self.modules if part not in parts]
        missing = [*self.unknown, *unplaced, *absent]
        if not missing:
            return list(self.remarks)
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        return [
            *self.remarks,
            f"the LoRA {self.name!r} has what this model has no place for: {', '.join(missing[:3])}{more}",
        ]


class Unplaced:
    """Modules of LoRAs that loaded components lack. Loading records them, notes of results name them."""

    def __init__(self) -> None:
        self._modules: dict[tuple[str, str], tuple[str, ...]] = {}

    def record(self, lora: Lora, part: str, modules: tuple[str, ...]) -> None:
        """Replace what was known of this component: it may have been loaded from another variant."""
        self._modules[lora.sha256, SAME.get(part, part)] = modules

    def of(self, lora: Lora) -> list[str]:
        """Modules that one of the components lacks."""
        return [module for (sha256, _), modules in self._modules.items() if sha256 == lora.sha256 for module in modules]


Change = tuple[Lora, float, Difference]


def changes_of(
    loras: Sequence[tuple[Lora, float]],
    part: str,
    names: Iterable[str],
    name: str,
    unplaced: Unplaced | None = None,
) -> dict[str, list[Change]]:
    """Module -> what is added to its weight, of the modules `names` of the component `part`, a file called `name`.

    Raises InvalidRequest where a LoRA for this part changes none of them.
    """
    names, added = list(names), dict[str, list[Change]]()
    for lora, factor in loras:
        found = lora.differences(part, names)
        if lora.has(part) and not found:
            raise InvalidRequest(f"the LoRA {lora.name!r} changes nothing that {name} has; it is for another model")
        if unplaced is not None:
            unplaced.record(lora, part, lora.unplaced(part, names))
        for module, difference in found.items():
            added.setdefault(module, []).append((lora, factor, difference))
    return added


def find_loras(
    given: Mapping[str | Path, Weight], named: Mapping[str, Weight], folder: Path | None
) -> dict[Path, Weight]:
    """File -> weight of those that were given, and of those that a prompt names, which lie in `folder`.

    Raises InvalidRequest for a name that is not there, or is there twice.
    """
    found = {Path(path): weight for path, weight in given.items()}
    known = {path.stem: path for path in sorted(folder.rglob("*.safetensors"))} if folder else {}
    for name, weight in named.items():
        if name not in known:
            valid = choices(known) if folder else "none: give the folder that it lies in"
            raise InvalidRequest(f"the prompt names the LoRA {name!r}; valid: {valid}")
        found.setdefault(known[name], weight)
    stems = [path.stem for path in found]
    if twice := sorted({stem for stem in stems if stems.count(stem) > 1}):
        raise InvalidRequest(f"two LoRAs are called {twice[0]!r}; give one of them another name")
    return found


def read_lora(path: str | Path) -> Lora:
    """The differences in a safetensors file. A pipeline reads files by itself; this is to look into one.

    Raises InvalidRequest (no such file) or InvalidModel (damaged, of a form not offered, or no LoRA).

    Example:
        lora = read_lora("style.safetensors")
        print(len(lora.modules), lora.unknown)
    """
    path = Path(path)
    stored = read(path)
    if refused := refused_form(stored.tensors):
        raise InvalidModel(
            f"{path.name} is {_a(refused[0])} ({refused[1]}), which is not offered; LoRA, LoHa and LoKr are"
        )
    strengths, part, notes, config = _strengths(path, stored.metadata, stored.tensors)
    groups: dict[tuple[str, str], tuple[Key, dict[str, NDArray[Any]]]] = {}
    unknown = []
    for name, value in stored.tensors.items():
        if (key := split(name, part)) is None:
            unknown.append(name)
        else:
            groups.setdefault((key.part, key.module), (key, {}))[1][key.kind] = value
    modules: dict[tuple[str, str], Difference] = {}
    original = is_sd3(module for _, module in groups)
    for place, (key, tensors) in groups.items():
        strength = strengths.get(key.part, strengths.get(""))
        try:
            found = _difference(tensors, strength, key.dotted)
            modules |= _apart(key.module, found) if original and key.part in DENOISERS else {place: found}
        except ValueError as error:
            raise InvalidModel(f"{path.name} is damaged: {key.dotted} {error}") from error
    if not modules:
        raise InvalidModel(f"{path.name} is no LoRA: it holds {', '.join(sorted(unknown)[:3]) or 'nothing'}")
    digest = hash_file(path)
    if config:
        digest = hashlib.sha256(f"{digest} {config}".encode()).hexdigest()
    return Lora(path.stem, digest, modules, tuple(unknown), notes)


def _apart(module: str, difference: Difference) -> dict[tuple[str, str], Difference]:
    """What a difference of an original module of SD 3 is of diffusers'. Raises ValueError (see lora_original.py)."""
    shape = product_shape(difference.tensors)
    made = {}
    for name, rows in placed(module, shape).items():
        whole = len(rows) == shape[0] and (rows[:-1] < rows[1:]).all()
        tensors = difference.tensors if whole else of_rows(difference.tensors, rows)
        made["transformer", name] = Difference(tensors, difference.scale)
    return made


def _a(name: str) -> str:
    return f"an {name}" if name[0] in "AO" else f"a {name}"


def _strengths(
    path: Path, metadata: Mapping[str, str], keys: Iterable[str]
) -> tuple[dict[str, Strength], str, tuple[str, ...], str]:
    """Strengths by part, the part of keys without a prefix, notes, and the hash of the config, "" without one."""
    if found := header_strengths(metadata, path.name):
        return found, "unet", (), ""
    names = [key for key in keys if key.startswith("base_model.model.")]
    if not names:
        return {}, "unet", (), ""
    if beside := config_strength(path):
        return {"": beside[0]}, beside[1], (), hash_file(path.with_name(CONFIG_FILE))
    if any(name.endswith(".alpha") for name in names):
        return {}, "unet", (), ""
    return {}, "unet", (f"the LoRA {path.stem!r} has no {CONFIG_FILE} beside it: alpha is taken to be its rank",), ""


def _difference(tensors: Mapping[str, NDArray[Any]], strength: Strength | None, module: str) -> Difference:
    """Raises ValueError for tensors that are incomplete, do not multiply, or are no numbers of a LoRA."""
    if kinds := _incomplete(tensors):
        raise ValueError(f"has {', '.join(sorted(tensors))}, but no {kinds}")
    if whole := [kind for kind, value in tensors.items() if kind != "alpha" and value.dtype.kind != "f"]:
        raise ValueError(f"has a {whole[0]} of whole numbers ({tensors[whole[0]].dtype}), which needs a scale")
    if any(not np.isfinite(value).all() for value in tensors.values()):
        raise ValueError("holds NaN or infinity")
    single = {kind: np.asarray(value, np.float32) for kind, value in tensors.items()}
    alpha = single.pop("alpha", None)
    product_shape(single)
    rank = next((len(single[kind]) for kind in ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b") if kind in single), 0)
    told = None if strength is None or "diff" in single else strength.factor(module, rank)
    if alpha is None or not rank:
        return Difference(single, 1.0 if told is None else told)
    if alpha.size != 1:
        raise ValueError(f"has {alpha.size} numbers for its alpha")
    own = float(alpha.ravel()[0]) / rank
    if told is not None and not math.isclose(own, told, rel_tol=1e-3):
        raise ValueError(f"has alpha / rank {own:g} as a tensor, and {told:g} by its config")
    return Difference(single, own)


def product_shape(t: Mapping[str, Array]) -> tuple[int, int]:
    """Rows of the difference that tensors make, and numbers in a row; nothing is multiplied.

    Raises ValueError where they do not fit each other.
    """
    shape = {kind: value.shape for kind, value in t.items()}
    if scalars := [kind for kind, each in shape.items() if len(each) < 2 and kind != "diff"]:
        raise ValueError(f"has a {scalars[0]} of the shape {list(shape[scalars[0]])}")
    if "diff" in t:
        rows, *rest = shape["diff"] or (1,)
        return rows, math.prod(rest)
    if "up" in t:
        up, down = ((len(t[kind]), math.prod(shape[kind][1:])) for kind in ("up", "down"))
        if "mid" not in t:
            return _chain(shape, "up", up, "down", down)
        mid = shape["mid"]
        outer = _chain(shape, "up", up, "mid", (mid[0], math.prod(mid[1:])))
        _chain(shape, "mid", (mid[0], mid[1]), "down", down)
        return outer[0], down[1] * math.prod(mid[2:])
    if "hada_w1_a" in t:
        first, second = _rebuilt(shape, "hada_w1", "hada_t1"), _rebuilt(shape, "hada_w2", "hada_t2")
        if first != second:
            raise ValueError(f"has products of the shapes {list(first)} and {list(second)}")
        return first
    (a, b), (c, d) = _rebuilt(shape, "lokr_w1", "lokr_t1"), _rebuilt(shape, "lokr_w2", "lokr_t2")
    return a * c, b * d


Shapes = Mapping[str, tuple[int, ...]]


def _rebuilt(shape: Shapes, name: str, core: str) -> tuple[int, int]:
    """Shape (rows, columns) of a LoKr factor: stored whole, as a product of two matrices, or with a core between."""
    if name in shape:
        return shape[name][0], math.prod(shape[name][1:])
    a, b = shape[f"{name}_a"], shape[f"{name}_b"]
    if core not in shape:
        return _chain(shape, f"{name}_a", (a[0], math.prod(a[1:])), f"{name}_b", (b[0], math.prod(b[1:])))
    t = shape[core]
    if (t[0], t[1]) != (a[0], b[0]) or len(a) != 2 or len(b) != 2:
        raise ValueError(f"has {core} {list(t)}, {name}_a {list(a)} and {name}_b {list(b)}, which do not multiply")
    return a[1], b[1] * math.prod(t[2:])


def _chain(shape: Shapes, left: str, first: tuple[int, int], right: str, second: tuple[int, int]) -> tuple[int, int]:
    if first[1] != second[0]:
        raise ValueError(f"has {left} {list(shape[left])} and {right} {list(shape[right])}, which do not multiply")
    return first[0], second[1]


def _incomplete(tensors: Mapping[str, Any]) -> str:
    """Which tensor a difference lacks, or ""."""
    kinds = set(tensors) - {"alpha"}
    if kinds & {"down", "up", "mid"}:
        wanted = {"down", "up"}
    elif any(kind.startswith("hada") for kind in kinds):
        wanted = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
    elif any(kind.startswith("lokr") for kind in kinds):
        wanted = set()
        for n in "12":
            wanted |= {f"lokr_w{n}"} if f"lokr_w{n}" in kinds else {f"lokr_w{n}_a", f"lokr_w{n}_b"}
    else:
        wanted = {"diff"}
    return ", ".join(sorted(wanted - kinds))
