"""Standard output and standard error: text in any encoding, and outputs that can't be written to."""

from __future__ import annotations

import contextlib
import os
import sys


class BrokenPipe(Exception):
    """A BrokenPipeError on its way past the parser, which would end the process with code 1 and not a word."""


def tolerate_encodings() -> None:
    """Write what an output's encoding lacks as \\uXXXX: cp1252 on Windows and ASCII with LC_ALL=C lack most prompts."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def reason(error: OSError) -> str:
    """What an error of the system says in one line; one without a file is of the output."""
    why = error.strerror or str(error) or type(error).__name__
    return f"{os.fspath(error.filename)}: {why}" if error.filename else f"the output can't be written: {why}"


def reader_is_gone() -> bool:
    """Whether nobody reads standard output any more; True where the system can't tell."""
    try:
        import select

        watch = select.poll()
        watch.register(sys.stdout.fileno(), 0)
        return bool(watch.poll(0))
    except (ImportError, AttributeError, OSError, ValueError):
        return True


def give_up_stdout() -> None:
    """Forget what standard output still holds: the interpreter would try to write it again at its end, and complain."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
