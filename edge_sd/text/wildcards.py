"""Prompts with alternatives, `a {red|green} __fruit__`, by the `dynamicprompts` package and its template language.

One seed makes one prompt: picture n of a request expands the template with its own seed. `__fruit__` is a line of
fruit.txt in a folder of wildcards (also .yaml and .json, as that package reads them).
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import InvalidRequest, MissingExtra, choices

# Limit of ${…} variables. Nested ones multiply; 32 expand in under a second.
MAX_VARIABLES = 32
# Names of wildcards in a message.
SHOWN = 12


def expand(template: str, seed: int, wildcards: Path | None = None) -> str:
    """The prompt that `template` becomes with `seed`.

    Raises MissingExtra, or InvalidRequest for what is no template, no folder, or a wildcard that is not in it.
    """
    try:
        from dynamicprompts.generators import RandomPromptGenerator
        from dynamicprompts.wildcards import WildcardManager
    except ImportError as error:
        raise MissingExtra("a prompt with alternatives", "prompts") from error

    if wildcards is not None and not wildcards.is_dir():
        raise InvalidRequest(f"the folder of wildcards {str(wildcards)!r} does not exist")
    if not template.strip():
        return template
    if template.count("${") > MAX_VARIABLES:
        raise InvalidRequest(
            f"a template names variables {template.count('${')} times; at most {MAX_VARIABLES} are read"
        )
    manager = WildcardManager(path=wildcards)
    try:
        with _without_logs():
            found = RandomPromptGenerator(wildcard_manager=manager, seed=seed).generate(template, num_images=1)
    except KeyError as error:
        raise InvalidRequest(f"{template[:60]!r} is no template: {str(error.args[0])[:120]}") from error
    except (ValueError, RecursionError, OSError) as error:
        raise InvalidRequest(f"{template[:60]!r} is no template: {_first(error)}") from error
    except Exception as error:  # The package's parsers have error classes of their own without a common base.
        if type(error).__module__.split(".")[0] not in ("pyparsing", "dynamicprompts", "jinja2"):
            raise
        raise InvalidRequest(f"{template[:60]!r} is no template: {_first(error)}") from error
    text = str(found[0]) if found else ""
    if missing := next((each for each in re.finditer(r"__([\w/*.-]+?)__", text) if re.search(r"\w", each[1])), None):
        known = _nearest(missing[1], sorted(manager.get_collection_names())) if wildcards else "none: give a folder"
        raise InvalidRequest(f"no wildcard {missing[1]!r}; valid: {known}")
    return text


def _nearest(name: str, known: list[str]) -> str:
    """The names most like `name`, as many as a message has room for."""
    if len(known) <= SHOWN:
        return choices(known)
    near = difflib.get_close_matches(name, known, n=SHOWN, cutoff=0.4) or known[:SHOWN]
    return f"{', '.join(near)}, and {len(known) - len(near)} more"


def _first(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


@contextmanager
def _without_logs() -> Iterator[None]:
    """The package logs a missing wildcard and goes on; here that is an error of ours."""
    # Loggers of the package's modules take its level, where they have none.
    logger = logging.getLogger("dynamicprompts")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
