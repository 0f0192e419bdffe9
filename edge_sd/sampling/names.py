"""The names that samplers go by: ours, AUTOMATIC1111's ("DPM++ 2M Karras"), diffusers' classes and ComfyUI's."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

from ..errors import InvalidRequest, choices
from .samplers import SAMPLERS, TIMESTEPS
from .scheduler_fields import CHOOSES, CLASSES, class_of
from .sigmas import SIGMA_SPACINGS

SIGMAS = (*SIGMA_SPACINGS, *TIMESTEPS)
# The model's own spacing, in place of one that the sampler's name carries.
AUTOMATIC = "automatic"
_OTHERS = {
    "eulerancestral": "euler_a", "ddimuniform": "ddim", "unipcbh2": "unipc", "floweuler": "euler",
    "flowmatcheuler": "euler", "dpm2ancestral": "dpm2_a", "dpmpp2sancestral": "dpmpp_2s_a", "edmeuler": "euler",
    "edmdpmsolvermultistep": "dpmpp_2m", "flowmatcheulerdiscrete": "euler", "scm": "lcm",
}  # fmt: skip


def _key(name: str) -> str:
    """A name without what writers differ in: case, spaces, "DPM++" for "dpmpp", "k_", "Scheduler"."""
    plain = re.sub(r"[^a-z0-9]", "", name.lower().replace("++", "pp"))
    return plain.removesuffix("scheduler")


def _known() -> dict[str, str]:
    """Key -> name in SAMPLERS. Of several with one class in diffusers the first, which is its default."""
    found = dict(_OTHERS)
    for name, sampler in reversed(list(SAMPLERS.items())):
        for alias in filter(None, (sampler.diffusers_class, sampler.title, name)):
            found[_key(alias)] = name
    return found


def find_sampler(name: str) -> tuple[str, str | None]:
    """A name in SAMPLERS, and the spacing of sigmas where the given one ends in it; InvalidRequest where it is none."""
    known, key = _known(), _key(name)
    for sigmas in SIGMAS:
        stem = key.removesuffix(_key(sigmas))
        if stem != key and stem in known:
            return _allowed(known[stem], sigmas), sigmas
    if key in known:
        return known[key], None
    near = dict.fromkeys(known[each] for each in difflib.get_close_matches(key, known, n=5, cutoff=0.5))
    nearest = f"nearest: {', '.join(near)}; " if near else ""
    refused = "".join(f"; {line}" for line in SAMPLERS.refused)
    raise InvalidRequest(f"unknown sampler {name!r}; {nearest}valid: {choices(SAMPLERS)}{refused}")


def find_sigmas(name: str) -> str:
    """A name in SIGMAS, or AUTOMATIC; InvalidRequest where it is none."""
    for sigmas in (*SIGMAS, AUTOMATIC):
        if _key(name) == _key(sigmas):
            return sigmas
    raise InvalidRequest(f"unknown sigmas {name!r}; valid: {choices((*SIGMAS, AUTOMATIC))}")


def choose_sampler(sampler: str, sigmas: str | None) -> tuple[str, str | None]:
    """The two of a request, in our names; `sigmas` goes before what the sampler's name says."""
    name, spacing = find_sampler(sampler)
    if sigmas is not None:
        found = find_sigmas(sigmas)
        spacing = None if found == AUTOMATIC else _allowed(name, found) and found
    return name, spacing


def _allowed(name: str, sigmas: str) -> str:
    sampler = SAMPLERS[name]
    if sigmas not in sampler.sigmas:
        free = [other for other, each in SAMPLERS.items() if sigmas in each.sigmas]
        raise InvalidRequest(f"sampler {name} has its own sigmas, not {sigmas}; that goes with: {choices(free)}")
    return name


def sampler_of_config(config: Mapping[str, Any]) -> str:
    """The sampler of a diffusers scheduler_config.json. Its sigmas are NoiseSchedule's.

    If we have no such sampler, a text that names it and that `find_sampler` refuses: the request has to choose one.
    """
    kind = _ALIKE.get(class_of(config), class_of(config))
    fitting = [sampler for sampler in SAMPLERS.values() if kind and sampler.diffusers_class == kind]
    keys = [key for key, rule in CLASSES.get(class_of(config), {}).items() if rule == CHOOSES]
    for sampler in fitting:
        if all(config.get(key, _OPTIONS[key]) == sampler.diffusers_options.get(key, _OPTIONS[key]) for key in keys):
            return sampler.name
    said = ", ".join(f"{key} {config[key]}" for key in keys if key in config)
    return f"the model's own {class_of(config) or 'scheduler'}" + (f" with {said}" if said else "")


# Classes that step as another does.
_ALIKE = {
    "EDMEulerScheduler": "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler": "EulerDiscreteScheduler",
    "EDMDPMSolverMultistepScheduler": "DPMSolverMultistepScheduler", "DDIMParallelScheduler": "DDIMScheduler",
    "DDPMParallelScheduler": "DDPMScheduler", "SCMScheduler": "LCMScheduler",
}  # fmt: skip
# What diffusers takes for the options that tell samplers of one class apart.
_OPTIONS = {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint"}
