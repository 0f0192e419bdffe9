"""What the shell offers after Tab for values of options: names of models, samplers, presets. Imported lazily."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from edge_sd.pipeline.options import Choice, Kind

Complete = Callable[[str], list[str]]


def models(incomplete: str) -> list[str]:
    """Names of installed models."""
    from edge_sd.bundle.library import installed_models, pulled_models

    return _starting({**installed_models(), **pulled_models()}, incomplete)


def samplers(incomplete: str) -> list[str]:
    """Names of samplers."""
    from edge_sd.sampling.samplers import SAMPLERS

    return _starting(SAMPLERS, incomplete)


def spacings(incomplete: str) -> list[str]:
    """Names of spacings of noise levels."""
    from edge_sd.sampling.names import AUTOMATIC, SIGMAS

    return _starting((*SIGMAS, AUTOMATIC), incomplete)


def presets(incomplete: str) -> list[str]:
    """Names of presets."""
    from edge_sd.pipeline.presets import PRESETS

    return _starting(PRESETS, incomplete)


def one_of(*names: str) -> Complete:
    """These names."""
    return lambda incomplete: _starting(names, incomplete)


def of_option(name: str, kind: Kind) -> Complete | None:
    """What completes an option of a request; None where nothing is known of its values."""
    if isinstance(kind, Choice):
        return one_of(*kind.names)
    return {"sampler": samplers, "sigmas": spacings, "refiner": models}.get(name)


def _starting(names: Iterable[str], incomplete: str) -> list[str]:
    return [name for name in sorted(names) if name.startswith(incomplete)]
