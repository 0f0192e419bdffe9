"""A diffusion transformer as the component that a UNet is: latents [B, C, h, w] and a timestep in, out_sample back.

Exports of transformers name and lay out their inputs in ways of their own. They end here, so that samplers, guidance,
tiles and batches know one form. What a backend runs has the names and shapes of optimum-intel's exports:

    sd3   hidden_states [B, C, h, w], timestep [1] in 0..1000, encoder_hidden_states, pooled_projections
"""

from __future__ import annotations

from dataclasses import dataclass

from ..bundle.facts import Facts
from .base import Array, Changeable, Component, Resting, Shapes
from .edits import Edits


@dataclass
class Transformer:
    """`component`, which takes `hidden_states`, as one that takes `sample`."""

    component: Component

    @staticmethod
    def shapes(shapes: Shapes) -> Shapes:
        """Those of the component's own inputs for a `sample` and conditions of `shapes`."""
        return {"hidden_states" if name == "sample" else name: shape for name, shape in shapes.items()}

    def bind(self, **constants: Array) -> None:
        self.component.bind(**constants)

    def __call__(self, **inputs: Array) -> dict[str, Array]:
        return self.component(**{"hidden_states" if name == "sample" else name: each for name, each in inputs.items()})

    def change(self, edits: Edits) -> bool:
        return isinstance(self.component, Changeable) and self.component.change(edits)

    def rest(self) -> None:
        if isinstance(self.component, Resting):
            self.component.rest()

    def close(self) -> None:
        self.component.close()


# Family -> its form.
FORMS: dict[str, type[Transformer]] = {"sd3": Transformer}


def form_of(facts: Facts, part: str) -> type[Transformer] | None:
    """The form that `part` of a model has; None where it takes what the pipeline gives as it is."""
    return FORMS.get(facts.family) if part == "transformer" else None
