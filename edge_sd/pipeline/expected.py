"""What the pictures of a request are expected to take: a plan's costs, times the work that is asked for.

A plan's costs are of the model's own picture: its size, steps and guidance. The work of a request is counted, not
guessed: the sampler runs over its levels with a denoiser that only counts. What can't be told in multiples of the
model's own picture (a refiner, deep features that are reused, merged tokens, components that take turns in memory) is
left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from ..bundle.bundle import ModelBundle
from ..bundle.facts import Facts
from ..bundle.parts import DECODER, IMAGE_ENCODER, TINY
from ..components.tiling import windows
from ..devices.estimates import rows_of
from ..devices.plan import DevicePlan
from ..sampling.noise import TorchNoise
from ..sampling.samplers import Latents
from ..sampling.schedule import Level
from ..sampling.windows import active_timesteps, within
from .run import Run
from .settings import Settings

# Pixels a side of what CLIPs that IP-Adapters were trained with have a token for.
PATCH = 14


def expected(plan: DevicePlan, bundle: ModelBundle, run: Run, chunks: int) -> DevicePlan:
    """`plan` with what all pictures of `run` are expected to cost; with no word of it where that can't be told.

    chunks   of the prompts, as `Wording.count` counts them
    """
    settings = run.settings
    if settings.refiner is not None or settings.deep_every > 1 or settings.merge_tokens:
        return replace(plan, picture="")
    denoiser, decoder = bundle.facts.denoiser, "vae_decoder"
    defaults = {part: bundle.defaults_of(plan.parts[part].variant) for part in plan.parts}
    nets = [_share(plan, bundle, denoiser, each.part) for each in settings.controls]
    encoder = _share(plan, bundle, decoder, "vae_encoder")
    begun, referred = settings.image is not None, 0
    if bundle.facts.refers:
        referred = sum(each.width * each.height for each in settings.references)
    looked = len(settings.references) if bundle.facts.image_prompt else 0
    tiny = _share(plan, bundle, decoder, TINY) if DECODER[settings.decoder] == TINY else 1.0
    own = defaults[denoiser]
    sizes = {part: each.width * each.height for part, each in defaults.items()}
    steps = _rows(run, nets) / (own.steps * rows_of(bundle.facts, own.guidance))
    # A transformer takes reference pictures beside what it draws, as so many pixels more.
    pixels = (_pixels(settings, bundle.facts, settings.window) + referred) / sizes[denoiser]
    decoded = _pixels(settings, bundle.facts, settings.vae_window) / sizes[decoder]
    texts = (1 + len(settings.weights)) if run.doubled else len(settings.weights)
    count = settings.count
    draws = {
        denoiser: count * steps * pixels,
        # Prompts and reference pictures are encoded once for all pictures.
        decoder: count * decoded * (tiny + begun * encoder) + referred / sizes[decoder] * encoder,
        "text_encoder": (chunks * texts + looked * _looking(plan, bundle))
        / rows_of(bundle.facts, defaults["text_encoder"].guidance),
    }
    loads = {denoiser: 1 + sum(nets), decoder: tiny + (encoder if begun or referred else 0)}
    if looked:
        loads["text_encoder"] = 1 + _share(plan, bundle, "text_encoder", IMAGE_ENCODER)
    return plan.scaled(draws, loads, "this picture" if count == 1 else f"these {count} pictures")


def _share(plan: DevicePlan, bundle: ModelBundle, home: str, part: str) -> float:
    """How much larger or smaller `part` is than `home`, whose device it shares; 1 where sizes are not known."""
    variant = bundle.variant(plan.parts[home].variant)
    own, other = variant.part_size(home), variant.part_size(part)
    return other / own if own and other else 1.0


def _looking(plan: DevicePlan, bundle: ModelBundle) -> float:
    """What an IP-Adapter's CLIP takes for a picture, in chunks of text: it has a token for each patch."""
    patches = (bundle.facts.image_side // PATCH) ** 2 + 1
    return _share(plan, bundle, "text_encoder", IMAGE_ENCODER) * patches / bundle.facts.max_tokens


def _rows(run: Run, nets: Sequence[float]) -> float:
    """Rows that the denoiser is given for one picture in all its calls, those of ControlNets counted by their sizes."""
    settings = run.settings
    guided = active_timesteps(run.timesteps, settings.guidance_start, settings.guidance_end)
    active = [active_timesteps(run.timesteps, each.start, each.end) for each in settings.controls]
    several = rows_of(run.facts, settings.guidance, len(settings.weights)) if run.doubled else 1
    total = 0.0
    for level in _asked(run):
        t = float(np.float32(level.t))
        # Several prompts are composed in all steps, whether guided or not.
        rows = several if within(guided, t) or len(settings.weights) > 1 else 1
        total += rows * (1 + sum(net for net, when in zip(nets, active, strict=True) if within(when, t)))
    return total


def _asked(run: Run) -> Iterator[Level]:
    """The levels at which the sampler asks for x_0, in order: once a step for some, twice for others."""
    asked: list[Level] = []

    def denoise(x: Latents, level: Level) -> Latents:
        asked.append(level)
        return x

    noise, x = TorchNoise(0), np.zeros((1, 1, 1, 1), np.float32)
    for _ in run.sampler.run(denoise, x, run.levels, noise.normal, run.settings.stochasticity):
        yield from asked
        asked.clear()


def _pixels(settings: Settings, facts: Facts, window: tuple[int, int]) -> int:
    """Pixels of all windows of (width, height) that a picture is computed in."""
    factor = facts.latents.factor
    width, height = window
    whole = settings.height // factor, settings.width // factor
    return windows(whole, (height // factor, width // factor)) * width * height
