"""Settings: a request with nothing left open, as it is written into pictures."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

from ..bundle.facts import Defaults
from ..components.edits import Shortcuts
from ..sampling.names import choose_sampler
from ..sampling.samplers import Stochasticity
from ..sampling.schedule import NoiseSchedule
from ..text.schedule import composed
from .control import Control
from .request import Request, Shared, second_seed

# Pictures of more pixels are decoded in tiles of so many a side.
VAE_WHOLE, VAE_TILE = 1024 * 1024, 768
# Share of the steps that are taken from an image on.
STRENGTH = 0.7
# Factor of what an IP-Adapter attends to in reference pictures.
REFERENCE_WEIGHT = 1.0
# How closely a model that edits by instruction keeps to the image.
IMAGE_GUIDANCE = 1.5


@dataclass(frozen=True)
class Reference:
    """A reference picture as Settings have it: the hash of its pixels, and the size that the model is shown it at."""

    image: str
    width: int
    height: int


@dataclass(frozen=True)
class Filled:
    """Options in another form than Request's: nothing is None that the model has a default for."""

    prompt: str
    negative: str
    width: int
    height: int
    steps: int
    guidance: float
    seed: int
    sampler: str
    sigmas: str | None = None
    image: str | None = None
    mask: str | None = None
    extend: tuple[int, ...] | None = None
    references: tuple[Reference, ...] = ()
    controls: tuple[Control, ...] = ()
    embeddings: dict[str, str] = field(default_factory=dict)
    loras: dict[str, tuple[float, float, str]] = field(default_factory=dict)
    refiner: str | None = None
    deep_every: int = 1
    merge_tokens: bool = False
    decoder: str = "full"


@dataclass(frozen=True)
class Settings(Shared, Filled):
    """A request with nothing left open: what a model really draws. Fields are Request's, with these differences.

    `image`, `mask` and the images of references and controls are hashes of pixels, the values of `embeddings` hashes of
    files, and `loras` are names with the weights for text encoders and UNet, and a hash. `safety` is None where the
    model has no checker, and False where it was switched off.

    Example:
        settings = pipeline.resolve(Request("a red apple"))
        print(settings.seed, settings.sampler, settings.steps_taken)
    """

    @classmethod
    def of(cls, request: Request, defaults: Defaults, seed: int) -> Settings:
        """`request` with the model's defaults, and `seed` if it has none of its own, filled in.

        What comes out of files (pictures' hashes, embeddings, LoRAs) the Resolver adds.
        """
        shared = {each.name: getattr(request, each.name) for each in fields(Shared)}
        sampler, sigmas = choose_sampler(request.sampler or defaults.sampler, request.sigmas)
        given = {name: getattr(request, name) for name in ("width", "height", "steps", "guidance")}
        filled = {name: getattr(defaults, name) if value is None else value for name, value in given.items()}
        return cls(
            prompt=request.prompt,
            negative=request.negative,
            seed=seed if request.seed is None else request.seed,
            sampler=sampler,
            sigmas=sigmas,
            controls=tuple(request.controls),
            extend=None if request.extend is None else tuple(request.extend),
            deep_every=request.deep_every or 1,
            merge_tokens=bool(request.merge_tokens),
            decoder=request.decoder or "full",
            **filled,
            **{**shared, "strength": _strength(request), "variation_seed": second_seed(request, seed)},
        )

    @property
    def guided(self) -> bool:
        """Whether the negative prompt takes part."""
        return self.guidance != 1 or self.weights != (1.0,)

    @property
    def weights(self) -> tuple[float, ...]:
        """Those of the prompt's parts between ANDs; one of 1 where there is no AND."""
        return tuple(weight for _, weight in composed(self.prompt))

    @property
    def shortcuts(self) -> Shortcuts:
        """What the UNet is loaded for."""
        sometimes = self.guided and (self.guidance_start, self.guidance_end) != (0, 1)
        return Shortcuts(self.deep_every > 1, self.merge_tokens, sometimes)

    @property
    def steps_taken(self) -> int:
        """How many of the steps are taken, counted as diffusers does."""
        return self.steps if self.strength is None else int(self.steps * self.strength)

    def nth(self, n: int) -> Settings:
        """Those of picture n of the count alone."""
        if self.variation_seed is not None:
            return replace(self, variation_seed=self.variation_seed + n, count=1)
        return replace(self, seed=self.seed + n, count=1)

    @property
    def window(self) -> tuple[int, int]:
        """Width and height, in pixels, that the UNet draws at once."""
        if self.tile is None:
            return self.width, self.height
        return min(self.width, self.tile), min(self.height, self.tile)

    @property
    def vae_window(self) -> tuple[int, int]:
        """Width and height, in pixels, that the autoencoder takes at once."""
        return self.vae_window_of(self.width, self.height)

    def vae_window_of(self, width: int, height: int) -> tuple[int, int]:
        """The same for a picture of width x height."""
        whole = width * height <= VAE_WHOLE
        side = (0 if whole else VAE_TILE) if self.vae_tile is None else self.vae_tile
        return (min(width, side), min(height, side)) if side else (width, height)

    @property
    def stochasticity(self) -> Stochasticity:
        """How much noise the sampler adds on its way."""
        return Stochasticity(eta=self.eta, s_churn=self.s_churn, s_noise=self.s_noise)

    def schedule(self, trained: NoiseSchedule) -> NoiseSchedule:
        """`trained` with the levels spaced as was asked. Raises ValueError where that model can't start from noise."""
        if self.zero_snr and trained.prediction_type != "v_prediction":
            raise ValueError(f"zero_snr needs a model of v_prediction; this one is of {trained.prediction_type}")
        changes: dict[str, Any] = {"rescale_betas_zero_snr": True} if self.zero_snr else {}
        if self.sigmas == "sgm_uniform":
            changes |= {"timestep_spacing": "trailing", "sigma_spacing": None}
        elif self.sigmas == "simple":
            changes |= {"timestep_spacing": "simple", "sigma_spacing": None}
        elif self.sigmas is not None:
            changes["sigma_spacing"] = self.sigmas
        return replace(trained, **changes)


def _strength(request: Request) -> float | None:
    if request.image is None or request.strength is not None:
        return request.strength
    return STRENGTH if request.mask is None and request.extend is None else 1.0
