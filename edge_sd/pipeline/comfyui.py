"""ComfyUI's graph of nodes (the `prompt` text of its pictures) as the fields of an Infotext.

The graph is followed upwards from the nodes that save pictures to the sampler that began from empty latents, and from
there to its prompts, size, model and LoRAs, by the names of inputs, so that other authors' nodes with the usual names
are read too. Each node is visited once. What stands on the way and is not understood is named in a note.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..files import parse_json
from .infotext import Infotext

MAX_NODES = 10_000
# Nodes looked at altogether, which bounds the time: graphs of the field take a few hundred.
MAX_VISITS = 100_000
# Prompts that a graph may join; each is looked for upwards of its own node.
MAX_PROMPTS = 32
# Inputs that lead from what one looks for into another subject.
TEXTS = ("text", "text_g", "text_l", "t5xxl", "clip_l", "prompt", "string", "value")
PROMPTS = ("positive", "negative", "conditioning")
# Nodes that are read, or that change nothing that a request has no word for.
KNOWN = ("KSampler", "SamplerCustom", "CLIPTextEncode", "Empty", "VAE", "Save", "Preview", "Checkpoint", "UNETLoader",
         "CLIPLoader", "DualCLIPLoader", "LoraLoader", "CLIPSetLastLayer", "RandomNoise", "CFGGuider", "BasicGuider",
         "BasicScheduler", "Primitive", "Note", "Reroute", "String", "Int", "Float")  # fmt: skip
# ComfyUI's names of samplers that differ from every other program's.
SAMPLERS = {"euler_ancestral": "euler_a", "dpmpp_2m_sde_gpu": "dpmpp_2m_sde", "dpmpp_sde_gpu": "dpmpp_sde",
            "dpmpp_3m_sde_gpu": "dpmpp_3m_sde", "uni_pc": "unipc", "uni_pc_bh2": "unipc"}  # fmt: skip


@dataclass
class _Graph:
    """Nodes by their ids; an input is a value, or a link: [id, number of the output]."""

    nodes: dict[str, dict[str, Any]]
    visits: int = 0

    def inputs(self, node: str) -> dict[str, Any]:
        found = self.nodes[node].get("inputs")
        return found if isinstance(found, dict) else {}

    def kind(self, node: str) -> str:
        return str(self.nodes[node].get("class_type", ""))

    def link(self, value: Any) -> str | None:
        """The id of the node that an input comes from, None where it is a value."""
        if isinstance(value, list) and len(value) == 2 and str(value[0]) in self.nodes:
            return str(value[0])
        return None

    def above(self, *starts: str | None, without: tuple[str, ...] = ()) -> Iterator[str]:
        """`starts` and the nodes that they come from, nearest first, each once; not through inputs `without`."""
        waiting, seen = [start for start in starts if start is not None], set()
        for node in waiting:
            if node in seen:
                continue
            seen.add(node)
            self.visits += 1
            if self.visits > MAX_VISITS:
                raise ValueError(f"its graph takes more than {MAX_VISITS} looks at nodes")
            yield node
            links = (self.link(value) for name, value in self.inputs(node).items() if name not in without)
            waiting += [link for link in links if link is not None and link not in seen]

    def value(self, start: str | None, names: tuple[str, ...], without: tuple[str, ...] = ()) -> Any:
        """The nearest value above `start` of an input called one of `names`; a link there leads to its own value."""
        for node in self.above(start, without=without):
            for name in names:
                found = self.inputs(node).get(name)
                if isinstance(found, (str, int, float)) and not isinstance(found, bool):
                    return found
                if (link := self.link(found)) is not None and (plain := self._constant(link)) is not None:
                    return plain
        return None

    def _constant(self, node: str) -> Any:
        """The value of a node that holds nothing else."""
        held = self.inputs(node)
        for name in ("value", "seed", "int", "float", "number", *TEXTS):
            if isinstance(found := held.get(name), (str, int, float)):
                return found
        return None


def read_comfyui(text: str) -> Infotext | None:
    """What a graph in JSON says, or None where no sampler is in it. Raises ValueError for one that is too tangled."""
    try:
        document = parse_json(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(document, dict) or len(document) > MAX_NODES:
        return None
    graph = _Graph({str(key): node for key, node in document.items() if isinstance(node, dict)})
    saving = [node for node in graph.nodes if graph.kind(node).startswith(("Save", "Preview"))]
    samplers = [node for node in graph.nodes if _is_sampler(graph, node)]
    passes = [node for node in graph.above(*saving, without=PROMPTS) if _is_sampler(graph, node)] or samplers[:1]
    return _read_sampler(graph, passes[-1], passes) if passes else None


def _is_sampler(graph: _Graph, node: str) -> bool:
    inputs = graph.inputs(node)
    return "latent_image" in inputs and bool({"steps", "sigmas", "sampler", "sampler_name"} & set(inputs))


def _read_sampler(graph: _Graph, sampler: str, passes: list[str]) -> Infotext:
    inputs = graph.inputs(sampler)
    guider = graph.link(inputs.get("guider"))
    owner = inputs if "positive" in inputs else graph.inputs(guider) if guider else inputs
    positive = graph.link(owner.get("positive", owner.get("conditioning")))
    negative = graph.link(owner.get("negative"))
    latent = graph.link(inputs.get("latent_image"))
    beside = ("latent_image", "latent", "samples", *PROMPTS)

    def of(*names: str) -> Any:
        return graph.value(sampler, names, (*beside, "model"))

    model = graph.link(inputs.get("model")) or (graph.link(graph.inputs(guider).get("model")) if guider else None)
    fields = {
        "Steps": of("steps"),
        "Sampler": of("sampler_name"),
        "Schedule type": of("scheduler"),
        "CFG scale": of("cfg"),
        "Seed": of("seed", "noise_seed"),
        "Denoising strength": of("denoise"),
        "Model": graph.value(model, ("ckpt_name", "unet_name", "model_name")),
    }
    width, height = (graph.value(latent, (name,), PROMPTS) for name in ("width", "height"))
    if isinstance(width, int) and isinstance(height, int):
        fields["Size"] = f"{width}x{height}"
    if fields["Denoising strength"] == 1:
        fields["Denoising strength"] = None
    if isinstance(fields["Sampler"], str):
        name = fields["Sampler"].removeprefix("sample_")
        fields["Sampler"] = SAMPLERS.get(name, name)
    skip = graph.value(positive, ("stop_at_clip_layer",))
    if isinstance(skip, int) and skip < -1:
        fields["Clip skip"] = -skip
    prompts, others = _texts(graph, positive)
    negatives, _ = _texts(graph, negative)
    loras = _loras(graph, model)
    notes = []
    if len(prompts) > 1 or len(negatives) > 1:
        notes.append(
            f"the graph joins {max(len(prompts), len(negatives))} prompts, which are written one after another"
        )
    if len(passes) > 1:
        notes.append(f"the graph draws in {len(passes)} passes; the first is taken over")
    unread = sorted({graph.kind(node) for node in graph.above(passes[0], sampler)} | others)
    if left := [kind for kind in unread if kind and not any(part in kind for part in KNOWN)]:
        notes.append(f"nodes that are not taken over: {', '.join(kind[:40] for kind in left[:12])}")
    named = {key: str(value) for key, value in fields.items() if value is not None}
    return Infotext(", ".join(prompts) + loras, ", ".join(negatives), named, "ComfyUI", tuple(notes))


def _texts(graph: _Graph, start: str | None) -> tuple[list[str], set[str]]:
    """The texts above a conditioning, each once, and the kinds of nodes on the way; square brackets are words there."""
    found: dict[str, None] = {}
    kinds = set()
    for node in graph.above(start, without=("clip", "model", "vae", "image", "control_net")):
        kinds.add(graph.kind(node))
        if len(found) == MAX_PROMPTS:
            break
        if "Encode" not in graph.kind(node) and "clip" not in graph.inputs(node):
            continue
        for name in TEXTS:
            value = graph.inputs(node).get(name)
            link = graph.link(value)
            text = graph.value(link, TEXTS) if link else value
            if isinstance(text, str) and text.strip():
                found[text.strip().replace("[", r"\[").replace("]", r"\]")] = None
    return list(found), kinds


def _loras(graph: _Graph, model: str | None) -> str:
    tags = ""
    for node in graph.above(model, without=PROMPTS):
        held = graph.inputs(node)
        name = held.get("lora_name")
        if isinstance(name, str):
            stem = name.replace("\\", "/").rpartition("/")[2].removesuffix(".safetensors")
            unet = held.get("strength_model", 1)
            text = held.get("strength_clip", unet)
            weight = f"{text}" if text == unet else f"{text}:{unet}"
            tags += f" <lora:{stem}:{weight}>"
    return tags
