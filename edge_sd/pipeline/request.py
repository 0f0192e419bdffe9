"""Request: what the user asked for. Each field carries its help and its range (see options.py).

Nothing heavy is imported before it is needed: the command line reads the fields to answer --help.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InvalidRequest
from ..text.prompt import parse, take_loras
from ..text.schedule import script
from .control import Control
from .options import Choice, Flag, Number, Other, Place, Text, Whole, check, option

if TYPE_CHECKING:
    from PIL.Image import Image


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
MAX_REFERENCES = 10
MAX_WEIGHT = 2
DECODERS = ("full", "tiny", "auto")

# Headings of the help page, in its order.
DRAWING, STARTING, FOLLOWING, WORDS, SPEED = (
    "Drawing", "Starting from a picture", "Following lines", "Words and weights of your own", "Speed and memory"
)  # fmt: skip
SIDE, TILE, SEED, SHARE = Whole(8, MAX_SIDE, 8), Whole(64, MAX_SIDE, 8), Whole(0, MAX_SEED), Number(0, 1)


@dataclass(frozen=True)
class Asked:
    """Options that Settings hold in another form: with the model's defaults, or as hashes of files."""

    prompt: str = option(Text(MAX_PROMPT), "What to draw.", group=DRAWING)
    negative: str = option(Text(MAX_PROMPT), "What to lead away from.", "", group=DRAWING, title="negative prompt")
    width: int | None = option(SIDE, "Pixels.", group=DRAWING, says="the model's")
    height: int | None = option(SIDE, "Pixels.", group=DRAWING, says="the model's")
    steps: int | None = option(Whole(1, MAX_STEPS), "Denoising steps.", group=DRAWING, says="the model's")
    guidance: float | None = option(
        Number(0, 100), "How strongly to follow the prompt; 1 is not at all.", group=DRAWING, says="the model's"
    )
    seed: int | None = option(SEED, "The same seed makes the same picture.", group=DRAWING, says="random")
    sampler: str | None = option(
        Other(), "euler_a, dpmpp_2m, heun, unipc, ddim, lcm, …", group=DRAWING, says="the model's"
    )
    sigmas: str | None = option(
        Other(), "Spacing of noise levels: karras, exponential, beta, sgm-uniform, automatic.", group=DRAWING,
        says="the model's",
    )  # fmt: skip
    image: str | Path | Image | None = option(Place(picture=True), "A picture to start from.", group=STARTING)
    mask: str | Path | Image | None = option(
        Place(picture=True), "White where the image is drawn anew; the rest stays.", group=STARTING
    )
    extend: Sequence[int] | None = option(
        Other(), "Pixels to add to the image: left, right, top, bottom.", group=STARTING
    )
    references: Sequence[str | Path | Image] = option(
        Other(), f"Pictures that the prompt refers to, in models that take some; at most {MAX_REFERENCES}.", (),
        group=STARTING, title="reference picture",
    )  # fmt: skip
    controls: Sequence[Control] = option(Other(), "Pictures whose lines are followed.", (), group=FOLLOWING)
    embeddings: Mapping[str, str | Path] = option(
        Other(), "Textual inversions, and the word for each.", group=WORDS, factory=dict
    )
    loras: Mapping[str | Path, float] = option(
        Other(), "LoRA, LoHa or LoKr files, and how much of each.", group=WORDS, factory=dict
    )
    lora_folder: str | Path | None = option(Place(), "Where the prompt's <lora:NAME:0.8> lie.", group=WORDS)
    refiner: str | Path | None = option(Place(type=str), "SDXL's refiner, a bundle, for the last steps.", group=WORDS)
    deep_every: int | None = option(
        Whole(1, MAX_REUSE), "Compute the UNet's deep features on every n-th step only.", group=SPEED, says="1"
    )
    merge_tokens: bool | None = option(
        Flag(), "Average 2 x 2 positions that the finest self-attention looks at.", group=SPEED, says="no"
    )
    decoder: str | None = option(
        Choice(DECODERS), "Which decoder; tiny is softer, a fraction of the work.", group=SPEED, says="full"
    )
    dynamic: bool = option(Flag(), "Prompts are templates: a {red|green} apple.", False, group=WORDS)
    wildcards: str | Path | None = option(Place(), "The folder that a template's __name__ is in.", group=WORDS)


@dataclass(frozen=True, kw_only=True)
class Shared:
    """Options that Settings hold as Request does."""

    count: int = option(
        Whole(1, MAX_COUNT), "Pictures, at seed, seed + 1, …", 1, group=DRAWING
    )  # fmt: skip
    zero_snr: bool = option(Flag(), "Start from noise alone (v-prediction models).", False, group=DRAWING)
    eta: float | None = option(
        SHARE, "Fresh noise in each step, of samplers that add some; 0 is none.", group=DRAWING, says="the sampler's"
    )
    s_churn: float = option(Number(0, 100), "Noise added before steps of euler, heun and dpm2.", 0.0, group=DRAWING)
    s_noise: float = option(Number(0, 2), "Factor of all noise that is added on the way.", 1.0, group=DRAWING)
    variation_strength: float = option(
        SHARE, "How far towards a second noise.", 0.0, group=DRAWING, title="variation strength"
    )
    variation_seed: int | None = option(
        SEED, "Seed of the second noise; counts on with --count.", group=DRAWING, title="variation seed"
    )
    guidance_start: float = option(Number(0, 1), "Guide from this share of the steps.", 0.0, group=SPEED)
    guidance_end: float = option(
        Number(0, 1), "Guide up to this share of the steps; others take half the time.", 1.0, group=SPEED
    )
    strength: float | None = option(
        Number(0, 1, above=True), "How much of the image is drawn anew: the share of the steps that are taken.",
        group=STARTING, says="0.7; with a mask 1",
    )  # fmt: skip
    image_guidance: float | None = option(
        Number(1, 100), "How closely to keep to the image, in models that edit one by instruction.", group=STARTING,
        title="image guidance", says="1.5 in those",
    )  # fmt: skip
    reference_weight: float | None = option(
        Number(0, MAX_WEIGHT), "How much reference pictures count, in models with an IP-Adapter.", group=STARTING,
        title="reference weight", says="1 in those",
    )  # fmt: skip
    mask_blur: float | None = option(
        Number(0, MAX_BLUR), "Pixels over which the drawn and the rest are blended.", group=STARTING,
        title="mask blur", says="a 128th of the width",
    )  # fmt: skip
    mask_padding: int | None = option(
        Whole(0, MAX_PADDING), "Draw only the mask and N pixels around it, at the model's size.", group=STARTING,
        title="mask padding",
    )  # fmt: skip
    colour: bool = option(Flag(), "Colour the image; its light and dark stay.", False, group=STARTING)
    toward: str | None = option(Text(MAX_PROMPT), "A second prompt.", group=WORDS, title="second prompt")
    toward_share: float = option(SHARE, "How far to go towards the second prompt.", 0.0, group=WORDS)
    clip_skip: int = option(
        Whole(1, MAX_SKIP), "The text encoder's layer from its end, as AUTOMATIC1111 counts.", 1, group=WORDS,
        title="CLIP skip",
    )  # fmt: skip
    tile: int | None = option(TILE, "Draw in overlapping pieces of N pixels a side.", group=SPEED)
    vae_tile: int | None = option(
        Other(int),
        "Decode in tiles of N pixels a side; 0: never.",
        group=SPEED,
        says="above 1024 x 1024 pixels",
    )
    refiner_start: float | None = option(
        Number(0, 1), "The share of the steps after which the refiner draws.", group=WORDS, says="0.8"
    )
    safety: bool | None = option(
        Flag(), "Black out what the model's checker flags.", group=DRAWING, says="if it has one"
    )


@dataclass(frozen=True)
class Request(Shared, Asked):
    """What to draw. None means: the preset's or the model's own default.

    Args:
        prompt: What to draw, in the language of text/prompt.py.
        negative: What guidance leads away from, in the same language.
        width: Pixels, a multiple of 8, 8 to 16384.
        height: Pixels, a multiple of 8, 8 to 16384.
        steps: Denoising steps, 1 to 1000.
        guidance: Scale of classifier-free guidance (Ho & Salimans 2022), 0 to 100; 1 turns it off.
        seed: Of the first picture, 0 to 2^32 - 1; picture n of a count uses seed + n.
        sampler: A name of edge_sd.sampling.samplers.SAMPLERS, or AUTOMATIC1111's or diffusers' for one.
        sigmas: Spacing of the noise levels: karras, exponential, beta, kl_optimal, align_your_steps, sgm_uniform,
            simple; "automatic" is the model's.
        zero_snr: Start from noise alone, by betas rescaled to zero terminal SNR; for v-prediction models.
        eta: Share of each step's noise that is fresh, 0 to 1, for samplers that add noise; None is the sampler's own.
        s_churn: Noise added before the steps of euler, heun and dpm2, 0 to 100 (Karras et al. 2022, algorithm 2).
        s_noise: Factor of all noise that is added on the way, 0 to 2.
        count: Number of pictures.
        image: A picture to start from: a file, or a PIL picture.
        strength: The share of the steps that are taken from the image on, above 0 to 1.
        image_guidance: Scale of guidance by the image, 1 to 100, in models that edit one by instruction.
        mask: A picture of the image's size, white where it is drawn anew; the rest stays as it is.
        mask_blur: Pixels over which the two are blended.
        mask_padding: Only the mask and so many pixels around it are drawn, at the model's size, and pasted back.
        extend: Pixels to add to the image: left, right, top, bottom.
        references: Pictures that the prompt refers to, files or PIL pictures, in models that take some; 10 at most.
        reference_weight: Factor of what an IP-Adapter attends to in reference pictures, 0 to 2; None is 1.
        colour: Of what is drawn only the colours are taken; light and dark are the image's.
        controls: Pictures whose lines are followed, with what belongs to each (see Control).
        guidance_start: Share of the steps after which steps are guided, 0 to 1, below `guidance_end`.
        guidance_end: Share of the steps up to which they are, 0 to 1.
        deep_every: The UNet's deep features are computed on every n-th step and kept for those between, 1 to 10.
        merge_tokens: The finest self-attention looks at averages of 2 x 2 positions.
        variation_seed: Seed of a second noise, 0 to 2^32 - 1; with a count this seed counts on, not the first.
        variation_strength: How far to go towards the second noise, 0 to 1.
        toward: A second prompt.
        toward_share: How far to go towards the second prompt, 0 to 1.
        tile: Draw in overlapping pieces of so many pixels a side, for sizes that a model can't draw at once.
        vae_tile: The same of the autoencoder alone; 0 is never, None above settings.VAE_WHOLE pixels.
        decoder: "full"; "tiny", a fraction of the work for a softer picture; "auto": tiny where the model has one.
        clip_skip: The text encoder's layer, counted from its last, 1; AUTOMATIC1111's counting.
        embeddings: Word -> a safetensors file of textual inversion, whose vectors the word stands for.
        loras: Safetensors files of differences of the weights -> how much of each, -10 to 10; 1 is all.
        lora_folder: Where the files lie that a prompt names, <lora:NAME:0.8>.
        refiner: A bundle of SDXL's refiner, which draws the last steps.
        refiner_start: The share of the steps after which it does; None is 0.8.
        dynamic: The prompts are templates, such as "a {red|green} apple" (see text/wildcards.py).
        wildcards: A folder for the templates' __name__; given, the prompts are templates.
        safety: The model's checker looks at each picture and blacks out what it flags; None: where it has one.

    Raises:
        InvalidRequest: A value that cannot be drawn.

    Example:
        Request("a red apple, glossy style", seed=7, steps=20)
    """

    def __post_init__(self) -> None:
        if self.prompt is None:
            raise InvalidRequest("there is no prompt; say what to draw")
        object.__setattr__(self, "controls", _tuple_of_controls(self.controls))
        object.__setattr__(self, "references", _tuple_of_references(self.references))
        check(self)
        for text in (self.prompt, self.negative, self.toward or ""):
            parse(text)
            script(text, "", 1)
        if not self.prompt.strip():
            raise InvalidRequest("the prompt is empty; say what to draw")
        self._check_seeds()
        self._check_names()
        self._check_ranges()
        self._check_files()
        self._check_needs()

    def _check_seeds(self) -> None:
        if self.seed is not None and self.seed + self.count - 1 > MAX_SEED:
            raise InvalidRequest(f"seed {self.seed} with count {self.count} runs past the last seed, {MAX_SEED}")
        if self.variation_seed is None:
            return
        if not self.variation_strength:
            raise InvalidRequest("a variation seed needs a variation strength")
        if self.variation_seed + self.count - 1 > MAX_SEED:
            raise InvalidRequest(f"variation seed {self.variation_seed} with count {self.count} runs past {MAX_SEED}")

    def _check_names(self) -> None:
        from ..sampling.names import find_sampler, find_sigmas

        for value, find in ((self.sampler, find_sampler), (self.sigmas, find_sigmas)):
            if value is not None:
                if not isinstance(value, str):
                    raise InvalidRequest(f"{value!r} is no name of a sampler or of sigmas")
                find(value)

    def _check_ranges(self) -> None:
        if not self.guidance_start < self.guidance_end:
            raise InvalidRequest(
                f"guidance from {self.guidance_start} to {self.guidance_end} is no part of the steps, such as 0 to 0.6"
            )
        if self.refiner_start is not None and not 0 < self.refiner_start < 1:
            raise InvalidRequest(f"refiner start {self.refiner_start} is no share of the steps between 0 and 1")
        if self.extend is not None:
            sides = tuple(self.extend) if isinstance(self.extend, Sequence) else (self.extend,)
            whole = all(type(side) is int and 0 <= side <= MAX_PADDING for side in sides)
            if not (whole and len(sides) == 4 and any(sides)):
                raise InvalidRequest(
                    f"extend {','.join(map(str, sides))} is not left,right,top,bottom, such as 0,64,0,0: "
                    f"whole numbers to {MAX_PADDING}, not all 0"
                )
        if self.vae_tile:
            TILE.check("vae_tile", self.vae_tile)

    def _check_files(self) -> None:
        from ..text.textual_inversion import check_word

        for name, rows in (("embeddings", self.embeddings), ("loras", self.loras)):
            if not isinstance(rows, Mapping):
                raise InvalidRequest(f"{name} is {type(rows).__name__}, not a dict")
        for name, files in (("embedding", self.embeddings.values()), ("LoRA", self.loras)):
            for file in files:
                Place().check(name, file)
        for word in self.embeddings:
            check_word(Text().check("word of an embedding", word))
        for weight in (*self.loras.values(), *chain(*take_loras(self.prompt)[1].values())):
            if not isinstance(weight, Real) or not -MAX_LORA <= weight <= MAX_LORA:
                raise InvalidRequest(f"the weight {weight} of a LoRA is not a number from -{MAX_LORA} to {MAX_LORA}")
        if self.lora_folder is not None and not Path(self.lora_folder).is_dir():
            raise InvalidRequest(f"the folder of LoRAs {str(self.lora_folder)!r} does not exist")

    def _check_needs(self) -> None:
        """Options that mean nothing without another."""
        masked = self.mask if self.mask is not None else self.extend
        for name, value, need, what in (
            ("strength", self.strength, self.image, "an image"),
            ("image guidance", self.image_guidance, self.image, "an image"),
            ("reference weight", self.reference_weight, self.references or None, "a reference picture"),
            ("mask", self.mask, self.image, "an image"),
            ("extend", self.extend, self.image, "an image"),
            ("colour", self.colour or None, self.image, "an image"),
            ("refiner_start", self.refiner_start, self.refiner, "a refiner"),
            ("mask_blur", self.mask_blur, masked, "a mask"),
            ("mask_padding", self.mask_padding, masked, "a mask"),
        ):
            if value is not None and need is None:
                raise InvalidRequest(f"{name} needs {what}")

    def nth(self, n: int) -> Request:
        """The request for picture n of the count alone, which draws the same picture. The seed has to be given."""
        assert self.seed is not None, "a request without a seed draws other pictures each time"
        second = second_seed(self, self.seed)
        if second is None:
            return replace(self, seed=self.seed + n, count=1)
        # Templates go by the first seed, which stays, and are another text for each picture all the same.
        return replace(self.expanded(self.seed + n), variation_seed=second + n, count=1)

    def expanded(self, seed: int) -> Request:
        """The request with its prompts' templates expanded, if they are any. Raises InvalidRequest, MissingExtra."""
        from ..text.wildcards import expand

        if not self.dynamic and self.wildcards is None:
            return self
        folder = None if self.wildcards is None else Path(self.wildcards)
        prompt, negative = (expand(text, seed, folder) for text in (self.prompt, self.negative))
        return replace(self, prompt=prompt, negative=negative, dynamic=False, wildcards=None)


def second_seed(request: Request, seed: int) -> int | None:
    """The seed of the second noise, if there is one; any but the first, where the request leaves it open."""
    if not request.variation_strength or request.variation_seed is not None:
        return request.variation_seed
    return (seed + 1_000_003) % (MAX_SEED + 1 - request.count)


def _tuple_of_controls(given: Any) -> tuple[Control, ...]:
    """The controls of any iterable, which is gone through once. Raises InvalidRequest for what is none."""
    found = tuple(given) if isinstance(given, Iterable) and not isinstance(given, str) else (given,)
    if not all(isinstance(each, Control) for each in found):
        raise InvalidRequest("controls are Control objects: controls=[Control(image)]")
    if not isinstance(given, Iterable):
        raise InvalidRequest("controls are a list of Control objects: controls=[Control(image)]")
    return found


def _tuple_of_references(given: Any) -> tuple[Any, ...]:
    """The reference pictures of any iterable. Raises InvalidRequest for what is none, and for too many."""
    if isinstance(given, str | Path) or not isinstance(given, Iterable):
        raise InvalidRequest("references are a list of paths or pictures: references=[image]")
    found = tuple(Place(picture=True).check("reference picture", each) for each in given)
    if len(found) > MAX_REFERENCES:
        raise InvalidRequest(f"there are {len(found)} reference pictures; at most {MAX_REFERENCES} are taken")
    return found
