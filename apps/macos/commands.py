"""`edge-sd macos`: draw, install, uninstall."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from edge_sd.errors import InvalidRequest, OutputError

from .. import completion
from ..drawing import parse_size
from ..options import AsJson
from ..terminal import say, say_json

app = typer.Typer(help="On a Mac: draw and show it, from the desktop or any text.", no_args_is_help=True)


@app.command("draw")
def draw(
    prompt: Annotated[
        str | None, typer.Argument(help="What to draw. Without it: asks, or reads what is piped.")
    ] = None,
    preview: Annotated[bool, typer.Option(help="Open the picture in Preview.")] = True,
    wallpaper: Annotated[bool, typer.Option("--wallpaper", help="Make it the desktop picture.")] = False,
    clipboard: Annotated[bool, typer.Option("--clipboard", help="Copy it.")] = False,
    negative: Annotated[str, typer.Option(help="As for generate.")] = "",
    size: Annotated[str | None, typer.Option(metavar="N|WxH", help="As for generate.")] = None,
    steps: Annotated[int | None, typer.Option(help="As for generate.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed makes the same picture.")] = None,
    model: Annotated[
        str, typer.Option(help="A name (edge-sd models list) or a folder.", autocompletion=completion.models)
    ] = "emoji",
    folder: Annotated[Path | None, typer.Option(help="Where pictures go. Default: Pictures/edge-sd.")] = None,
) -> None:
    """Draw with Core ML, and show the picture."""
    from edge_sd.pipeline.request import Request

    from ..saving import Saver
    from . import draw as script
    from .wallpaper import wallpaper_of

    wishes = {"preview": preview, "wallpaper": wallpaper, "clipboard": clipboard}
    actions = [action for action, wanted in wishes.items() if wanted]
    for action in actions:
        script.require_macos(action)
    words = " ".join((_asked() if prompt is None else prompt).split())
    if not words:
        raise InvalidRequest("there is nothing to draw: the text is empty")
    width, height = parse_size(size)
    request = Request(words, negative=negative, width=width, height=height, steps=steps, seed=seed)
    place = folder or Path.home() / "Pictures/edge-sd"
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{place} cannot be made ({error.strerror})") from error
    with Saver(None, words, 1, folder=place) as saver:
        saver.check()
        (drawn,) = script.draw(request, model, lambda line: say(line, error=True)).pictures
        saver.save(0, drawn)
    (picture,) = saver.paths
    for action in actions:
        script.hand_over(wallpaper_of(picture) if action == "wallpaper" else picture, action)


def _asked() -> str:
    if not sys.stdin.isatty():
        return sys.stdin.read()
    print("What shall be drawn? ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline()


@app.command("plan")
def plan(
    model: Annotated[str, typer.Argument(help="A name (edge-sd models list) or a folder.")] = "emoji",
    variant: Annotated[str | None, typer.Option(help="One of its Core ML variants.")] = None,
    device: Annotated[str, typer.Option(help="ane, gpu or cpu.")] = "ane",
    as_json: AsJson = False,
) -> None:
    """Which engine Core ML runs the operations of each component on; those that fall back cost most."""
    from .draw import require_macos
    from .plan import placements, table

    require_macos("Core ML's plan")
    rows = placements(model, device, variant)
    if as_json:
        say_json(rows)
    else:
        print(table(rows))


@app.command("install")
def install() -> None:
    """Put "Draw with edge-sd" on the desktop and into every program's Services menu."""
    from .draw import require_macos
    from .install import install

    require_macos("installing the desktop script")
    for path in install(Path.home(), sys.executable):
        print(path)


@app.command("uninstall")
def uninstall() -> None:
    """Take both away again."""
    from .draw import require_macos
    from .install import uninstall

    require_macos("taking the desktop script away")
    removed = uninstall(Path.home())
    for path in removed:
        print(path)
    if not removed:
        print("nothing of edge-sd's is there", file=sys.stderr)
