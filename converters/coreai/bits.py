"""Mixed bits: how many each component of a model gets, and each weight of it, by a sensitivity analysis in torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from edge_sd.bundle.parts import DENOISERS, kind_of
from edge_sd.bundle.safetensors import shapes_in

from ..coreml import mixed
from ..parity import Arrays, Recording, Runner
from ..recipes import PARTS, QuantRecipe
from ..sources.source import Source
from . import compress

if TYPE_CHECKING:
    from ..form import Report
    from ..sources.wrappers import Wrapped

# dB between what is aimed at with mixed bits, on the first and the last call of a picture, and what all must reach.
ROOM = 0.5
# The mean bits of a model's weights where mixed bits are held to a size: with norms and biases under 30 % of float16's.
MEAN = 4.65
# Of that, the bits that a component gets more than the denoiser. An error of the text's is there in each step, and
# guidance multiplies it; one of the autoencoder's is seen once, as it is.
MORE = {"text": 0.5, "vae": -2.0}


def choose(
    wrapped: Wrapped, call: Runner, source: Source, recipe: QuantRecipe, recording: Recording, report: Report
) -> mixed.BitRecipe:
    """The bits of a component's weights, on the recorded calls of the first size; `call` runs it by our names."""
    states = {each for text in source.facts.encoders if text.part == wrapped.part for each in text.states.split(",")}
    wanted = states | {"text_embeds"} if states else set(wrapped.outputs)

    def run(given: Arrays) -> Arrays:
        return {name: value for name, value in call(given).items() if name in wanted}

    shapes = [{name: value.shape for name, value in given.items()} for given in recording.inputs]
    calls = [n for n, each in enumerate(shapes) if each == shapes[0]]
    first = Recording([recording.inputs[n] for n in calls], [recording.outputs[n] for n in calls])
    program, names = compress.Weights(wrapped.module), list(compress.weights(wrapped.module))

    def weighed(share: float) -> None:
        report("weighing layers", share)

    if recipe.bits < 16:
        return mixed.choose_within(program, names, run, first, mean_bits(source, wrapped.part), weighed)
    return mixed.choose(program, names, run, first, recipe.floor + ROOM, weighed)


def mean_bits(source: Source, part: str) -> float:
    """The bits of a number of `part`, such that the parts that make a picture together have MEAN."""
    kinds: dict[str, tuple[str, ...]] = {"text": PARTS["text"], "denoiser": DENOISERS, "vae": PARTS["vae"]}
    # Both halves of an autoencoder are of one file.
    files = {kind: {path for each in source.parts if each in parts for path in source.weights(each)[0]}
             for kind, parts in kinds.items()}  # fmt: skip
    numbers = {
        kind: sum(math.prod(shape) for path in paths for shape in shapes_in(path).values())
        for kind, paths in files.items()
    }
    more = sum(MORE.get(kind, 0.0) * count for kind, count in numbers.items()) / max(sum(numbers.values()), 1)
    own = next((kind for kind, parts in kinds.items() if kind_of(part) in parts), "denoiser")
    return MEAN - more + MORE.get(own, 0.0)
