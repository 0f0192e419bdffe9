"""A checkpoint in one file, in its makers' names: what it is, and its tensors as diffusers names them.

What a checkpoint is, is read from the names and shapes of its tensors, never from its file's name. Keys are translated
by diffusers' own functions. Pickles are never opened.

    model.diffusion_model.                        the denoiser (denoisers.py); may be absent in a file of it alone
    first_stage_model.                            the autoencoder
    cond_stage_model.transformer.text_model.      SD 1: CLIP ViT-L, 768 numbers; "text_model." may be absent
    cond_stage_model.model.                       SD 2: OpenCLIP ViT-H, 1024; its last layer is not used
    conditioner.embedders.0.transformer., .1.model.   SDXL: ViT-L and OpenCLIP bigG, 768 + 1280
    conditioner.embedders.0.model.                SDXL's refiner: bigG alone
    text_encoders.clip_l., .clip_g., .t5xxl.transformer.   SD 3: ViT-L, bigG and T5, each of which may be absent
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from edge_sd.errors import InvalidModel, InvalidRequest, choices

from .components import QUANTIZED, most_of, write_component
from .denoisers import DENOISERS, SD3, UNET, Denoiser, find, other
from .plain import Weights

PREDICTIONS = ("epsilon", "v_prediction")
DENOISER, VAE = "model.diffusion_model.", "first_stage_model."
CLIP_L, CLIP_H = "cond_stage_model.transformer.", "cond_stage_model.model."
XL_L, XL_G = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
REFINER_G = "conditioner.embedders.0.model."
SD3_L, SD3_G = "text_encoders.clip_l.transformer.", "text_encoders.clip_g.transformer."
SD3_T5 = "text_encoders.t5xxl.transformer."
# Text encoders in transformers' names, behind a prefix.
OURS = (CLIP_L, XL_L, SD3_L, SD3_G)
# Whatever a checkpoint has beside its denoiser.
OTHER_PARTS = (VAE, "cond_stage_model.", "conditioner.", "text_encoders.", "model_ema.")
# Tensors that trainers leave behind and no picture needs.
LEFT_BEHIND = re.compile(r"position_ids$|logit_scale$|attn_mask$|^first_stage_model\.(loss|model_ema)\.|^model_ema\.")
# Marks of models that predict v, and of schedules that end in noise alone; not a number of theirs is used.
V_MARK, ZERO_SNR_MARK = "v_pred", "ztsnr"
# Marks of models preconditioned as EDM's (Karras et al. 2022): statistics of Playground 2.5's latents, ends of CosXL's
# levels. `prediction` calls the first "edm" and the second "edm_v".
EDM_MEAN, EDM_STD = "edm_mean", "edm_std"
EDM_V_MAX, EDM_V_MIN = "edm_vpred.sigma_max", "edm_vpred.sigma_min"


@dataclass(frozen=True)
class Kind:
    """A family: its pipeline in diffusers, the prefix of each text encoder, usual pixels a side, scale of latents."""

    family: str
    pipeline: str
    text: Mapping[str, str]
    side: int
    scale: float
    shift: float | None = None


KINDS = {
    "sd1": Kind("sd1", "StableDiffusion", {"text_encoder": CLIP_L}, 512, 0.18215),
    "sd2": Kind("sd2", "StableDiffusion", {"text_encoder": CLIP_H}, 512, 0.18215),
    "sdxl": Kind("sdxl", "StableDiffusionXL", {"text_encoder": XL_L, "text_encoder_2": XL_G}, 1024, 0.13025),
    "refiner": Kind("sdxl", "StableDiffusionXLImg2Img", {"text_encoder_2": REFINER_G}, 1024, 0.13025),
    "sd3": Kind(
        "sd3", "StableDiffusion3", {"text_encoder": SD3_L, "text_encoder_2": SD3_G, "text_encoder_3": SD3_T5}, 1024,
        1.5305, 0.0609,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """What a file's header tells: name -> shape of each tensor, and the metadata.

    A denoiser's tensors have the prefix DENOISER here, whatever they have in the file, which is in `stored`.
    `file` is where the numbers are, where that is not `path` (see plain.py).
    """

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]
    stored: Mapping[str, str] = field(default_factory=dict)
    file: Callable[[], Path] | None = None

    @classmethod
    def of(cls, weights: Weights) -> Checkpoint:
        """Raises InvalidModel for one without a denoiser that is known."""
        stored = _stored(weights.shapes)
        shapes = {name: weights.shapes[own] for name, own in stored.items()}
        checkpoint = cls(weights.path, shapes, weights.metadata, stored, weights.file)
        _ = checkpoint.denoiser  # None that is known: the error is raised here.
        return checkpoint

    @property
    def name(self) -> str:
        return self.path.name

    @cached_property
    def denoiser(self) -> Denoiser:
        """What its denoiser is. Raises InvalidModel."""
        found = self._found
        if found is not None:
            return found[0]
        if known := other(self.shapes):
            offered = choices([each.title for each in DENOISERS])
            raise InvalidModel(f"{self.name} is of {known}, which is not offered in one file; offered: {offered}")
        few = ", ".join(sorted(self.shapes)[:2]) or "nothing"
        raise InvalidModel(f"{self.name} is no whole checkpoint: it has no denoiser that is known; it holds {few}, …")

    @cached_property
    def _found(self) -> tuple[Denoiser, str, bool] | None:
        return find(self.shapes)

    @property
    def original(self) -> bool:
        """Whether its denoiser is in its makers' names, not in diffusers'."""
        return self._found is not None and self._found[2]

    @cached_property
    def kind(self) -> str:
        """A key of KINDS, by the tensors that only that family has. Raises InvalidModel."""
        if not self.has(DENOISER) or not self.has(VAE):
            alone = f"{self.denoiser.title} is in it alone" if self.has(DENOISER) else "it has no UNet"
            lacks = "" if self.has(VAE) else "it has no autoencoder; "
            raise InvalidModel(
                f"{self.name} is no whole checkpoint: {lacks}{alone}; give --base FOLDER with the rest of the model"
            )
        wanted = {
            "sd3": (SD3_L, SD3_G),
            "sdxl": (XL_L, XL_G),
            "refiner": (REFINER_G,),
            "sd2": (CLIP_H,),
            "sd1": (CLIP_L,),
        }
        for name, prefixes in wanted.items():
            if all(map(self.has, prefixes)):
                return name
        raise InvalidModel(
            f"{self.name} is no whole checkpoint: it has no text encoder of SD 1, SD 2, SDXL or SD 3 "
            f"({CLIP_L}…, {CLIP_H}…, {XL_L}… or {SD3_L}…); give --base FOLDER with the rest of the model"
        )

    @property
    def texts(self) -> dict[str, str]:
        """The text encoders that it has: folder in diffusers -> prefix."""
        kinds = [each for each in KINDS.values() if all(map(self.has, [each.text[part] for part in _needed(each)]))]
        return {part: prefix for part, prefix in kinds[-1].text.items() if self.has(prefix)} if kinds else {}

    def has(self, prefix: str) -> bool:
        return any(name.startswith(prefix) for name in self.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises InvalidModel where there is no such tensor."""
        if name not in self.shapes:
            raise InvalidModel(f"{self.name} lacks {name}")
        return self.shapes[name]

    @property
    def edm(self) -> str | None:
        """ "edm" (Playground 2.5) or "edm_v" (CosXL) where it is marked as such."""
        return "edm" if {EDM_MEAN, EDM_STD} <= set(self.shapes) else "edm_v" if EDM_V_MAX in self.shapes else None

    def prediction(self, wish: str | None) -> str:
        """What the UNet predicts: as asked for, as the file is marked, or as all of its family do.

        Raises InvalidRequest where only the person can know: SD 2 was published both ways, in the same shapes.
        """
        if wish is not None and wish not in PREDICTIONS:
            raise InvalidRequest(f"unknown prediction {wish!r}; valid: {choices(PREDICTIONS)}")
        if edm := self.edm:
            if wish is not None:
                raise InvalidRequest(f"{self.name} is marked as an EDM model; leave --prediction {wish} out")
            return edm
        told = self.metadata.get("modelspec.prediction_type", "").lower()
        marked = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon"}.get(told)
        if V_MARK in self.shapes:
            marked = "v_prediction"
        if wish or marked:
            return wish or str(marked)
        if self.kind == "sd2":
            raise InvalidRequest(
                f"{self.name} does not say what it predicts, and SD 2 was published both ways: give --prediction "
                "v_prediction (768 pixels) or --prediction epsilon (512 pixels, and inpainting)"
            )
        return "epsilon"

    def numbers(self, name: str) -> list[float]:
        """The numbers of a small tensor."""
        from safetensors import safe_open

        self.shape(name)
        with safe_open(self._file, "pt") as opened:
            return [float(value) for value in opened.get_tensor(self.stored.get(name, name)).flatten().tolist()]

    def side(self, usual: int) -> int:
        """Pixels of its usual square: what its metadata says, or what is usual."""
        found = re.fullmatch(r"(\d+)x\1", self.metadata.get("modelspec.resolution", ""))
        return int(found[1]) if found else usual

    @property
    def _file(self) -> Path:
        return self.path if self.file is None else self.file()

    def tensors(self, prefix: str) -> dict[str, Any]:
        """Torch tensors of a component, under their full names."""
        from safetensors import safe_open

        with safe_open(self._file, "pt") as opened:
            names = [name for name in self.shapes if name.startswith(prefix) and not LEFT_BEHIND.search(name)]
            return {name: opened.get_tensor(self.stored.get(name, name)) for name in names}

    @cached_property
    def _types(self) -> dict[str, str]:
        """Name in the file -> type, of tensors that were quantized (see plain.py)."""
        found: dict[str, str] = json.loads(self.metadata.get(QUANTIZED, "{}"))
        return found

    def quantized(self, prefix: str) -> str:
        """What most of a component's numbers were quantized to, as Q4_K; "" for none."""
        names = {name: self.stored.get(name, name) for name in self.shapes if name.startswith(prefix)}
        types = {name: self._types[own] for name, own in names.items() if own in self._types}
        return most_of(types, {name: math.prod(self.shapes[name]) for name in types})

    def write_denoiser(self, folder: Path, config: dict[str, Any]) -> None:
        import diffusers
        from diffusers.loaders import single_file_utils

        denoiser, given = self.denoiser, self.tensors(DENOISER)
        translate = getattr(single_file_utils, denoiser.translate)
        if denoiser is UNET and self.original:
            self._write(folder, config, given, translate, diffusers.UNet2DConditionModel, DENOISER)
            return
        given = {name.removeprefix(DENOISER): x for name, x in given.items()}
        if not self.original:
            # In diffusers' names, nothing is to be translated.
            def translate(tensors: dict[str, Any], **_: Any) -> dict[str, Any]:
                return {name: tensors.pop(name) for name in list(tensors)}

        def convert(tensors: dict[str, Any], _: Any) -> dict[str, Any]:
            for name in denoiser.unused:
                # Some are always there in its makers' files, which diffusers counts on.
                tensors.setdefault(name, None)
            made: dict[str, Any] = translate(tensors)
            for name in denoiser.unused:
                tensors.pop(name, None)
                made.pop(name, None)
            return _of_weights(made, denoiser)

        self._write(folder, config, given, convert, getattr(diffusers, denoiser.kind), DENOISER, takes=True)

    def write_vae(self, folder: Path, config: dict[str, Any]) -> None:
        from diffusers import AutoencoderKL
        from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

        self._write(folder, config, self.tensors(VAE), convert_ldm_vae_checkpoint, AutoencoderKL, VAE)

    def write_text(self, folder: Path, config: dict[str, Any], prefix: str) -> None:
        import torch
        import transformers
        from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint, convert_open_clip_checkpoint

        kind = getattr(transformers, config["architectures"][0])
        given = self.tensors(prefix)
        if prefix == SD3_T5:
            plain = {name.removeprefix(prefix): x for name, x in given.items()}
            # The embeddings may be there under a second name.
            plain.pop("encoder.embed_tokens.weight", None)
            self._write(folder, config, plain, lambda tensors, _: dict(tensors), kind, prefix)
            return
        if prefix in OURS:
            if not self.has(f"{prefix}text_model."):  # What old merges and transformers from 5.6 on write.
                given = {
                    name
                    if name.startswith(f"{prefix}text_projection")
                    else name.replace(prefix, f"{prefix}text_model.", 1): x
                    for name, x in given.items()
                }

            def named(tensors: dict[str, Any], _: Any) -> dict[str, Any]:
                made: dict[str, Any] = convert_ldm_clip_checkpoint(tensors, remove_prefix=prefix)
                if prefix == SD3_L and "text_projection.weight" not in made:
                    # Left out where it changes nothing.
                    made["text_projection.weight"] = torch.eye(config["hidden_size"])
                return made

            self._write(folder, config, given, named, kind, prefix)
            return
        if prefix == CLIP_H:
            last = f"{prefix}transformer.resblocks.{config['num_hidden_layers']}."
            given = {name: x for name, x in given.items() if not name.startswith((last, f"{prefix}text_projection"))}

        def convert(tensors: dict[str, Any], _: Any) -> dict[str, Any]:
            class Model:
                class config:
                    hidden_size = self.shape(f"{prefix}positional_embedding")[1]

            # The projection's rows are taken for the width, which they are in all that was published.
            made = convert_open_clip_checkpoint(Model, tensors, prefix=prefix)
            return {name: x for name, x in made.items() if x is not None}

        self._write(folder, config, given, convert, kind, prefix)

    def _write(
        self, folder: Path, config: dict[str, Any], given: dict[str, Any], convert: Callable[..., Any], kind: Any,
        prefix: str, *, takes: bool = False,
    ) -> None:  # fmt: skip
        write_component(self.name, folder, config, given, convert, kind, takes=takes, quantized=self.quantized(prefix))


def _stored(shapes: Mapping[str, Any]) -> dict[str, str]:
    """Name here -> name in the file: a denoiser's tensors get one prefix."""
    found = find(shapes)
    if found is None:
        return {name: name for name in shapes}
    prefix = found[1]
    alone = prefix == ""
    return {
        DENOISER + name.removeprefix(prefix)
        if (name.startswith(prefix) and not (alone and name.startswith(OTHER_PARTS)))
        else name: name
        for name in shapes
    }


def _needed(kind: Kind) -> list[str]:
    """The text encoders that a family's whole checkpoints have; T5 may be left out."""
    return [part for part in kind.text if part != "text_encoder_3"]


def _of_weights(made: dict[str, Any], denoiser: Denoiser) -> dict[str, Any]:
    """Without a row around learned tokens, which other programs write flat."""
    if denoiser is not SD3:
        return {name: x[None] if name.endswith("pad_token") and x.ndim == 1 else x for name, x in made.items()}
    name = "pos_embed.pos_embed"
    return {**made, name: made[name][None]} if name in made and made[name].ndim == 2 else made
