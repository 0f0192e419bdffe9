"""Readers of models that others wrote, for the fuzzer: exports, Apple's folders, Core AI assets and what lies beside.

A model is several files. Their texts stand in one input, a blank line after each, so that a fuzzer changes any of them.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from edge_sd.paths import embedded_models

EMOJI = embedded_models() / "emoji"
CONFIGS = ("model_index.json", "unet/config.json", "vae/config.json", "scheduler/scheduler_config.json",
           "text_encoder/config.json", "text_encoder_2/config.json", "hub.json")  # fmt: skip
FLOW_CONFIGS = ("model_index.json", "transformer/config.json", *CONFIGS[2:])
COMPILED = tuple(f"{name}.mlmodelc/metadata.json" for name in ("Unet", "TextEncoder", "VAEDecoder", "VAEEncoder"))
GRAPH = "unet/openvino_model.xml"
SHAPES = {"sample": (1, 4, 8, 8), "timestep": (1,), "encoder_hidden_states": (1, 7, 8)}


@cache
def _root(name: str) -> Path:
    """A folder of this process, in memory where the system has such a place."""
    place = "/dev/shm" if Path("/dev/shm").is_dir() else None
    return Path(tempfile.mkdtemp(dir=place, prefix=f"edge-sd-fuzz-{name}-"))


def _write(root: Path, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


def _split(data: bytes, names: tuple[str, ...]) -> dict[str, bytes]:
    """Pieces of an input by the names of their files; what is missing is empty."""
    pieces = data.split(b"\n\n", len(names) - 1)
    return dict(zip(names, [*pieces, *[b""] * (len(names) - len(pieces))], strict=True))


def _use(root: Path) -> None:
    """Open a model without a manifest, and ask what is asked before anything is drawn."""
    from edge_sd.bundle.bundle import open_foreign

    bundle = open_foreign(root)
    facts = bundle.facts
    str(facts.defaults)
    if not facts.schedule.is_flow:
        facts.schedule.compute_sigmas()
    for name in bundle.variants:
        bundle.fingerprint(name)


def _export(name: str, data: bytes, configs: tuple[str, ...], denoiser: str) -> None:
    graphs = [f"{part}/openvino_model.{end}" for part in ("text_encoder", "text_encoder_2", denoiser, "vae_decoder")
              for end in ("xml", "bin")]  # fmt: skip
    root = _root(name)
    _write(root, {**dict.fromkeys(graphs, b'<net output_names="a,hidden_states.1"/>'), **_split(data, configs)})
    if not (root / "hub.json").read_bytes().strip():
        # Not every export was pulled.
        (root / "hub.json").unlink()
    _use(root)


def export(data: bytes) -> None:
    """The configs of an export whose denoiser is a UNet, and the record of its pull."""
    _export("export", data, CONFIGS, "unet")


def flow_export(data: bytes) -> None:
    """The configs of one whose denoiser is a transformer."""
    _export("flow_export", data, FLOW_CONFIGS, "transformer")


def resources(data: bytes) -> None:
    """Apple's `Resources/` of compiled packages, which are known by their metadata.json."""
    from edge_sd.bundle.bundle import open_foreign

    root = _root("resources")
    _write(root, {"vocab.json": b"{}", "merges.txt": b"", **_split(data, COMPILED)})
    open_foreign(root)


def graph(data: bytes) -> None:
    """The graph of an export, as it is read, given its sizes and a LoRA, and rewritten."""
    root, loading = _loading()
    _write(root, {GRAPH: data})
    loading.graphs()


@cache
def _loading() -> tuple[Path, Any]:
    import openvino as ov
    from safetensors.numpy import save

    from edge_sd.backends.base import Device, LoadRequest
    from edge_sd.backends.openvino.loading import Loading
    from edge_sd.bundle.bundle import ModelBundle, read_manifest
    from edge_sd.bundle.variants import Artifact, Variant
    from edge_sd.components.edits import Edits
    from edge_sd.components.lora import read_lora

    root = _root("graph")
    # The graph of `_small_graph` has 4 x 4 x 3 x 3 weights and 8 x 4 more.
    _write(root, {"unet/openvino_model.bin": _small_graph()[1]})
    rows = {f"lora_unet_conv_in.lora_{half}.weight": value for half, value in
            (("down", np.ones((1, 4, 3, 3), np.float32)), ("up", np.ones((4, 1, 1, 1), np.float32)))}  # fmt: skip
    _write(root, {"a.safetensors": save(rows)})
    bundle = ModelBundle(root, read_manifest(EMOJI).facts, {})
    artifact = Artifact(GRAPH, ("unet/openvino_model.bin",), (), ())
    variant = Variant("openvino", "fp32", {"unet": artifact}, {})
    edits = Edits(loras=((read_lora(root / "a.safetensors"), 1.0),), part="unet")
    request = LoadRequest(bundle, variant, "unet", Device("cpu", "openvino", "a processor"), SHAPES, edits)
    return root, Loading(ov.Core(), "1", frozenset(), 2, request)


@cache
def _small_graph() -> tuple[bytes, bytes]:
    """The XML and the weights of a graph with the inputs of a UNet, a doubling, a convolution and a matrix product."""
    import openvino as ov
    from openvino import opset13 as ops

    rng = np.random.default_rng(0)
    ports = {name: ops.parameter([-1, *shape[1:]] if len(shape) > 1 else [-1], ov.Type.f32, name=name)
             for name, shape in SHAPES.items()}  # fmt: skip
    for name, port in ports.items():
        port.output(0).set_names({name})
    kernel = ops.constant(rng.normal(size=(4, 4, 3, 3)).astype(np.float16))
    kernel.set_friendly_name("conv_in.weight")
    y = ops.convolution(ports["sample"], ops.convert(kernel, "f32"), [1, 1], [1, 1], [1, 1], [1, 1])
    text = ops.matmul(ports["encoder_hidden_states"], ops.constant(rng.normal(size=(8, 4)).astype(np.float32)),
                      False, False)  # fmt: skip
    text = ops.unsqueeze(ops.unsqueeze(ops.reduce_mean(text, ops.constant([1]), False), ops.constant(2)),
                         ops.constant(3))  # fmt: skip
    time = ops.reshape(ports["timestep"], ops.constant([-1, 1, 1, 1]), False)
    y = ops.add(ops.add(y, text), time)
    y.output(0).set_names({"out_sample"})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.xml"
        ov.save_model(ov.Model([y], list(ports.values()), "unet"), path, compress_to_fp16=False)
        return path.read_bytes(), path.with_suffix(".bin").read_bytes()


def asset(data: bytes) -> None:
    """A Core AI asset: its recorded hash, and its program."""
    from edge_sd.backends.coreai.runtime import HASH, PROGRAM, check_asset

    _write(_root("asset"), _split(data, (HASH, PROGRAM)))
    check_asset(_root("asset"))


def pieces(data: bytes) -> None:
    """What a package is put together of."""
    from edge_sd.bundle.assembly import Assembly

    root = _root("pieces")
    _write(root, {"x.json": data, "weights": bytes(range(256)) * 4, "package/graph": b""})
    assembly = Assembly.read(root / "x.json")
    assembly.write([root / "weights"], root / "package")
    assembly.is_whole(root / "package")


def bits(data: bytes) -> None:
    """How many bits each weight of a package has, and the curve behind it."""
    from edge_sd.converters.coreml.mixed import BitRecipe, draw, table

    root = _root("bits")
    _write(root, {"x.bits.json": data})
    recipe = BitRecipe.open(root / "x.bits.json")
    table(recipe)
    draw(recipe, root / "x.png")


READERS: dict[str, Callable[[bytes], None]] = {
    each.__name__: each for each in (export, flow_export, resources, graph, asset, pieces, bits)
}


def seeds(name: str) -> Iterator[bytes]:
    """What a reader takes, to begin with."""
    if name == "export":
        yield b"\n\n".join((EMOJI / each).read_bytes() for each in CONFIGS[:5]) + b"\n\n{}\n\n" + _record()
        yield _texts(_XL)
    elif name == "flow_export":
        yield from map(_texts, _FLOWS)
    elif name == "resources":
        ports = {"Unet": ({"sample": [2, 4, 64, 64], "timestep": [2], "encoder_hidden_states": [2, 768, 1, 77]},
                          "noise_pred"),
                 "TextEncoder": ({"input_ids": [1, 77]}, "last_hidden_state"),
                 "VAEDecoder": ({"z": [1, 4, 64, 64]}, "image"),
                 "VAEEncoder": ({"x": [1, 3, 512, 512]}, "latent")}  # fmt: skip
        yield _texts([_metadata(*row) for row in ports.values()])
    elif name == "graph":
        yield _small_graph()[0]
    elif name == "asset":
        yield hashlib.sha256(b"program").digest() + b"\n\nprogram"
    elif name == "pieces":
        made = hashlib.sha256(bytes(range(16)) + bytes(range(100, 116))).hexdigest()
        yield json.dumps({"file": "a/b.bin", "bytes": 32, "sha256": made, "pieces": [[0, 16], [100, 16]]}).encode()
        yield json.dumps({"file": "b", "bytes": 8, "sha256": "", "pieces": [[0, 4, 0.5], [4, 4]]}).encode()
    elif name == "bits":
        point = {"name": "4", "bits": 4.0, "bytes": 1000, "psnr": 40.5}
        fixed = [point, {**point, "name": "8", "bytes": 2000, "psnr": 60.25}]
        yield json.dumps({"bits": {"a.weight": 4}, "fixed": fixed, "mixed": [point]}).encode()


def _texts(documents: list[Any]) -> bytes:
    return b"\n\n".join(json.dumps(each).encode() for each in documents)


def _record() -> bytes:
    return json.dumps(
        {"repo": "a/b", "revision": "0" * 40, "form": "openvino", "license": "mit", "defaults": {"steps": 4},
         "files": {"unet/openvino_model.xml": {"bytes": 3, "sha256": "ab"}}}
    ).encode()  # fmt: skip


def _metadata(ports: dict[str, list[int]], output: str) -> list[Any]:
    rows = [{"name": name, "dataType": "Float16", "shape": str(shape)} for name, shape in ports.items()]
    return [{"inputSchema": rows, "outputSchema": [{"name": output}],
             "mlProgramOperationTypeHistogram": {"Ios16.einsum": 3}}]  # fmt: skip


_VAE: dict[str, Any] = {"block_out_channels": [8, 16, 16, 16], "latent_channels": 16, "scaling_factor": 1.5,
                        "shift_factor": 0.06}  # fmt: skip
_FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
_QWEN = {"hidden_size": 8, "num_hidden_layers": 28}
_XL: list[Any] = [
    {"_class_name": "StableDiffusionXLPipeline", "requires_aesthetics_score": True},
    {"addition_embed_type": "text_time", "in_channels": 4, "out_channels": 4, "sample_size": [128, 96],
     "cross_attention_dim": 2048, "_diffusers_version": "0.19.0"},
    {**_VAE, "latent_channels": 4, "latents_mean": [0, 1, 2, 3], "latents_std": [1, 1, 1, 1]},
    {"_class_name": "EulerDiscreteScheduler", "beta_start": 0.00085, "beta_end": 0.012, "timestep_spacing": "trailing"},
    {"hidden_size": 768, "num_hidden_layers": 12, "max_position_embeddings": 77},
    {"hidden_size": 1280, "num_hidden_layers": 32, "projection_dim": 1280},
]  # fmt: skip
_FLOWS: list[list[Any]] = [
    [{"_class_name": "StableDiffusion3Pipeline", "text_encoder": ["a", "b"], "text_encoder_2": ["a", "b"]},
     {"in_channels": 16, "patch_size": 2, "sample_size": 64, "joint_attention_dim": 64, "pooled_projection_dim": 64,
      "pos_embed_max_size": 96, "qk_norm": "rms_norm"}, _VAE, _FLOW, {"hidden_size": 8, "num_hidden_layers": 2},
     {"hidden_size": 8, "num_hidden_layers": 2}],
    [{"_class_name": "Flux2KleinPipeline", "is_distilled": True}, {"joint_attention_dim": 24, "in_channels": 8},
     {**_VAE, "bn_running_mean_data": [0.0] * 8, "bn_running_var_data": [1.0] * 8}, _FLOW, _QWEN],
    [{"_class_name": "ZImagePipeline"}, {"cap_feat_dim": 8, "in_channels": 16, "all_patch_size": [2]}, _VAE, _FLOW,
     _QWEN],
]  # fmt: skip
