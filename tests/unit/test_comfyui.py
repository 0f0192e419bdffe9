"""The nodes for ComfyUI, held against its documented contract, and run by its own engine where that is installed."""

from __future__ import annotations

import inspect
import subprocess
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from edge_sd import Pipeline, Request
from edge_sd.apps.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS, nodes
from edge_sd.errors import InvalidRequest

# Types that ComfyUI's own nodes have, and how a widget's value of each is written in a workflow.
WIDGETS = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}
TYPES = {*WIDGETS, "IMAGE", "MASK", nodes.PIPELINE}


def defaults(node: Any) -> dict[str, Any]:
    """What a workflow holds of a node whose widgets nobody touched."""
    found = {}
    for inputs in node.INPUT_TYPES().values():
        for name, (kind, *more) in inputs.items():
            if isinstance(kind, list):
                found[name] = kind[0]
            elif kind in WIDGETS:
                found[name] = more[0].get("default", "") if more else ""
    return found


@pytest.fixture(scope="module")
def pipeline() -> Any:
    (opened,) = nodes.EdgeSDLoader().load(**{**defaults(nodes.EdgeSDLoader), "variant": "openvino-fp16"})
    with opened:
        yield opened


@pytest.mark.parametrize("name", NODE_CLASS_MAPPINGS)
def test_a_node_is_what_comfyui_wants_of_one(name: str) -> None:
    node = NODE_CLASS_MAPPINGS[name]
    assert name in NODE_DISPLAY_NAME_MAPPINGS
    groups = node.INPUT_TYPES()
    assert {"required"} <= {*groups} <= {"required", "optional", "hidden"}
    for inputs in groups.values():
        for title, (kind, *more) in inputs.items():
            options = more[0] if more else {}
            assert isinstance(title, str)
            if isinstance(kind, list):
                assert kind
                assert all(isinstance(each, str) for each in kind)
                assert options.get("default", kind[0]) in kind
                continue
            assert kind in TYPES
            if "default" in options:
                assert isinstance(options["default"], WIDGETS[kind])
            if "min" in options:
                assert options["min"] <= options["default"] <= options["max"]
    method = inspect.signature(getattr(node, node.FUNCTION)).parameters
    assert {*method} - {"self"} == {title for inputs in groups.values() for title in inputs}
    assert {title for title, each in method.items() if each.default is not each.empty} == {*groups.get("optional", {})}
    assert len(node.RETURN_TYPES) == len(node.RETURN_NAMES)
    assert {*node.RETURN_TYPES} <= TYPES
    assert isinstance(node.CATEGORY, str)


def test_importing_the_nodes_loads_neither_torch_nor_a_backend() -> None:
    script = "import edge_sd.apps.comfyui, sys; print({'torch', 'openvino'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def draw(pipeline: Pipeline, **given: Any) -> tuple[torch.Tensor, str]:
    inputs = {**defaults(nodes.EdgeSDSampler), "pipeline": pipeline, "prompt": "a cat", "steps": 2, **given}
    found = nodes.EdgeSDSampler().draw(**inputs)
    assert len(found) == len(nodes.EdgeSDSampler.RETURN_TYPES)
    images, text = found
    assert (images.dtype, images.ndim, images.shape[3]) == (torch.float32, 4, 3)
    assert 0 <= float(images.min()) <= float(images.max()) <= 1
    return images, text


def pixels(images: torch.Tensor) -> np.ndarray:
    return np.round(images.numpy() * 255).astype(np.uint8)


def test_it_draws_what_the_pipeline_draws(pipeline: Pipeline) -> None:
    images, text = draw(pipeline, seed=7, count=2, sampler="euler", guidance=3.0, negative="a dog")
    alone = pipeline.generate(Request("a cat", "a dog", seed=7, count=2, sampler="euler", guidance=3.0, steps=2))
    assert np.array_equal(pixels(images), np.stack([np.asarray(each.image) for each in alone.pictures]))
    assert text == alone.pictures[0].texts()[0]


def test_outside_the_mask_the_image_stays_and_each_of_a_batch_is_gone_on_from(pipeline: Pipeline) -> None:
    before = torch.rand(2, 64, 64, 3)
    mask = torch.zeros(1, 64, 64)
    mask[:, :, 32:] = 1
    images, _ = draw(pipeline, image=before, mask=mask, strength=1.0, seed=1)
    assert images.shape == before.shape
    assert np.array_equal(pixels(images)[:, :, :24], pixels(before)[:, :, :24])
    assert not np.array_equal(pixels(images)[:, :, 40:], pixels(before)[:, :, 40:])


def test_a_control_picture_is_followed_and_what_cannot_be_drawn_is_said(pipeline: Pipeline) -> None:
    control = torch.ones(1, 128, 128, 3)
    control[:, 32:96, 32:96] = 0
    plain, _ = draw(pipeline, seed=3)
    followed, _ = draw(pipeline, seed=3, control=control)
    assert not torch.equal(plain, followed)
    with pytest.raises(InvalidRequest, match="width 1024 is beyond"):
        draw(pipeline, width=1024)
    with pytest.raises(InvalidRequest, match="emoji takes no reference pictures"):
        draw(pipeline, reference=control)


def test_the_bar_moves_and_a_stop_holds_within_a_step(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(Exception):
        pass

    moved: list[tuple[int, int]] = []

    def check() -> None:
        if len(moved) == 3:
            raise Interrupted

    class Bar:
        def __init__(self, total: int) -> None: ...

        def update_absolute(self, value: int, total: int) -> None:
            moved.append((value, total))

    for name, content in {
        "comfy": {},
        "comfy.model_management": {"throw_exception_if_processing_interrupted": check},
        "comfy.utils": {"ProgressBar": Bar},
    }.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(Interrupted):
        draw(pipeline, steps=20, count=2)
    assert moved == [(1, 40), (2, 40), (3, 40)]


def test_a_workflow_runs_in_comfyuis_own_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine that PyPI's `comfyui` has; ours beside a node that keeps what it gets."""
    execution = pytest.importorskip("comfy.cmd.execution", reason="pip install --no-deps comfyui, and what it asks for")
    kept: list[torch.Tensor] = []

    class Keep:
        RETURN_TYPES = ()
        FUNCTION = "keep"
        OUTPUT_NODE = True
        CATEGORY = "test"

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:
            return {"required": {"images": ("IMAGE",)}}

        def keep(self, images: torch.Tensor) -> dict[str, Any]:
            kept.append(images)
            return {"ui": {}}

    class Server:
        client_id = last_node_id = last_prompt_id = None

        def send_sync(self, *given: Any, **named: Any) -> None: ...

    found = ModuleType("nodes")
    found.NODE_CLASS_MAPPINGS = {**NODE_CLASS_MAPPINGS, "Keep": Keep}  # type: ignore[attr-defined]
    monkeypatch.setattr(execution, "nodes", found)
    sampler = {**defaults(nodes.EdgeSDSampler), "prompt": "a cat", "steps": 2, "seed": 7, "pipeline": ["1", 0]}
    workflow = {
        "1": {"class_type": "EdgeSDLoader", "inputs": {**defaults(nodes.EdgeSDLoader), "variant": "openvino-fp16"}},
        "2": {"class_type": "EdgeSDSampler", "inputs": sampler},
        "3": {"class_type": "Keep", "inputs": {"images": ["2", 0]}},
    }
    accepted, error, *_ = execution.validate_prompt(workflow)
    assert accepted, error
    executor = execution.PromptExecutor(Server())
    executor.execute(workflow, "one", {}, ["3"])
    with Pipeline.open("emoji", variant="openvino-fp16") as pipeline:
        alone = pipeline.generate(Request("a cat", seed=7, steps=2)).pictures[0].image
    assert np.array_equal(pixels(kept[0])[0], np.asarray(alone))
    sampler["count"] = 0
    assert not execution.validate_prompt(workflow)[0], "below the least"
