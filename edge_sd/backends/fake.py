"""A backend without weights: small numpy functions in the shapes of the real networks, for tests in milliseconds.

The denoised latents are a smooth pattern that depends on the text and hardly on the noise, so that a correct pipeline
converges to the same picture with every sampler.
"""

from __future__ import annotations

import numpy as np

from ..bundle.bundle import ModelBundle
from ..bundle.facts import Defaults, Facts, LatentSpace
from ..bundle.variants import Artifact, Variant
from ..components.base import Array, Component, last_rows
from ..errors import DeviceError
from ..paths import embedded_models
from ..sampling.schedule import NoiseSchedule
from .base import Device, LoadRequest

WIDTH = 16


def fake_bundle(schedule: NoiseSchedule | None = None) -> ModelBundle:
    """A bundle without files for FakeBackend; it borrows the embedded model's tokenizer."""
    facts = Facts(
        name="fake",
        family="sd1",
        schedule=schedule or NoiseSchedule(),
        latents=LatentSpace(scale=0.5),
        defaults=Defaults(64, 64, 4, 3.0, "euler"),
        max_tokens=32,
        text_width=WIDTH,
    )
    parts = ("text_encoder", "unet", "vae_decoder", "vae_encoder")
    artifacts = {part: Artifact(part, (), (), ()) for part in parts}
    return ModelBundle(embedded_models() / "emoji", facts, {"fake": Variant("fake", "fp32", artifacts)})


class FakeBackend:
    """Its first device is "fake". `poison` names a component that fails there, from its `after`-th call on.

    devices   names; each draws a little differently, as real ones do
    fault     what failing is: "nan", "flat", "black" (a decoder's, below the range), "red" (one channel), "far" (beyond
              any picture's range), "raise" (at a call), "memory" (at a call) or "refuse" (at loading)
    """

    name = "fake"

    def __init__(
        self, poison: str = "", after: int = 0, *, devices: tuple[str, ...] = ("fake",), fault: str = "nan"
    ) -> None:
        self.poison, self.after, self.names, self.fault = poison, after, devices, fault

    def devices(self) -> list[Device]:
        return [Device(name, self.name, "numpy functions in place of networks") for name in self.names]

    def load(self, request: LoadRequest) -> Component:
        device, part = request.device.name, request.artifact.graph
        number = self.names.index(device)
        poisoned = part == self.poison and number == 0
        if poisoned and self.fault == "refuse":
            raise DeviceError(f"{device} refused {part}")
        return FakeComponent(request.bundle, part, self.after if poisoned else None, self.fault, number / 100)


class FakeComponent:
    def __init__(
        self, bundle: ModelBundle, part: str, poison_after: int | None, fault: str = "nan", accent: float = 0.0
    ) -> None:
        self.bundle, self.part, self.poison_after = bundle, part, poison_after
        self.fault, self.accent = fault, np.float32(accent)
        self.calls = 0
        self.bound: dict[str, Array] = {}

    def bind(self, **constants: Array) -> None:
        self.bound |= constants

    def __call__(self, **inputs: Array) -> dict[str, Array]:
        inputs = last_rows({**self.bound, **inputs})
        run = {
            "text_encoder": self._encode_text, "unet": self._predict,
            "vae_decoder": self._decode, "vae_encoder": self._encode,
        }  # fmt: skip
        output = {name: value * (1 + self.accent) for name, value in run[self.part](inputs).items()}
        self.calls += 1
        if self.poison_after is not None and self.calls > self.poison_after:
            return self._fail(output)
        return output

    def _fail(self, output: dict[str, Array]) -> dict[str, Array]:
        if self.fault == "raise":
            raise DeviceError(f"{self.part} failed: the device was lost")
        if self.fault == "memory":
            raise MemoryError
        if self.fault == "black":
            return {name: array / 10 - 3 for name, array in output.items()}
        if self.fault == "far":
            return {name: array * np.float32(1e6) for name, array in output.items()}
        if self.fault == "red":
            channels = np.array([1, -1, -1], np.float32)[None, :, None, None]
            return {name: np.broadcast_to(channels, array.shape).copy() for name, array in output.items()}
        value = np.nan if self.fault == "nan" else 0.0
        return {name: np.full_like(array, value) for name, array in output.items()}

    def close(self) -> None:
        self.bound.clear()

    def _encode_text(self, inputs: dict[str, Array]) -> dict[str, Array]:
        angles = inputs["input_ids"][..., None] * np.arange(1, WIDTH + 1) / 7
        return {"last_hidden_state": np.sin(angles).astype(np.float32)}

    def _predict(self, inputs: dict[str, Array]) -> dict[str, Array]:
        """The eps of x_0 = a pattern of the text and a trace of the noise, so that seeds differ."""
        x_t = inputs["sample"]
        schedule = self.bundle.facts.schedule
        abar = np.interp(inputs["timestep"], np.arange(schedule.num_train_timesteps), schedule.compute_alphas_cumprod())
        rows, columns = np.indices(x_t.shape[2:]) / 4
        phase = inputs["encoder_hidden_states"].mean(axis=1)[:, :4, None, None]
        x_0 = np.sin(rows + 5 * phase) * np.cos(columns - 3 * phase) + 0.01 * np.tanh(x_t)
        eps = (x_t - np.sqrt(abar) * x_0) / np.sqrt(1 - abar)
        return {"out_sample": eps.astype(np.float32)}

    def _decode(self, inputs: dict[str, Array]) -> dict[str, Array]:
        factor = self.bundle.facts.latents.factor
        pixels = inputs["latent_sample"][:, :3].repeat(factor, 2).repeat(factor, 3)
        return {"sample": pixels.astype(np.float32)}

    def _encode(self, inputs: dict[str, Array]) -> dict[str, Array]:
        """The mean of each block of pixels, which `_decode` turns into pixels again, with next to no variance."""
        factor = self.bundle.facts.latents.factor
        batch, channels, height, width = inputs["sample"].shape
        blocks = inputs["sample"].reshape(batch, channels, height // factor, factor, width // factor, factor)
        mean = np.concatenate([blocks.mean(axis=(3, 5)), np.zeros((batch, 1, height // factor, width // factor))], 1)
        return {"latent_parameters": np.concatenate([mean, np.full_like(mean, -30)], 1).astype(np.float32)}
