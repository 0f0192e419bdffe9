"""Denoiser: the UNet as a function (x, level) -> x_0. Prediction type and guidance end here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..errors import NumericalError
from ..sampling.windows import within
from .base import DEEP, Array, Component

if TYPE_CHECKING:
    from ..sampling.schedule import Level

Latents = NDArray[np.float32]


@dataclass
class TextSchedule:
    """A UNet's text over the noise levels.

    stages   the sigma that a stage ends above, and the inputs that are bound for it; from the highest sigma down
    """

    stages: tuple[tuple[float, Mapping[str, Array]], ...]
    _current: int = -1

    def changed(self, level: Level) -> Mapping[str, Array] | None:
        """The inputs for `level`, or None where they are those of the call before."""
        last = len(self.stages) - 1
        stage = next((n for n, (end, _) in enumerate(self.stages) if level.sigma > end), last)
        if stage == self._current:
            return None
        self._current = stage
        return self.stages[stage][1]


@dataclass
class Denoiser:
    """Classifier-free guidance around a UNet, whose text is bound before or given as a schedule.

    unet             takes sample [B, C, h, w] and timestep [1]; B is 2 (negative, then prompt) with guidance, else 1
    prediction_type  "epsilon", "v_prediction", "sample" or "flow_prediction"
    guidance         w of  out = out_negative + w (out_prompt - out_negative)
    guided           timesteps with guidance (Kynkäänniemi et al. 2024); None for all
    text             what is bound at which level; None: the text is bound already
    weights          of the prompts of a call, one for most; with several or another, B is 1 + their number (Liu et al.
                     2022, arXiv:2206.01714):  out = out_negative + w sum_i weights_i (out_i - out_negative)
    image_guidance   s_I of a UNet that edits a picture, with rows for nothing, the picture, and both it and the prompt
                     (Brooks et al. 2023, arXiv:2211.09800, equation 3):
                     out = out_0 + s_I (out_1 - out_0) + w (out_2 - out_1)
    deep_every       deep features are computed by every n-th call and reused by the calls between (Ma et al. 2023)
    """

    unet: Component
    prediction_type: str
    guidance: float
    guided: frozenset[float] | None = None
    deep_every: int = 1
    text: TextSchedule | None = None
    weights: tuple[float, ...] = (1.0,)
    image_guidance: float | None = None
    _deep: Latents | None = None
    _age: int = 0

    def __call__(self, x: Latents, level: Level) -> Latents:
        """x_0 of x = x_0 + sigma eps; x: [1, C, h, w]. Raises NumericalError."""
        if self.text is not None and (told := self.text.changed(level)) is not None:
            self.unet.bind(**told)
            self._deep = None
        x_t = np.float32(level.alpha) * x
        timestep = np.array([level.t], np.float32)
        guided = self.guidance != 1 and (self.guided is None or within(self.guided, float(timestep[0])))
        if self.weights != (1.0,):
            output = self._composed(x_t, timestep, self.guidance if guided else 1.0)
        elif guided and self.image_guidance is not None:
            nothing, picture, both = np.split(self._predicted(np.concatenate([x_t] * 3), timestep), 3)
            output = nothing + np.float32(self.guidance) * (both - picture)
            output = output + np.float32(self.image_guidance) * (picture - nothing)
        elif guided:
            output = self._predicted(np.concatenate([x_t, x_t]), timestep)
            negative, prompt = output[:1], output[1:]
            output = negative + np.float32(self.guidance) * (prompt - negative)
        else:
            output = self._predicted(x_t, timestep)
        x_0 = self._denoised(x, x_t, output, level)
        if not np.isfinite(x_0).all():
            raise NumericalError(f"the UNet returned NaN or infinity at timestep {level.t:g}; try a variant in fp32")
        return x_0

    def _composed(self, x_t: Latents, timestep: Latents, guidance: float) -> Latents:
        """The weighted sum of several prompts' differences from the negative one."""
        output = self._predicted(np.concatenate([x_t] * (1 + len(self.weights))), timestep)
        negative = output[:1]
        weights = np.asarray(self.weights, np.float32).reshape(-1, 1, 1, 1)
        sum_: Latents = np.sum(weights * (output[1:] - negative), axis=0, keepdims=True, dtype=np.float32)
        return np.asarray(negative + np.float32(guidance) * sum_, np.float32)

    def _predicted(self, sample: Latents, timestep: Latents) -> Latents:
        # Features of both rows also serve a call with the prompt's row alone; the reverse does not hold.
        if self._deep is not None and self._age < self.deep_every and len(self._deep) >= len(sample):
            self._age += 1
            kept = {DEEP: self._deep[-len(sample) :]}
            return self.unet(sample=sample, timestep=timestep, **kept)["out_sample"]
        outputs = self.unet(sample=sample, timestep=timestep)
        # A component that can't split itself returns none.
        self._deep, self._age = outputs.get(DEEP), 1
        return outputs["out_sample"]

    def _denoised(self, x: Latents, x_t: Latents, output: Latents, level: Level) -> Latents:
        if level.data:
            # D = c_skip x + c_out F (Karras et al. 2022, equation 7); diffusers' v_prediction is -F.
            out = level.sigma * level.data * level.alpha * (-1 if self.prediction_type == "v_prediction" else 1)
            x_0 = np.float32((level.data * level.alpha) ** 2) * x + np.float32(out) * output
        elif self.prediction_type == "epsilon":
            x_0 = x - np.float32(level.sigma) * output
        elif self.prediction_type == "v_prediction":
            # x_0 = sqrt(abar) x_t - sqrt(1 - abar) v, and sqrt(1 - abar) = sigma sqrt(abar)
            x_0 = np.float32(level.alpha) * x_t - np.float32(level.sigma * level.alpha) * output
        elif self.prediction_type == "flow_prediction":
            # u = eps - x_0, and s = sigma (1 - s)
            x_0 = x_t - np.float32(level.sigma * level.alpha) * output
        else:
            x_0 = output
        return np.asarray(x_0, np.float32)
