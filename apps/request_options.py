"""The options of a request on the command line, made from the fields of Request and Control (pipeline/options.py)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edge_sd.pipeline import control
from edge_sd.pipeline.control import Control, controls_of
from edge_sd.pipeline.options import Option, options
from edge_sd.pipeline.request import DRAWING, STARTING, WORDS, Request

from .completion import of_option
from .drawing import parse_embedding, parse_extend, parse_lora, parse_seeds, parse_size

if TYPE_CHECKING:
    from edge_sd.pipeline.recorded import Recorded

# Fields that have another form here, or stand beside a command's own arguments.
OTHERWISE = (
    "prompt", "width", "height", "seed", "count", "extend", "references", "controls", "embeddings", "loras"
)  # fmt: skip
DECLARED = {"colour": ("--colour", "--color"), "safety": ("--safety/--no-safety",)}
# Option -> its type and what typer says of it, where it is not a field as it is.
FORMS: dict[str, tuple[Any, str, str, str]] = {
    "seed": (str, "N|N-M", "The same seed makes the same picture. Default: random.", DRAWING),
    "size": (str, "N|WxH", "Pixels, multiples of 8. Default: the model's.", DRAWING),
    "count": (int, "N", "Pictures, at seed, seed + 1, … Default: 1.", DRAWING),
    "extend": (str, "L,R,T,B", "Pixels to add to the image: left, right, top, bottom.", STARTING),
    "reference": (list[Path], "FILE", "A picture that the prompt refers to. Repeats.", STARTING),
    "embedding": (list[str], "FILE[:WORD]", "A textual inversion, and the word for it. Repeats.", WORDS),
    "lora": (list[str], "FILE[:WEIGHT]", "A LoRA, LoHa, LoKr, and how much of it. Repeats.", WORDS),
}


def takes_request(command: Callable[..., None]) -> Callable[..., None]:
    """A command with all options of a request after its own; it gets what was given as `wishes` (see `fields_of`)."""
    own = inspect.signature(command, eval_str=True).parameters
    added = list(_parameters())
    names = [each.name for each in added]
    kept = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for name, each in own.items() if name != "wishes"]
    # The prompt comes first and the command's own options last, as in the help page's order of headings.
    first = [each for each in kept if each.name == "prompt"]
    parameters = [*first, *added, *(each for each in kept if each.name != "prompt")]

    @wraps(command)
    def wrapped(**values: Any) -> None:
        given = {name: values.pop(name) for name in names}
        command(**values, wishes=given)

    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {each.name: each.annotation for each in parameters}
    return wrapped


def _parameters() -> Iterator[inspect.Parameter]:
    def parameter(name: str, annotation: Any) -> inspect.Parameter:
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)

    for name, (kind, metavar, text, group) in FORMS.items():
        option = typer.Option(f"--{name}", metavar=metavar, help=text, rich_help_panel=group)
        yield parameter(name, Annotated[kind | None, option])
    for name, described, default in options(Request):
        if name not in OTHERWISE:
            kind = described.kind.type
            flags = DECLARED.get(name, (_dashed(name),))
            option = typer.Option(
                *flags, help=_help(described, default), rich_help_panel=described.group,
                autocompletion=of_option(name, described.kind),
            )  # fmt: skip
            yield parameter(name, Annotated[kind | None, option])
    for name, described, default in options(Control):
        flag = "--control" if name == "image" else f"--control-{name}"
        kind = list[Path] if name == "image" else list[described.kind.type]  # type: ignore[name-defined]
        option = typer.Option(
            flag,
            metavar=described.kind.type.__name__,
            help=_help(described, default),
            rich_help_panel=control.GROUP,
            autocompletion=of_option(name, described.kind),
        )
        yield parameter(_control(name), Annotated[kind | None, option])


def row_options() -> dict[str, tuple[type, bool]]:
    """Name -> type of a value, and whether there may be several, of what a row of a file may say (apps/batch/rows.py).

    The names are those of the command's options, with `prompt`, `width` and `height`.
    """
    found: dict[str, tuple[type, bool]] = {"prompt": (str, False), "width": (int, False), "height": (int, False)}
    for name, (kind, *_) in FORMS.items():
        several = kind not in (str, int)
        found[name] = (str, True) if several else (kind, False)
    for name, described, _ in options(Request):
        if name not in OTHERWISE:
            found[name] = (described.kind.type, False)
    for name, described, _ in options(Control):
        found[_control(name)] = (Path if name == "image" else described.kind.type, True)
    return found


def _dashed(name: str) -> str:
    return "--" + name.replace("_", "-")


def _control(name: str) -> str:
    return "control" if name == "image" else f"control_{name}"


def _help(described: Option, default: Any) -> str:
    """The help, the range, and the default."""
    parts = [described.help.removesuffix("."), described.kind.range]
    if described.default:
        parts.append(f"default: {described.default}")
    elif default is not None and default is not False and default not in ("", ()):
        parts.append(f"default: {default:g}" if isinstance(default, float) else f"default: {default}")
    said = [each for each in parts[1:] if each]
    text = f"{parts[0]} ({'; '.join(said)})" if said else parts[0]
    return text if text.endswith("…") else f"{text}."


def fields_of(wishes: dict[str, Any], recorded: Recorded | None = None) -> dict[str, Any]:
    """What was given, as fields of Request; `recorded` says the rest of its controls."""
    given = dict(wishes)
    size, lora, embedding, reference = (given.pop(name) for name in ("size", "lora", "embedding", "reference"))
    extend, seed, count = (given.pop(name) for name in ("extend", "seed", "count"))
    rows = {name: given.pop(_control(name)) for name, _, _ in options(Control)}
    images = rows.pop("image") or []
    controls = controls_of(images, **rows) if recorded is None else recorded.controls(images, **rows)
    width, height = parse_size(size)
    first, count = parse_seeds(seed, count)
    return {
        name: value
        for name, value in {
            **given,
            "width": width,
            "height": height,
            "seed": first,
            "count": count,
            "extend": parse_extend(extend),
            "references": tuple(map(Path, reference)) if reference else None,
            "controls": controls or None,
            "embeddings": dict(map(parse_embedding, embedding)) if embedding else None,
            "loras": dict(map(parse_lora, lora)) if lora else None,
        }.items()
        if value is not None
    }
