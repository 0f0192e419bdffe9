"""OpenAI's CLIP (Radford et al. 2021), if it is on this disk, for models other than the embedded one."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edge_sd.bundle.library import find_pulled
from edge_sd.text.tokenizer import TextTokenizer

from ..libraries import hush_libraries

Array = NDArray[np.float32]
# The largest first; where `edge-sd models pull` or Hugging Face's libraries have put them.
NAMES = ("openai/clip-vit-large-patch14", "openai/clip-vit-base-patch16", "openai/clip-vit-base-patch32")
MEAN, SPREAD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Clip:
    """Reads a folder as transformers saves it, safetensors only. Raises what transformers does of damaged files."""

    def __init__(self, folder: Path, name: str) -> None:
        hush_libraries()
        from transformers import CLIPModel

        self.name = name
        self.model: Any = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
        self.side = int(self.model.config.vision_config.image_size)
        self.tokenizer = TextTokenizer(folder, self.model.config.text_config.max_position_embeddings)

    def see(self, picture: Image.Image) -> Array:
        """The unit vector of a picture: shrunk to the shorter side and cut in the middle, as CLIP was trained."""
        import torch

        scale = self.side / min(picture.size)
        width, height = (max(self.side, round(each * scale)) for each in picture.size)
        left, top = (width - self.side) // 2, (height - self.side) // 2
        small = picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        pixels = np.asarray(small.crop((left, top, left + self.side, top + self.side)), np.float32) / 255
        x = torch.from_numpy((pixels - MEAN) / SPREAD).permute(2, 0, 1)[None].float()
        with torch.no_grad():
            return _unit(self.model.visual_projection(self.model.vision_model(pixel_values=x).pooler_output))

    def read(self, prompts: list[str]) -> dict[str, Array]:
        """The unit vectors of prompts, each as far as it fits into CLIP's window."""
        import torch

        def vector(prompt: str) -> Array:
            ids = torch.from_numpy(self.tokenizer(prompt).ids)
            return _unit(self.model.text_projection(self.model.text_model(input_ids=ids).pooler_output))

        with torch.no_grad():
            return {prompt: vector(prompt) for prompt in prompts}


def _unit(vectors: Any) -> Array:
    vector = vectors[0].numpy()
    return np.asarray(vector / max(float(np.linalg.norm(vector)), 1e-12), np.float32)


def open_clip() -> tuple[Clip | None, str]:
    """The largest CLIP on this disk, or None and why there is none. Downloads nothing."""
    if not all(find_spec(name) for name in ("torch", "transformers", "diffusers")):
        return None, "torch, transformers and diffusers are not all installed"
    for name in NAMES:
        folder = find_pulled(name)
        if folder and (folder / "config.json").is_file() and (folder / "model.safetensors").is_file():
            try:
                return Clip(folder, name), ""
            # transformers raises errors of any type for a damaged file.
            except Exception as error:
                return None, f"{name} cannot be read ({type(error).__name__})"
    return None, f"edge-sd downloads nothing, and none of {', '.join(NAMES)} is on this disk with safetensors"
