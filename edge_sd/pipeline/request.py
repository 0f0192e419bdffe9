"""Request: what the user asked for. Settings: the same with nothing left open."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..components.controlnet import Control, controls_of
from ..components.edits import Shortcuts
from ..errors import InvalidRequest, choices
from ..sampling.names import choose_sampler, find_sampler, find_sigmas
from ..text.prompt import parse, take_loras
from ..text.schedule import script
from ..text.textual_inversion import check_word
from ..text.wildcards import expand

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..bundle.facts import Defaults
    from ..sampling.schedule import NoiseSchedule

MAX_STEPS = 1000
MAX_SIDE = 16384
MAX_PADDING = 4096
MAX_COUNT = 1000
MAX_SEED = 2**32 - 1
MAX_PROMPT = 20_000
MAX_BLUR = 64
MAX_REUSE = 10
MAX_SKIP = 48
MAX_LORA = 10
DECODERS = ("full", "tiny", "auto")
STRENGTH = 0.7
# Pictures of more pixels are decoded in tiles of so many a side.
VAE_WHOLE, VAE_TILE = 1024 * 1024, 768


@dataclass(frozen=True)
class Request:
    """What to draw. None means: the model's own default.

    prompt, negative   text; the negative prompt is what guidance leads away from
    width, height      pixels, multiples of 8
    steps              denoising steps, 1 to 1000
    guidance           scale of classifier-free guidance (Ho & Salimans 2022); 1 turns it off
    seed               of the first picture, 0 to 2^32 - 1; picture n of a count uses seed + n
    sampler            a name of edge_sd.sampling.samplers.SAMPLERS, or AUTOMATIC1111's or diffusers' for one
    sigmas             how noise levels are spaced: karras, exponential, beta, sgm_uniform; "automatic": the model's way
    zero_snr           start from noise alone, by betas rescaled to zero terminal SNR; for v-prediction models
    count              number of pictures
    image              a picture to start from: a file, or a PIL picture
    strength           how much of it is drawn anew: the share of the steps that are taken, above 0 to 1
    mask               a picture of the image's size, white where it is drawn anew; the rest stays as it is
    mask_blur          pixels over which the two are blended
    control            a picture whose lines say where things are: a photograph, a sketch, a drawing; or several,
                       which take part together. The next five are then one for all, or one each
    control_weight     how closely they are followed, 0 to 2; 1 is what the ControlNet was trained for
    control_start, control_end   the share of the steps during which they are, 0 to 1
    control_reading    "canny", "scribble", "lines", "grey", "tile" or "auto" (see control.read_lines)
    control_net        which of the model's ControlNets; "" is the one called controlnet
    guidance_start, guidance_end   the share of the steps that are guided, 0 to 1; others take half the time
    deep_every         the UNet's deep features are computed on every n-th step and kept for those between, 1 to 10
    merge_tokens       the finest self-attention looks at averages of 2 x 2 positions
    mask_padding       only the mask and so many pixels around it are drawn, at the model's size, and pasted back
    extend             pixels to add to the image: left, right, top, bottom
    colour             of what is drawn only the colours are taken; light and dark are the image's
    variation_seed, variation_strength   a second noise, and how far to go towards it, 0 to 1; with a count the second
                       seed counts on, not the first
    toward, toward_share   a second prompt, and how far to go towards it, 0 to 1
    tile               draw in overlapping pieces of so many pixels a side, for sizes that a model can't draw at once
    vae_tile           the same of the autoencoder alone; 0 is never, None above VAE_WHOLE pixels
    decoder            "full"; "tiny", a fraction of the work for a softer picture; "auto": tiny where the model has one
    clip_skip          the text encoder's layer, counted from its last, 1; AUTOMATIC1111's counting
    embeddings         word -> a safetensors file of textual inversion, whose vectors the word stands for
    loras              safetensors files of differences of the weights -> how much of each, 1 is all (see lora.py)
    refiner            a bundle of SDXL's refiner, which draws the last steps
    refiner_start      the share of the steps after which it does; None is 0.8
    lora_folder        where the files lie that a prompt names, <lora:NAME:0.8>
    dynamic            the prompts are templates, such as "a {red|green} apple" (see wildcards.py)
    wildcards          a folder for the templates' __name__; given, the prompts are templates
    safety             the model's checker looks at each picture and blacks out what it flags; None: where it has one

    The language of prompts is prompt.py's. Raises InvalidRequest on any value that cannot be drawn.
    """

    prompt: str
    negative: str = ""
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int | None = None
    sampler: str | None = None
    sigmas: str | None = None
    zero_snr: bool = False
    count: int = 1
    image: str | Path | Image | None = None
    strength: float | None = None
    mask: str | Path | Image | None = None
    mask_blur: float | None = None
    control: str | Path | Image | Sequence[str | Path | Image] | None = None
    control_weight: float | Sequence[float] = 1.0
    control_start: float | Sequence[float] = 0.0
    control_end: float | Sequence[float] = 1.0
    control_reading: str | Sequence[str] = "auto"
    control_net: str | Sequence[str] = ""
    guidance_start: float = 0.0
    guidance_end: float = 1.0
    deep_every: int = 1
    merge_tokens: bool = False
    mask_padding: int | None = None
    extend: Sequence[int] | None = None
    colour: bool = False
    variation_seed: int | None = None
    variation_strength: float = 0.0
    toward: str | None = None
    toward_share: float = 0.0
    tile: int | None = None
    vae_tile: int | None = None
    decoder: str = "full"
    clip_skip: int = 1
    embeddings: Mapping[str, str | Path] = field(default_factory=dict)
    dynamic: bool = False
    wildcards: str | Path | None = None
    loras: Mapping[str | Path, float] = field(default_factory=dict)
    lora_folder: str | Path | None = None
    refiner: str | Path | None = None
    refiner_start: float | None = None
    safety: bool | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.toward_share <= 1:
            raise InvalidRequest(f"the share {self.toward_share} towards a prompt is not a number from 0 to 1")
        texts = (("prompt", self.prompt), ("negative prompt", self.negative), ("second prompt", self.toward or ""))
        for name, text in texts:
            _check_text(name, text)
            parse(text)
            script(text, "", 1)
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
        self._check_variation()
        if self.guidance is not None and not (math.isfinite(self.guidance) and 0 <= self.guidance <= 100):
            raise InvalidRequest(f"guidance {self.guidance} is not a number from 0 to 100")
        if self.sampler is not None:
            find_sampler(self.sampler)
        if self.sigmas is not None:
            find_sigmas(self.sigmas)
        if self.strength is not None and not 0 < self.strength <= 1:
            raise InvalidRequest(f"strength {self.strength} is not a number above 0, up to 1")
        if self.mask_blur is not None and not 0 <= self.mask_blur <= MAX_BLUR:
            raise InvalidRequest(f"mask blur {self.mask_blur} is not a number from 0 to {MAX_BLUR}")
        self.controls()
        if not 0 <= self.guidance_start < self.guidance_end <= 1:
            raise InvalidRequest(
                f"guidance from {self.guidance_start} to {self.guidance_end} is no part of the steps, such as 0 to 0.6"
            )
        _check_range("deep_every", self.deep_every, 1, MAX_REUSE)
        if self.decoder not in DECODERS:
            raise InvalidRequest(f"unknown decoder {self.decoder!r}; valid: {choices(DECODERS)}")
        _check_range("CLIP skip", self.clip_skip, 1, MAX_SKIP)
        for word in self.embeddings:
            check_word(word)
        for weight in (*self.loras.values(), *chain(*take_loras(self.prompt)[1].values())):
            if not -MAX_LORA <= weight <= MAX_LORA:
                raise InvalidRequest(f"the weight {weight} of a LoRA is not a number from -{MAX_LORA} to {MAX_LORA}")
        if self.lora_folder is not None and not Path(self.lora_folder).is_dir():
            raise InvalidRequest(f"the folder of LoRAs {str(self.lora_folder)!r} does not exist")
        for name, value, need in (
            ("strength", self.strength, self.image),
            ("mask", self.mask, self.image),
            ("extend", self.extend, self.image),
            ("colour", self.colour or None, self.image),
            ("refiner_start", self.refiner_start, self.refiner),
            ("mask_blur", self.mask_blur, self.mask or self.extend),
            ("mask_padding", self.mask_padding, self.mask or self.extend),
        ):
            if value is not None and need is None:
                needed = {"mask_": "a mask", "refin": "a refiner"}.get(name[:5], "an image")
                raise InvalidRequest(f"{name} needs {needed}")
        if self.refiner_start is not None and not 0 < self.refiner_start < 1:
            raise InvalidRequest(f"refiner start {self.refiner_start} is no share of the steps between 0 and 1")
        _check_range("mask padding", self.mask_padding, 0, MAX_PADDING)
        if self.extend is not None:
            whole = all(type(side) is int and 0 <= side <= MAX_PADDING for side in self.extend)
            if not (whole and len(self.extend) == 4 and any(self.extend)):
                raise InvalidRequest(
                    f"extend {','.join(map(str, self.extend))} is not left,right,top,bottom, such as 0,64,0,0: "
                    f"whole numbers to {MAX_PADDING}, not all 0"
                )
        for name, side in (("tile", self.tile), ("vae_tile", self.vae_tile or None)):
            if side is not None and (side % 8 or not 64 <= side <= MAX_SIDE):
                raise InvalidRequest(f"{name} {side} is not a multiple of 8 from 64 to {MAX_SIDE}")

    def controls(self) -> list[Control]:
        """What is followed, one for each picture."""
        return controls_of(
            self.control, weight=self.control_weight, start=self.control_start, end=self.control_end,
            reading=self.control_reading, net=self.control_net,
        )  # fmt: skip

    def _check_variation(self) -> None:
        if not 0 <= self.variation_strength <= 1:
            raise InvalidRequest(f"variation strength {self.variation_strength} is not a number from 0 to 1")
        _check_range("variation seed", self.variation_seed, 0, MAX_SEED)
        if self.variation_seed is not None and not self.variation_strength:
            raise InvalidRequest("a variation seed needs a variation strength")
        if self.variation_seed is not None and self.variation_seed + self.count - 1 > MAX_SEED:
            raise InvalidRequest(f"variation seed {self.variation_seed} with count {self.count} runs past {MAX_SEED}")

    def resolve(self, defaults: Defaults, seed: int) -> Settings:
        """The request with the model's defaults, and `seed` if it has none of its own, filled in."""
        sampler, sigmas = choose_sampler(self.sampler or defaults.sampler, self.sigmas)
        return Settings(
            prompt=self.prompt,
            negative=self.negative,
            width=defaults.width if self.width is None else self.width,
            height=defaults.height if self.height is None else self.height,
            steps=defaults.steps if self.steps is None else self.steps,
            guidance=defaults.guidance if self.guidance is None else self.guidance,
            seed=seed if self.seed is None else self.seed,
            sampler=sampler,
            sigmas=sigmas,
            zero_snr=self.zero_snr,
            count=self.count,
            strength=self._strength(),
            control_weight=_fixed(self.control_weight),
            control_start=_fixed(self.control_start),
            control_end=_fixed(self.control_end),
            control_reading=_fixed(self.control_reading),
            control_net=_fixed(self.control_net),
            guidance_start=self.guidance_start,
            guidance_end=self.guidance_end,
            deep_every=self.deep_every,
            merge_tokens=self.merge_tokens,
            mask_padding=self.mask_padding,
            extend=None if self.extend is None else tuple(self.extend),
            colour=self.colour,
            variation_seed=self._second_seed(seed),
            variation_strength=self.variation_strength,
            toward=self.toward,
            toward_share=self.toward_share,
            tile=self.tile,
            vae_tile=self.vae_tile,
            decoder=self.decoder,
            clip_skip=self.clip_skip,
            safety=self.safety,
        )

    def _second_seed(self, seed: int) -> int | None:
        if not self.variation_strength or self.variation_seed is not None:
            return self.variation_seed
        # Any but the first.
        return (seed + 1_000_003) % (MAX_SEED + 1 - self.count)

    def expanded(self, seed: int) -> Request:
        """The request with its prompts' templates expanded, if they are any. Raises InvalidRequest, MissingExtra."""
        if not self.dynamic and self.wildcards is None:
            return self
        folder = None if self.wildcards is None else Path(self.wildcards)
        prompt, negative = (expand(text, seed, folder) for text in (self.prompt, self.negative))
        return replace(self, prompt=prompt, negative=negative, dynamic=False, wildcards=None)

    def _strength(self) -> float | None:
        if self.image is None or self.strength is not None:
            return self.strength
        return STRENGTH if self.mask is None and self.extend is None else 1.0


@dataclass(frozen=True)
class Settings:
    """A request with nothing left open: what a model really draws.

    `image`, `mask` and `control` are hashes of their pixels, the values of `embeddings` of their files, and `loras` are
    names with the weights for text encoders and UNet, and a hash; where there are none, `Request(**asdict(settings))`
    asks for the same again. `safety` is None where the model has no checker, and False where it was switched off.
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
    sigmas: str | None = None
    zero_snr: bool = False
    image: str | None = None
    strength: float | None = None
    mask: str | None = None
    mask_blur: float | None = None
    control: str | tuple[str, ...] | None = None
    control_weight: float | tuple[float, ...] = 1.0
    control_start: float | tuple[float, ...] = 0.0
    control_end: float | tuple[float, ...] = 1.0
    control_reading: str | tuple[str, ...] = "auto"
    control_net: str | tuple[str, ...] = ""
    guidance_start: float = 0.0
    guidance_end: float = 1.0
    deep_every: int = 1
    merge_tokens: bool = False
    mask_padding: int | None = None
    extend: tuple[int, ...] | None = None
    colour: bool = False
    variation_seed: int | None = None
    variation_strength: float = 0.0
    toward: str | None = None
    toward_share: float = 0.0
    tile: int | None = None
    vae_tile: int | None = None
    decoder: str = "full"
    clip_skip: int = 1
    embeddings: dict[str, str] = field(default_factory=dict)
    loras: dict[str, tuple[float, float, str]] = field(default_factory=dict)
    refiner: str | None = None
    refiner_start: float | None = None
    safety: bool | None = None

    @property
    def guided(self) -> bool:
        """Whether the negative prompt takes part."""
        return self.guidance != 1

    @property
    def shortcuts(self) -> Shortcuts:
        """What the UNet is loaded for."""
        sometimes = self.guided and (self.guidance_start, self.guidance_end) != (0, 1)
        return Shortcuts(self.deep_every > 1, self.merge_tokens, sometimes)

    def controls(self) -> list[Control]:
        """What is followed, one for each picture."""
        return controls_of(
            self.control, weight=self.control_weight, start=self.control_start, end=self.control_end,
            reading=self.control_reading, net=self.control_net,
        )  # fmt: skip

    @property
    def variation(self) -> tuple[int | None, float]:
        """The second seed and how far to go towards it."""
        return self.variation_seed, self.variation_strength

    def nth(self, n: int) -> Settings:
        """Those of picture n of the count alone."""
        if self.variation_seed is not None:
            return replace(self, variation_seed=self.variation_seed + n, count=1)
        return replace(self, seed=self.seed + n, count=1)

    @property
    def window(self) -> tuple[int, int]:
        """Width and height, in pixels, that the UNet draws at once."""
        return (
            (self.width, self.height)
            if self.tile is None
            else (min(self.width, self.tile), min(self.height, self.tile))
        )

    @property
    def vae_window(self) -> tuple[int, int]:
        """Width and height, in pixels, that the autoencoder takes at once."""
        whole = self.width * self.height <= VAE_WHOLE
        side = (0 if whole else VAE_TILE) if self.vae_tile is None else self.vae_tile
        return (min(self.width, side), min(self.height, side)) if side else (self.width, self.height)

    def schedule(self, trained: NoiseSchedule) -> NoiseSchedule:
        """`trained` with the levels spaced as was asked. Raises ValueError where that model can't start from noise."""
        if self.zero_snr and trained.prediction_type != "v_prediction":
            raise ValueError(f"zero_snr needs a model of v_prediction; this one is of {trained.prediction_type}")
        changes: dict[str, Any] = {"rescale_betas_zero_snr": True} if self.zero_snr else {}
        if self.sigmas == "sgm_uniform":
            changes |= {"timestep_spacing": "trailing", "sigma_spacing": None}
        elif self.sigmas is not None:
            changes["sigma_spacing"] = self.sigmas
        return replace(trained, **changes)


def _fixed(value: Any) -> Any:
    """A list as a tuple, so that it can't change."""
    return tuple(value) if isinstance(value, (list, tuple)) else value


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
