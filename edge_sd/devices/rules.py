"""Rules: placements that are impossible, or so slow or inaccurate that they are never chosen automatically."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..backends.base import Device
from ..bundle.bundle import ModelBundle
from ..machine import Machine
from .estimates import arithmetic_of, has_bfloat16

# Devices that check what a Mac would draw, and how they compute.
REFERENCES = {"coreml-reference": "in torch", "coreai-reference": "by Apple's runtime on the CPU"}
# The macOS of the same year as a target of Core ML.
MACOS_OF = {"iOS16": 13, "iOS17": 14, "iOS18": 15, "iOS26": 26}


@dataclass(frozen=True)
class Objection:
    """A reason against a placement. It is overridden, with a note, when no other placement is left, except:

    final    the placement is impossible
    unless   it stands unless the device or variant of this name was asked for
    last     with `unless`: it is overridden too when no other placement is left
    """

    why: str
    final: bool = False
    unless: tuple[str, ...] = ()
    last: bool = False


def macos_needed(target: str) -> int:
    """13 for "iOS16" and "macOS13"; 0 where a target is not known."""
    if target.startswith("macOS") and target[5:].isdigit():
        return int(target[5:])
    return MACOS_OF.get(target, 0)


def objections(bundle: ModelBundle, name: str, part: str, device: Device, machine: Machine) -> Iterator[Objection]:
    """Objections to `part` of variant `name` on `device`, which are of the same backend.

    Dynamic shapes are no objection: the backends fix shapes before they compile, for NPUs too.
    """
    variant = bundle.variant(name)
    needed, version = macos_needed(variant.target), machine.os_version
    here = machine.system == "Darwin" and device.name not in REFERENCES
    if here and needed and version and version[0] < needed:
        yield Objection(f"needs macOS {needed}, this is {machine.version}", final=True)
    if device.kind == "ane" and machine.system == "Darwin" and machine.arch == "x86_64":
        yield Objection("Macs with Intel processors have no Neural Engine", final=True)
    if device.name in REFERENCES:
        how = REFERENCES[device.name]
        why = f"computes {how} to check what a Mac would draw, slowly; ask for it: --device {device.name}"
        yield Objection(why, unless=(device.name,))
    if variant.backend == "torch" and device.name == "torch-cpu":
        if variant.precision == "fp16":
            yield Objection("CPUs compute float16 slowly; torch-cpu is for float32", unless=(name,))
        if variant.precision == "bf16" and not has_bfloat16(device, machine):
            yield Objection("this CPU has no bfloat16", unless=(name,))
    if device.backend == "torch" and any(each.backend != "torch" for each in bundle.variants.values()):
        why = f"a converted variant is faster and smaller; ask for it: --device {device.name}"
        yield Objection(why, unless=(name, device.name), last=True)
    if variant.defaults is not None:
        why = f"draws in other steps than the model's own, which shows; ask for it: --variant {name}"
        yield Objection(why, unless=(name,))
    if part == "unet" and variant.compute == "ane" and device.kind == "gpu":
        yield Objection("its attention is cut up for the Neural Engine, which a GPU runs slowly")
    if part == "unet" and variant.compute == "gpu" and device.kind == "ane":
        yield Objection("its fused attention does not run on the Neural Engine")
    if part == "text_encoder" and device.kind == "npu":
        yield Objection("text is encoded in float32, which an NPU does not have")
    half = arithmetic_of(variant, part, device, machine) == "f16"
    if part == "vae_decoder" and bundle.facts.family == "sdxl" and half:
        yield Objection("the decoder of SDXL overflows float16")
    if device.backend == "openvino" and device.kind == "gpu" and device.features and "FP16" not in device.features:
        yield Objection("this GPU has no float16")
