"""Checks of a schedule's fields: each raises ValueError and says what is valid."""

from __future__ import annotations

import numpy as np


def require_int(name: str, value: object, low: int) -> None:
    """An integer of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < low:
        raise ValueError(f"{name} {value!r} is not valid: it must be an integer of at least {low}")


def require_positive(name: str, value: object, optional: bool) -> None:
    """A number above 0; None where that is `optional`."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e6:
        raise ValueError(f"{name} {value!r} is not valid: it must be a number above 0, below 1000000")


def require_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """One of `choices`."""
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
        raise ValueError(f"{name} {value!r} is not valid: choose one of {', '.join(str(c) for c in choices)}")


def require_betas(name: str, values: object) -> None:
    """Betas below 1e-7 vanish when float32 computes 1 - beta, and sigma would be 0."""
    ok = isinstance(values, (list, tuple)) and all(
        isinstance(v, (int, float)) and not isinstance(v, bool) and 1e-7 <= v < 1 for v in values
    )
    if not ok:
        raise ValueError(f"{name} is not valid: betas must be numbers from 1e-7 up to, but not including, 1")
