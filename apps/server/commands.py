"""`edge-sd serve`: the service behind a port."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edge_sd.errors import InvalidRequest, MissingExtra

from ..options import Quiet

if TYPE_CHECKING:
    from .service import Service

# AUTOMATIC1111's, which its clients try by themselves.
PORT = 7860
# Shorter ones can be guessed.
MIN_TOKEN = 16


def serve(
    host: Annotated[str, typer.Option(help="Address to listen on; beyond this machine a token is needed.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = PORT,
    token: Annotated[
        str,
        typer.Option(
            envvar="EDGE_SD_TOKEN", show_default=False,
            help="What clients have to show: API key, or password of Basic. Better in the variable than here.",
        ),
    ] = "",
    model: Annotated[
        list[str] | None, typer.Option(help="A name or folder to serve; repeats, the default first. Default: all.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Where queue and history are kept. Default: beside the models.")
    ] = None,
    lora_folder: Annotated[Path | None, typer.Option(help="LoRAs that clients may name.")] = None,
    queue: Annotated[int, typer.Option(min=1, max=100_000, help="Jobs that may wait; more get 429.")] = 100,
    idle: Annotated[float, typer.Option(min=0, help="Seconds after which an unused model is released; 0: never.")] = (
        600.0
    ),
    allow_host: Annotated[
        list[str] | None, typer.Option(help="One more name for the Host header, NAME or NAME:PORT. Repeats.")
    ] = None,
    allow_origin: Annotated[
        list[str] | None, typer.Option(help="One more web page's origin, https://NAME. Repeats.")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say what is loaded and released.")] = False,
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """Serve the page, the OpenAI Images API, AUTOMATIC1111's API and a queue of jobs; Ctrl-C stops."""
    check_token(host, token)
    check_extra()
    from .app import create_app
    from .guard import Rules
    from .listen import Server, bind

    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="edge-sd: %(message)s")
    bound = bind(host, port)
    rules = Rules(tuple(map(str.lower, allow_host or ())), tuple(allow_origin or ()), token)
    with open_service(folder, model, queue, idle, lora_folder) as service:
        server = Server(create_app(service, rules), service.stop)
        if not quiet:
            name = f"[{host}]" if ":" in host else host
            print(f"serving on http://{name}:{bound.getsockname()[1]} (Ctrl-C stops)", file=sys.stderr, flush=True)
        server.run([bound])


def check_token(host: str, token: str) -> None:
    """Refuse to listen beyond this machine without a token, and tokens that can be guessed."""
    from ipaddress import ip_address

    try:
        local = ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if not local and not token:
        raise InvalidRequest(f"--host {host} lets other machines in: set a token in $EDGE_SD_TOKEN first")
    if token and not (len(token) >= MIN_TOKEN and token.isascii() and token.isprintable() and " " not in token):
        raise InvalidRequest(f"the token is not {MIN_TOKEN} or more printable ASCII characters without spaces")


def check_extra(extra: str = "serve") -> None:
    """Raise MissingExtra where the libraries of the server are not installed."""
    from importlib.util import find_spec

    for name in ("fastapi", "uvicorn", "python_multipart", "prometheus_client"):
        if find_spec(name) is None:
            raise MissingExtra("the server", extra)


def home_of(folder: Path | None) -> Path:
    """Where queue and history are kept."""
    from edge_sd.paths import models_home

    return folder or models_home().parent / "server"


def open_service(
    folder: Path | None, models: list[str] | None, limit: int, idle: float, lora_folder: Path | None = None
) -> Service:
    """The service over installed models, or those that are named. Raises InvalidRequest or ModelNotFound."""
    from edge_sd.bundle.library import find_model, installed_models, model_name

    from .engines import Engines
    from .service import Service
    from .store import Store

    if lora_folder is not None and not lora_folder.is_dir():
        raise InvalidRequest(f"the folder of LoRAs {str(lora_folder)!r} does not exist")
    if models:
        offered = {model_name(found): found for found in map(find_model, models)}
    else:
        there = installed_models()
        offered = dict(sorted(there.items(), key=lambda each: (each[0] != "emoji", each[0])))
    home = home_of(folder)
    try:
        store = Store(home)
    except OSError as error:
        raise InvalidRequest(f"the folder {str(home)!r} cannot be used ({error.strerror})") from None
    return Service(store, Engines(offered, idle), limit, lora_folder)
