"""What commands show on a terminal: lines, JSON and the progress bar.

Escape sequences are shown and not obeyed.
"""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

# Is told what is being done, and which share of all of it is done.
Watch = Callable[[str, float], None]


def plain(text: Any) -> str:
    """`text` with control and direction characters written as escapes, but for line ends and tabs.

    Example: plain("a\\x1b[2Jb") is "a\\\\x1b[2Jb".
    """
    # Cc: C0 and C1. Cf holds the marks of writing direction, and the joiners that emoji are built with, which stay.
    kept = "\n\t\u200c\u200d"
    return "".join(
        each
        if each in kept or unicodedata.category(each) not in ("Cc", "Cf")
        else each.encode("unicode_escape").decode()
        for each in str(text)
    )


def say(text: Any, error: bool = False) -> None:
    """Print a line that may hold a file's own text; on standard error if `error`."""
    print(plain(text), file=sys.stderr if error else sys.stdout)


def wrapped(text: str) -> str:
    """`text` broken into lines as wide as the terminal, indented by two; 80 columns where there is none."""
    return textwrap.fill(
        text, shutil.get_terminal_size().columns, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False
    )


def columns(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table, no wider than the terminal, or 80 columns where there is none.

    What does not fit goes on below, beside the first column again. Figures are set to the right.
    """
    limit = shutil.get_terminal_size().columns
    rows = [titles, *lines]
    widths = [max(len(row[n]) for row in rows) for n in range(len(titles))]
    blocks: list[list[int]] = [[]]
    for n in range(1, len(titles)):
        if blocks[-1] and widths[0] + sum(2 + widths[each] for each in (*blocks[-1], n)) > limit:
            blocks.append([])
        blocks[-1].append(n)
    shown: list[str] = []
    for block in blocks:
        shown += [""] * bool(shown)
        for row in rows:
            cells = [row[0].ljust(widths[0]), *(row[n].rjust(widths[n]) for n in block)]
            shown.append("  ".join(cells).rstrip())
    return shown


def say_json(document: Any) -> None:
    """Print what `--json` asks for: one document on standard output, in ASCII."""
    print(json.dumps(document, indent=2))


def messages(silent: bool) -> Callable[[str], None]:
    """What takes lines for the person at the terminal: they go to standard error, or nowhere if `silent`."""
    return (lambda line: None) if silent else (lambda line: say(line, error=True))


@contextmanager
def progress(silent: bool, first: str) -> Iterator[Watch]:
    """A bar with the time left on standard error, and nothing where that is no terminal.

    Yields report(what, share): what is being done, and how much of all is done, 0 to 1; `first` is said before that.
    """
    if silent:
        yield lambda what, share: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    # What is printed meanwhile is moved above the bar; where it goes to a file or a pipe, it has to stay there.
    moved = sys.stdout.isatty()
    shown = console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not shown, redirect_stdout=moved) as bar:
        task = bar.add_task(first, total=1.0)
        yield lambda what, share: bar.update(task, description=what, completed=share)
