"""Draw with Core ML, then hand the picture to macOS: Preview opens it, the desktop wears it, the clipboard holds it.

This is the whole script; the .command and the Quick Action call it too. It has not run on a Mac: the tests check the
commands that it would run there.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Timer

from edge_sd.errors import DeviceError, InvalidRequest, NumericalError, OutputError, VariantNotFound
from edge_sd.pipeline.pipeline import Pipeline
from edge_sd.pipeline.request import Request
from edge_sd.pipeline.result import Result

# A path reaches AppleScript as an argument, never as a part of the script: nothing in a name can be taken for code.
SCRIPT = "on run argv\n    set chosen to item 1 of argv\n    {}\nend run"
WALLPAPER = SCRIPT.format('tell application "System Events" to set picture of every desktop to chosen')
CLIPBOARD = SCRIPT.format("set the clipboard to (read (POSIX file chosen) as «class PNGf»)")
NOTIFICATION = SCRIPT.format('display notification chosen with title "edge-sd"')
ACTIONS = {
    "preview": ("open", "-a", "Preview"),
    "wallpaper": ("osascript", "-e", WALLPAPER),
    "clipboard": ("osascript", "-e", CLIPBOARD),
}
# Seconds without a first step after which a person is told why: Core ML compiles a model when it is first used.
PATIENCE = 5.0
COMPILING = "Core ML is compiling the model. That is done once and may take minutes."


def draw(request: Request, model: str = "emoji", say: Callable[[str], None] = print) -> Result:
    """One picture by Core ML. `say` gets the device, and the reason if another backend drew it."""
    for device in ("ane", "auto"):
        compiling = Timer(PATIENCE, notify, [COMPILING])
        if device == "ane":
            compiling.start()
        try:
            with Pipeline.open(model, device) as pipeline:
                result = pipeline.generate(request, lambda n, step, timer=compiling: timer.cancel())  # type: ignore[misc]
            say(result.plan)
            return result
        except (DeviceError, VariantNotFound, NumericalError) as error:
            if device == "auto":
                raise
            say(f"Core ML can't draw here, so another backend does: {error}")
        finally:
            compiling.cancel()
    raise AssertionError("auto draws or raises")


def require_macos(what: str) -> None:
    """Raise InvalidRequest where this is no Mac."""
    if sys.platform != "darwin":
        raise InvalidRequest(f"{what} needs macOS; on any system there is: edge-sd generate")


def notify(text: str) -> None:
    """Show a notification, on a Mac whose settings let it."""
    with suppress(OSError, InvalidRequest):
        require_macos("a notification")
        subprocess.run(["osascript", "-e", NOTIFICATION, text], capture_output=True, check=False)


def hand_over(picture: Path, action: str) -> None:
    """Do one of ACTIONS with a PNG file. Raises InvalidRequest off macOS, OutputError if macOS does not do it."""
    require_macos(action)
    try:
        done = subprocess.run([*ACTIONS[action], picture.absolute()], capture_output=True, text=True, check=False)
    except OSError as error:
        raise OutputError(f"{picture} was drawn, but {ACTIONS[action][0]} cannot be run ({error.strerror})") from error
    if done.returncode:
        raise OutputError(f"{picture} was drawn, but {action} failed: {done.stderr.strip() or done.returncode}")
