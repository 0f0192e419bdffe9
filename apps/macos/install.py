"""Put the desktop script where a Mac's user looks, and take it away again. Only files of ours are touched.

Desktop/Draw with edge-sd.command               a double click asks what to draw
Library/Services/Draw with edge-sd.workflow     draws the selected text, in every program's Services menu
"""

from __future__ import annotations

import os
import plistlib
import shlex
import shutil
from pathlib import Path

from edge_sd.errors import InvalidRequest, OutputError
from edge_sd.files import remove, replaced

COMMAND = "Desktop/Draw with edge-sd.command"
WORKFLOW = "Library/Services/Draw with edge-sd.workflow"
MARK = '# Made by "edge-sd macos install"; "edge-sd macos uninstall" takes it away.'
IDENTIFIER = "edge-sd.draw-selected-text"
TEMPLATES = Path(__file__).parent / "quick_action"


def install(home: Path, python: str) -> list[Path]:
    """Write both into the home folder, to draw with the installation of that interpreter. Returns their paths.

    Raises InvalidRequest if a file that is not ours stands there, OutputError for what the disk refuses.
    """
    command, workflow = home / COMMAND, home / WORKFLOW
    for path in (command, workflow):
        if os.path.lexists(path) and not _is_ours(path):
            raise InvalidRequest(f"{path} is there already and not edge-sd's; move it away")
    draw = _script(python)
    try:
        for path in (command, workflow):
            path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(command) as made:
            made.write_text(f"#!/bin/sh\n{MARK}\n{draw}\n", "utf-8")
            made.chmod(0o755)
        with replaced(workflow) as made:
            contents = made / "Contents"
            contents.mkdir(parents=True)
            shutil.copyfile(TEMPLATES / "Info.plist", contents / "Info.plist")
            (contents / "document.wflow").write_bytes(_document(draw))
    except OSError as error:
        raise OutputError(f"{error.filename or home} cannot be written ({error.strerror})") from error
    return [command, workflow]


def _script(python: str) -> str:
    """What both run: the interpreter that installed them, or a hint where that has moved or lost edge-sd."""
    quoted = shlex.quote(python)
    hint = f"edge-sd is no longer where it was installed from ({python}). Where it is now, run: edge-sd macos install"
    # The Service shows nobody what it prints.
    shown = 'on run argv\n display alert "edge-sd" message (item 1 of argv)\nend run'
    return (
        f"if ! {quoted} -c 'import edge_sd' </dev/null 2>/dev/null; then\n"
        f"  echo {shlex.quote(hint)} >&2\n"
        f"  osascript -e {shlex.quote(shown)} {shlex.quote(hint)}\n"
        f"  exit 2\nfi\n"
        f"exec {shlex.join([python, '-m', 'edge_sd', 'macos', 'draw'])}"
    )


def uninstall(home: Path) -> list[Path]:
    """Remove what `install` put in place, and return what was removed. Files that are not ours stay."""
    removed = []
    for path in (home / COMMAND, home / WORKFLOW):
        if not _is_ours(path):
            continue
        try:
            remove(path)
        except OSError as error:
            raise OutputError(f"{path} cannot be removed ({error.strerror})") from error
        removed.append(path)
    return removed


def _document(draw: str) -> bytes:
    """The workflow: one "Run Shell Script" action, which gets the selected text on its standard input."""
    document = plistlib.loads((TEMPLATES / "document.wflow").read_bytes())
    document["actions"][0]["action"]["ActionParameters"]["COMMAND_STRING"] = draw
    return plistlib.dumps(document)


def _is_ours(path: Path) -> bool:
    try:
        if path.suffix == ".command":
            return MARK in path.read_text("utf-8")
        with (path / "Contents/Info.plist").open("rb") as file:
            return bool(plistlib.load(file).get("CFBundleIdentifier") == IDENTIFIER)
    except (OSError, ValueError, AttributeError, plistlib.InvalidFileException):
        return False
