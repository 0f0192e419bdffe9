"""Run: all that the loop needs of one request, made once by the resolver."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..bundle.facts import Facts
from ..errors import InvalidRequest
from ..images.canvas import Canvas
from ..sampling.samplers import SAMPLERS, Sampler, refuse_idle
from ..sampling.schedule import Level, NoiseSchedule
from .request import Request
from .settings import Settings


@dataclass(frozen=True)
class Source:
    """The pictures of a request, opened.

    canvas   what it starts from
    lines    what its ControlNets follow, float32 [1, 3 N, H, W] in [0, 1]
    references   what its prompt refers to, uint8 [H, W, 3] each
    cuts     what of those was cut off, as notes
    """

    canvas: Canvas | None = None
    lines: NDArray[np.float32] | None = None
    references: tuple[NDArray[np.uint8], ...] = ()
    cuts: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """What was lost of the pictures on the way here."""
        return (*(self.canvas.notes if self.canvas else ()), *self.cuts)


@dataclass(frozen=True)
class Run:
    """A request on one model, with nothing left open.

    levels         noise levels from the first step that is taken to the end, one more than steps
    latent_shape   [1, C, h, w]
    """

    request: Request
    settings: Settings
    source: Source
    facts: Facts
    schedule: NoiseSchedule
    sampler: Sampler
    levels: tuple[Level, ...]

    @classmethod
    def of(cls, request: Request, settings: Settings, source: Source, facts: Facts) -> Run:
        """Raises InvalidRequest where the sampler can't take that many steps of this model's schedule."""
        sampler = SAMPLERS[settings.sampler]
        refuse_idle(sampler, settings.stochasticity)
        try:
            schedule = settings.schedule(facts.schedule)
            if schedule.sigma_spacing == "align_your_steps" and facts.family == "sdxl":
                schedule = replace(schedule, sigma_spacing="align_your_steps_xl")
            schedule = facts.schedule_for(schedule, settings.width, settings.height, settings.steps)
            levels = sampler.levels(schedule, settings.steps)
        except ValueError as error:
            raise InvalidRequest(f"sampler {settings.sampler}: {error}") from error
        taken = levels[settings.steps - settings.steps_taken :]
        return cls(request, settings, source, facts, schedule, sampler, tuple(taken))

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        space = self.facts.latents
        return 1, space.channels, self.settings.height // space.factor, self.settings.width // space.factor

    @property
    def doubled(self) -> bool:
        """Whether the negative prompt is asked, too: not where the UNet itself takes the guidance scale."""
        return self.settings.guided and not self.facts.takes_guidance

    @property
    def timesteps(self) -> list[float]:
        """Of the steps that are taken."""
        return [level.t for level in self.levels[:-1]]

    def having(self, settings: Settings) -> Run:
        """The same run with other words or seeds."""
        return replace(self, settings=settings)

    def before_refining(self) -> int:
        """How many steps of `levels` are not the refiner's, counted by timesteps as diffusers does."""
        count = self.facts.schedule.num_train_timesteps
        handed_over = round(count - (self.settings.refiner_start or 1) * count)
        return sum(t >= handed_over for t in self.timesteps)

    def refining(self, facts: Facts) -> Run:
        """The run of a refiner with `facts` after this one: the base model's words of its own mean nothing to it."""
        settings = replace(self.settings, embeddings={}, loras={}, clip_skip=1, toward=None, safety=None)
        settings = replace(settings, references=(), reference_weight=None)
        whole = Run.of(self.request, settings, Source(), facts)
        return replace(whole, levels=whole.levels[whole.before_refining() :])
