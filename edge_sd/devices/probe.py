"""Probe: times components on devices and compares what they return, in a process of its own.

A driver that crashes or hangs takes this process with it and not the user's (see `tuning`). The work comes as one JSON
document on stdin, {"model": folder, "rows": [[part, variant, place], …]}; a line of JSON goes to stdout when all is
imported, and then one for each row, in order. The first row of a component that works is the reference of the others.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import numpy as np

from ..backends import AllBackends, Backend, Component, Device, LoadRequest
from ..bundle.bundle import ModelBundle
from ..bundle.facts import TextPart
from ..components.base import Array
from ..components.fallback import FAILURES, fault, reason
from ..components.image_prompt import unseen
from ..components.shapes import shapes_of
from ..errors import InvalidRequest
from ..images.metrics import finite, psnr
from ..sampling.noise import TorchNoise
from ..text.conditioning import conditions
from ..text.tokenizer import Chunk, attended, inputs_of
from ..text.whole import open_tokenizer
from .measurements import Measured, place_of

PROMPT = "a red apple, glossy style"
# One call warms up; these many are timed, unless the first took so long that warming up is lost in it.
CALLS, LONG = 3, 1.0
# Largest error, in units of the reference's spread, that is the same result. The mean alone has 1, an unrelated result
# 1.4.
UNRELATED = 1.0

Arrays = dict[str, Array]


def _rms_error(reference: Array, found: Array) -> float:
    return float(np.sqrt(np.mean((reference.astype(np.float64) - found) ** 2)))


class Probe:
    """Measures components of one model at its default size, on the inputs of a picture's first step."""

    def __init__(self, bundle: ModelBundle, backend: Backend) -> None:
        self.bundle, self.backend = bundle, backend
        self.devices = {place_of(device): device for device in backend.devices()}
        self.references: dict[str, Arrays] = {}
        defaults = bundle.defaults
        self.batch = 2 if defaults.guidance != 1 and not bundle.facts.takes_guidance else 1
        self.shapes = shapes_of(bundle.facts, defaults.width, defaults.height, self.batch)

    def measure(self, part: str, variant: str, place: str) -> Measured:
        """Seconds and dB of a component there; what fails is a `failure`, not an error."""
        try:
            return self._measure(part, variant, self.devices[place])
        except KeyError:
            return Measured(failure="the device is gone")
        except (*FAILURES, InvalidRequest) as error:
            return Measured(failure=reason(error))

    def _measure(self, part: str, variant: str, device: Device) -> Measured:
        constants, inputs = self._inputs(part, variant, device)
        # Some backends keep what they compiled: every later run pays for the second loading, not the first.
        self._load(part, variant, device).close()
        started = time.perf_counter()
        with closing(self._load(part, variant, device)) as component:
            load = time.perf_counter() - started
            component.bind(**constants)
            seconds, outputs = _timed(component, inputs)
            if seconds < LONG:
                seconds = statistics.median(_timed(component, inputs)[0] for _ in range(CALLS))
        if why := fault(outputs):
            return Measured(load, seconds, failure=f"the {part.replace('_', ' ')} {why}")
        reference = self.references.setdefault(part, outputs)
        pairs = [(reference[name], outputs[name]) for name in reference if name in outputs]
        likeness = min(finite(psnr(found, expected)) for expected, found in pairs)
        if max(_rms_error(*pair) / float(pair[0].std()) for pair in pairs) >= UNRELATED:
            return Measured(load, seconds, likeness, f"its result is another than the reference's ({likeness:.0f} dB)")
        return Measured(load, seconds, likeness)

    def _load(self, part: str, name: str, device: Device) -> Component:
        variant = self.bundle.variant(name)
        return self.backend.load(LoadRequest(self.bundle, variant, part, device, self.shapes[part]))

    def _inputs(self, part: str, variant: str, device: Device) -> tuple[Arrays, Arrays]:
        """What is bound once, and what each call gets: pure noise at the last timestep, as a picture starts."""
        facts, space = self.bundle.facts, self.bundle.facts.latents
        for text in (each for each in facts.encoders if each.part == part):
            return {}, inputs_of(self._chunks(text))
        shape = self.shapes["vae_decoder"]["latent_sample"]
        noise = TorchNoise(0).normal(shape)
        if part == "vae_decoder":
            return {}, {"latent_sample": space.restored(noise)}
        last = np.array([facts.schedule.num_train_timesteps - 1], np.float32)
        sample = np.zeros(self.shapes[facts.denoiser]["sample"], np.float32)
        sample[:, : noise.shape[1]] = noise
        return self._conditions(variant, device), {"sample": sample, "timestep": last}

    def _chunks(self, text: TextPart) -> list[Chunk]:
        """Those of the negative prompt, where there is one, and the prompt."""
        tokenizer = open_tokenizer(self.bundle.path(text.tokenizer), text, self.bundle.facts)
        return [tokenizer.chunks(each, negative=not each)[0] for each in ("", PROMPT)[-self.batch :]]

    def _conditions(self, variant: str, device: Device) -> Arrays:
        facts, defaults = self.bundle.facts, self.bundle.defaults
        for part in (text.part for text in facts.encoders if text.part not in self.references):
            cpus = [each for each in self.devices.values() if (each.backend, each.kind) == (device.backend, "cpu")]
            _, inputs = self._inputs(part, variant, device)
            with closing(self._load(part, variant, cpus[0] if cpus else device)) as encoder:
                self.references[part] = encoder(**inputs)
        encoded = {}
        for text in facts.encoders:
            outputs = self.references[text.part]
            encoded[text.part] = {**outputs, **attended(outputs, self._chunks(text), text.states)}
        told = conditions(facts, encoded, defaults.width, defaults.height, defaults.guidance)
        return {**told, **unseen(facts, len(told["encoder_hidden_states"]))}


def _timed(component: Component, inputs: Arrays) -> tuple[float, Arrays]:
    started = time.perf_counter()
    outputs = component(**inputs)
    return time.perf_counter() - started, outputs


def main() -> None:
    work = json.loads(sys.stdin.read())
    probe = Probe(ModelBundle.open(Path(work["model"])), AllBackends())
    print(json.dumps({"ready": True}), flush=True)
    for part, variant, place in work["rows"]:
        print(json.dumps(asdict(probe.measure(part, variant, place))), flush=True)


if __name__ == "__main__":
    main()
