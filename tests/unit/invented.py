"""Machines that are not here, and models that need not be: what the tables of plans are made of."""

from __future__ import annotations

from edge_sd.backends import Device
from edge_sd.backends.fake import fake_bundle
from edge_sd.bundle import Artifact, Defaults, FileRecord, ModelBundle, Variant
from edge_sd.machine import Machine

GB = 1 << 30
PARTS = ("text_encoder", "unet", "vae_decoder")
BITS = {"fp32": 32, "fp16": 16, "int8": 8, "p6": 6, "int4": 4, "p4": 4}


def model(parameters: dict[str, float], defaults: Defaults, variants: dict[str, tuple[str, str, str]]) -> ModelBundle:
    """A bundle of variants, name -> (backend, precision, target), with weights of `parameters` (millions)."""
    from dataclasses import replace

    made = {}
    for name, (backend, precision, target) in variants.items():
        artifacts = {part: Artifact(f"{name}/{part}", (), (), ()) for part in PARTS}
        bits = BITS[precision.removesuffix("-lcm")]
        files = {f"{name}/{part}": FileRecord(int(parameters[part] * 1e6 * bits / 8), name) for part in PARTS}
        compute = next((c for c in ("ane", "gpu") if f"-{c}-" in name), "")
        few = replace(defaults, steps=4, guidance=1.0, sampler="lcm") if precision.endswith("-lcm") else None
        made[name] = Variant(backend, precision, artifacts, files, "source", compute, few, target)
    bundle = fake_bundle()
    return replace(bundle, variants=made, facts=replace(bundle.facts, name="invented", defaults=defaults))


OPENVINO = {"openvino-fp16": ("openvino", "fp16", ""), "openvino-int8": ("openvino", "int8", "")}
COREML = {
    "coreml-ane-fp16": ("coreml", "fp16", "iOS16"),
    "coreml-ane-p6": ("coreml", "p6", "iOS16"),
    "coreml-gpu-fp16": ("coreml", "fp16", "iOS18"),
}
FEW = {"openvino-fp16-lcm": ("openvino", "fp16-lcm", "")}
SD15_PARAMETERS = {"text_encoder": 123.0, "unet": 860.0, "vae_decoder": 50.0}
SD15 = model(SD15_PARAMETERS, Defaults(512, 512, 20, 7.5, "dpmpp_2m"), OPENVINO | COREML | FEW)
EMOJI = model(
    {"text_encoder": 3.0, "unet": 9.6, "vae_decoder": 4.0}, Defaults(128, 128, 20, 4.0, "ddim", 512),
    {"openvino-fp16": OPENVINO["openvino-fp16"]} | FEW,
)  # fmt: skip


def pc(cores: int = 8, flags: str = "AVX2", free: float = 12, memory: float = 16, system: str = "Linux") -> Machine:
    return Machine(system, "", "x86_64", "a CPU", frozenset(flags.split()), cores, int(memory * GB), int(free * GB))


def mac(chip: str, version: str = "15.1", free: float = 10, memory: float = 16) -> Machine:
    flags = frozenset({"NEON", "FP16"})
    return Machine("Darwin", version, "arm64", f"Apple {chip}", flags, 8, int(memory * GB), int(free * GB), False, chip)


def openvino(*names: str) -> list[Device]:
    """OpenVINO's devices: cpu, cpu-bf16, gpu-xe (no matrix units), gpu-arc, gpu-mtl, gpu-old, dgpu, npu3, npu4, npu5."""
    kinds = {
        "cpu": Device("cpu", "openvino", "a CPU", frozenset({"FP32", "INT8"})),
        "cpu-bf16": Device("cpu", "openvino", "a CPU", frozenset({"FP32", "INT8", "BF16"})),
        "gpu-xe": Device("gpu", "openvino", "Xe-LP", frozenset({"FP32", "FP16", "GPU: vendor=0x8086 arch=v12.3.0"})),
        "gpu-mtl": Device("gpu", "openvino", "Arc", frozenset({"FP32", "FP16", "GPU: vendor=0x8086 arch=v12.71.4"})),
        "gpu-arc": Device("gpu", "openvino", "Arc 140V", frozenset({"FP32", "FP16", "GPU_HW_MATMUL"})),
        "gpu-old": Device("gpu", "openvino", "UHD 620", frozenset({"FP32", "FP16", "GPU: vendor=0x8086 arch=v9.5.0"})),
        "gpu-fp32": Device("gpu", "openvino", "a GPU", frozenset({"FP32"})),
        "dgpu": Device("gpu.1", "openvino", "Arc A770", frozenset({"FP32", "FP16", "GPU_HW_MATMUL"}), 16 * GB),
        "dgpu-small": Device("gpu.1", "openvino", "Arc A310", frozenset({"FP16", "GPU_HW_MATMUL"}), 2 * GB),
        "npu3": Device("npu", "openvino", "AI Boost", frozenset({"FP16", "INT8", "3720"})),
        "npu4": Device("npu", "openvino", "AI Boost", frozenset({"FP16", "INT8", "4000"})),
        "npu5": Device("npu", "openvino", "AI Boost", frozenset({"FP16", "INT8", "5010"})),
    }
    return [kinds[name] for name in names]


APPLE = [Device(name, "coreml", f"Apple {name}") for name in ("ane", "gpu", "cpu")]
REFERENCE = [Device("coreml-reference", "coreml", "computed by torch")]
