"""The exit codes of every command, said once: --help, the manual page and docs/errors.md."""

from __future__ import annotations

EXIT_CODES = {
    0: "done",
    1: "it ran, and what it checked or drew is not all well: models verify found a difference, doctor a device that is "
    "off, compare --fail-under a variant below its limit, batch a row that failed",
    2: "a mistake that the message explains in one line: a bad option, a missing model, a device that is not here; "
    "nothing was written",
    130: "stopped by Ctrl-C; nothing more was written",
    141: "the program that read stdout went away",
}
SHORT = "Exit codes: 0 done, 1 what was checked or drawn is not all well, 2 a mistake, 130 stopped by Ctrl-C."
