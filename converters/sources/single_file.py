"""A checkpoint in one file, in Stability's original names: what it is, and its tensors as diffusers names them.

What a checkpoint is, is read from the names and shapes of its tensors, never from its file's name. Keys are translated
by diffusers' own functions. Only safetensors are opened.

    model.diffusion_model.                        the UNet; 9 channels go in where it is for inpainting
    first_stage_model.                            the autoencoder
    cond_stage_model.transformer.text_model.      SD 1: CLIP ViT-L, 768 numbers; "text_model." may be absent
    cond_stage_model.model.                       SD 2: OpenCLIP ViT-H, 1024; its last layer is not used
    conditioner.embedders.0.transformer., .1.model.   SDXL: ViT-L and OpenCLIP bigG, 768 + 1280
    conditioner.embedders.0.model.                SDXL's refiner: bigG alone
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_sd.bundle.safetensors import check_readable
from edge_sd.errors import InvalidModel, InvalidRequest, choices

PREDICTIONS = ("epsilon", "v_prediction")
UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP_L, CLIP_H = "cond_stage_model.transformer.", "cond_stage_model.model."
XL_L, XL_G = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
REFINER_G = "conditioner.embedders.0.model."
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


KINDS = {
    "sd1": Kind("sd1", "StableDiffusion", {"text_encoder": CLIP_L}, 512, 0.18215),
    "sd2": Kind("sd2", "StableDiffusion", {"text_encoder": CLIP_H}, 512, 0.18215),
    "sdxl": Kind("sdxl", "StableDiffusionXL", {"text_encoder": XL_L, "text_encoder_2": XL_G}, 1024, 0.13025),
    "refiner": Kind("sdxl", "StableDiffusionXLImg2Img", {"text_encoder_2": REFINER_G}, 1024, 0.13025),
}


@dataclass(frozen=True)
class Checkpoint:
    """A file whose header was read: name -> shape of each tensor, and the metadata."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Raises InvalidModel for a pickle, a damaged file, or one of no family that is known."""
        from safetensors import SafetensorError, safe_open

        try:
            check_readable(path)
            if path.suffix in (".ckpt", ".pt", ".pth", ".bin"):
                raise InvalidModel(
                    f"{path.name} is a pickle, which can run code when opened; only safetensors are read"
                )
            with safe_open(path, "np") as opened:
                shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
                checkpoint = cls(path, shapes, opened.metadata() or {})
        except (SafetensorError, OSError) as error:
            raise InvalidModel(f"{path} is damaged or no safetensors file: {error}") from error
        _ = checkpoint.kind  # No known family: the error is raised here.
        return checkpoint

    @property
    def kind(self) -> str:
        """A key of KINDS, by the tensors that only that family has. Raises InvalidModel."""
        parts = {"UNet": UNET, "autoencoder": VAE}
        if missing := [what for what, prefix in parts.items() if not self.has(prefix)]:
            few = ", ".join(sorted(self.shapes)[:2]) or "nothing"
            raise InvalidModel(f"{self.path.name} is no whole checkpoint: it has no {missing[0]}; it holds {few}, …")
        for name, prefixes in {
            "sdxl": (XL_L, XL_G),
            "refiner": (REFINER_G,),
            "sd2": (CLIP_H,),
            "sd1": (CLIP_L,),
        }.items():
            if all(map(self.has, prefixes)):
                return name
        raise InvalidModel(
            f"{self.path.name} is no whole checkpoint: it has no text encoder of SD 1, SD 2 or SDXL "
            f"({CLIP_L}…, {CLIP_H}… or {XL_L}…)"
        )

    def has(self, prefix: str) -> bool:
        return any(name.startswith(prefix) for name in self.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises InvalidModel where there is no such tensor."""
        if name not in self.shapes:
            raise InvalidModel(f"{self.path.name} lacks {name}")
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
                raise InvalidRequest(f"{self.path.name} is marked as an EDM model; leave --prediction {wish} out")
            return edm
        told = self.metadata.get("modelspec.prediction_type", "").lower()
        marked = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon"}.get(told)
        if V_MARK in self.shapes:
            marked = "v_prediction"
        if wish or marked:
            return wish or str(marked)
        if self.kind == "sd2":
            raise InvalidRequest(
                f"{self.path.name} does not say what it predicts, and SD 2 was published both ways: give --prediction "
                "v_prediction (768 pixels) or --prediction epsilon (512 pixels, and inpainting)"
            )
        return "epsilon"

    def numbers(self, name: str) -> list[float]:
        """The numbers of a small tensor."""
        from safetensors import safe_open

        self.shape(name)
        with safe_open(self.path, "pt") as opened:
            return [float(value) for value in opened.get_tensor(name).flatten().tolist()]

    def side(self, usual: int) -> int:
        """Pixels of its usual square: what its metadata says, or what is usual."""
        found = re.fullmatch(r"(\d+)x\1", self.metadata.get("modelspec.resolution", ""))
        return int(found[1]) if found else usual

    def tensors(self, prefix: str) -> dict[str, Any]:
        """Torch tensors of a component, under their full names."""
        from safetensors import safe_open

        with safe_open(self.path, "pt") as opened:
            names = [name for name in self.shapes if name.startswith(prefix) and not LEFT_BEHIND.search(name)]
            return {name: opened.get_tensor(name) for name in names}

    def write_unet(self, folder: Path, config: dict[str, Any]) -> None:
        from diffusers import UNet2DConditionModel
        from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

        self._write(folder, config, self.tensors(UNET), convert_ldm_unet_checkpoint, UNet2DConditionModel)

    def write_vae(self, folder: Path, config: dict[str, Any]) -> None:
        from diffusers import AutoencoderKL
        from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

        self._write(folder, config, self.tensors(VAE), convert_ldm_vae_checkpoint, AutoencoderKL)

    def write_text(self, folder: Path, config: dict[str, Any], prefix: str) -> None:
        import transformers
        from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint, convert_open_clip_checkpoint

        kind = getattr(transformers, config["architectures"][0])
        given = self.tensors(prefix)
        if prefix in (CLIP_L, XL_L):
            if not self.has(f"{prefix}text_model."):  # What old merges and transformers from 5.6 on write.
                given = {name.replace(prefix, f"{prefix}text_model.", 1): x for name, x in given.items()}
            self._write(folder, config, given, lambda tensors, _: convert_ldm_clip_checkpoint(tensors), kind)
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

        self._write(folder, config, given, convert, kind)

    def _write(
        self, folder: Path, config: dict[str, Any], given: dict[str, Any], convert: Callable[..., Any], kind: Any
    ) -> None:
        """Translate a component and hold it beside the module that its config describes, then write both."""
        import torch
        from safetensors.torch import save_file

        made = convert(dict(given), config)
        with torch.device("meta"):
            transformer = "architectures" in config
            module = kind(kind.config_class(**config)) if transformer else kind.from_config(config)
        wanted = {name: tuple(x.shape) for name, x in module.state_dict().items() if "position_ids" not in name}
        # transformers renames as it loads; files keep the names of old.
        inner = "text_model." if transformer and not any(name.startswith("text_model.") for name in wanted) else ""
        wanted = {name if name.startswith("text_projection") else inner + name: x for name, x in wanted.items()}
        missing = sorted(set(wanted) - set(made))
        if missing:
            self._refuse("lacks", missing, folder.name)
        used = {x.untyped_storage().data_ptr() for x in made.values()}
        fused = re.compile(r"\.attn\.in_proj_(weight|bias)$|\.text_projection$")
        extra = [
            name for name, x in given.items() if x.untyped_storage().data_ptr() not in used and not fused.search(name)
        ]
        extra += sorted(set(made) - set(wanted))
        if extra:
            self._refuse("has what this family has not:", extra, folder.name)
        wrong = [name for name, shape in wanted.items() if tuple(made[name].shape) != shape]
        if wrong:
            found = f"{wrong[0]} ({list(made[wrong[0]].shape)} instead of {list(wanted[wrong[0]])})"
            self._refuse("has a wrong shape for", [found, *wrong[1:]], folder.name)
        stem = "model" if transformer else "diffusion_pytorch_model"
        write_json(folder / "config.json", config)
        save_file({name: x.contiguous() for name, x in made.items()}, folder / f"{stem}.safetensors", {"format": "pt"})

    def _refuse(self, what: str, names: list[str], part: str) -> None:
        more = f" and {len(names) - 2} more" if len(names) > 2 else ""
        raise InvalidModel(f"{self.path.name}, {part}: {what} {', '.join(names[:2])}{more}")


def write_json(path: Path, document: dict[str, Any]) -> None:
    """`document` as JSON, in a folder that may have to be made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False), "utf-8")
