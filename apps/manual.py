"""`edge-sd manual`: the manual page, made from the same descriptions as --help. Its form is that of man(7)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import typer

from edge_sd import __version__

from .exit_codes import EXIT_CODES

VARIABLES = {
    "EDGE_SD_MODELS": "The folder of your own models.",
    "EDGE_SD_CACHE": "The folder of all that can be made again.",
    "EDGE_SD_TOKEN": "The token of serve and mcp, which clients have to show.",
}


def manual(context: typer.Context) -> None:
    """Print the manual page; to read it: edge-sd manual | man -l -"""
    print("\n".join(page(context.find_root().command)))


def page(root: Any) -> Iterator[str]:
    """The lines of the page of a command and all below it."""
    yield f'.TH EDGE\\-SD 1 "" "edge\\-sd {__version__}" "User commands"'
    yield from (".SH NAME", "edge\\-sd \\- " + _text(_first(root.help).rstrip(".")))
    yield from (".SH SYNOPSIS", ".B edge\\-sd", ".I command", "[\\fIoptions\\fR]")
    yield from (".SH DESCRIPTION", _text(" ".join((root.help or "").split())))
    yield ".SH COMMANDS"
    yield from _commands(root, "edge-sd")
    yield ".SH EXIT STATUS"
    for code, meaning in EXIT_CODES.items():
        yield from (".TP", f"\\fB{code}\\fR", _text(meaning))
    yield ".SH ENVIRONMENT"
    for name, meaning in VARIABLES.items():
        yield from (".TP", f"\\fB{_text(name)}\\fR", _text(meaning))


def _commands(group: Any, path: str) -> Iterator[str]:
    for name, command in group.commands.items():
        own = f"{path} {name}"
        if getattr(command, "commands", None):
            yield from _commands(command, own)
        elif not command.hidden:
            yield from _command(command, own)


def _command(command: Any, path: str) -> Iterator[str]:
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    words = " ".join(each.metavar or each.name.upper() for each in arguments)
    yield from (f".SS {_text(f'{path} {words}'.strip())}", _text(" ".join((command.help or "").split())))
    for each in command.params:
        if getattr(each, "hidden", False):
            continue
        names = ", ".join(_text(name) for name in (*each.opts, *each.secondary_opts))
        option = each.param_type_name == "option"
        if option and not each.is_flag:
            names += f" \\fI{_text(each.metavar or each.name.upper())}\\fR"
        if each.help:
            yield from (".TP", f"\\fB{names}\\fR" if option else f"\\fI{names}\\fR", _text(each.help))
    if command.epilog:
        yield from (".PP", _text(command.epilog))


def _first(text: str | None) -> str:
    return re.split(r"(?<=[.:])\s", " ".join((text or "").split()), maxsplit=1)[0]


def _text(text: str) -> str:
    """Text for roff: ASCII, hyphens that may be copied, and no line that begins with a request."""
    escaped = " ".join(text.split()).replace("\\", "\\e").replace("-", "\\-")
    escaped = re.sub(r"[^\x20-\x7e]", lambda each: f"\\[u{ord(each[0]):04X}]", escaped)
    return f"\\&{escaped}" if escaped[:1] in (".", "'") else escaped
