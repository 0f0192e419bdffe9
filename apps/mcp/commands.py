"""`edge-sd mcp`: the tools over standard input and output, or over HTTP."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edge_sd.errors import InvalidRequest, MissingExtra

if TYPE_CHECKING:
    pass

PORT = 7861
# Jobs that may wait.
LIMIT = 32


def mcp(
    http: Annotated[
        bool, typer.Option("--http", help="Streamable HTTP at /mcp in place of standard input and output.")
    ] = False,
    host: Annotated[str, typer.Option(help="As for serve.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = PORT,
    token: Annotated[
        str, typer.Option(envvar="EDGE_SD_TOKEN", show_default=False, help="With --http: as for serve.")
    ] = "",
    folder: Annotated[Path | None, typer.Option(help="Where pictures go. Default: Pictures/edge-sd.")] = None,
    images: Annotated[
        list[Path] | None, typer.Option(help="A folder whose pictures agents may edit, too. Repeats.")
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="A name or folder to offer; repeats, the default first. Default: all.")
    ] = None,
    idle: Annotated[float, typer.Option(min=0, help="As for serve.")] = 600.0,
) -> None:
    """Let agents draw: a server of the Model Context Protocol, with the tools draw, edit, compare, models, picture."""
    from ..server.commands import check_extra, check_token, open_service

    if _lacks_mcp():
        raise MissingExtra("the server for agents", "mcp")
    check_extra("mcp")
    if http:
        check_token(host, token)
    place = folder or Path.home() / "Pictures/edge-sd"
    for each in images or ():
        if not each.is_dir():
            raise InvalidRequest(f"the folder of pictures {str(each)!r} does not exist")
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidRequest(f"the folder {str(place)!r} cannot be made ({error.strerror})") from None

    from .studio import Studio
    from .tools import make_server

    # Nothing of an agent's is kept but its pictures.
    with tempfile.TemporaryDirectory() as scratch, open_service(Path(scratch), model, LIMIT, idle) as service:
        server = make_server(Studio(service, place, images or ()))
        if http:
            serve_http(server, service, host, port, token)
        else:
            server.run("stdio")


def _lacks_mcp() -> bool:
    from importlib.util import find_spec

    return find_spec("mcp") is None


def serve_http(server: Any, service: Any, host: str, port: int, token: str) -> None:
    """Serve at /mcp behind the same guard as `edge-sd serve`."""
    from mcp.server.transport_security import TransportSecuritySettings

    from ..server.answers import refuse
    from ..server.guard import MAX_BODY, Guard, Rules
    from ..server.listen import Server, bind

    bound = bind(host, port)
    # The guard looks at Host and Origin.
    inner = TransportSecuritySettings(enable_dns_rebinding_protection=False)
    app = server.streamable_http_app(transport_security=inner, max_request_body_size=MAX_BODY)
    name = f"[{host}]" if ":" in host else host
    print(f"serving on http://{name}:{bound.getsockname()[1]}/mcp (Ctrl-C stops)", file=sys.stderr, flush=True)
    Server(Guard(app, Rules(token=token), refuse), service.stop).run([bound])
