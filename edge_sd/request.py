"""Request: what the user asked for. Result: the pictures, and all that is needed to make them again."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .control import check_reading
from .errors import InvalidRequest, choices
from .samplers import SAMPLERS

if TYPE_CHECKING:
    from PIL.Image import Image

    from .bundle import Defaults

MAX_STEPS = 1000
MAX_SIDE = 2048
MAX_COUNT = 1000
MAX_SEED = 2**32 - 1
MAX_PROMPT = 20_000
MAX_BLUR = 64
MAX_WEIGHT = 2
STRENGTH = 0.7


@dataclass(frozen=True)
class Request:
    """What to draw. None means: the model's own default.

    prompt, negative   text; the negative prompt is what guidance leads away from
    width, height      pixels, multiples of 8
    steps              denoising steps, 1 to 1000
    guidance           scale of classifier-free guidance (Ho & Salimans 2022); 1 turns it off
    seed               of the first picture, 0 to 2^32 - 1; picture n of a count uses seed + n
    sampler            a name of edge_sd.samplers.SAMPLERS
    count              number of pictures
    image              a picture to start from: a file, or a PIL picture
    strength           how much of it is drawn anew: the share of the steps that are taken, above 0 to 1
    mask               a picture of the image's size, white where it is drawn anew; the rest stays as it is
    mask_blur          pixels over which the two are blended
    control            a picture whose lines say where things are: a photograph, a sketch, a drawing
    control_weight     how closely they are followed, 0 to 2; 1 is what the ControlNet was trained for
    control_start, control_end   the share of the steps during which they are, 0 to 1
    control_reading    "canny", "scribble", "lines" or "auto" (see control.read_lines)

    Raises InvalidRequest on any value that cannot be drawn.
    """

    prompt: str
    negative: str = ""
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int | None = None
    sampler: str | None = None
    count: int = 1
    image: str | Path | Image | None = None
    strength: float | None = None
    mask: str | Path | Image | None = None
    mask_blur: float | None = None
    control: str | Path | Image | None = None
    control_weight: float = 1.0
    control_start: float = 0.0
    control_end: float = 1.0
    control_reading: str = "auto"

    def __post_init__(self) -> None:
        for name, text in (("prompt", self.prompt), ("negative prompt", self.negative)):
            _check_text(name, text)
        if not self.prompt.strip():
            raise InvalidRequest("the prompt is empty; say what to draw")
        for name, side in (("width", self.width), ("height", self.height)):
            if side is not None and (side % 8 or not 8 <= side <= MAX_SIDE):
                raise InvalidRequest(f"{name} {side} is not a multiple of 8 from 8 to {MAX_SIDE}")
        _check_range("steps", self.steps, 1, MAX_STEPS)
        _check_range("seed", self.seed, 0, MAX_SEED)
        _check_range("count", self.count, 1, MAX_COUNT)
        if self.seed is not None and self.seed + self.count - 1 > MAX_SEED:
            raise InvalidRequest(f"seed {self.seed} with count {self.count} runs past the last seed, {MAX_SEED}")
        if self.guidance is not None and not (math.isfinite(self.guidance) and 0 <= self.guidance <= 100):
            raise InvalidRequest(f"guidance {self.guidance} is not a number from 0 to 100")
        if self.sampler is not None and self.sampler not in SAMPLERS:
            raise InvalidRequest(f"unknown sampler {self.sampler!r}; valid: {choices(SAMPLERS)}")
        if self.strength is not None and not 0 < self.strength <= 1:
            raise InvalidRequest(f"strength {self.strength} is not a number above 0, up to 1")
        if self.mask_blur is not None and not 0 <= self.mask_blur <= MAX_BLUR:
            raise InvalidRequest(f"mask blur {self.mask_blur} is not a number from 0 to {MAX_BLUR}")
        if not 0 <= self.control_weight <= MAX_WEIGHT:
            raise InvalidRequest(f"control weight {self.control_weight} is not a number from 0 to {MAX_WEIGHT}")
        if not 0 <= self.control_start < self.control_end <= 1:
            raise InvalidRequest(
                f"control from {self.control_start} to {self.control_end} is no part of the steps, such as 0 to 0.6"
            )
        check_reading(self.control_reading)
        for name, value, need in (
            ("strength", self.strength, self.image),
            ("mask", self.mask, self.image),
            ("mask_blur", self.mask_blur, self.mask),
        ):
            if value is not None and need is None:
                raise InvalidRequest(f"{name} needs {'a mask' if name == 'mask_blur' else 'an image'}")

    def resolve(self, defaults: Defaults, seed: int) -> Settings:
        """The request with the model's defaults, and `seed` if it has none of its own, filled in."""
        return Settings(
            prompt=self.prompt,
            negative=self.negative,
            width=defaults.width if self.width is None else self.width,
            height=defaults.height if self.height is None else self.height,
            steps=defaults.steps if self.steps is None else self.steps,
            guidance=defaults.guidance if self.guidance is None else self.guidance,
            seed=seed if self.seed is None else self.seed,
            sampler=defaults.sampler if self.sampler is None else self.sampler,
            count=self.count,
            strength=self._strength(),
            control_weight=self.control_weight,
            control_start=self.control_start,
            control_end=self.control_end,
            control_reading=self.control_reading,
        )

    def _strength(self) -> float | None:
        if self.image is None or self.strength is not None:
            return self.strength
        return STRENGTH if self.mask is None else 1.0


@dataclass(frozen=True)
class Settings:
    """A request with nothing left open: what a model really draws.

    `image`, `mask` and `control` are hashes of their pixels; where there are none, `Request(**asdict(settings))` asks
    for the same again.
    """

    prompt: str
    negative: str
    width: int
    height: int
    steps: int
    guidance: float
    seed: int
    sampler: str
    count: int
    image: str | None = None
    strength: float | None = None
    mask: str | None = None
    mask_blur: float | None = None
    control: str | None = None
    control_weight: float = 1.0
    control_start: float = 0.0
    control_end: float = 1.0
    control_reading: str = "auto"

    @property
    def guided(self) -> bool:
        """Whether the negative prompt takes part."""
        return self.guidance != 1


def _check_text(name: str, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        # A byte that is no UTF-8 reaches Python's argv as a lone surrogate.
        raise InvalidRequest(f"the {name} is not valid UTF-8") from None
    if "\0" in text:
        raise InvalidRequest(f"the {name} holds a NUL character")
    if len(text) > MAX_PROMPT:
        raise InvalidRequest(f"the {name} has {len(text)} characters; at most {MAX_PROMPT} are taken")


def _check_range(name: str, value: int | None, low: int, high: int) -> None:
    if value is not None and not low <= value <= high:
        raise InvalidRequest(f"{name} {value} is not a whole number from {low} to {high}")


@dataclass(frozen=True)
class Picture:
    """One picture and the settings, with count 1, that make it again."""

    image: Image
    settings: Settings
    model: str
    variant: str
    device: str
    model_hash: str

    def save(self, path: str | Path) -> Path:
        """Write PNG, JPEG or WebP by the name's ending, with the parameters inside; all or nothing."""
        from .image_io import save

        return save(self, Path(path))


@dataclass(frozen=True)
class Result:
    """The pictures of a request, what the device plan said, and where the seconds went."""

    pictures: list[Picture]
    plan: str
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def save(self, path: str | Path) -> list[Path]:
        """Write one picture to `path`, several to `path` with -1, -2, … before the ending."""
        path = Path(path)
        if len(self.pictures) == 1:
            return [self.pictures[0].save(path)]
        return [p.save(path.with_stem(f"{path.stem}-{n}")) for n, p in enumerate(self.pictures, 1)]
