"""Draw with Core ML, then hand the picture to macOS: Preview opens it, the desktop wears it, the clipboard holds it.

This is the whole script; the .command and the Quick Action call it too. It has not run on a Mac: the tests check the
commands that it would run there.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from edge_sd.errors import DeviceError, InvalidRequest, NumericalError, OutputError, VariantNotFound
from edge_sd.pipeline.pipeline import Pipeline
from edge_sd.pipeline.request import Request
from edge_sd.pipeline.result import Result

# A path reaches AppleScript as an argument, never as a part of the script: nothing in a name can be taken for code.
WALLPAPER = """\
on run argv
    set chosen to item 1 of argv
    tell application "System Events" to set picture of every desktop to chosen
end run"""
CLIPBOARD = """\
on run argv
    set the clipboard to (read (POSIX file (item 1 of argv)) as «class PNGf»)
end run"""
ACTIONS = {
    "preview": ("open", "-a", "Preview"),
    "wallpaper": ("osascript", "-e", WALLPAPER),
    "clipboard": ("osascript", "-e", CLIPBOARD),
}


def draw(prompt: str, model: str = "emoji", seed: int | None = None, say: Callable[[str], None] = print) -> Result:
    """One picture by Core ML. `say` gets the device, and the reason if another backend drew it."""
    for device in ("ane", "auto"):
        try:
            with Pipeline.open(model, device) as pipeline:
                result = pipeline.generate(Request(prompt, seed=seed))
            say(result.plan)
            return result
        except (DeviceError, VariantNotFound, NumericalError) as error:
            if device == "auto":
                raise
            say(f"Core ML can't draw here, so another backend does: {error}")
    raise AssertionError("auto draws or raises")


def require_macos(what: str) -> None:
    """Raise InvalidRequest where this is no Mac."""
    if sys.platform != "darwin":
        raise InvalidRequest(f"{what} needs macOS; on any system there is: edge-sd generate")


def hand_over(picture: Path, action: str) -> None:
    """Do one of ACTIONS with a PNG file. Raises InvalidRequest off macOS, OutputError if macOS does not do it."""
    require_macos(action)
    try:
        done = subprocess.run([*ACTIONS[action], picture.absolute()], capture_output=True, text=True, check=False)
    except OSError as error:
        raise OutputError(f"{picture} was drawn, but {ACTIONS[action][0]} cannot be run ({error.strerror})") from error
    if done.returncode:
        raise OutputError(f"{picture} was drawn, but {action} failed: {done.stderr.strip() or done.returncode}")
