"""Drawing: one picture, from text and noise to latents, on components that are loaded for it.

text encoders, bound once -> noise, the same everywhere -> the sampler's loop over a denoiser
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from ..components.autoencoder import encode, encode_mean
from ..components.base import Array, Component
from ..components.controlnet import ControlledUNet, Net
from ..components.denoiser import Denoiser, TextSchedule
from ..components.image_prompt import unseen
from ..components.inpainting import Inpainting, Masked
from ..components.instructed import Instructed
from ..components.shapes import chunks_of, rows_of_batch
from ..components.tiling import fitted
from ..errors import InvalidRequest
from ..images.canvas import Canvas
from ..sampling.noise import NoiseSource, first_noise
from ..sampling.samplers import Denoise, Latents, Step
from ..sampling.windows import active_timesteps
from .conditionings import Conditionings
from .loader import Components
from .prompting import Wording
from .run import Run
from .shapes import batch_of

# A seed -> the noise of its picture.
NoiseOf = Callable[[int], NoiseSource]


@dataclass(frozen=True)
class Drawing:
    """What draws `run`; the components are loaded for it, and `second` is the noise of its variation.

    references   what the denoiser is bound for the pictures that its prompt refers to
    """

    run: Run
    components: Components
    wording: Wording
    noise: NoiseSource
    second: NoiseSource | None = None
    references: Mapping[str, Array] = field(default_factory=dict)

    def steps(self) -> Iterator[Step]:
        """The loop; the last step's latents are the picture's. A refiner's base model stops where that begins."""
        run, settings = self.run, self.run.settings
        unet = self._unet()
        denoiser = self._denoiser(unet)
        denoise: Denoise = denoiser
        if run.source.canvas is None:
            eps = self._eps(run.latent_shape)
            x = run.sampler.start(eps, run.levels, run.schedule)
        else:
            denoise, x = self._begin(run.source.canvas, denoiser)
        if settings.refiner is None:
            yield from run.sampler.run(denoise, x, run.levels, self.noise.normal, run.settings.stochasticity)
            return
        total, head = len(run.levels) - 1, run.levels[: run.before_refining() + 1]
        for step in run.sampler.head(denoise, x, head, self.noise.normal, run.settings.stochasticity):
            yield replace(step, total=total)

    def _eps(self, shape: tuple[int, ...]) -> Latents:
        return first_noise(self.noise, shape, self.second, self.run.settings.variation_strength)

    def refine(self, x: Latents) -> Iterator[Step]:
        """Go on from where a base model stopped (Podell et al. 2023, section 2.5)."""
        run, settings = self.run, self.run.settings
        unet = self.components.fitted(run.facts.denoiser, run.latent_shape)
        unet.bind(**self._shown())
        kind = run.schedule.prediction_type
        denoiser = Denoiser(unet, kind, settings.guidance, text=self._text(), weights=settings.weights)
        yield from run.sampler.run(denoiser, x, run.levels, self.noise.normal, settings.stochasticity)

    def _denoiser(self, unet: Component) -> Denoiser:
        run, settings = self.run, self.run.settings
        guided = active_timesteps(run.timesteps, settings.guidance_start, settings.guidance_end)
        scale = settings.guidance if run.doubled else 1.0
        kind, text = run.schedule.prediction_type, self._text()
        return Denoiser(unet, kind, scale, guided, settings.deep_every, text, settings.weights, settings.image_guidance)

    def _unet(self) -> Component:
        """The denoiser for the run's size; a UNet with its ControlNets around it."""
        run, controls = self.run, self.run.settings.controls
        if run.source.lines is None:
            denoiser = self.components.fitted(run.facts.denoiser, run.latent_shape)
            if shown := self._shown():
                denoiser.bind(**shown)
            return denoiser
        nets = [
            Net(
                self.components[each.part], each.weight, active_timesteps(run.timesteps, each.start, each.end),
                each.part in run.facts.pooled_nets,
            )
            for each in controls
        ]  # fmt: skip
        both = ControlledUNet(self.components["controlled_unet"], nets, run.facts.latents.channels)
        shapes = self.components.shapes(controls[0].part)
        whole = fitted(both, "unet", shapes, run.latent_shape, run.facts.latents.factor)
        whole.bind(controlnet_cond=np.repeat(run.source.lines, shapes["controlnet_cond"][0], axis=0), **self._shown())
        return whole

    def _shown(self) -> Mapping[str, Array]:
        """What is bound for reference pictures; a UNet with an IP-Adapter is bound something without any, too."""
        facts = self.run.facts
        return self.references or unseen(facts, rows_of_batch(facts, batch_of(facts, self.run.settings)))

    def _begin(self, canvas: Canvas, denoise: Denoiser) -> tuple[Denoise, Latents]:
        """The denoiser and the first x where a picture is gone on from; noise is drawn in the order of diffusers."""
        run, shape = self.run, self.run.latent_shape
        if run.facts.inpainting:
            return self._begin_masked(canvas, denoise)
        if run.facts.instructed:
            x = run.sampler.start(self._eps(shape), run.levels, run.schedule)
            seen = encode_mean(self.components.fitted("vae_encoder", shape), canvas.pixels)
            return replace(denoise, unet=Instructed(denoise.unet, seen)), x
        encoder, mask = self.components.fitted("vae_encoder", shape), canvas.latent_mask(run.facts.latents.factor)
        z = encode(encoder, run.facts.latents, canvas.pixels, lambda: self.noise.normal(shape))
        eps = self._eps(shape)
        x = z + np.float32(run.levels[0].sigma) * eps
        if mask is None:
            return denoise, x
        if run.settings.strength == 1:
            # Start from noise alone under the mask, or traces of the old picture would remain.
            x = mask * run.sampler.start(eps, run.levels, run.schedule) + (1 - mask) * x
        return Inpainting(denoise, z, mask), x

    def _begin_masked(self, canvas: Canvas, denoise: Denoiser) -> tuple[Denoise, Latents]:
        """The same for a UNet that sees the mask: it keeps the rest by itself."""
        run, space, shape = self.run, self.run.facts.latents, self.run.latent_shape
        encoder, mask = self.components.fitted("vae_encoder", shape), canvas.latent_mask(space.factor)
        assert mask is not None, "a request without one was refused"
        if run.settings.strength == 1:
            x = run.sampler.start(self._eps(shape), run.levels, run.schedule)
        else:
            z = encode(encoder, space, canvas.pixels, lambda: self.noise.normal(shape))
            x = z + np.float32(run.levels[0].sigma) * self._eps(shape)
        visible = encode(encoder, space, canvas.pixels, lambda: self.noise.normal(shape), canvas.mask)
        return replace(denoise, unet=Masked(denoise.unet, mask, visible)), x

    def _text(self) -> TextSchedule:
        """What the denoiser attends to at which of the run's levels."""
        controls, facts = self.run.settings.controls, self.run.facts
        shapes = self.components.shapes(controls[0].part if controls else facts.denoiser)
        # What was loaded decides: a plan may have changed meanwhile.
        count = chunks_of(facts, shapes)
        return Conditionings(self.run, self.components, self.wording, count).schedule()


def source_of(noise_of: NoiseOf, seed: int) -> NoiseSource:
    """The noise of a seed. Raises InvalidRequest for what makes none."""
    if not callable(noise_of):
        raise InvalidRequest(f"noise is a function of a seed (see NoiseSource), not {type(noise_of).__name__}")
    source = noise_of(seed)
    if not callable(getattr(source, "normal", None)):
        raise InvalidRequest(f"noise made {type(source).__name__}, which has no normal(shape) (see NoiseSource)")
    return source
