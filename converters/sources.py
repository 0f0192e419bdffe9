"""Where weights come from: a diffusers folder, one component at a time as a torch module in float32.

Only safetensors are read; a pickle can run code when it is opened. A tensor that is missing would be made up at random
by the libraries' loaders, so it is an error here.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_sd.bundle import MANIFEST, Facts, find_model, hash_file, inside, read_manifest
from edge_sd.errors import InvalidModel
from edge_sd.foreign import diffusers_facts, read_json
from edge_sd.text import read_vocabulary

# part -> (library, class, folder, the weight file's stem)
PARTS = {
    "text_encoder": ("transformers", "CLIPTextModel", "text_encoder", "model"),
    "unet": ("diffusers", "UNet2DConditionModel", "unet", "diffusion_pytorch_model"),
    "vae_decoder": ("diffusers", "AutoencoderKL", "vae", "diffusion_pytorch_model"),
    "vae_encoder": ("diffusers", "AutoencoderKL", "vae", "diffusion_pytorch_model"),
    "controlnet": ("diffusers", "ControlNetModel", "controlnet", "diffusion_pytorch_model"),
    # The UNet that takes a ControlNet's residuals; its weights are the UNet's.
    "controlled_unet": ("diffusers", "UNet2DConditionModel", "unet", "diffusion_pytorch_model"),
}
CONTROL = ("controlnet", "controlled_unet")
PICKLES = ("*.bin", "*.ckpt", "*.pt", "*.pth", "*.pkl")


@dataclass(frozen=True)
class Source:
    """A diffusers folder whose configs and weight files have been looked at, but not loaded."""

    folder: Path
    facts: Facts

    @classmethod
    def open(cls, model: str | Path) -> Source:
        """Open a folder, or an installed model that carries its torch weights. Raises ModelNotFound, InvalidModel."""
        folder = find_model(model)
        facts = diffusers_facts(folder)
        if (folder / MANIFEST).is_file():
            facts = read_manifest(folder).facts
        source = cls(folder, facts)
        for part in source.parts:
            source.check(part)
        read_vocabulary(folder / "tokenizer")
        return source

    @property
    def parts(self) -> tuple[str, ...]:
        """What the folder holds, in the order of the pipeline."""
        controlled = (self.folder / "controlnet/config.json").is_file()
        return tuple(part for part in PARTS if controlled or part not in CONTROL)

    def weights(self, part: str) -> tuple[list[Path], str | None]:
        """The weight files of a part, several if it is sharded, and their names' variant."""
        _, _, name, stem = PARTS[part]
        folder = self.folder / name
        for variant in (None, "fp16"):
            path = folder / (f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors")
            if path.is_file():
                return [path], variant
            index = folder / f"{stem}.safetensors.index{f'.{variant}' if variant else ''}.json"
            if index.is_file():
                return _shards(index), variant
        pickles = [path.name for pattern in PICKLES for path in (self.folder / folder).glob(pattern)]
        if pickles:
            raise InvalidModel(
                f"{self.folder / folder} holds {pickles[0]}, a pickle, which can run code when opened; "
                f"only safetensors are read ({stem}.safetensors)"
            )
        raise InvalidModel(f"{self.folder / folder} has no {stem}.safetensors")

    def check(self, part: str) -> None:
        """Read the weight file's header: it must be whole and describe exactly the bytes that follow."""
        from safetensors import SafetensorError, safe_open

        for path in self.weights(part)[0]:
            try:
                with safe_open(path, "np") as file:
                    file.keys()
            except (SafetensorError, OSError) as error:
                raise InvalidModel(f"{path} is damaged or no safetensors file: {error}") from error

    def load(self, part: str) -> Any:
        """The torch module of a part, float32, in evaluation mode. Raises InvalidModel."""
        import importlib

        import torch

        library, name, folder, _ = PARTS[part]
        paths, variant = self.weights(part)
        path = paths[0]
        kind = getattr(importlib.import_module(library), name)
        extra: dict[str, Any] = {} if library == "transformers" else {"low_cpu_mem_usage": False}
        try:
            module, info = kind.from_pretrained(
                self.folder / folder,
                variant=variant,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                torch_dtype=torch.float32,
                **extra,
            )
        except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
            raise InvalidModel(f"{self.folder / folder} cannot be loaded: {str(error).splitlines()[0]}") from error
        missing = sorted(key for key in info["missing_keys"] if "position_ids" not in key)
        wrong = sorted(str(row[0]) for row in info["mismatched_keys"])
        if missing or wrong:
            names = missing or wrong
            what = "lacks" if missing else "has a wrong shape for"
            raise InvalidModel(f"{path} {what} {names[0]}" + (f" and {len(names) - 1} more" if names[1:] else ""))
        for key, tensor in module.state_dict().items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise InvalidModel(f"{path} is damaged: {key} holds NaN or infinity")
        return module.eval().requires_grad_(False)

    def config(self, part: str) -> dict[str, Any]:
        """The part's config.json."""
        return read_json(self._config_path(part))

    def fingerprint(self) -> str:
        """The hash of what the weight and config files hold: two checkpoints of one family differ in nothing else."""
        paths = {path for part in self.parts for path in (*self.weights(part)[0], self._config_path(part))}
        digest = hashlib.sha256()
        for path in sorted(paths):
            digest.update(f"{path.relative_to(self.folder).as_posix()} {hash_file(path)}\n".encode())
        return digest.hexdigest()

    def _config_path(self, part: str) -> Path:
        return self.folder / PARTS[part][2] / "config.json"


def _shards(index: Path) -> list[Path]:
    """The files that an index of shards names, in order. Raises InvalidModel."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise InvalidModel(f"{index} is damaged: it has no weight_map")
    paths = [inside(index.parent, name) for name in sorted(set(names.values()))]
    for path in paths:
        if not path.is_file():
            raise InvalidModel(f"{index.parent} lacks {path.name}, which {index.name} names")
    return paths
