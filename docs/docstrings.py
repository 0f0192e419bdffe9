"""An extension of griffe, which reads the code for the reference: options show their defaults, examples are code."""

from __future__ import annotations

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"^(Example:\n)((?:[ ]{4}.*\n?|\n)+)", re.MULTILINE)


class Docstrings(griffe.Extension):
    """`option(kind, help, default, …)` is shown as `default`, and the body of an Example as Python."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """The value of a field that pipeline/options.py describes."""
        value = attr.value
        if isinstance(value, griffe.ExprCall) and str(value.function) == "option":
            given = [each for each in value.arguments if not isinstance(each, griffe.ExprKeyword)]
            named = {each.name: each.value for each in value.arguments if isinstance(each, griffe.ExprKeyword)}
            attr.value = f"{named['factory']}()" if "factory" in named else given[2] if len(given) > 2 else "None"

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Fence the code of an Example."""
        if obj.docstring is not None:
            obj.docstring.value = EXAMPLE.sub(fenced, obj.docstring.value)


def fenced(example: re.Match[str]) -> str:
    """The section with its body as a fenced block, unless it is one."""
    if "```" in example[2] or ">>>" in example[2]:
        return example[0]
    return f"{example[1]}    ```python\n{example[2].rstrip()}\n    ```\n"
