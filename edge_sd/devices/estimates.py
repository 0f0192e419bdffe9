"""Estimates: the cost of a component on a device where it has not been measured.

These are orders of magnitude, good enough to tell ten seconds from a hundred. Sources: multiply-adds of Stable
Diffusion 1.5 as published, vendors' peak figures, and the share of them that people report on such pictures. A
measurement (`edge-sd tune`) takes the place of each of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..backends.base import Device
from ..bundle.bundle import ModelBundle
from ..bundle.facts import Facts
from ..bundle.parts import DENOISERS
from ..bundle.variants import Variant
from ..machine import Machine

# Bits of a stored weight, and PSNR in dB against torch float32 where the manifest has not measured it.
BITS = {
    "fp32": 32, "fp16": 16, "bf16": 16, "as exported": 16, "int8": 8, "w8a8": 8, "hybrid": 8, "p8": 8, "p6": 6,
    "mixed": 5, "mixed4": 5, "int4": 4, "int4g64": 4, "int4g128": 4, "p4": 4, "p4g16": 4, "p2": 2, "p1": 1,
    "int4scale": 4, "int4awq": 4, "int4gptq": 4, "int4lowrank": 4, "nf4": 4, "fp8": 8,
}  # fmt: skip
TYPICAL_PSNR = {
    "fp32": 100.0, "fp16": 60.0, "bf16": 42.0, "as exported": 60.0, "p8": 40.0, "int8": 35.0, "p6": 32.0,
    "w8a8": 30.0, "hybrid": 30.0, "mixed": 30.0, "mixed4": 25.0, "p4g16": 22.0, "int4": 20.0, "int4g64": 18.0,
    "int4g128": 16.0, "p4": 20.0, "p2": 6.0, "p1": 2.0, "int4scale": 20.0,
    "int4awq": 20.0, "int4gptq": 25.0, "int4lowrank": 23.0, "nf4": 18.0, "fp8": 25.0,
}  # fmt: skip
UNKNOWN_BITS, UNKNOWN_PSNR = 16, 25.0
# Highest PSNR in dB that each arithmetic allows, and the PSNR above which no difference is visible.
ARITHMETIC_PSNR = {"f32": 100.0, "f16": 55.0, "bf16": 42.0}
INVISIBLE = 50.0

# A backend's library and its graphs, in memory and to import.
BACKEND_BYTES, BACKEND_SECONDS = 150 << 20, 0.5
# Seconds to open a component on a kind of device, and bytes of weights compiled in a second after that.
LOADING = {
    ("openvino", "cpu"): (0.15, 1.5e9), ("openvino", "gpu"): (3.0, 3e8), ("openvino", "npu"): (8.0, 1.5e8),
    ("torch", "torch-cpu"): (2.0, 1e9), ("torch", "torch-cuda"): (2.0, 2e9), ("torch", "torch-mps"): (2.0, 1e9),
    ("coreml", "cpu"): (0.3, 1e9), ("coreml", "gpu"): (1.0, 1e9), ("coreml", "ane"): (2.0, 3e8),
    ("coreai", "cpu"): (0.3, 1e9), ("coreai", "gpu"): (1.0, 1e9), ("coreai", "ane"): (2.0, 3e8),
    # A program is lowered anew at each load: the embedded UNet of 27 MB took 6 s.
    ("coreai", "coreai-reference"): (0.5, 5e6),
}  # fmt: skip
APPLE = ("coreml", "coreai")
# Watts while it computes, of a laptop.
WATTS = {"cpu": 25.0, "gpu": 20.0, "npu": 6.0, "ane": 4.0,
         "torch-cpu": 25.0, "torch-cuda": 150.0, "torch-mps": 20.0}  # fmt: skip
LOADING_WATTS = 15.0


@dataclass(frozen=True)
class Estimate:
    """One component on one device, for the variant's default picture.

    load, draw   seconds: once, and for all calls of a picture
    memory       bytes while it is loaded
    quality      dB against torch float32, INVISIBLE at most
    arithmetic   "f32", "f16" or "bf16"
    """

    load: float
    draw: float
    memory: int
    quality: float
    arithmetic: str

    @property
    def seconds(self) -> float:
        """Seconds until the first picture: load and draw."""
        return self.load + self.draw


def placed(facts: Facts) -> tuple[str, ...]:
    """The components that have a device of their own, in the order of the pipeline."""
    return ("text_encoder", facts.denoiser, "vae_decoder")


def calls(bundle: ModelBundle, variant: str, part: str) -> int:
    """How often a picture calls a component."""
    return bundle.defaults_of(variant).steps if part in DENOISERS else 1


def rows_of(facts: Facts, guidance: float, prompts: int = 1) -> int:
    """Rows of the denoiser in a step: the negative prompt's with guidance, unless the scale is an input, and a row of
    the picture without words in a model that edits one.
    """
    if guidance == 1 and prompts == 1:
        return 1
    return 1 if facts.takes_guidance else 1 + prompts + facts.instructed


def energy(estimate: Estimate, device: Device) -> float:
    """Joules for a picture, loading shared among ten."""
    return estimate.draw * WATTS.get(device.kind, 20.0) + estimate.load * LOADING_WATTS / 10


def estimate(bundle: ModelBundle, name: str, part: str, device: Device, machine: Machine) -> Estimate:
    """What `part` of variant `name` costs on `device`."""
    variant = bundle.variant(name)
    size = variant.part_size(part)
    arithmetic = arithmetic_of(variant, part, device, machine)
    fixed, rate = LOADING.get((device.backend, device.kind), (0.5, 5e8))
    work = _flops(bundle, name, part, size)
    return Estimate(
        load=fixed + size / rate,
        draw=work / flops_per_second(device, machine, arithmetic),
        memory=_resident(variant, part, device, arithmetic) + _activations(bundle, name, part, arithmetic),
        quality=quality(variant, part, arithmetic),
        arithmetic=arithmetic,
    )


def quality(variant: Variant, part: str, arithmetic: str) -> float:
    """dB: what the manifest measured or is typical of the precision, as far as the arithmetic leaves it."""
    artifact = variant.artifacts.get(part)
    stored = TYPICAL_PSNR.get(variant.precision_of(part), UNKNOWN_PSNR)
    if artifact is not None and artifact.parity is not None:
        stored = artifact.parity.psnr
    return min(stored, ARITHMETIC_PSNR[arithmetic], INVISIBLE)


def arithmetic_of(variant: Variant, part: str, device: Device, machine: Machine) -> str:
    """The type that a backend computes in on this device; bfloat16 only where there is hardware for it."""
    if device.backend == "torch":
        return "f32" if part == "text_encoder" else {"fp16": "f16", "bf16": "bf16"}.get(variant.precision, "f32")
    if device.backend == "coreml":
        return "f16"
    if device.backend == "coreai":
        artifact = variant.artifacts.get(part)
        exact = artifact is not None and artifact.precision == "float32"
        return "f32" if exact or variant.precision == "fp32" else "f16"
    if device.kind == "npu":
        return "f16"
    if variant.precision_of(part) == "fp32" or part == "text_encoder":
        return "f32"
    if device.kind == "gpu":
        return "f16"
    if has_bfloat16(device, machine):
        return "bf16"
    return "f16" if "NEON" in machine.flags and "FP16" in device.features else "f32"


def has_bfloat16(device: Device, machine: Machine) -> bool:
    """Whether the CPU multiplies bfloat16 itself; emulated, it is slower than float32."""
    told = "BF16" in device.features or bool({"BF16", "AMX-BF16"} & machine.flags)
    return told and device.kind in ("cpu", "torch-cpu")


def flops_per_second(device: Device, machine: Machine, arithmetic: str) -> float:
    """Floating-point operations in a second that such networks reach, not the peak."""
    if device.kind == "npu":
        architecture = max((int(f) for f in device.features if re.fullmatch(r"\d{4}", f)), default=0)
        return 8e12 if architecture >= 5000 else 6e12 if architecture >= 4000 else 1.5e12
    if device.backend in APPLE and device.kind == "ane":
        return {1: 1.5e12, 2: 2e12, 3: 2.3e12}.get(machine.apple_generation, 3.5e12)
    if device.kind == "torch-cuda":
        return 10e12 * (0.5 if arithmetic == "f32" else 2.0)
    if (device.kind == "gpu" and device.backend in APPLE) or device.kind == "torch-mps":
        generation = {0: 0.5, 1: 1.0, 2: 1.3, 3: 1.5, 4: 1.8}.get(machine.apple_generation, 4.0)
        size = next((n for word, n in (("Pro", 2), ("Max", 4), ("Ultra", 7)) if word in machine.apple_chip), 1)
        return generation * size * 1e12
    if device.kind == "gpu":
        return _intel_gpu(device) * (0.5 if arithmetic == "f32" else 1.0)
    return machine.cores * _core(machine, arithmetic)


def _intel_gpu(device: Device) -> float:
    if device.memory:
        # A card says how much memory it has and not how many cores; the two go together.
        return 20e12 * min(1.0, device.memory / (16 << 30))
    if "GPU_HW_MATMUL" in device.features:
        return 8e12
    version = next((match for f in device.features if (match := re.search(r"arch=v(\d+)\.(\d+)", f))), None)
    major, minor = (int(version[1]), int(version[2])) if version else (9, 0)
    if (major, minor) >= (12, 70):
        return 2.5e12
    return 1e12 if major >= 12 else 0.5e12 if major >= 11 else 0.3e12


def _core(machine: Machine, arithmetic: str) -> float:
    if machine.apple_chip:
        return 70e9
    if arithmetic == "bf16" and "AMX-BF16" in machine.flags:
        return 250e9
    wide = 60e9 if "AVX512" in machine.flags else 35e9 if "AVX2" in machine.flags else 0
    narrow = 12e9 if "NEON" in machine.flags else 8e9
    return (wide or narrow) * (1.6 if arithmetic in ("bf16", "f16") else 1.0)


def _flops(bundle: ModelBundle, name: str, part: str, size: int) -> float:
    """For one picture. Of Stable Diffusion 1.5's weights a tenth works at each position, on average."""
    defaults, factor = bundle.defaults_of(name), bundle.facts.latents.factor
    parameters = size * 8 / BITS.get(bundle.variant(name).precision_of(part), UNKNOWN_BITS)
    batch = rows_of(bundle.facts, defaults.guidance)
    pixels = defaults.width * defaults.height
    if part == "transformer":
        # Nearly every weight works at each token; attention adds a quarter at 1024 pixels.
        return 2 * parameters * (pixels // bundle.facts.grain**2 + bundle.facts.single_rows) * batch * defaults.steps
    if part == "unet":
        return 0.2 * parameters * pixels / factor**2 * batch * defaults.steps
    if part == "vae_decoder":
        return 0.2 * parameters * pixels
    return 2 * parameters * bundle.facts.max_tokens * batch


def _resident(variant: Variant, part: str, device: Device, arithmetic: str) -> int:
    """Bytes of weights in memory: floats in the type that is computed in, compressed ones unpacked in part."""
    bits, size = BITS.get(variant.precision_of(part), UNKNOWN_BITS), variant.part_size(part)
    if bits >= 16:
        return size * 8 // bits * (4 if arithmetic == "f32" else 2)
    return size if device.kind == "ane" else size * 3 // 2


def _activations(bundle: ModelBundle, name: str, part: str, arithmetic: str) -> int:
    defaults, factor = bundle.defaults_of(name), bundle.facts.latents.factor
    width = 4 if arithmetic == "f32" else 2
    pixels = defaults.width * defaults.height
    if part in DENOISERS:
        return 15_000 * width * (pixels // factor**2) * rows_of(bundle.facts, defaults.guidance)
    return 500 * width * pixels if part == "vae_decoder" else 0
