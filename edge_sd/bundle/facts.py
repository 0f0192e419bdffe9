"""Facts: what is true of a model's weights, whatever runs them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..sampling.schedule import NoiseSchedule

# Pixels a side of one latent, at most; those of the families here are 8, 16 and 32.
MOST_FACTOR = 256
Family = Literal["sd1", "sd2", "sdxl", "sd3", "flux2", "zimage", "sana"]
# Kinds of text encoders that are decoders of a language model, and take a mask of what is no padding.
LANGUAGE_MODELS = ("qwen3", "gemma2")


@dataclass(frozen=True)
class Defaults:
    """Defaults for fields that the request leaves None: pixels, steps, guidance scale, sampler."""

    width: int = 512
    height: int = 512
    steps: int = 20
    guidance: float = 7.5
    sampler: str = "dpmpp_2m"
    max_side: int = 2048


@dataclass(frozen=True)
class LatentSpace:
    """z = (encode(x) - shift) * scale, with `channels` values for each `factor` x `factor` pixels.

    mean, std   of each channel, for models of normalized latents: z = (encode(x) - mean - shift) * scale / std
    fold        the autoencoder's latents a side that are one latent here, side by side in its channels (FLUX.2)

    Raises ValueError where there are not `channels` of them.
    """

    channels: int = 4
    factor: int = 8
    scale: float = 0.18215
    shift: float = 0.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    fold: int = 1

    def __post_init__(self) -> None:
        if type(self.factor) is not int or not 1 <= self.factor <= MOST_FACTOR or self.channels < 1:
            raise ValueError(f"an autoencoder of {self.channels} channels and {self.factor} pixels a side of each")
        if self.fold < 1 or self.channels % self.fold**2 or self.factor % self.fold:
            raise ValueError(f"fold {self.fold} of {self.channels} channels, {self.factor} pixels a side")
        counts = {len(self.mean), len(self.std)}
        if counts not in ({0}, {self.channels}) or not all(0 < abs(value) < 1e6 for value in self.std):
            raise ValueError(
                f"latents_mean {list(self.mean)} and latents_std {list(self.std)} of {self.channels} channels"
            )

    def normalized(self, encoded: NDArray[np.float32]) -> NDArray[np.float32]:
        """What an encoder returns, [B, C / fold^2, h fold, w fold], as the denoiser has it, [B, C, h, w]."""
        mean, std = self._of_channels()
        return np.asarray((self._folded(encoded) - mean) * (np.float32(self.scale) / std), np.float32)

    def restored(self, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        """Latents as the denoiser has them, [B, C, h, w], as a decoder takes them, [B, C / fold^2, h fold, w fold]."""
        mean, std = self._of_channels()
        return self.unfolded(np.asarray(latents / (np.float32(self.scale) / std) + mean, np.float32))

    @property
    def own_factor(self) -> int:
        """Pixels a side of one of the autoencoder's latents."""
        return self.factor // self.fold

    def own_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """[B, C, h, w] here as the autoencoder has it."""
        rows, channels, height, width = shape
        return rows, channels // self.fold**2, height * self.fold, width * self.fold

    def unfolded(self, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        """[B, C, h, w] as the autoencoder's latents lie: channels are (c, dy, dx)."""
        if self.fold == 1:
            return latents
        rows, _, height, width = latents.shape
        parts = latents.reshape(rows, -1, self.fold, self.fold, height, width).transpose(0, 1, 4, 2, 5, 3)
        return np.ascontiguousarray(parts.reshape(self.own_shape(latents.shape)))

    def _folded(self, own: NDArray[np.float32]) -> NDArray[np.float32]:
        if self.fold == 1:
            return own
        rows, channels, height, width = own.shape
        h, w = height // self.fold, width // self.fold
        parts = own.reshape(rows, channels, h, self.fold, w, self.fold).transpose(0, 1, 3, 5, 2, 4)
        return np.ascontiguousarray(parts.reshape(rows, channels * self.fold**2, h, w))

    def _of_channels(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        mean, std = (
            np.array(values, np.float32).reshape(1, -1, 1, 1) for values in (self.mean or (0.0,), self.std or (1.0,))
        )
        return mean + np.float32(self.shift), std


@dataclass(frozen=True)
class TextPart:
    """One text encoder: its component, the folder of its tokenizer, and the output that the denoiser attends to.

    states   one output, or several with "," between them, which then stand side by side
    kind     how text becomes tokens: "clip", in as many chunks as a prompt needs, or whole, in one of `tokens`, by
             "t5" or a language model, "qwen3" or "gemma2", which also takes a mask of what is no padding
    before, after   the template around a prompt
    bare_negative   a negative prompt has no template
    tokens   that it takes at once; 0 is Facts.max_tokens
    rows     states that the denoiser attends to, where those are fewer: the first, and the last of the others; of a
             negative prompt without a template, the first ones
    width    of its states; 0 where the model has one encoder, or several that stand side by side in Facts.text_width
    """

    part: str = "text_encoder"
    tokenizer: str = "tokenizer"
    states: str = "last_hidden_state"
    kind: Literal["clip", "t5", "qwen3", "gemma2"] = "clip"
    tokens: int = 0
    width: int = 0
    before: str = ""
    after: str = ""
    bare_negative: bool = False
    rows: int = 0

    @property
    def layers(self) -> int | None:
        """How many layers of a language model are needed; None for other encoders, which are whole."""
        if self.kind not in LANGUAGE_MODELS or "." not in self.states:
            return None
        return max(int(each.rpartition(".")[2]) for each in self.states.split(","))


@dataclass(frozen=True)
class Facts:
    """What is true of the weights whatever runs them.

    denoiser        the component that denoises; what tells families apart beyond it are facts below
    patch           latents a side of one token of a transformer; sizes are multiples of `grain`
    text_width      width of the states that the denoiser attends to, all text encoders together
    texts           the text encoders, where it is not the one called text_encoder
    conditioning    what the denoiser takes beside the states: the numbers of SDXL's UNet, "size", or "aesthetic" for
                    the refiner; "joint" is the pooled text of SD 3, whose encoders' states also stand one after another
    pooled_width    width of the pooled text that goes with it
    text_only       pictures are drawn from text; it was not trained to go on from one
    text_mask       the denoiser is told which rows of the states are padding
    blank_rows      rows of zeros in place of the states of a T5 that is left out: 256 is diffusers' way, 77
                    openvino.genai's, 0 Core AI's; each makes another picture
    zero_negative   an empty negative prompt is zeros, not the states of no words
    guidance_width  width of the embedded guidance scale of a latent consistency model; 0 for none
    guidance_factor  what the guidance scale is multiplied by for a denoiser that takes it as a number (SANA-Sprint); 0
                    for none
    time_factor     what timesteps are multiplied by for the denoiser, where that is a number of the model
    inpainting      the UNet also takes a mask and the latents of what is outside it
    instructed      the UNet also takes the latents of a picture that it edits as the prompt says (InstructPix2Pix)
    pooled_nets     ControlNets whose residuals are means over the picture, which the prompt's row alone is given
    image_prompt    the kind of the IP-Adapter in the UNet, which then also attends to tokens of pictures; "" is none
    image_tokens    that it makes of a picture
    image_side      pixels a side that its image encoder is shown
    vae_float32     the autoencoder overflows in float16
    """

    name: str
    family: Family
    schedule: NoiseSchedule
    latents: LatentSpace
    defaults: Defaults
    tokenizer: str = "tokenizer"
    max_tokens: int = 77
    text_width: int = 768
    license: str = "unknown"
    texts: tuple[TextPart, ...] = ()
    conditioning: Literal["", "size", "aesthetic", "joint"] = ""
    pooled_width: int = 0
    zero_negative: bool = False
    guidance_width: int = 0
    inpainting: bool = False
    instructed: bool = False
    pooled_nets: tuple[str, ...] = ()
    vae_float32: bool = False
    denoiser: Literal["unet", "transformer"] = "unet"
    patch: int = 1
    blank_rows: int = 0
    text_only: bool = False
    text_mask: bool = False
    guidance_factor: float = 0.0
    time_factor: float = 1.0
    image_prompt: Literal["", "base", "plus"] = ""
    image_tokens: int = 0
    image_side: int = 0

    @property
    def takes_guidance(self) -> bool:
        """Whether the denoiser itself takes the guidance scale, and there is no negative prompt."""
        return bool(self.guidance_width or self.guidance_factor)

    @property
    def grain(self) -> int:
        """Pixels that widths and heights are multiples of."""
        return self.latents.factor * self.patch

    def schedule_for(self, schedule: NoiseSchedule, width: int, height: int, steps: int) -> NoiseSchedule:
        """`schedule`, the model's own or a change of it, for pictures of this size in pixels."""
        return schedule.for_tokens((width // self.grain) * (height // self.grain), steps)

    @property
    def single_rows(self) -> int:
        """Rows of the states that follow the chunks of CLIP, however many those are."""
        return self.blank_rows + sum(text.rows or text.tokens for text in self.encoders if text.kind != "clip")

    @property
    def chunked(self) -> bool:
        """Whether prompts are taken in chunks, as many as they need."""
        return any(text.kind == "clip" for text in self.encoders)

    def text_rows(self, chunks: int) -> int:
        """Rows of the states of a prompt of so many chunks."""
        return (self.max_tokens * chunks if self.chunked else 0) + self.single_rows

    @property
    def word_width(self) -> int:
        """Width of a token's embedding in the encoders that take words of one's own, all together."""
        return sum(text.width for text in self.encoders if text.kind == "clip") or self.text_width

    @property
    def encoders(self) -> tuple[TextPart, ...]:
        """The text encoders in the order in which the denoiser attends to them."""
        return self.texts or (TextPart(tokenizer=self.tokenizer),)

    @property
    def refers(self) -> bool:
        """Whether prompts may refer to pictures by their latents: FLUX.2 has a place in time for each."""
        return self.family == "flux2"

    @property
    def sample_channels(self) -> int:
        """Of what goes into the denoiser."""
        return self.latents.channels * (2 if self.inpainting or self.instructed else 1) + self.inpainting

    @property
    def time_ids(self) -> int:
        """How many numbers `conditioning` is."""
        return {"size": 6, "aesthetic": 5}.get(self.conditioning, 0)
