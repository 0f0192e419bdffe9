"""The two nodes. Names in capitals are ComfyUI's contract for a node: its inputs, outputs and the method that runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from edge_sd.bundle.library import installed_models, pulled_models
from edge_sd.pipeline.control import Control
from edge_sd.pipeline.request import MAX_COUNT, MAX_SEED, MAX_SIDE, MAX_STEPS, Request

from .tensors import from_image, from_mask, to_images

if TYPE_CHECKING:
    from edge_sd.pipeline.pipeline import Pipeline
    from edge_sd.sampling.samplers import Step

Inputs = dict[str, dict[str, tuple[Any, ...]]]
# The type of a loaded model, between the two nodes alone.
PIPELINE = "EDGE_SD_PIPELINE"
CATEGORY = "edge-sd"
# What a list offers for what a request leaves open.
OWN = "the model's"


class EdgeSDLoader:
    """Opens a model; its components are loaded when the first picture is drawn, and kept."""

    RETURN_TYPES = (PIPELINE,)
    RETURN_NAMES = ("pipeline",)
    FUNCTION = "load"
    CATEGORY = CATEGORY
    DESCRIPTION = "Opens a model of edge-sd on the devices that it chooses, or on those that are named."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        from edge_sd.pipeline.presets import PRESETS

        models = sorted({**installed_models(), **pulled_models()}, key=lambda name: (name != "emoji", name))
        return {
            "required": {
                "model": (models, {"tooltip": "An installed model: edge-sd models list."}),
                "variant": ("STRING", {"default": "", "tooltip": "edge-sd models show. Empty: the plan's choice."}),
                "device": ("STRING", {"default": "auto", "tooltip": "auto, cpu, gpu, npu, ane, …"}),
                "preset": ([*PRESETS], {"tooltip": "Likeness for speed."}),
                "low_memory": ("BOOLEAN", {"default": False, "tooltip": "One component in memory at a time."}),
            }
        }

    def load(self, model: str, variant: str, device: str, preset: str, low_memory: bool) -> tuple[Pipeline]:
        """The pipeline. Raises what Pipeline.open raises; ComfyUI shows its line."""
        from edge_sd.pipeline.pipeline import Pipeline

        return (Pipeline.open(model, device, variant.strip() or None, preset=preset, low_memory=low_memory),)


class EdgeSDSampler:
    """Draws: from words, from an image, in a mask, along the lines of a control picture."""

    RETURN_TYPES = ("IMAGE", "STRING")
    RETURN_NAMES = ("image", "parameters")
    OUTPUT_TOOLTIPS: ClassVar[tuple[str, ...]] = ("The pictures.", "AUTOMATIC1111's text of the first one.")
    FUNCTION = "draw"
    CATEGORY = CATEGORY
    DESCRIPTION = "Draws with a model of edge-sd. 0, and -1 for the guidance, are the model's own values."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        from edge_sd.sampling.samplers import SAMPLERS

        side = {"default": 0, "min": 0, "max": MAX_SIDE, "step": 8}
        return {
            "required": {
                "pipeline": (PIPELINE,),
                "prompt": ("STRING", {"multiline": True, "dynamicPrompts": False}),
                "negative": ("STRING", {"multiline": True, "dynamicPrompts": False}),
                "seed": ("INT", {"default": 0, "min": 0, "max": MAX_SEED, "control_after_generate": True}),
                "width": ("INT", side),
                "height": ("INT", side),
                "steps": ("INT", {"default": 0, "min": 0, "max": MAX_STEPS}),
                "guidance": ("FLOAT", {"default": -1.0, "min": -1.0, "max": 100.0, "step": 0.1}),
                "sampler": ([OWN, *SAMPLERS],),
                "count": ("INT", {"default": 1, "min": 1, "max": MAX_COUNT}),
            },
            "optional": {
                "image": ("IMAGE", {"tooltip": "Goes on from it; of several, from each."}),
                "strength": ("FLOAT", {"default": 0.7, "min": 0.01, "max": 1.0, "step": 0.01}),
                "mask": ("MASK", {"tooltip": "White is drawn anew, the rest of the image stays."}),
                "reference": ("IMAGE", {"tooltip": "The prompt refers to it, or to all of several."}),
                "reference_2": ("IMAGE", {"tooltip": "More of them, of another size."}),
                "reference_weight": (
                    "FLOAT",
                    {
                        "default": 1.0,
                        "min": 0.0,
                        "max": 2.0,
                        "step": 0.05,
                        "tooltip": "How much they count, in models with an IP-Adapter.",
                    },
                ),
                "control": ("IMAGE", {"tooltip": "Its lines are followed, if the model has a ControlNet."}),
                "control_weight": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 2.0, "step": 0.05}),
            },
        }

    def draw(
        self, pipeline: Pipeline, prompt: str, negative: str, seed: int, width: int, height: int, steps: int,
        guidance: float, sampler: str, count: int, image: Any = None, strength: float = 0.7, mask: Any = None,
        reference: Any = None, reference_2: Any = None, reference_weight: float = 1.0, control: Any = None,
        control_weight: float = 1.0,
    ) -> tuple[Any, str]:  # fmt: skip
        """The pictures as a tensor [B, H, W, 3], and the first one's parameters. Raises InvalidRequest and others."""
        controls = () if control is None else (Control(from_image(control, 0), weight=control_weight),)
        batches = [each for each in (reference, reference_2) if each is not None]
        request = Request(
            prompt, negative, width=width or None, height=height or None, steps=steps or None, seed=seed,
            guidance=None if guidance < 0 else guidance, sampler=None if sampler == OWN else sampler, count=count,
            references=[from_image(each, n) for each in batches for n in range(len(each))], controls=controls,
            # 1 is every model's own, and FLUX.2 klein takes no other.
            reference_weight=reference_weight if batches and reference_weight != 1 else None,
        )  # fmt: skip
        requests = [request]
        if image is not None:
            masks = [None if mask is None else from_mask(mask, n % len(mask)) for n in range(len(image))]
            requests = [
                replace(request, image=from_image(image, n), mask=each, strength=strength)
                for n, each in enumerate(masks)
            ]
        on_step = _watched(len(requests) * count)
        pictures = []
        for n, each in enumerate(requests):
            drawn = pipeline.generate(each, lambda k, step, n=n: on_step(n * count + k, step))  # type: ignore[misc]
            pictures += drawn.pictures
        return to_images([each.image for each in pictures]), pictures[0].texts()[0]


def _watched(pictures: int) -> Callable[[int, Step], None]:
    """Moves ComfyUI's progress bar, and ends the picture that is drawn when its queue is told to stop."""
    try:
        from comfy.model_management import throw_exception_if_processing_interrupted as check
        from comfy.utils import ProgressBar
    except ImportError:
        # Another program runs the nodes.
        return lambda k, step: None
    bar = ProgressBar(pictures)

    def on_step(k: int, step: Step) -> None:
        check()
        bar.update_absolute(k * step.total + step.index + 1, pictures * step.total)

    return on_step
