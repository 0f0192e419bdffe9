"""Apple's `Resources/` as a bundle: Core ML packages beside vocab.json and merges.txt, as Swift programs load them.

Nothing there says what the weights are; it is read off the shapes. Text of 768 numbers is Stable Diffusion 1, of 1024
is Stable Diffusion 2, which predicts v where it draws 768 pixels (stabilityai's stable-diffusion-2-1 and -2-1-base).
Noise levels and the scale of latents are those of both families. `.mlpackage`s run everywhere, `.mlmodelc`s on macOS.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import InvalidModel
from ..files import FileRecord, refuse_pointer
from ..sampling.schedule import NoiseSchedule
from .apple_layout import LAYOUTS
from .facts import Defaults, Facts, LatentSpace
from .library import model_name
from .mlpackage.compiled import COMPILED, SUFFIXES, interface
from .mlpackage.package import Package
from .pulled import hashes, with_record
from .variants import Artifact, Variant

VOCABULARY = ("vocab.json", "merges.txt")
NEEDED = ("text_encoder", "unet", "vae_decoder")
SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
            "steps_offset": 1, "timestep_spacing": "leading", "set_alpha_to_one": False}  # fmt: skip


@dataclass(frozen=True)
class _Model:
    """Packages that follow one another as one component: their places, and names -> shapes of what goes in and out."""

    places: tuple[Path, ...]
    inputs: dict[str, tuple[int, ...]]
    outputs: tuple[str, ...]
    split: bool

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self.inputs:
            raise InvalidModel(f"{self.places[0]} has no input {name}; it is not in Apple's layout")
        return self.inputs[name]


def is_resources(root: Path) -> bool:
    """Whether a folder has a UNet where Apple's programs look for it."""
    return any((root / f"{name}{suffix}").is_dir() for name in ("Unet", "UnetChunk1") for suffix in SUFFIXES)


def read_resources(root: Path) -> tuple[Facts, dict[str, Variant]]:
    """The facts and the one variant of the folder, with the hashes of its pull, where it was one.

    Raises InvalidModel naming what is missing or strange.
    """
    for name in VOCABULARY:
        if not (root / name).is_file():
            raise InvalidModel(f"{root} has no {name}, which Apple's layout has beside the packages")
    names = {part: layout.package for part, layout in LAYOUTS.items()} | {"controlled_unet": "ControlledUnet"}
    found = {part: _find(root, name) for part, name in names.items()}
    found |= {"controlnet": _first_net(root)}
    models = {part: _read(places) for part, places in found.items() if places}
    for part in NEEDED:
        if part not in models:
            raise InvalidModel(f"{root} has no {names[part]}.mlpackage or {names[part]}{COMPILED}")
    artifacts: dict[str, Artifact] = {}
    files: dict[str, FileRecord] = {}
    known = hashes(root)
    for part, model in models.items():
        places = [place.relative_to(root).as_posix() for place in model.places]
        artifacts[part] = Artifact(places[0], (), tuple(model.inputs), model.outputs, chunks=tuple(places[1:]))
        for place in model.places:
            each = (path for path in sorted(place.rglob("*")) if path.is_file())
            there = {path.relative_to(root).as_posix(): path for path in each}
            files |= {name: known.get(name) or FileRecord(path.stat().st_size, "") for name, path in there.items()}
    compute = "ane" if models["unet"].split else "gpu"
    variant = Variant("coreml", "as converted", artifacts, files, compute=compute)
    try:
        facts = _facts(root, models)
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise InvalidModel(f"{root} is not in Apple's layout: {error}") from error
    return with_record(root, facts), {f"coreml-{compute}": variant}


def _find(root: Path, name: str) -> tuple[Path, ...]:
    """A component's packages: its chunks before the whole, as Swift programs choose."""
    for suffix in SUFFIXES:
        chunks = tuple(root / f"{name}Chunk{n}{suffix}" for n in (1, 2))
        if all(each.is_dir() for each in chunks):
            return chunks
        if (root / f"{name}{suffix}").is_dir():
            return (root / f"{name}{suffix}",)
    return ()


def _first_net(root: Path) -> tuple[Path, ...]:
    nets = [path for suffix in SUFFIXES for path in sorted((root / "controlnet").glob(f"*{suffix}"))]
    return tuple(nets[:1])


def _read(places: tuple[Path, ...]) -> _Model:
    inputs: dict[str, tuple[int, ...]] = {}
    outputs: tuple[str, ...] = ()
    split = False
    for path in (each for place in places for each in place.rglob("*") if each.is_file()):
        refuse_pointer(path)
    for place in places:
        if place.suffix == COMPILED:
            ports, outputs, operations = interface(place)
            given = {name: port.shape for name, port in ports.items()}
            split |= any("einsum" in kind.lower() for kind in operations)
        else:
            function = next(iter(sorted(Package.open(place).functions.items())))[1]
            given = {name: kind.shape for name, kind in function.inputs.items()}
            outputs = tuple(function.outputs)
            split |= any(each.kind == "einsum" for each in function.operations)
        # A second chunk reads outputs of the first, which are no inputs of the component.
        inputs |= {name: shape for name, shape in given.items() if not inputs or name in inputs}
    return _Model(places, inputs, outputs, split)


def _facts(root: Path, models: dict[str, _Model]) -> Facts:
    unet, decoder, text = (models[part] for part in ("unet", "vae_decoder", "text_encoder"))
    if "time_ids" in unet.inputs:
        raise InvalidModel(f"{root} is of SDXL, which is not opened in Apple's layout; convert its weights instead")
    context, sample, z = unet.shape("encoder_hidden_states"), unet.shape("sample"), decoder.shape("z")
    shaped = len(context) == len(sample) == len(z) == 4
    # A UNet for inpainting also takes the mask and the picture around it; one that edits by instruction, the picture.
    if not shaped or z[2:] != sample[2:] or sample[1] not in (z[1], 2 * z[1], 2 * z[1] + 1):
        raise InvalidModel(f"{root}: the UNet's sample {list(sample)} is not what its decoder takes, {list(z)}")
    encoder = models.get("vae_encoder")
    # Swift programs read the size of pictures off the encoder; without one it is the factor of both families.
    factor = encoder.shape("x")[2] // z[2] if encoder else LatentSpace().factor
    width, height = sample[3] * factor, sample[2] * factor
    family: Literal["sd1", "sd2"] = "sd2" if context[1] == 1024 else "sd1"
    prediction = "v_prediction" if family == "sd2" and max(width, height) >= 768 else "epsilon"
    return Facts(
        name=model_name(root),
        family=family,
        schedule=NoiseSchedule.from_config({**SCHEDULE, "prediction_type": prediction}),
        latents=LatentSpace(channels=z[1], factor=factor),
        defaults=Defaults(width=width, height=height),
        tokenizer=".",
        max_tokens=text.shape("input_ids")[1],
        text_width=context[1],
        inpainting=sample[1] == 2 * z[1] + 1,
        instructed=sample[1] == 2 * z[1],
    )
