"""The noise schedule a model was trained with, and the noise levels at which a sampler visits it.

Coordinates are variance exploding (Karras et al. 2022, arXiv:2206.00364): x = x0 + sigma * eps. A variance
preserving x_vp (Ho et al. 2020) relates to it by x_vp = alpha * x, alpha = sqrt(abar) = 1 / sqrt(1 + sigma^2), and the
straight paths of flow matching (Lipman et al. 2023, arXiv:2210.02747), x_s = (1 - s) x0 + s eps, by alpha = 1 - s and
sigma = s / (1 - s), so that all solvers hold for them. The file is long because one class holds all fields of
diffusers' schedulers, and the levels that each class of them makes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from . import flow
from .checks import require_betas, require_choice, require_int, require_positive
from .flow import FlowGrid, FlowMu, TimeShift
from .level import Level as Level
from .scheduler_fields import checked, class_of
from .sigmas import ALIGNED, SigmaSpacing, space

BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]
PredictionType = Literal["epsilon", "v_prediction", "sample", "flow_prediction"]
TimestepSpacing = Literal["leading", "trailing", "linspace", "simple"]
FinalSigmas = Literal["zero", "sigma_min"]
Interpolation = Literal["linear", "log_linear"]
TimestepType = Literal["discrete", "continuous"]

# With zero terminal SNR the last abar is 0 and sigma infinite. diffusers' Euler and DPM++ use 2**-24 instead. Its DDIM
# and LCM compute with the 0; 2**-48 gives sigma = 2**24, where alpha * x equals the pure noise to float32 precision.
_ABAR_MIN_EULER = 2.0**-24
_ABAR_MIN_VP = 2.0**-48
# Flow matching starts at pure noise, s = 1; there too alpha * x is the noise to float32 precision.
_SIGMA_MAX_FLOW = 2.0**24

# Of the schedule's arrays; models have 1,000.
MOST_TIMESTEPS = 100_000
_TCD_ETA = 0.3  # gamma of Zheng et al. 2024 (arXiv:2402.19159); the value is diffusers'


@dataclass(frozen=True)
class NoiseSchedule:
    """The fields of a diffusers ``scheduler_config.json`` that decide the noise levels; the defaults are diffusers'.

    timestep_spacing and set_alpha_to_one may be None: then each sampler uses the default of its diffusers class, which
    is what ``SomeScheduler.from_config(other.config)`` does there (Euler and DPM++: linspace; the others: leading).
    sigma_spacing stands for use_karras_sigmas, use_exponential_sigmas and use_beta_sigmas; sigma_min and sigma_max are
    the ends that it spaces between, where they are not those of the timesteps. final_sigmas_type "sigma_min" ends there
    and not at 0. A flow model has no betas; flow_shift moves its levels, spaced by flow_grid, towards the noise. Where
    flow_mu is set the shift depends on a picture's size, and `for_tokens` has to fix it. Where sigma_data is set the
    model is preconditioned as EDM's are, has no betas either, and its levels lie between sigma_min and sigma_max.
    What each field of each of diffusers' classes does stands in scheduler_fields.py.

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
    sigma_spacing: SigmaSpacing | None = None
    flow_shift: float = 1.0
    flow_grid: FlowGrid = "twice"
    flow_mu: FlowMu | None = None
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    time_shift_type: TimeShift = "exponential"
    sigma_min: float | None = None
    sigma_max: float | None = None
    final_sigmas_type: FinalSigmas = "zero"
    interpolation_type: Interpolation = "linear"
    timestep_type: TimestepType = "discrete"
    sigma_data: float | None = None
    rho: float = 7.0
    original_inference_steps: int = 50
    timestep_scaling: float = 10.0

    def __post_init__(self) -> None:
        require_int("num_train_timesteps", self.num_train_timesteps, 1)
        if self.num_train_timesteps > MOST_TIMESTEPS:
            raise ValueError(f"num_train_timesteps {self.num_train_timesteps} is more than {MOST_TIMESTEPS}")
        require_int("steps_offset", self.steps_offset, 0)
        require_choice("beta_schedule", self.beta_schedule, get_args(BetaSchedule))
        require_choice("prediction_type", self.prediction_type, get_args(PredictionType))
        require_choice("timestep_spacing", self.timestep_spacing, (*get_args(TimestepSpacing), None))
        require_choice("set_alpha_to_one", self.set_alpha_to_one, (True, False, None))
        require_choice("rescale_betas_zero_snr", self.rescale_betas_zero_snr, (True, False))
        require_choice("sigma_spacing", self.sigma_spacing, (*get_args(SigmaSpacing), None))
        require_choice("final_sigmas_type", self.final_sigmas_type, get_args(FinalSigmas))
        require_choice("interpolation_type", self.interpolation_type, get_args(Interpolation))
        require_choice("timestep_type", self.timestep_type, get_args(TimestepType))
        require_int("original_inference_steps", self.original_inference_steps, 1)
        require_choice("flow_grid", self.flow_grid, get_args(FlowGrid))
        require_choice("flow_mu", self.flow_mu, (*get_args(FlowMu), None))
        require_choice("time_shift_type", self.time_shift_type, get_args(TimeShift))
        for name in ("base_image_seq_len", "max_image_seq_len"):
            require_int(name, getattr(self, name), 1)
        if self.base_image_seq_len >= self.max_image_seq_len:
            raise ValueError(f"base_image_seq_len must be below max_image_seq_len {self.max_image_seq_len}")
        for name in (
            "flow_shift",
            "base_shift",
            "max_shift",
            "rho",
            "timestep_scaling",
            "sigma_min",
            "sigma_max",
            "sigma_data",
        ):
            require_positive(name, getattr(self, name), optional=name.startswith("sigma"))
        if self.sigma_data is not None and (self.sigma_min is None or self.sigma_max is None):
            raise ValueError("sigma_data needs sigma_min and sigma_max: they are the ends of the levels")
        if self.sigma_min is not None and self.sigma_max is not None and self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min} must be below sigma_max {self.sigma_max}")
        for name, betas in (("beta_start", [self.beta_start]), ("beta_end", [self.beta_end])):
            require_betas(name, betas)
        if self.beta_start > self.beta_end:
            raise ValueError(f"beta_start {self.beta_start} must not exceed beta_end {self.beta_end}")
        if self.trained_betas is not None:
            require_betas("trained_betas", self.trained_betas)
            if len(self.trained_betas) != self.num_train_timesteps:
                raise ValueError(
                    f"trained_betas has {len(self.trained_betas)} values: it must have num_train_timesteps, "
                    f"{self.num_train_timesteps}"
                )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """Read a diffusers scheduler config, or one of a manifest, which has no class.

        Missing fields take the class's defaults, fields that no class has are ignored.

        Raises:
            ValueError: as for the class, and for a class or a value that is not offered (see scheduler_fields.py).
        """
        config, kind = checked(config), class_of(config)
        values = {field.name: config[field.name] for field in fields(cls) if field.name in config}
        for spacing in get_args(SigmaSpacing):
            if config.get(f"use_{spacing}_sigmas"):
                values["sigma_spacing"] = spacing
        if config.get("use_lu_lambdas"):
            # Even steps of lambda (Lu et al. 2022) are even steps of log sigma.
            values["sigma_spacing"] = "exponential"
        if kind.startswith("FlowMatch"):
            values |= {"prediction_type": "flow_prediction", "flow_shift": config.get("shift", 1.0)}
            if config.get("use_dynamic_shifting"):
                # diffusers ignores the number then.
                values |= {"flow_mu": "linear", "flow_shift": 1.0}
        elif kind == "SCMScheduler":
            values |= {"prediction_type": "flow_prediction", "flow_grid": "trig"}
        elif config.get("use_flow_sigmas"):
            values["flow_grid"] = "dpm"
        elif kind:
            # It belongs to flow sigmas.
            values.pop("flow_shift", None)
        if kind.startswith("EDM"):
            values["sigma_spacing"] = config["sigma_schedule"]
        elif kind:
            values = {name: value for name, value in values.items() if name not in ("sigma_data", "rho")}
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
        if self.is_flow:
            return self._flow_levels(steps)
        if self.is_edm:
            return self._edm_levels(steps)
        trained = self.compute_sigmas()
        t: NDArray[Any] = self._space(steps, self.timestep_spacing or "linspace").astype(np.float32)
        sigmas: NDArray[Any]
        sigmas, last = np.interp(t, np.arange(len(trained)), trained), self._last_sigma(trained)
        if self.interpolation_type == "log_linear":
            # Of steps + 1 evenly spaced ones diffusers' Euler takes the last for the end, and never comes to 0.
            sigmas = np.exp(np.linspace(math.log(trained[-1]), math.log(trained[0]), steps + 1))
            sigmas, last, low = sigmas[:-1], float(sigmas[-1]), float(sigmas[-1])
        else:
            low = float(np.float32(sigmas[-1]))
        if self.sigma_spacing is not None:
            sigmas = self._spaced(float(np.float32(sigmas[0])), low, steps)
            t, last = _interpolate_t(sigmas, trained), self._last_sigma(trained)
        if self.timestep_type == "continuous" and self.prediction_type == "v_prediction":
            t = 0.25 * np.log(sigmas)
        return self._pair(sigmas, t, last)

    def dpmpp_levels(self, steps: int) -> list[Level]:
        """Levels of diffusers' DPMSolverMultistepScheduler and UniPCMultistepScheduler."""
        require_int("steps", steps, 1)
        if self.is_flow:
            return self._flow_levels(steps)
        if self.is_edm:
            return self._edm_levels(steps)
        trained = self.compute_sigmas()
        last = self._last_sigma(trained)
        if self.sigma_spacing is None:
            spacing = self.timestep_spacing or "linspace"
            # diffusers spaces one more than steps and drops the lowest, except for trailing
            t = self._space(steps + (spacing in ("linspace", "leading")), spacing).round()[:steps]
            return self._pair(trained[self._checked_t(t, steps)], t, last)
        sigmas = self._spaced(float(trained[-1]), float(trained[0]), steps)
        t = _interpolate_t(sigmas, trained)
        # diffusers truncates t to an integer, but rounds Karras' first unless the schedule is the cosine one
        rounds = self.sigma_spacing == "karras" and self.beta_schedule != "squaredcos_cap_v2"
        return self._pair(sigmas, t.round() if rounds else np.floor(t), last)

    def deis_levels(self, steps: int) -> list[Level]:
        """Levels of diffusers' DEISMultistepScheduler: DPM++'s, but they end at sigma_0, or stay at their last."""
        levels = self.dpmpp_levels(steps)
        if self.is_flow or self.is_edm or self.sigma_spacing is not None:
            return [*levels[:-1], levels[-1]._replace(sigma=levels[-2].sigma if self.sigma_spacing else 0.0)]
        return [*levels[:-1], levels[-1]._replace(sigma=float(self.compute_sigmas()[0]))]

    def ddpm_levels(self, steps: int) -> list[Level]:
        """Levels of diffusers' DDPMScheduler, which always end at 0."""
        return replace(self, set_alpha_to_one=True).ddim_levels(steps)

    def restart_levels(self, steps: int) -> list[Level]:
        """Levels of AUTOMATIC1111's Restart: Karras' where nothing else was chosen."""
        own = self.sigma_spacing or ("karras" if self.timestep_spacing in (None, "linspace", "leading") else None)
        return replace(self, sigma_spacing=own).euler_levels(steps)

    def timestep_at(self, sigma: float) -> float:
        """The t of any sigma above 0."""
        if self.is_flow:
            return float(np.float32(sigma / (1 + sigma) * self.num_train_timesteps))
        if self.is_edm or (self.timestep_type == "continuous" and self.prediction_type == "v_prediction"):
            return float(np.float32(0.25 * math.log(sigma)))
        return float(np.float32(_interpolate_t(np.array([sigma]), _trained(self))[0]))

    def _spaced(self, high: float, low: float, steps: int) -> NDArray[np.float64]:
        """Sigmas by `sigma_spacing` from `high` to `low`, or between the ends that the schedule has of its own."""
        assert self.sigma_spacing is not None
        if self.sigma_spacing in ALIGNED and (self.is_flow or self.is_edm or not 10 < _trained(self)[-1] < 20):
            raise ValueError(f"{self.sigma_spacing} holds levels from 14.6 to 0.03, as SD's are; this model has others")
        high, low = self.sigma_max or high, self.sigma_min or low
        return space(self.sigma_spacing, high, low, steps, self.rho)

    def _last_sigma(self, trained: NDArray[np.float32]) -> float:
        return 0.0 if self.final_sigmas_type == "zero" else float(trained[0])

    def ddim_levels(self, steps: int) -> list[Level]:
        """Levels of diffusers' DDIMScheduler; they end at sigma_0 instead of 0 if set_alpha_to_one is False.

        diffusers always steps to t - num_train_timesteps // steps, even where the next t is another one (linspace,
        and trailing if steps does not divide num_train_timesteps). These levels step to the next t.
        """
        if self.is_flow:
            return self._flow_levels(steps)
        if self.is_edm:
            return self._edm_levels(steps)
        return self._vp_levels(steps, set_alpha_to_one=self.set_alpha_to_one is not False)

    def pndm_levels(self, steps: int) -> list[Level]:
        """Levels of diffusers' PNDMScheduler, each once: the sampler itself evaluates the second level twice.

        Raises:
            ValueError: also if the first level would have zero terminal SNR. There eps says nothing about x0, so PNDM's
                mean of two eps is meaningless. (diffusers' PNDM ignores rescale_betas_zero_snr altogether.)
        """
        self._refuse_others("PNDM")
        levels = self._vp_levels(steps, set_alpha_to_one=self.set_alpha_to_one is True)
        if self.rescale_betas_zero_snr and levels[0].t == self.num_train_timesteps - 1:
            raise ValueError(
                "PNDM cannot start from zero terminal SNR (rescale_betas_zero_snr): choose another sampler, such as "
                "ddim or euler, or timestep_spacing leading"
            )
        return levels

    def lcm_levels(self, steps: int) -> list[Level]:
        """Levels of diffusers' LCMScheduler: evenly taken from the timesteps LCMs are distilled on; spacing is moot.

        Flow models have no such timesteps and no boundary condition: theirs are their own, as in diffusers'
        SCMScheduler.

        Raises:
            ValueError: more steps than those (original_inference_steps, usually 50).
        """
        if self.is_flow:
            return [level._replace(boundary=0.0) for level in self._flow_levels(steps)]
        t = self._distilled_grid(steps, "LCM")
        levels = self._pair(self.compute_sigmas(_ABAR_MIN_VP)[t], t, 0.0)
        return [level._replace(boundary=float(self.timestep_scaling)) for level in levels]

    def tcd_levels(self, steps: int) -> list[Level]:
        """Levels of diffusers' TCDScheduler(eta=0.3): LCM's, but they end at sigma_0, each with its `via`."""
        t = self._distilled_grid(steps, "TCD")
        sigmas = self.compute_sigmas(_ABAR_MIN_VP)
        levels = self._pair(sigmas[t], t, float(sigmas[0]))
        return [level._replace(via=float(sigmas[math.floor((1 - _TCD_ETA) * level.t)])) for level in levels]

    @property
    def is_flow(self) -> bool:
        return self.prediction_type == "flow_prediction"

    def _flow_levels(self, steps: int) -> list[Level]:
        """Levels on straight paths (flow.py); t is 1000 s, between integers too."""
        require_int("steps", steps, 1)
        if self.flow_mu is not None:
            raise ValueError("the shift of this model's levels depends on the picture's size, which is not given")
        T = self.num_train_timesteps
        s = flow.grid(self.flow_grid, steps, self.flow_shift, T)
        if self.sigma_spacing is not None:
            s = self._spaced(float(s[0]), float(s[-1]), steps)
        sigmas = [s_i / (1 - s_i) if s_i < 1 else _SIGMA_MAX_FLOW for s_i in s.tolist()]
        t = np.floor(s * T) if self.flow_grid == "dpm" else s * T  # diffusers' solver cuts them to integers
        levels = [Level(sigma, float(np.float32(t_i)), True) for sigma, t_i in zip(sigmas, t.tolist(), strict=True)]
        return [*levels, Level(0.0, 0.0, True)]

    def for_tokens(self, tokens: int, steps: int) -> NoiseSchedule:
        """The schedule of a picture of so many image tokens in so many steps, whose shift is a number."""
        if self.flow_mu is None:
            return self
        low, high = (self.base_image_seq_len, self.base_shift), (self.max_image_seq_len, self.max_shift)
        mu = flow.flux2_mu(tokens, steps) if self.flow_mu == "flux2" else flow.linear_mu(tokens, low, high)
        grid: FlowGrid = "full" if self.flow_grid == "twice" else self.flow_grid
        return replace(self, flow_mu=None, flow_grid=grid, flow_shift=flow.shift_of(mu, self.time_shift_type))

    @property
    def is_edm(self) -> bool:
        return self.sigma_data is not None

    def _edm_levels(self, steps: int) -> list[Level]:
        """Levels of diffusers' EDMEulerScheduler and EDMDPMSolverMultistepScheduler; t is a quarter of log sigma."""
        require_int("steps", steps, 1)
        if self.sigma_spacing is None:
            raise ValueError("an EDM model has no timesteps to space: choose the sigmas karras, exponential or beta")
        assert self.sigma_min is not None
        assert self.sigma_max is not None
        sigmas = self._spaced(self.sigma_max, self.sigma_min, steps)
        levels = self._pair(sigmas, 0.25 * np.log(sigmas), 0.0 if self.final_sigmas_type == "zero" else self.sigma_min)
        return [level._replace(data=float(self.sigma_data or 0)) for level in levels]

    def _refuse_others(self, name: str) -> None:
        """Refuse a sampler that needs the timesteps of a variance preserving model."""
        if self.is_flow or self.is_edm:
            kind = "a flow-matching" if self.is_flow else "an EDM"
            raise ValueError(f"{name} is no sampler for {kind} model: choose another, such as euler or dpmpp_2m")

    def _distilled_grid(self, steps: int, name: str) -> NDArray[np.int64]:
        """Timesteps evenly taken from those that few-step models are distilled on."""
        require_int("steps", steps, 1)
        self._refuse_others(name)
        original = min(self.original_inference_steps, self.num_train_timesteps)
        if steps > original:
            raise ValueError(f"steps {steps} is too many for {name}: the valid range is 1 to {original}")
        grid = np.arange(original, 0, -1) * (self.num_train_timesteps // original) - 1
        return np.asarray(grid[np.floor(np.linspace(0, original, steps, endpoint=False)).astype(np.int64)])

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
        require_int("steps", steps, 1)
        T = self.num_train_timesteps
        if spacing == "linspace":
            return np.linspace(0, T - 1, steps, dtype=np.float64)[::-1]
        if spacing == "simple":  # AUTOMATIC1111's and ComfyUI's
            return np.asarray(T - 1 - np.floor(np.arange(steps) * (T / steps)), np.float64)
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


@lru_cache(maxsize=4)
def _trained(schedule: NoiseSchedule) -> NDArray[np.float32]:
    return schedule.compute_sigmas()


def _cumprod(alphas: NDArray[np.float32]) -> NDArray[np.float32]:
    """torch.cumprod: accumulates in double precision, stores float32."""
    return np.cumprod(alphas, dtype=np.float64).astype(np.float32)


def _interpolate_t(sigmas: NDArray[np.float64], trained: NDArray[np.float32]) -> NDArray[np.float64]:
    """The fractional timesteps of some sigmas: linear in log sigma, as k-diffusion's sigma_to_t."""
    t = np.interp(np.log(sigmas), np.log(trained), np.arange(len(trained)))
    return np.asarray(t, dtype=np.float64)
