"""`edge-sd desktop`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edge_sd.errors import MissingExtra


def desktop(
    model: Annotated[
        list[str] | None, typer.Option(help="A name or folder to offer; repeats, the default first. Default: all.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Where queue and pictures are kept. Default: beside the models.")
    ] = None,
    lora_folder: Annotated[Path | None, typer.Option(help="LoRAs to choose from.")] = None,
) -> None:
    """Open the window; started again, it comes to the front."""
    from importlib.util import find_spec

    from ..server.commands import check_extra, home_of, open_service

    check_extra("app")
    if find_spec("webview") is None:
        raise MissingExtra("the window", "app")
    from . import instance
    from .window import show

    home = home_of(folder)
    if instance.wake(home):
        return
    with open_service(home, model, 1000, 600.0, lora_folder) as service:
        show(service, home)
