"""Prompts with alternatives, `a {red|green} __fruit__`, by the `dynamicprompts` package and its template language.

One seed makes one prompt: picture n of a request expands the template with its own seed. `__fruit__` is a line of
fruit.txt in a folder of wildcards (also .yaml and .json, as that package reads them).
"""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import InvalidRequest, MissingExtra, choices


def expand(template: str, seed: int, wildcards: Path | None = None) -> str:
    """The prompt that `template` becomes with `seed`.

    Raises MissingExtra, or InvalidRequest for what is no template, no folder, or a wildcard that is not in it.
    """
    import logging

    try:
        from dynamicprompts.generators import RandomPromptGenerator
        from dynamicprompts.wildcards import WildcardManager
    except ImportError as error:
        raise MissingExtra("a prompt with alternatives", "prompts") from error

    if wildcards is not None and not wildcards.is_dir():
        raise InvalidRequest(f"the folder of wildcards {str(wildcards)!r} does not exist")
    if not template.strip():
        return template
    # The package logs a missing wildcard and goes on; here that is an error.
    logging.getLogger("dynamicprompts").setLevel(logging.CRITICAL)
    manager = WildcardManager(path=wildcards)
    try:
        found = RandomPromptGenerator(wildcard_manager=manager, seed=seed).generate(template, num_images=1)
    except (ValueError, RecursionError, OSError) as error:
        raise InvalidRequest(f"{template[:60]!r} is no template: {_first(error)}") from error
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("pyparsing", "dynamicprompts", "jinja2"):
            raise
        raise InvalidRequest(f"{template[:60]!r} is no template: {_first(error)}") from error
    text = str(found[0]) if found else ""
    if missing := re.search(r"__([\w/*.-]*\w[\w/*.-]*?)__", text):
        known = choices(manager.get_collection_names()) if wildcards else "none: give a folder of wildcards"
        raise InvalidRequest(f"no wildcard {missing[1]!r}; valid: {known}")
    return text


def _first(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
