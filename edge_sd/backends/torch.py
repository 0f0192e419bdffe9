"""torch: runs a diffusers folder as it is, on CPU, CUDA and MPS: the reference, and what has not been converted.

torch is imported when a component is loaded, not to list devices: the import takes longer than a small picture.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from threading import Lock
from typing import Any

import numpy as np

from ..bundle.diffusers import ADAPTED, DETERMINISTIC, NETWORKS, class_of
from ..bundle.ip_adapter import FOLDER, adapter_file, attach, image_encoder, projection
from ..bundle.parts import IMAGE_ENCODER, LATENTS, SAFETY_CHECKER, TINY, UPSCALER
from ..bundle.weights import load_module
from ..components.base import Array, Component, last_rows
from ..components.edits import Edits
from ..components.image_prompt import PIXELS, SCALE, TOKENS
from ..components.lora import changes_of
from ..errors import DeviceError, InvalidModel, InvalidRequest, MissingExtra
from ..files import read_json
from ..text.textual_inversion import FIRST
from .base import Device, LoadRequest

NEEDED = ("torch", "diffusers", "transformers", "safetensors")
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
# The libraries' loaders change torch's default type and nn.Module while they work.
_LOADING = Lock()
# Computed in bfloat16 where float16 is asked for, as SANA's makers do: they overflow it.
OVERFLOWING = ("Gemma2Model", "Gemma2ForCausalLM", "AutoencoderDC")
# What a UNet takes by other names than the component has.
CONDITIONS = ("text_embeds", "time_ids")
RESIDUAL = "additional_residual_"
# Inputs that stay float32.
EXACT = ("timestep", "time_ids", "img_ids", "txt_ids", "guidance", SCALE)


class TorchBackend:
    """torch-cpu; torch-cuda, or torch-cuda.0, torch-cuda.1, …; torch-mps."""

    name = "torch"

    def __init__(self) -> None:
        if not all(find_spec(each) for each in NEEDED):
            raise MissingExtra("running torch weights", "torch")
        try:
            self.version = version("torch")
        except PackageNotFoundError:
            self.version = ""

    def devices(self) -> list[Device]:
        found = []
        if not self.version.endswith("+cpu"):
            cards = _cuda_cards()
            for n, (name, memory) in enumerate(cards):
                label = "torch-cuda" if len(cards) == 1 else f"torch-cuda.{n}"
                found.append(Device(label, self.name, f"{name} (torch, CUDA)", frozenset(), memory, self.version))
        if sys.platform == "darwin" and platform.machine() == "arm64":
            found.append(Device("torch-mps", self.name, "Apple GPU (torch, MPS)", driver=self.version))
        return [*found, Device("torch-cpu", self.name, "CPU (torch)", driver=self.version)]

    def load(self, request: LoadRequest) -> Component:
        import torch

        part, device, graph, edits = request.part, request.device, request.artifact.graph, request.edits
        config = request.bundle.path(graph)
        library, kind, stem = class_of(read_json(config), config.parent.name)
        where = device.name.removeprefix("torch-").replace(".", ":")
        # Text steers every step and takes 1 % of the time, and these decoders overflow: they stay as they were.
        # T5 and language models are no small ones; T5's class keeps what overflows in float32 by itself.
        text = kind.startswith("CLIPText")
        exact = text or part in (SAFETY_CHECKER, IMAGE_ENCODER) or bool(read_json(config).get("force_upcast"))
        dtype = torch.float32 if exact else getattr(torch, DTYPES[request.variant.precision])
        dtype = torch.bfloat16 if kind in OVERFLOWING and dtype is torch.float16 else dtype
        try:
            with _LOADING, _quiet():
                layers = next((text.layers for text in request.bundle.facts.encoders if text.part == part), None)
                module = (
                    _network(kind)(config.parent).to(dtype)
                    if library == NETWORKS
                    else load_module(
                        getattr(importlib.import_module(library), kind), config.parent, stem, dtype, layers=layers
                    )
                )
                if request.bundle.facts.image_prompt and part in ADAPTED:
                    module = _adapted(request, module)
            if part in ("vae_encoder", "vae_decoder", TINY):
                delattr(module, "decoder" if part == "vae_encoder" else "encoder")
            if edits.loras:
                _add_loras(module, edits, graph)
            return TorchComponent(part, module.to(where), where, dtype, edits, graph)
        except (RuntimeError, AssertionError) as error:
            raise DeviceError(f"{device.name} refused {graph}: {_first_line(error)}") from error


def _adapted(request: LoadRequest, module: Any) -> Any:
    """A UNet with the attention of the model's IP-Adapter; or the image encoder with its projection."""
    path = adapter_file(request.bundle.root)
    if path is None:
        raise InvalidModel(f"{request.bundle.root} has no {FOLDER}, which its manifest names")
    if request.part == IMAGE_ENCODER:
        return image_encoder(module, projection(path), request.bundle.facts.image_prompt)
    attach(module, path)
    return module


def _network(kind: str) -> Any:
    """What loads the network of a folder, of a class that we have written ourselves. Raises DeviceError."""
    found = list(entry_points(group=NETWORKS, name=kind))
    if not found:
        raise DeviceError(f"{kind} needs the converters of edge-sd; install it again from its wheel or a clone")
    return found[0].load()


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the loaders' progress bars and advice: stderr belongs to the caller."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        from diffusers.utils import logging as of_diffusers
        from transformers.utils import logging as of_transformers

        bars = [each for each in (of_diffusers, of_transformers) if each.is_progress_bar_enabled()]
        for each in bars:
            each.disable_progress_bar()
        yield
        for each in bars:
            each.enable_progress_bar()
    finally:
        logging.disable(before)


def _cuda_cards() -> list[tuple[str, int]]:
    """Name and bytes of each card, asked of the driver itself; none where there is no driver."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    with suppress(OSError, AttributeError):
        driver = ctypes.CDLL(name)
        count = ctypes.c_int(0)
        if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
            return []
        cards = []
        for n in range(count.value):
            device, memory, text = ctypes.c_int(0), ctypes.c_size_t(0), ctypes.create_string_buffer(128)
            driver.cuDeviceGet(ctypes.byref(device), n)
            driver.cuDeviceGetName(text, len(text), device)
            driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
            cards.append((text.value.decode("utf-8", "replace"), int(memory.value)))
        return cards
    return []


def _add_loras(module: Any, edits: Edits, name: str) -> None:
    """Add differences, times their factors, to the weights of linear layers and convolutions.

    Raises InvalidRequest where nothing has a place, or something has another shape.
    """
    import torch

    weights = {
        each: layer.weight
        for each, layer in module.named_modules()
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d))
    }
    for key, changes in changes_of(edits.loras, edits.part, weights, name, edits.unplaced).items():
        weight = weights[key]
        for lora, factor, difference in changes:
            try:
                change = difference.of(tuple(weight.shape), factor)
            except ValueError as error:
                raise InvalidRequest(f"the LoRA {lora.name!r} does not fit this model: {key} is {error}") from error
            weight.data = (weight.data.float() + torch.from_numpy(np.ascontiguousarray(change))).to(weight.dtype)


class TorchComponent:
    """A module of diffusers or transformers in the names of our own contract."""

    def __init__(self, part: str, module: Any, where: str, dtype: Any, edits: Edits, name: str) -> None:
        self.part, self.module, self.where, self.dtype, self.edits, self.name = part, module, where, dtype, edits, name
        self._bound: dict[str, Any] = {}
        if part.startswith("text_encoder") and module.config.model_type.startswith("clip"):
            last = int(module.config.num_hidden_layers)
            if not 1 <= edits.clip_skip <= last:
                raise InvalidRequest(
                    f"CLIP skip {edits.clip_skip} is beyond this model's text encoder; valid: 1 to {last}"
                )
            if edits.vectors is not None:
                _add_vectors(module, edits.vectors)

    def bind(self, **constants: Array) -> None:
        self._bound |= {name: self._tensor(name, value) for name, value in constants.items()}

    def __call__(self, **inputs: Array) -> dict[str, Array]:
        import torch

        try:
            given = last_rows({**self._bound, **{name: self._tensor(name, value) for name, value in inputs.items()}})
            with torch.inference_mode():
                outputs = self._run(given)
            return {name: np.asarray(value.float().cpu().numpy(), np.float32) for name, value in outputs.items()}
        except RuntimeError as error:
            raise DeviceError(f"{self.name} failed: {_first_line(error)}") from error

    def close(self) -> None:
        self._bound.clear()
        self.module = None
        if self.where != "cpu":
            import torch

            (torch.mps if self.where == "mps" else torch.cuda).empty_cache()

    def _tensor(self, name: str, value: Array) -> Any:
        import torch

        tensor = torch.from_numpy(np.ascontiguousarray(value))
        if name in ("input_ids", "attention_mask"):
            return tensor.to(self.where, torch.int64)
        # float16 would round the timestep, and bfloat16 positions.
        return tensor.to(self.where, torch.float32 if name in EXACT else self.dtype)

    def _run(self, given: dict[str, Any]) -> dict[str, Any]:
        if "attention_mask" in given:
            # Classes with a head return no last state.
            out = getattr(self.module, "model", self.module)(**given, output_hidden_states=True, use_cache=False)
            states = {f"hidden_states.{n}": state for n, state in enumerate(out.hidden_states)}
            return {"last_hidden_state": out.last_hidden_state, **states}
        if self.part.startswith("text_encoder"):
            return self._encode_text(given["input_ids"])
        if self.part == "vae_decoder":
            latents = given["latent_sample"]
            post = getattr(self.module, "post_quant_conv", None)
            return {"sample": self.module.decoder(latents if post is None else post(latents))}
        if self.part == UPSCALER:
            return {"sample": self.module(given["image"])}
        if self.part == TINY:
            return {"sample": self.module.decoder(given["latent_sample"])}
        if self.part == "vae_encoder":
            moments, quant = self.module.encoder(given["sample"]), getattr(self.module, "quant_conv", None)
            if self.module.config.get("_class_name") in DETERMINISTIC:
                return {LATENTS: moments}
            return {"latent_parameters": moments if quant is None else quant(moments)}
        if self.part == IMAGE_ENCODER:
            return {TOKENS: self.module(given[PIXELS])}
        if self.part == SAFETY_CHECKER:
            return self._check(given["clip_input"])
        if self.part == "transformer" and {"encoder_attention_mask", "txt_ids"} <= set(given):
            return {"out_sample": self._ragged(given)}
        if self.part == "transformer":
            return {"out_sample": self.module(**given, return_dict=False)[0]}
        return self._denoise(given)

    def _ragged(self, given: dict[str, Any]) -> Any:
        """Z-Image's class takes lists of latents and of texts of any length, and finds positions itself."""
        import torch

        texts = [
            states[mask >= 0]
            for states, mask in zip(given["encoder_hidden_states"], given["encoder_attention_mask"], strict=True)
        ]
        latents = list(given["hidden_states"].unsqueeze(2).unbind(0))
        found = self.module(latents, given["timestep"], texts, return_dict=False)[0]
        return torch.stack(found).squeeze(2)

    def _check(self, picture: Any) -> dict[str, Any]:
        """As diffusers' checker, but for its verdict: cosine similarities less thresholds."""
        from torch.nn.functional import normalize

        checker = self.module
        seen = normalize(checker.visual_projection(checker.vision_model(picture)[1]))
        return {
            "special_scores": seen @ normalize(checker.special_care_embeds).T - checker.special_care_embeds_weights,
            "concept_scores": seen @ normalize(checker.concept_embeds).T - checker.concept_embeds_weights,
        }

    def _encode_text(self, ids: Any) -> dict[str, Any]:
        if self.module.config.model_type == "t5":
            return {"last_hidden_state": self.module(ids)[0]}
        words = ids >= FIRST
        if self.edits.vectors is not None:
            self.module.get_input_embeddings().ids = ids
        # Other readers, such as the search for the end of the text, must not take these ids for the largest.
        out = self.module(ids.masked_fill(words, 0), output_hidden_states=True)
        last = out.last_hidden_state
        if self.edits.clip_skip > 1:
            (norm,) = [each for name, each in self.module.named_modules() if name.endswith("final_layer_norm")]
            last = norm(out.hidden_states[-self.edits.clip_skip])
        pooled = "text_embeds" if "text_embeds" in out else "pooler_output"
        states = {f"hidden_states.{n}": state for n, state in enumerate(out.hidden_states)}
        return {pooled: out[pooled], "last_hidden_state": last, **states}

    def _denoise(self, given: dict[str, Any]) -> dict[str, Any]:
        """A UNet or a ControlNet; SDXL's conditions, LCM's and a ControlNet's residuals where they are given."""
        wishes: dict[str, Any] = {}
        if added := {name: given[name] for name in CONDITIONS if name in given}:
            wishes["added_cond_kwargs"] = added
        if "timestep_cond" in given:
            wishes["timestep_cond"] = given["timestep_cond"]
        words = given["encoder_hidden_states"]
        if TOKENS in given:
            words = words, [given[TOKENS]]
            for each in self.module.attn_processors.values():
                if hasattr(each, "to_k_ip"):
                    each.scale = [float(given[SCALE])]
        arguments = given["sample"], given["timestep"], words
        if "controlnet_cond" in given:
            down, middle = self.module(*arguments, given["controlnet_cond"], return_dict=False, **wishes)
            return {f"{RESIDUAL}{n}": value for n, value in enumerate([*down, middle])}
        if count := sum(name.startswith(RESIDUAL) for name in given):
            residuals = [given[f"{RESIDUAL}{n}"] for n in range(count)]
            wishes["down_block_additional_residuals"] = tuple(residuals[:-1])
            wishes["mid_block_additional_residual"] = residuals[-1]
        return {"out_sample": self.module(*arguments, return_dict=False, **wishes)[0]}


def _add_vectors(module: Any, vectors: Any) -> None:
    """A second table of embeddings: what `ids` has from FIRST on are rows of `vectors`."""
    import torch

    class Table(torch.nn.Module):
        def __init__(self, first: Any) -> None:
            super().__init__()
            self.first, self.ids = first, None
            self.register_buffer("own", torch.from_numpy(np.ascontiguousarray(vectors)).to(first.weight))

        def forward(self, known: Any) -> Any:
            ids: Any = self.ids
            own: Any = self.own
            rows = own[(ids - FIRST).clamp(0)]
            return torch.where((ids >= FIRST)[..., None], rows, self.first(known))

    module.set_input_embeddings(Table(module.get_input_embeddings()))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
