"""Where weights come from: a diffusers folder, one component at a time as a torch module in float32."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edge_sd.bundle.bundle import read_manifest
from edge_sd.bundle.diffusers import ADAPTED, class_of, diffusers_facts, has_checker
from edge_sd.bundle.facts import Facts
from edge_sd.bundle.ip_adapter import FOLDER, adapter_file, attach, image_encoder, projection
from edge_sd.bundle.library import MANIFEST, find_model
from edge_sd.bundle.parts import DENOISERS, IMAGE_ENCODER, NET, SAFETY_CHECKER, TINY, UPSCALER, kind_of
from edge_sd.bundle.weights import load_module, weight_files
from edge_sd.errors import InvalidModel
from edge_sd.files import hash_file, read_json
from edge_sd.text.tokenizer import read_vocabulary
from edge_sd.text.whole import check as check_tokenizer

from .components import QUANTIZED

# part -> (library, class, folder, the weight file's stem)
PARTS = {
    "text_encoder": ("transformers", "CLIPTextModel", "text_encoder", "model"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection", "text_encoder_2", "model"),
    "text_encoder_3": ("transformers", "T5EncoderModel", "text_encoder_3", "model"),
    IMAGE_ENCODER: ("transformers", "CLIPVisionModelWithProjection", IMAGE_ENCODER, "model"),
    "transformer": ("diffusers", "SD3Transformer2DModel", "transformer", "diffusion_pytorch_model"),
    "unet": ("diffusers", "UNet2DConditionModel", "unet", "diffusion_pytorch_model"),
    "vae_decoder": ("diffusers", "AutoencoderKL", "vae", "diffusion_pytorch_model"),
    "vae_encoder": ("diffusers", "AutoencoderKL", "vae", "diffusion_pytorch_model"),
    TINY: ("diffusers", "AutoencoderTiny", "vae_tiny", "diffusion_pytorch_model"),
    "controlnet": ("diffusers", "ControlNetModel", "controlnet", "diffusion_pytorch_model"),
    SAFETY_CHECKER: (
        "diffusers.pipelines.stable_diffusion.safety_checker",
        "StableDiffusionSafetyChecker",
        SAFETY_CHECKER,
        "model",
    ),
    UPSCALER: ("edge_sd.converters.sources.upscaler", "RRDBNet", UPSCALER, "diffusion_pytorch_model"),
    # The UNet that takes a ControlNet's residuals; its weights are the UNet's.
    "controlled_unet": ("diffusers", "UNet2DConditionModel", "unet", "diffusion_pytorch_model"),
}
# Bytes of weights from which a part is large, and steps that are cheap for small parts take minutes.
LARGE = 256 << 20
# Of those of a transformer from which a step takes a minute in float32: it computes all tokens with all weights.
HUGE = 2 << 30
CONTROL = ("controlnet", "controlled_unet")


@dataclass(frozen=True)
class Source:
    """A diffusers folder whose configs and weight files have been looked at, but not loaded."""

    folder: Path
    facts: Facts

    @classmethod
    def open(cls, model: str | Path) -> Source:
        """Open a folder, or an installed model that carries its torch weights. Raises ModelNotFound, InvalidModel."""
        folder = find_model(model, weights=True)
        facts = diffusers_facts(folder)
        if (folder / MANIFEST).is_file():
            # Its manifest does not know a ControlNet or an IP-Adapter that was put beside it.
            beside = ("pooled_nets", "image_prompt", "image_tokens", "image_side")
            facts = replace(read_manifest(folder).facts, **{name: getattr(facts, name) for name in beside})
        if facts.denoiser != "unet" and (folder / "controlnet/config.json").is_file():
            raise InvalidModel(f"{folder} has a controlnet, which is offered beside a UNet; it has a {facts.denoiser}")
        if facts.denoiser != "unet" and (folder / FOLDER).is_dir():
            raise InvalidModel(f"{folder} has an IP-Adapter, which is offered in a UNet; it has a {facts.denoiser}")
        source = cls(folder, facts)
        for part in source.parts:
            source.check(part)
        for text in facts.encoders:
            if text.kind == "clip":
                read_vocabulary(folder / text.tokenizer)
            else:
                check_tokenizer(folder / text.tokenizer)
        return source

    @property
    def parts(self) -> tuple[str, ...]:
        """What the folder holds, in the order of the pipeline."""
        nets = sorted(path.parent.name for path in self.folder.glob(f"{NET}*/config.json"))
        controlled = bool(nets) and self.facts.denoiser == "unet"
        checked = has_checker(self.folder)
        tiny = (self.folder / "vae_tiny/config.json").is_file()
        enlarging = (self.folder / UPSCALER / "config.json").is_file()
        texts = [text.part for text in self.facts.encoders]
        return tuple(
            part
            for kind in PARTS
            for part in (nets if kind == NET else [kind])
            if (controlled or kind not in CONTROL)
            and (part in texts or not part.startswith("text_encoder"))
            and (checked or part != SAFETY_CHECKER)
            and (tiny or part != TINY)
            and (self.facts.image_prompt or part != IMAGE_ENCODER)
            and (enlarging or part != UPSCALER)
            and (part == self.facts.denoiser or part not in DENOISERS)
        )

    def weights(self, part: str) -> tuple[list[Path], str | None]:
        """The weight files of a part, an IP-Adapter's among them, several if it is sharded; their names' variant."""
        _, _, name, stem = _row(part)
        paths, variant = weight_files(self.folder / name, stem)
        adapter = self.adapter if part in ADAPTED else None
        return [*paths, adapter] if adapter is not None else paths, variant

    def quantized(self, part: str) -> str:
        """What most of a part's weights were quantized to where they came from, as Q4_K; "" for whole ones."""
        return str(self.config(part).get(QUANTIZED, ""))

    @property
    def origin(self) -> str:
        """The same of all parts together, as a variant has it (bundle/variants.py)."""
        return "+".join(sorted({self.quantized(part) for part in self.parts} - {""}))

    @property
    def adapter(self) -> Path | None:
        """The file of the IP-Adapter; None where there is none."""
        return adapter_file(self.folder) if self.facts.image_prompt else None

    def check(self, part: str) -> None:
        """Read the weight file's header: it must be whole and describe exactly the bytes that follow."""
        from safetensors import SafetensorError, safe_open

        for path in self.weights(part)[0]:
            try:
                with safe_open(path, "np") as file:
                    file.keys()
            except (SafetensorError, OSError) as error:
                raise InvalidModel(f"{path} is damaged or no safetensors file: {error}") from error

    def load(self, part: str, halves: bool = False) -> Any:
        """The torch module of a part, in evaluation mode, that computes in float32. Raises InvalidModel.

        With `halves` many weights of a large part that are stored in 16 bits stay so; else all are float32.
        """
        import importlib

        from .half_weights import compute_in_float32, type_of_halves

        library, name, folder, stem = _row(part)
        if part == UPSCALER:
            from . import upscaler

            return upscaler.load(self.folder / folder)
        if self.facts.denoiser == "transformer" or folder == "vae":
            # Families of transformers have classes of their own, and projections where others have none; and what is
            # in vae/ may be a tiny autoencoder.
            library, name, _ = class_of(self.config(part), folder)
        kind = getattr(importlib.import_module(library), name)
        layers = next((text.layers for text in self.facts.encoders if text.part == part), None)
        half = type_of_halves(self.weights(part)[0]) if halves and self.is_large(part) else None
        more: dict[str, Any] = {"dtype": half, "mapped": True} if half else {}
        module = load_module(kind, self.folder / folder, stem, layers=layers, **more)
        return self._adapted(part, module, compute_in_float32 if half else lambda each: each)

    def _adapted(self, part: str, module: Any, computing: Callable[[Any], Any]) -> Any:
        """A loaded part with what it has of the IP-Adapter; `computing` changes how layers compute."""
        if (path := self.adapter) is None or part not in ADAPTED:
            return computing(module)
        if part == IMAGE_ENCODER:
            made = projection(path)
            return image_encoder(computing(module), computing(made), self.facts.image_prompt)
        from .ip_adapter import traceable

        attach(module, path)
        return traceable(computing(module))

    def is_large(self, part: str) -> bool:
        return sum(path.stat().st_size for path in self.weights(part)[0]) >= LARGE

    @property
    def is_huge(self) -> bool:
        """Whether the denoiser is a transformer of billions of weights."""
        part = self.facts.denoiser
        return part == "transformer" and sum(path.stat().st_size for path in self.weights(part)[0]) >= HUGE

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
        return self.folder / _row(part)[2] / "config.json"


def _row(part: str) -> tuple[str, str, str, str]:
    """Library, class, folder and the weight file's stem; several ControlNets lie in folders of their own names."""
    library, name, folder, stem = PARTS[kind_of(part)]
    return library, name, folder if part in PARTS else part, stem
