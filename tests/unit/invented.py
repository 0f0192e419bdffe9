"""Machines that are not here, and models that need not be: what the tables of plans are made of."""

from __future__ import annotations

from dataclasses import replace

from edge_sd.backends import Device
from edge_sd.backends.fake import fake_bundle
from edge_sd.bundle.bundle import ModelBundle
from edge_sd.bundle.facts import Defaults
from edge_sd.bundle.variants import Artifact, Variant
from edge_sd.files import FileRecord
from edge_sd.machine import Machine

GB = 1 << 30
PARTS = ("text_encoder", "unet", "vae_decoder")
BITS = {"fp32": 32, "fp16": 16, "int8": 8, "p6": 6, "int4": 4, "p4": 4}


def model(parameters: dict[str, float], defaults: Defaults, variants: dict[str, tuple[str, str, str]]) -> ModelBundle:
    """A bundle of variants, name -> (backend, precision, target), with weights of `parameters` (millions)."""
    made = {}
    for name, (backend, precision, target) in variants.items():
        artifacts = {part: Artifact(f"{name}/{part}", (), (), ()) for part in PARTS}
        bits = BITS[precision.removesuffix("-lcm")]
        files = {
            f"{name}/{part}": FileRecord(int(parameters[part] * 1e6 * bits / 8), f"{name} of {parameters}")
            for part in PARTS
        }
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
    """OpenVINO's devices by the names below, which are those of processors' generations."""
    kinds = {
        "cpu": Device("cpu", "openvino", "a CPU", frozenset({"FP32", "INT8"})),
        "cpu-bf16": Device("cpu", "openvino", "a CPU", frozenset({"FP32", "INT8", "BF16"})),
        "gpu-xe": Device("gpu", "openvino", "Xe-LP", frozenset({"FP32", "FP16", "GPU: vendor=0x8086 arch=v12.3.0"})),
        "gpu-mtl": Device("gpu", "openvino", "Arc", frozenset({"FP32", "FP16", "GPU: vendor=0x8086 arch=v12.71.4"})),
        "gpu-arc": Device("gpu", "openvino", "Arc 140V", frozenset({"FP32", "FP16", "GPU_HW_MATMUL"})),
        "gpu-old": Device("gpu", "openvino", "UHD 620", frozenset({"FP32", "FP16", "GPU: vendor=0x8086 arch=v9.5.0"})),
        "gpu-fp32": Device("gpu", "openvino", "a GPU", frozenset({"FP32"})),
        "gpu-icl": Device(
            "gpu", "openvino", "Iris Plus", frozenset({"FP32", "FP16", "GPU: vendor=0x8086 arch=v11.0.0"})
        ),
        "dgpu-2": Device("gpu.2", "openvino", "Arc B580", frozenset({"FP16", "GPU_HW_MATMUL"}), 12 * GB),
        "dgpu": Device("gpu.1", "openvino", "Arc A770", frozenset({"FP32", "FP16", "GPU_HW_MATMUL"}), 16 * GB),
        "dgpu-small": Device("gpu.1", "openvino", "Arc A310", frozenset({"FP16", "GPU_HW_MATMUL"}), 2 * GB),
        "npu3": Device("npu", "openvino", "AI Boost", frozenset({"FP16", "INT8", "3720"})),
        "npu4": Device("npu", "openvino", "AI Boost", frozenset({"FP16", "INT8", "4000"})),
        "npu5": Device("npu", "openvino", "AI Boost", frozenset({"FP16", "INT8", "5010"})),
    }
    return [kinds[name] for name in names]


APPLE = [Device(name, "coreml", f"Apple {name}") for name in ("ane", "gpu", "cpu")]
REFERENCE = [Device("coreml-reference", "coreml", "computed by torch")]

# Name -> the machine, and the words for its devices.
MACHINES: dict[str, tuple[Machine, str]] = {
    "M1 8 GB, macOS 13": (mac("M1", "13.6", 3, 8), "apple"),
    "M1 8 GB, macOS 13, little free": (mac("M1", "13.6", 1.5, 8), "apple"),
    "M1 8 GB, macOS 14": (mac("M1", "14.5", 4, 8), "apple"),
    "M1, macOS 15": (mac("M1", "15.0", 10), "apple"),
    "M1 Pro": (mac("M1 Pro", "14.2", 10), "apple"),
    "M1 Max, macOS 15": (mac("M1 Max", "15.1", 40, 64), "apple"),
    "M1 Ultra, macOS 13": (mac("M1 Ultra", "13.1", 90, 128), "apple"),
    "M2, macOS 15": (mac("M2"), "apple"),
    "M2 Max, macOS 15": (mac("M2 Max", "15.1", 20, 32), "apple"),
    "M3, macOS 14": (mac("M3", "14.0"), "apple"),
    "M4, macOS 15": (mac("M4"), "apple"),
    "M4 Pro, macOS 15": (mac("M4 Pro", "15.2", 30, 48), "apple"),
    "M5, macOS 26": (mac("M5", "26.0"), "apple"),
    "M1 with OpenVINO too": (mac("M1"), "apple cpu"),
    "M2, OpenVINO only": (mac("M2"), "cpu"),
    "M4": (mac("M4"), "apple cpu"),
    "Mac with Intel, macOS 13": (replace(mac("", "13.6"), arch="x86_64", cpu="Intel"), "apple"),
    "M2, memory not known": (replace(mac("M2"), memory=0, free=0), "apple"),
    "Lunar Lake": (pc(8, "AVX2 AVX-VNNI", 20, 32), "cpu gpu-arc npu4"),
    "Lunar Lake on Windows": (pc(8, "AVX2", 20, 32, "Windows"), "cpu gpu-arc npu4"),
    "Lunar Lake, no GPU driver": (pc(8, "AVX2", 20, 32), "cpu npu4"),
    "Lunar Lake, 2 GB free": (pc(8, "AVX2", 2, 16), "cpu gpu-arc npu4"),
    "Meteor Lake": (pc(14, "AVX2 AVX-VNNI"), "cpu gpu-mtl npu3"),
    "Meteor Lake, NPU only": (pc(14, "AVX2"), "cpu npu3"),
    "Panther Lake": (pc(16, "AVX2", 24, 32), "cpu gpu-arc npu5"),
    "Arrow Lake desktop": (pc(24, "AVX2", 40, 64), "cpu gpu-mtl npu3"),
    "Tiger Lake": (pc(4, "AVX2 AVX512 VNNI"), "cpu gpu-xe"),
    "Alder Lake": (pc(12, "AVX2"), "cpu gpu-xe"),
    "Kaby Lake, UHD 620": (pc(4, "AVX2", 5, 8), "cpu gpu-old"),
    "GPU without float16": (pc(4, "AVX2", 5, 8), "cpu gpu-fp32"),
    "Core 2, no AVX2": (pc(2, "", 3, 4), "cpu"),
    "Celeron N4020, 4 GB": (pc(2, "", 2.2, 4), "cpu gpu-old"),
    "Celeron, 1 GB free": (pc(2, "", 1, 4), "cpu"),
    "Arc A770": (pc(16, "AVX2", 20, 32), "cpu dgpu"),
    "Arc A770 beside an iGPU": (pc(16, "AVX2", 20, 32), "cpu gpu-xe dgpu"),
    "Arc A310, 2 GB of its own": (pc(16, "AVX2", 20, 32), "cpu dgpu-small"),
    "Arc A770, 1 GB of RAM free": (pc(16, "AVX2", 1, 32), "cpu dgpu"),
    "Ryzen, AVX2 only": (pc(8), "cpu"),
    "Ryzen 7000, AVX-512 BF16": (pc(8, "AVX2 AVX512 VNNI BF16", 20, 32), "cpu-bf16"),
    "Ryzen, 3 GB free": (pc(8, "AVX2", 3, 8), "cpu"),
    "Ryzen, Windows": (pc(8, "AVX2", 10, 16, "Windows"), "cpu"),
    "Xeon with AMX": (pc(32, "AVX2 AVX512 VNNI BF16 AMX-BF16 AMX-INT8", 100, 128), "cpu-bf16"),
    "Xeon with AMX, with torch": (pc(32, "AVX2 AVX512 AMX-BF16", 100, 128), "cpu-bf16 reference"),
    "Xeon, AVX-512": (pc(16, "AVX2 AVX512", 50, 64), "cpu"),
    "EPYC, AVX2": (pc(2, "AVX2", 20, 24), "cpu reference"),
    "container, 1 core": (pc(1, "AVX2", 7, 8), "cpu"),
    "container, 1 core EMOJI": (pc(1, "AVX2", 0.9, 1), "cpu"),
    "container, 2 GB": (pc(2, "AVX2", 1.8, 2), "cpu"),
    "container, 512 MB": (pc(1, "AVX2", 0.5, 0.5), "cpu"),
    "container, 256 MB": (pc(1, "AVX2", 0.2, 0.25), "cpu"),
    "container on Graviton": (replace(pc(4, "NEON FP16 BF16", 14, 16), arch="aarch64"), "cpu-bf16"),
    "Raspberry Pi 5, 8 GB": (replace(pc(4, "NEON FP16 DOTPROD", 6, 8), arch="aarch64"), "cpu"),
    "Raspberry Pi 4, 4 GB": (replace(pc(4, "NEON", 3, 4), arch="aarch64"), "cpu"),
    "nothing known but OpenVINO": (Machine(), "cpu"),
    "Windows on Arm": (replace(pc(12, "NEON", 10, 16, "Windows"), arch="ARM64"), "cpu"),
    "M1, macOS 12": (mac("M1", "12.6", 6, 8), "apple"),
    "M2 Ultra, macOS 14": (mac("M2 Ultra", "14.6", 150, 192), "apple"),
    "M3 Pro, macOS 15": (mac("M3 Pro", "15.3", 20, 36), "apple"),
    "M3 Max, macOS 14": (mac("M3 Max", "14.4", 40, 64), "apple"),
    "M4 Max, macOS 26": (mac("M4 Max", "26.1", 90, 128), "apple"),
    "M2 8 GB, macOS 15, 2 GB free": (mac("M2", "15.4", 2, 8), "apple"),
    "M4 with 2 GB free and OpenVINO": (mac("M4", "15.4", 2, 16), "apple cpu"),
    "Ice Lake": (pc(4, "AVX2 AVX512 VNNI", 8, 16), "cpu gpu-icl"),
    "Broadwell NUC": (pc(2, "AVX2", 6, 8), "cpu gpu-old"),
    "N100 mini PC": (pc(4, "AVX2", 5, 8), "cpu gpu-xe"),
    "Atom, no AVX": (pc(4, "", 3, 4), "cpu"),
    "Steam Deck": (pc(8, "AVX2", 9, 16), "cpu"),
    "Threadripper": (pc(64, "AVX2 AVX512 VNNI BF16", 200, 256), "cpu-bf16"),
    "EPYC Genoa, virtual, 8 cores": (pc(8, "AVX2 AVX512 VNNI BF16", 24, 32), "cpu-bf16"),
    "Sapphire Rapids, virtual, 2 cores": (pc(2, "AVX2 AVX512 VNNI BF16 AMX-BF16 AMX-INT8", 12, 16), "cpu-bf16"),
    "Haswell server": (pc(24, "AVX2", 100, 128), "cpu"),
    "two Arc cards": (pc(16, "AVX2", 40, 64), "cpu dgpu-small dgpu-2"),
    "Arc A770, Windows": (pc(16, "AVX2", 20, 32, "Windows"), "cpu dgpu"),
    "Meteor Lake, 3 GB free": (pc(14, "AVX2", 3, 16), "cpu gpu-mtl npu3"),
    "Ampere Altra": (replace(pc(32, "NEON FP16 DOTPROD", 50, 64), arch="aarch64"), "cpu"),
    "Orange Pi 5, 16 GB": (replace(pc(8, "NEON FP16 DOTPROD", 14, 16), arch="aarch64"), "cpu"),
    "container, cgroup of 3 GB on a Xeon with AMX": (pc(4, "AVX2 AVX512 BF16 AMX-BF16", 3, 3), "cpu-bf16"),
}


def invented(name: str) -> tuple[Machine, list[Device]]:
    """A machine of the list and its devices."""
    machine, words = MACHINES[name]
    groups = {"apple": APPLE, "reference": REFERENCE}
    return machine, [device for word in words.split() for device in groups.get(word) or openvino(word)]
