"""What the denoiser attends to at which noise level: the stages of a picture's prompts, each encoded once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ..components.base import Array
from ..components.denoiser import TextSchedule
from ..text.conditioning import conditions, states_of
from ..text.schedule import Script
from ..text.tokenizer import encode as encode_text
from .loader import Components
from .prompting import Wording
from .run import Run

Conditions = dict[str, Array]


@dataclass(frozen=True)
class Conditionings:
    """The text side of one picture.

    count   chunks that each prompt is filled up to, as the denoiser was loaded for
    """

    run: Run
    components: Components
    wording: Wording
    count: int

    def schedule(self) -> TextSchedule:
        """The conditionings of the run's levels."""
        settings, levels = self.run.settings, self.run.levels
        first = self.wording.script(settings)
        second = None if settings.toward is None else self.wording.script(settings, settings.toward)
        scripts = [first] if second is None else [first, second]
        ends = sorted({stage.last for script in scripts for stage in script.stages})
        told = self._encoded({texts_at(script, end): None for script in scripts for end in ends})
        # PNDM takes a step more than it is asked for, and a refiner only the last ones.
        more = len(levels) - 1 - first.stages[-1].last
        stages = []
        for end in ends:
            here = told[texts_at(first, end)]
            if second is not None:
                here = between(here, told[texts_at(second, end)], settings.toward_share)
            stages.append((levels[end + more].sigma if end + more > 0 else np.inf, here))
        return TextSchedule(tuple(stages))

    def _encoded(self, rows: Iterable[tuple[str, ...]]) -> dict[tuple[str, ...], Conditions]:
        """Texts of the rows of a call -> its inputs. Encoders come one after the other: in low memory one is loaded."""
        found: dict[tuple[str, ...], dict[str, dict[str, Array]]] = {each: {} for each in rows}
        for text in self.run.facts.encoders:
            encoder, states = self.components[text.part], states_of(text, self.run.settings.clip_skip)
            for texts, outputs in found.items():
                chunks = self.wording.chunks(self.run.settings, texts, self.count, text)
                outputs[text.part] = encode_text(encoder, chunks, states)
        return {texts: self._conditions(texts, outputs) for texts, outputs in found.items()}

    def _conditions(self, texts: tuple[str, ...], encoded: dict[str, dict[str, Array]]) -> Conditions:
        settings, facts = self.run.settings, self.run.facts
        size = settings.width, settings.height
        told = conditions(facts, encoded, *size, settings.guidance, settings.clip_skip)
        if facts.zero_negative and self.run.doubled and not texts[0]:
            for name in ("encoder_hidden_states", "text_embeds"):
                told[name] = np.concatenate([np.zeros_like(told[name][:1]), told[name][1:]])
        return told


def texts_at(script: Script, step: int) -> tuple[str, ...]:
    """The texts of a step, counted from 1; of one beyond the script's end, the last."""
    return next((stage.texts for stage in script.stages if step <= stage.last), script.stages[-1].texts)


def between(first: Conditions, second: Conditions, share: float) -> Conditions:
    """Linear interpolation between the conditionings of two prompts; `share` 0 is the first."""
    weight = np.float32(share)
    return {name: value * (1 - weight) + second[name] * weight for name, value in first.items()}
