"""The noise schedule a model was trained with, and the noise levels at which a sampler visits it.

Coordinates are variance exploding (Karras et al. 2022, arXiv:2206.00364): x = x0 + sigma * eps. A variance
preserving x_vp (Ho et al. 2020) relates to it by x_vp = alpha * x, alpha = sqrt(abar) = 1 / sqrt(1 + sigma^2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]
PredictionType = Literal["epsilon", "v_prediction", "sample"]
TimestepSpacing = Literal["leading", "trailing", "linspace"]

# With zero terminal SNR the last abar is 0 and sigma infinite. diffusers' Euler and DPM++ use 2**-24 instead. Its DDIM
# and LCM compute with the 0; 2**-48 gives sigma = 2**24, where alpha * x equals the pure noise to float32 precision.
_ABAR_MIN_EULER = 2.0**-24
_ABAR_MIN_VP = 2.0**-48

_KARRAS_RHO = 7.0  # Karras et al. 2022, equation 5
_LCM_ORIGINAL_STEPS = 50  # the grid LCMs are distilled on (Luo et al. 2023, arXiv:2310.04378)


class Level(NamedTuple):
    """One noise level: sigma = sqrt((1 - abar) / abar), and t, the timestep as the UNet is given it."""

    sigma: float
    t: float

    @property
    def alpha(self) -> float:
        """sqrt(abar), which scales latents into what the UNet was trained on: unet(alpha * x, t)."""
        return 1.0 / math.sqrt(1.0 + self.sigma**2)


@dataclass(frozen=True)
class NoiseSchedule:
    """The fields of a diffusers ``scheduler_config.json`` that decide the noise levels; the defaults are diffusers'.

    timestep_spacing and set_alpha_to_one may be None: then each sampler uses the default of its diffusers class, which
    is what ``SomeScheduler.from_config(other.config)`` does there (Euler and DPM++: linspace; the others: leading).

    Raises:
        ValueError: a field is out of range; the message is one line that names the valid values.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: BetaSchedule = "linear"
    trained_betas: tuple[float, ...] | None = None
    prediction_type: PredictionType = "epsilon"
    timestep_spacing: TimestepSpacing | None = None
    steps_offset: int = 0
    set_alpha_to_one: bool | None = None
    rescale_betas_zero_snr: bool = False

    def __post_init__(self) -> None:
        _require_int("num_train_timesteps", self.num_train_timesteps, 1)
        _require_int("steps_offset", self.steps_offset, 0)
        _require_choice("beta_schedule", self.beta_schedule, get_args(BetaSchedule))
        _require_choice("prediction_type", self.prediction_type, get_args(PredictionType))
        _require_choice("timestep_spacing", self.timestep_spacing, (*get_args(TimestepSpacing), None))
        _require_choice("set_alpha_to_one", self.set_alpha_to_one, (True, False, None))
        _require_choice("rescale_betas_zero_snr", self.rescale_betas_zero_snr, (True, False))
        for name, betas in (("beta_start", [self.beta_start]), ("beta_end", [self.beta_end])):
            _require_betas(name, betas)
        if self.beta_start > self.beta_end:
            raise ValueError(f"beta_start {self.beta_start} must not exceed beta_end {self.beta_end}")
        if self.trained_betas is not None:
            _require_betas("trained_betas", self.trained_betas)
            if len(self.trained_betas) != self.num_train_timesteps:
                raise ValueError(
                    f"trained_betas has {len(self.trained_betas)} values: it must have num_train_timesteps, "
                    f"{self.num_train_timesteps}"
                )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """Read a diffusers scheduler config; unknown keys are ignored, missing ones take the defaults.

        Raises:
            ValueError: as for the class.
        """
        values = {field.name: config[field.name] for field in fields(cls) if field.name in config}
        if isinstance(values.get("trained_betas"), list):
            values["trained_betas"] = tuple(values["trained_betas"])
        return cls(**values)

    def compute_alphas_cumprod(self) -> NDArray[np.float32]:
        """abar_t = prod(1 - beta), shape (num_train_timesteps,); rounded to float32 where diffusers rounds.

        The last value is 0 with rescale_betas_zero_snr (Lin et al. 2024, arXiv:2305.08891, algorithm 1).
        """
        betas = self._compute_betas()
        if self.rescale_betas_zero_snr:
            root = np.sqrt(_cumprod(1 - betas))
            root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
            abar = root**2
            betas = 1 - np.concatenate([abar[:1], abar[1:] / abar[:-1]])
        return _cumprod(1 - betas)

    def compute_sigmas(self, abar_min: float = _ABAR_MIN_EULER) -> NDArray[np.float32]:
        """sigma_t = sqrt((1 - abar_t) / abar_t), ascending, shape (num_train_timesteps,).

        Args:
            abar_min: stands in for the last abar when zero terminal SNR makes it 0, so that sigma stays finite.
        """
        abar = self.compute_alphas_cumprod()
        if self.rescale_betas_zero_snr:
            abar[-1] = abar_min
        sigmas: NDArray[np.float32] = np.sqrt((1 - abar) / abar)
        return sigmas

    def euler_levels(self, steps: int) -> list[Level]:
        """Levels of diffusers' EulerDiscreteScheduler and EulerAncestralDiscreteScheduler; t may be fractional.

        Like every ``*_levels`` method: ``steps`` is at least 1, the list has ``steps`` levels of falling sigma and a
        last one that says where the sampler ends; ValueError where the schedule has no room for so many steps.
        """
        sigmas = self.compute_sigmas()
        t = self._space(steps, self.timestep_spacing or "linspace").astype(np.float32)
        return self._pair(np.interp(t, np.arange(len(sigmas)), sigmas), t, 0.0)

    def euler_karras_levels(self, steps: int) -> list[Level]:
        """Levels of diffusers' EulerDiscreteScheduler(use_karras_sigmas=True): Karras between Euler's own ends."""
        plain = self.euler_levels(steps)
        sigmas = _karras_sigmas(plain[-2].sigma, plain[0].sigma, steps)
        return self._pair(sigmas, _interpolate_t(sigmas, self.compute_sigmas()), 0.0)

    def dpmpp_levels(self, steps: int) -> list[Level]:
        """Levels of diffusers' DPMSolverMultistepScheduler(final_sigmas_type="zero")."""
        _require_int("steps", steps, 1)
        spacing = self.timestep_spacing or "linspace"
        # diffusers spaces one more than steps and drops the lowest, except for trailing
        t = self._space(steps + (spacing != "trailing"), spacing).round()[:steps]
        return self._pair(self.compute_sigmas()[self._checked_t(t, steps)], t, 0.0)

    def dpmpp_karras_levels(self, steps: int) -> list[Level]:
        """Levels of diffusers' DPMSolverMultistepScheduler(use_karras_sigmas=True): Karras over all sigmas."""
        _require_int("steps", steps, 1)
        trained = self.compute_sigmas()
        sigmas = _karras_sigmas(float(trained[0]), float(trained[-1]), steps)
        t = _interpolate_t(sigmas, trained)
        # diffusers truncates t to an integer, but rounds it first unless the schedule is the cosine one
        t = np.floor(t) if self.beta_schedule == "squaredcos_cap_v2" else t.round()
        return self._pair(sigmas, t, 0.0)

    def ddim_levels(self, steps: int) -> list[Level]:
        """Levels of diffusers' DDIMScheduler; they end at sigma_0 instead of 0 if set_alpha_to_one is False.

        diffusers always steps to t - num_train_timesteps // steps, even where the next t is another one (linspace,
        and trailing if steps does not divide num_train_timesteps). These levels step to the next t.
        """
        return self._vp_levels(steps, set_alpha_to_one=self.set_alpha_to_one is not False)

    def pndm_levels(self, steps: int) -> list[Level]:
        """Levels of diffusers' PNDMScheduler, each once: the sampler itself evaluates the second level twice.

        Raises:
            ValueError: also if the first level would have zero terminal SNR. There eps says nothing about x0, so PNDM's
                mean of two eps is meaningless. (diffusers' PNDM ignores rescale_betas_zero_snr altogether.)
        """
        levels = self._vp_levels(steps, set_alpha_to_one=self.set_alpha_to_one is True)
        if self.rescale_betas_zero_snr and levels[0].t == self.num_train_timesteps - 1:
            raise ValueError(
                "PNDM cannot start from zero terminal SNR (rescale_betas_zero_snr): choose another sampler, such as "
                "ddim or euler, or timestep_spacing leading"
            )
        return levels

    def lcm_levels(self, steps: int) -> list[Level]:
        """Levels of diffusers' LCMScheduler: evenly taken from the 50 timesteps LCMs are distilled on; spacing is moot.

        Raises:
            ValueError: more than 50 steps.
        """
        _require_int("steps", steps, 1)
        original = min(_LCM_ORIGINAL_STEPS, self.num_train_timesteps)
        if steps > original:
            raise ValueError(f"steps {steps} is too many for LCM: the valid range is 1 to {original}")
        grid = np.arange(original, 0, -1) * (self.num_train_timesteps // original) - 1
        t = grid[np.floor(np.linspace(0, original, steps, endpoint=False)).astype(np.int64)]
        return self._pair(self.compute_sigmas(_ABAR_MIN_VP)[t], t, 0.0)

    def _vp_levels(self, steps: int, set_alpha_to_one: bool) -> list[Level]:
        t = self._space(steps, self.timestep_spacing or "leading").round()
        sigmas = self.compute_sigmas(_ABAR_MIN_VP)
        return self._pair(sigmas[self._checked_t(t, steps)], t, 0.0 if set_alpha_to_one else float(sigmas[0]))

    def _compute_betas(self) -> NDArray[np.float32]:
        T = self.num_train_timesteps
        if self.trained_betas is not None:
            return np.array(self.trained_betas, dtype=np.float32)
        if self.beta_schedule == "linear":
            return np.linspace(self.beta_start, self.beta_end, T, dtype=np.float32)
        if self.beta_schedule == "scaled_linear":
            return np.linspace(self.beta_start**0.5, self.beta_end**0.5, T, dtype=np.float32) ** 2
        # Nichol and Dhariwal 2021, arXiv:2102.09672, equation 17
        f = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2
        betas: NDArray[np.float32] = np.minimum(1 - f[1:] / f[:-1], 0.999).astype(np.float32)
        return betas

    def _space(self, steps: int, spacing: TimestepSpacing) -> NDArray[np.float64]:
        """Falling timesteps, shape (steps,), unrounded for linspace (Lin et al. 2024, table 2)."""
        _require_int("steps", steps, 1)
        T = self.num_train_timesteps
        if spacing == "linspace":
            return np.linspace(0, T - 1, steps, dtype=np.float64)[::-1]
        if spacing == "leading":
            return np.arange(steps - 1, -1, -1, dtype=np.float64) * (T // steps) + self.steps_offset
        t: NDArray[np.float64] = np.arange(T, 0, -T / steps, dtype=np.float64)[:steps].round() - 1
        return t

    def _checked_t(self, t: NDArray[np.float64], steps: int) -> NDArray[np.int64]:
        """t as an index, once it is known to lie inside the schedule and to fall at each step."""
        if t[0] > self.num_train_timesteps - 1 or (np.diff(t) >= 0).any():
            raise ValueError(
                f"steps {steps} is too many for {self.num_train_timesteps} training timesteps with "
                f"steps_offset {self.steps_offset}: choose fewer steps"
            )
        return t.astype(np.int64)

    def _pair(self, sigmas: NDArray[Any], t: NDArray[Any], sigma_last: float) -> list[Level]:
        """Sigmas and timesteps, each of shape (steps,), as levels, with the terminal one appended."""
        if t[0] > self.num_train_timesteps - 1 or (np.diff(sigmas) >= 0).any():
            raise ValueError(
                f"steps {len(t)} is too many for {self.num_train_timesteps} training timesteps with "
                f"steps_offset {self.steps_offset}: choose fewer steps"
            )
        pairs = zip(sigmas.astype(np.float32), t.astype(np.float32), strict=True)
        return [*(Level(float(s), float(u)) for s, u in pairs), Level(sigma_last, 0.0)]


def _cumprod(alphas: NDArray[np.float32]) -> NDArray[np.float32]:
    """torch.cumprod: accumulates in double precision, stores float32."""
    return np.cumprod(alphas, dtype=np.float64).astype(np.float32)


def _karras_sigmas(sigma_min: float, sigma_max: float, steps: int) -> NDArray[np.float64]:
    """Karras et al. 2022, equation 5, without the final 0: shape (steps,), falling."""
    ramp = np.linspace(0, 1, steps)
    low, high = sigma_min ** (1 / _KARRAS_RHO), sigma_max ** (1 / _KARRAS_RHO)
    return np.asarray((high + ramp * (low - high)) ** _KARRAS_RHO, dtype=np.float64)


def _interpolate_t(sigmas: NDArray[np.float64], trained: NDArray[np.float32]) -> NDArray[np.float64]:
    """The fractional timesteps of some sigmas: linear in log sigma, as k-diffusion's sigma_to_t."""
    t = np.interp(np.log(sigmas), np.log(trained), np.arange(len(trained)))
    return np.asarray(t, dtype=np.float64)


def _require_int(name: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < low:
        raise ValueError(f"{name} {value!r} is not valid: it must be an integer of at least {low}")


def _require_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
        raise ValueError(f"{name} {value!r} is not valid: choose one of {', '.join(str(c) for c in choices)}")


def _require_betas(name: str, values: object) -> None:
    """Betas below 1e-7 vanish when float32 computes 1 - beta, and sigma would be 0."""
    ok = isinstance(values, (list, tuple)) and all(
        isinstance(v, (int, float)) and not isinstance(v, bool) and 1e-7 <= v < 1 for v in values
    )
    if not ok:
        raise ValueError(f"{name} is not valid: betas must be numbers from 1e-7 up to, but not including, 1")
