"""Single-file checkpoints in Stability's original names -> a diffusers folder, which is what a Source is.

What a checkpoint is, is read from the names and shapes of its tensors, never from its file's name. The configs are made
here, without a network; keys are translated by diffusers' own functions. Only safetensors are opened.

    model.diffusion_model.                        the UNet; 9 channels go in where it is for inpainting
    first_stage_model.                            the autoencoder
    cond_stage_model.transformer.text_model.      SD 1: CLIP ViT-L, 768 numbers for a token
    cond_stage_model.model.                       SD 2: OpenCLIP ViT-H, 1024; its last layer is not used
    conditioner.embedders.0.transformer., .1.model.   SDXL: ViT-L and OpenCLIP bigG, 768 + 1280
    conditioner.embedders.0.model.                SDXL's refiner: bigG alone
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_sd.bundle import HUB_RECORD, find_model, find_pulled
from edge_sd.errors import ConversionError, InvalidModel, InvalidRequest, choices
from edge_sd.text import END, START, read_vocabulary

from .vocabulary import installed_vocabulary

PREDICTIONS = ("epsilon", "v_prediction")
UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP_L, CLIP_H = "cond_stage_model.transformer.", "cond_stage_model.model."
XL_L, XL_G = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
REFINER_G = "conditioner.embedders.0.model."
# Tensors that trainers leave behind and no picture needs.
LEFT_BEHIND = re.compile(r"position_ids$|logit_scale$|attn_mask$|^first_stage_model\.(loss|model_ema)\.|^model_ema\.")
# Marks of models that predict v, and of schedules that end in noise alone; not a number of theirs is used.
V_MARK, ZERO_SNR_MARK = "v_pred", "ztsnr"
# The second tokenizers of SDXL and SD 2's fill up with "!", id 0, SD 1's with the end of the text.
PADDED_WITH_ZERO = "!"


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


@contextmanager
def unpacked(
    source: str | Path, beside: Path, *, tokenizer: Path | None = None, prediction: str | None = None
) -> Iterator[str | Path]:
    """`source` if it is no file; else a diffusers folder of the checkpoint, beside `beside` and removed at the end.

    Raises InvalidModel (the checkpoint) or InvalidRequest (what a folder does not take, or a checkpoint needs).
    """
    path = _file_of(source)
    if path is None:
        if tokenizer is not None or prediction is not None:
            raise InvalidRequest("--tokenizer and --prediction belong to single-file checkpoints; a folder has both")
        yield source
        return
    parent = beside.absolute().parent
    if not parent.is_dir():
        raise InvalidRequest(f"the folder {str(parent)!r}, where the bundle would go, does not exist")
    with tempfile.TemporaryDirectory(prefix=".edge-sd-", dir=parent) as folder:
        try:
            made = unpack(path, Path(folder) / path.stem, tokenizer=tokenizer, prediction=prediction)
        except OSError as error:
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


def unpack(path: Path, folder: Path, *, tokenizer: Path | None = None, prediction: str | None = None) -> Path:
    """Write the checkpoint in `path` as a diffusers folder; weights keep their type. Raises as `unpacked`."""
    checkpoint = Checkpoint.open(path)
    kind = KINDS[checkpoint.kind]
    prediction = checkpoint.prediction(prediction)
    unet, vae = unet_config(checkpoint, kind), vae_config(checkpoint, kind)
    texts = {part: text_config(checkpoint, prefix) for part, prefix in kind.text.items()}
    vocabulary = _vocabulary(checkpoint, tokenizer, next(iter(texts.values()))["vocab_size"])
    folder.mkdir(parents=True)
    checkpoint.write_unet(folder / "unet", unet)
    checkpoint.write_vae(folder / "vae", vae)
    for part, prefix in kind.text.items():
        pad = END if prefix in (CLIP_L, XL_L) or PADDED_WITH_ZERO not in vocabulary[0] else PADDED_WITH_ZERO
        ids = {"bos_token_id": START, "eos_token_id": END, "pad_token_id": pad}
        texts[part] |= {name: vocabulary[0][token] for name, token in ids.items()}
        checkpoint.write_text(folder / part, texts[part], prefix)
        length = texts[part]["max_position_embeddings"]
        _write_tokenizer(folder / part.replace("text_encoder", "tokenizer"), vocabulary, pad, length)
    _write_json(folder / "scheduler/scheduler_config.json", _scheduler(checkpoint, prediction))
    _write_json(folder / "model_index.json", _index(kind, unet))
    return folder


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
            with path.open("rb") as file:
                start = file.read(2)
            if start in (b"\x80\x02", b"PK") or path.suffix in (".ckpt", ".pt", ".pth", ".bin"):
                raise InvalidModel(
                    f"{path.name} is a pickle, which can run code when opened; only safetensors are read"
                )
            with safe_open(path, "np") as opened:
                shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
                checkpoint = cls(path, shapes, opened.metadata() or {})
        except (SafetensorError, OSError) as error:
            raise InvalidModel(f"{path} is damaged or no safetensors file: {error}") from error
        _ = checkpoint.kind  # Of none that is known is told here.
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

    def prediction(self, wish: str | None) -> str:
        """What the UNet predicts: as asked for, as the file is marked, or as all of its family do.

        Raises InvalidRequest where only the person can know: SD 2 was published both ways, in the same shapes.
        """
        if wish is not None and wish not in PREDICTIONS:
            raise InvalidRequest(f"unknown prediction {wish!r}; valid: {choices(PREDICTIONS)}")
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
        _write_json(folder / "config.json", config)
        save_file({name: x.contiguous() for name, x in made.items()}, folder / f"{stem}.safetensors", {"format": "pt"})

    def _refuse(self, what: str, names: list[str], part: str) -> None:
        more = f" and {len(names) - 2} more" if len(names) > 2 else ""
        raise InvalidModel(f"{self.path.name}, {part}: {what} {', '.join(names[:2])}{more}")


def unet_config(checkpoint: Checkpoint, kind: Kind) -> dict[str, Any]:
    """diffusers' config of the UNet, read off its tensors but for the number of heads, which no shape tells."""
    shapes = {name[len(UNET) :]: shape for name, shape in checkpoint.shapes.items() if name.startswith(UNET)}
    first = checkpoint.shape(f"{UNET}input_blocks.0.0.weight")
    # One list of (width, depth of its transformer) for each level of the way down.
    levels: list[list[tuple[int, int]]] = [[]]
    for n in range(1, 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("input_blocks."))):
        if f"input_blocks.{n}.0.op.weight" in shapes:
            levels.append([])
            continue
        width = checkpoint.shape(f"{UNET}input_blocks.{n}.0.out_layers.3.weight")[0]
        levels[-1].append((width, _depth(shapes, f"input_blocks.{n}.1")))
    depths = [level[0][1] if level else 0 for level in levels]
    if any(
        len(level) != len(levels[0]) or {depth for _, depth in level} != {depths[n]} for n, level in enumerate(levels)
    ):
        raise InvalidModel(f"{checkpoint.path.name}: its UNet's levels have {[len(level) for level in levels]} layers")
    widths = [level[0][0] for level in levels]
    keys = [name for name in shapes if name.endswith("attn2.to_k.weight")]
    if not keys:
        raise InvalidModel(f"{checkpoint.path.name}: its UNet attends to no text")
    context = shapes[keys[0]][1]
    crossed = [depth > 0 for depth in depths]
    projection = next((shape for name, shape in shapes.items() if name.endswith("proj_in.weight")), ())
    config: dict[str, Any] = {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        # diffusers calls the number of heads by this name: 8 of any width, or as many as are 64 wide.
        "attention_head_dim": 8 if kind is KINDS["sd1"] else [max(1, width // 64) for width in widths],
        "block_out_channels": widths,
        "cross_attention_dim": context,
        "down_block_types": ["CrossAttnDownBlock2D" if each else "DownBlock2D" for each in crossed],
        "up_block_types": ["CrossAttnUpBlock2D" if each else "UpBlock2D" for each in reversed(crossed)],
        "in_channels": first[1],
        "out_channels": checkpoint.shape(f"{UNET}out.2.weight")[0],
        "layers_per_block": len(levels[0]),
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "sample_size": checkpoint.side(kind.side) // 8,
        "use_linear_projection": len(projection) == 2,
    }
    middle = _depth(shapes, "middle_block.1")
    if any(depth > 1 for depth in [*depths, middle]):
        # A level without attention has no depth; diffusers wants a number all the same.
        config["transformer_layers_per_block"] = [max(1, depth) for depth in depths]
        if middle != max(1, depths[-1]):
            config["transformer_layers_per_block"][-1] = middle
    if kind.family == "sdxl":
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": checkpoint.shape(f"{UNET}label_emb.0.0.weight")[1],
        }
    return config


def _depth(shapes: Mapping[str, Any], place: str) -> int:
    found = [re.match(rf"{re.escape(place)}\.transformer_blocks\.(\d+)\.", name) for name in shapes]
    return max((int(match[1]) + 1 for match in found if match), default=0)


def vae_config(checkpoint: Checkpoint, kind: Kind) -> dict[str, Any]:
    """diffusers' config of the autoencoder, read off its tensors."""
    down = [re.match(rf"{VAE}encoder\.down\.(\d+)\.block\.(\d+)\.conv1\.weight", name) for name in checkpoint.shapes]
    places = [(int(match[1]), int(match[2])) for match in down if match]
    if not places:
        raise InvalidModel(f"{checkpoint.path.name} lacks {VAE}encoder.down.0.block.0.conv1.weight")
    levels = max(level for level, _ in places) + 1
    widths = [checkpoint.shape(f"{VAE}encoder.down.{n}.block.0.conv2.weight")[0] for n in range(levels)]
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": checkpoint.shape(f"{VAE}decoder.conv_in.weight")[1],
        "layers_per_block": max(block for _, block in places) + 1,
        "norm_num_groups": 32,
        "sample_size": checkpoint.side(kind.side),
        "scaling_factor": kind.scale,
        "force_upcast": kind.family == "sdxl",
    }


def text_config(checkpoint: Checkpoint, prefix: str) -> dict[str, Any]:
    """transformers' config of a text encoder, read off its tensors; heads are 64 wide in all that were published."""
    ours = prefix in (CLIP_L, XL_L)
    if ours:
        words = checkpoint.shape(f"{prefix}text_model.embeddings.token_embedding.weight")
        positions = checkpoint.shape(f"{prefix}text_model.embeddings.position_embedding.weight")[0]
        layer = f"{prefix}text_model.encoder.layers."
        inner = checkpoint.shape(f"{layer}0.mlp.fc1.weight")[0]
    else:
        words = checkpoint.shape(f"{prefix}token_embedding.weight")
        positions = checkpoint.shape(f"{prefix}positional_embedding")[0]
        layer = f"{prefix}transformer.resblocks."
        inner = checkpoint.shape(f"{layer}0.mlp.c_fc.weight")[0]
    layers = 1 + max(int(name[len(layer) :].split(".")[0]) for name in checkpoint.shapes if name.startswith(layer))
    projection = checkpoint.shapes.get(f"{prefix}text_projection", (words[1], words[1]))
    projected = prefix in (XL_G, REFINER_G)
    return {
        "architectures": ["CLIPTextModelWithProjection" if projected else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": words[0],
        "hidden_size": words[1],
        "intermediate_size": inner,
        # SD 2 reads the last layer but one, so the last is left out.
        "num_hidden_layers": layers - (prefix == CLIP_H),
        "num_attention_heads": words[1] // 64,
        "max_position_embeddings": positions,
        "hidden_act": "quick_gelu" if ours else "gelu",
        "projection_dim": projection[-1],
        "layer_norm_eps": 1e-05,
    }


def _scheduler(checkpoint: Checkpoint, prediction: str) -> dict[str, Any]:
    return {
        "_class_name": "EulerDiscreteScheduler" if checkpoint.kind in ("sdxl", "refiner") else "PNDMScheduler",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "prediction_type": prediction,
        "rescale_betas_zero_snr": ZERO_SNR_MARK in checkpoint.shapes,
        "skip_prk_steps": True,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "timestep_spacing": "leading",
    }


def _index(kind: Kind, unet: dict[str, Any]) -> dict[str, Any]:
    inpainting = "Inpaint" if unet["in_channels"] == 9 else ""
    index: dict[str, Any] = {
        "_class_name": f"{kind.pipeline}{inpainting}Pipeline",
        "scheduler": ["diffusers", "EulerDiscreteScheduler" if kind.family == "sdxl" else "PNDMScheduler"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if kind.family == "sdxl":
        index |= {"text_encoder": [None, None], "tokenizer": [None, None], "force_zeros_for_empty_prompt": True}
    else:
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    if kind is KINDS["refiner"]:
        index |= {"requires_aesthetics_score": True, "force_zeros_for_empty_prompt": False}
    for part in kind.text:
        projected = "WithProjection" if part == "text_encoder_2" else ""
        index[part] = ["transformers", f"CLIPTextModel{projected}"]
        index[part.replace("text_encoder", "tokenizer")] = ["transformers", "CLIPTokenizer"]
    return index


def _vocabulary(checkpoint: Checkpoint, given: Path | None, size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token -> id and the merges: of a folder, or of a package that is installed. Raises InvalidRequest."""
    found = read_vocabulary(_tokenizer_in(given)) if given is not None else installed_vocabulary()
    if found is None:
        raise InvalidRequest(
            f"{checkpoint.path.name} has no tokenizer inside, as no checkpoint has: give --tokenizer FOLDER "
            "(vocab.json and merges.txt, or a model that has one), or pip install --no-deps open_clip_torch"
        )
    if len(found[0]) != size or not {START, END} <= set(found[0]):
        raise InvalidRequest(
            f"the tokenizer has {len(found[0])} tokens, the text encoder of {checkpoint.path.name} {size}: "
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
    _write_json(folder / "vocab.json", vocabulary[0])
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in vocabulary[1])]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
    marks = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    _write_json(
        folder / "tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, **marks}
    )


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False), "utf-8")
