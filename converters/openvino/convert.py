"""Torch component -> `openvino_model.xml` + `.bin`, as optimum-intel writes them and openvino.genai reads them."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np

from edge_sd.backends.openvino.component import Graph
from edge_sd.backends.openvino.loading import LARGE
from edge_sd.backends.openvino.mapping import forgetting, places_of_model
from edge_sd.backends.openvino.reading import accept_fractional_timesteps, read_model
from edge_sd.backends.openvino.streaming import stream
from edge_sd.backends.openvino.telemetry import refuse_telemetry
from edge_sd.bundle.diffusers import GRAPH
from edge_sd.bundle.facts import Facts
from edge_sd.bundle.parts import DENOISERS, IMAGE_ENCODER, kind_of
from edge_sd.bundle.variants import Parity
from edge_sd.errors import ConversionError

from ..form import Report
from ..parity import Arrays, Recording, measure
from ..recipes import QuantRecipe
from ..sources.source import CONTROL
from ..sources.wrappers import Wrapped
from .bfloat16 import leave_bfloat16
from .precise import keep_float32

# Lives while a graph is quantized.
FLOAT = "float"
# Layers of SANA's transformer that shift and scale all its blocks, and those of the text: 3 % of its weights, whose 4
# bits would cost more than those of all others.
STEERING = r"__module\.model\.(time_embed|caption_projection|proj_out)\..*"


def convert(
    wrapped: Wrapped,
    recipe: QuantRecipe,
    folder: Path,
    facts: Facts,
    recording: Recording | None = None,
    report: Report = lambda what, share: None,
) -> None:
    """Write the component's graph and weights, stored as `recipe` says, into `folder`. Raises ConversionError.

    A recipe with `activations` is calibrated on the inputs in `recording`; `report` is told how far that is.
    """
    refuse_telemetry()
    import openvino as ov
    import torch

    try:
        with torch.no_grad():
            # torch would trace a second time to compare; the parity that is measured later says more.
            example = tuple(wrapped.example.values())
            traced = torch.jit.trace(wrapped.module, example, check_trace=False, strict=False)
            model = _from_trace(traced, example)
    except Exception as error:  # The frontend raises errors of any type, as torch's tracer does.
        raise ConversionError(f"{wrapped.part} could not be traced: {str(error).splitlines()[0]}") from error
    _name_ports(model, wrapped)
    if factor := _scale_factor(wrapped.part, facts):
        model.set_rt_info(factor, ["runtime_options", "ACTIVATIONS_SCALE_FACTOR"])
    if recipe.bits < 16:
        from .weights import compress, small_layers_by_numpy

        # nncf draws bars of its own on stdout, where a command's result is expected.
        with redirect_stdout(io.StringIO()), small_layers_by_numpy(model):
            if recording is not None and _in_integers(recipe, wrapped.part):
                from .quantize import quantize_activations

                model = quantize_activations(_in_float16(model, folder), wrapped, recording, report, recipe.hybrid)
            else:
                model = compress(model, wrapped, recipe, recording, STEERING if facts.family == "sana" else "", report)
    leave_bfloat16(model)
    try:
        ov.save_model(model, folder / GRAPH, compress_to_fp16=recipe.bits <= 16)
    except RuntimeError as error:
        raise ConversionError(f"{folder / GRAPH} could not be written: {str(error).splitlines()[-1]}") from error
    if facts.family == "sana" and not keep_float32(folder / GRAPH) and wrapped.part == facts.denoiser:
        raise ConversionError(f"{wrapped.part} has no linear attention by the names that diffusers gave it")
    for path in folder.glob(f"{FLOAT}.*"):
        path.unlink()


def _scale_factor(part: str, facts: Facts) -> str:
    """What keeps float16 GPUs from overflowing in these components, as optimum-intel has it; "" for none."""
    if facts.family == "sana":
        return "" if part == facts.denoiser else "8.0"
    if part.startswith("vae") and (facts.vae_float32 or facts.schedule.prediction_type == "v_prediction"):
        return "128.0" if facts.vae_float32 else "8.0"
    return ""


def _from_trace(traced: Any, example: tuple[Any, ...]) -> Any:
    """Convert a trace as ov.convert_model does, without its preprocessing, in half the time.

    The transformations have no public name; optimum-intel calls them by the same one.
    """
    from openvino._offline_transformations import apply_moc_transformations
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    frontend = FrontEndManager().load_by_framework("pytorch")
    # The frontend does not hold what it reads from.
    decoder = TorchScriptPythonDecoder(traced, example_input=example)
    read = frontend.load(decoder)
    model = frontend.convert(read)
    apply_moc_transformations(model, cf=False, smart_reshape=False)
    return model


def _in_integers(recipe: QuantRecipe, part: str) -> bool:
    """Whether the inputs of this component's layers are rounded too."""
    if recipe.hybrid:
        return part in DENOISERS
    # Text, and pictures beside it, take 1 % of the time and steer every step, and what follows lines is added to every
    # skip of the UNet: their activations are left alone, and their weights take 8 bits.
    exact = part.startswith("text_encoder") or part == IMAGE_ENCODER or kind_of(part) in CONTROL
    return recipe.activations and not exact


def _in_float16(model: Any, folder: Path) -> Any:
    """The model with weights of float16: those that stay so beside int8 are not compressed as it is saved."""
    import openvino as ov

    leave_bfloat16(model)
    ov.save_model(model, folder / f"{FLOAT}.xml", compress_to_fp16=True)
    return ov.Core().read_model(folder / f"{FLOAT}.xml")


def _name_ports(model: Any, wrapped: Wrapped) -> None:
    import openvino as ov

    for port, name in zip(model.inputs, wrapped.example, strict=True):
        shape = list(wrapped.example[name].shape)
        for dimension in wrapped.dynamic[name]:
            shape[dimension] = -1
        port.get_node().set_partial_shape(ov.PartialShape(shape))
        port.get_tensor().set_names({name})
        # Timesteps of transformers lie between integers, and their exports say so.
        if not wrapped.example[name].is_floating_point():
            port.get_node().set_element_type(ov.Type.i64)
    for port, name in zip(model.outputs, wrapped.outputs, strict=True):
        port.get_tensor().set_names({name})
    model.validate_nodes_and_infer_types()


def measure_parity(graph: Path, weights: list[Path], recording: Recording) -> Parity:
    """Parity of a saved component, run by OpenVINO in float32 on the CPU; the same on every machine."""
    import openvino as ov

    core = ov.Core()
    try:
        model, streamed = read_model(core, graph, weights), {}
        accept_fractional_timesteps(model)
        names = [port.any_name for port in model.outputs]
        places = places_of_model(model, weights)
        if sum(path.stat().st_size for path in weights) >= LARGE:
            # Weights in float32, packed, are twice or four times what is in the file.
            model.reshape({name: value.shape for name, value in recording.inputs[0].items()})
            streamed = stream(model, lean=True)
        compiled = Graph(core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": ov.Type.f32}), weights=streamed)
    except RuntimeError as error:
        # A disk that filled up while the weights were written shows here.
        raise ConversionError(f"{graph} does not run: {str(error).splitlines()[-1]}") from error

    def run(inputs: Arrays) -> Arrays:
        results = compiled(inputs)
        return {name: np.array(results[name]) for name in names}

    with forgetting(places):
        return measure(run, recording)


def convert_tokenizer(tokenizer: Path, folder: Path) -> None:
    """Write openvino_tokenizer.xml and openvino_detokenizer.xml, which openvino.genai wants beside vocab.json."""
    import openvino as ov
    from openvino_tokenizers import convert_tokenizer as convert_hf
    from transformers import AutoTokenizer

    pair = convert_hf(AutoTokenizer.from_pretrained(tokenizer, local_files_only=True), with_detokenizer=True)
    for model, name in zip(pair, ("openvino_tokenizer.xml", "openvino_detokenizer.xml"), strict=True):
        ov.save_model(model, folder / name)
