"""Facts: what is true of a model's weights, whatever runs them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..sampling.schedule import NoiseSchedule


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

    Raises ValueError where there are not `channels` of them.
    """

    channels: int = 4
    factor: int = 8
    scale: float = 0.18215
    shift: float = 0.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        counts = {len(self.mean), len(self.std)}
        if counts not in ({0}, {self.channels}) or not all(0 < abs(value) < 1e6 for value in self.std):
            raise ValueError(
                f"latents_mean {list(self.mean)} and latents_std {list(self.std)} of {self.channels} channels"
            )

    def normalized(self, encoded: NDArray[np.float32]) -> NDArray[np.float32]:
        """What an encoder returns, [B, C, h, w], as the UNet has it."""
        mean, std = self._of_channels()
        return np.asarray((encoded - mean) * (np.float32(self.scale) / std), np.float32)

    def restored(self, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        """Latents as the UNet has them, [B, C, h, w], as a decoder takes them."""
        mean, std = self._of_channels()
        return np.asarray(latents / (np.float32(self.scale) / std) + mean, np.float32)

    def _of_channels(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        mean, std = (
            np.array(values, np.float32).reshape(1, -1, 1, 1) for values in (self.mean or (0.0,), self.std or (1.0,))
        )
        return mean + np.float32(self.shift), std


@dataclass(frozen=True)
class TextPart:
    """One text encoder: its component, the folder of its tokenizer, and the output that the UNet attends to."""

    part: str = "text_encoder"
    tokenizer: str = "tokenizer"
    states: str = "last_hidden_state"


@dataclass(frozen=True)
class Facts:
    """What is true of the weights whatever runs them.

    text_width      width of the states that the UNet attends to, all text encoders together
    texts           the text encoders, where it is not the one called text_encoder
    conditioning    the numbers that SDXL's UNet takes beside the text: "size", or "aesthetic" for the refiner
    pooled_width    width of the text_embeds that go with it
    zero_negative   an empty negative prompt is zeros, not the states of no words
    guidance_width  width of the embedded guidance scale of a latent consistency model; 0 for none
    inpainting      the UNet also takes a mask and the latents of what is outside it
    vae_float32     the autoencoder overflows in float16
    """

    name: str
    family: Literal["sd1", "sd2", "sdxl"]
    schedule: NoiseSchedule
    latents: LatentSpace
    defaults: Defaults
    tokenizer: str = "tokenizer"
    max_tokens: int = 77
    text_width: int = 768
    license: str = "unknown"
    texts: tuple[TextPart, ...] = ()
    conditioning: Literal["", "size", "aesthetic"] = ""
    pooled_width: int = 0
    zero_negative: bool = False
    guidance_width: int = 0
    inpainting: bool = False
    vae_float32: bool = False

    @property
    def encoders(self) -> tuple[TextPart, ...]:
        """The text encoders in the order in which the UNet attends to them."""
        return self.texts or (TextPart(tokenizer=self.tokenizer),)

    @property
    def sample_channels(self) -> int:
        """Of what goes into the UNet."""
        return 2 * self.latents.channels + 1 if self.inpainting else self.latents.channels

    @property
    def time_ids(self) -> int:
        """How many numbers `conditioning` is."""
        return {"": 0, "size": 6, "aesthetic": 5}[self.conditioning]
