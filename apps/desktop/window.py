"""The window itself, of pywebview: WKWebView on macOS, WebView2 on Windows, Qt on Linux."""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import webview
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel, Field
from starlette.responses import Response
from webview.menu import Menu, MenuAction, MenuSeparator

from edge_sd.errors import InvalidRequest, OutputError
from edge_sd.files import write_atomically

from ..server.app import create_app
from ..server.guard import Rules
from ..server.listen import Running, Server, bind
from ..server.service import Service
from . import instance

PLACE = "window.json"
TITLE = "edge-sd"
KINDS = ("Pictures (*.png;*.jpg;*.jpeg;*.webp)",)
MIN_SIZE = (360, 480)
TABS = (("Draw", "tab-draw"), ("Words", "tab-words"), ("Compare", "tab-quant"))


@dataclass
class Place:
    """Where the window was; the port too, since a browser keeps what it remembers by address."""

    x: int | None = None
    y: int | None = None
    width: int = 1200
    height: int = 860
    port: int = 0


def read_place(home: Path) -> Place:
    """What was remembered, or the first place where that makes no sense."""
    try:
        found = Place(**json.loads((home / PLACE).read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return Place()
    numbers = [value for value in asdict(found).values() if value is not None]
    if not all(type(value) is int and -20_000 < value < 65_536 for value in numbers):
        return Place()
    if found.width < MIN_SIZE[0] or found.height < MIN_SIZE[1] or found.port < 0:
        return Place()
    return found


class Which(BaseModel):
    """A picture of a job."""

    id: Annotated[str, Field(pattern=r"^[0-9a-f]{24}$")]
    n: Annotated[int, Field(ge=0, le=999)]


def add_routes(app: FastAPI, service: Service, window: Callable[[], Any]) -> None:
    """What the page asks of the window, by HTTP: pywebview's own bridge needs `eval`, which the page forbids.

    The page names jobs; paths are chosen in native dialogs alone.
    """

    @app.post("/api/show", status_code=204, include_in_schema=False)
    def come() -> Response:
        """A second start wants it in front."""
        window().restore()
        window().show()
        return Response(status_code=204)

    @app.post("/api/save", include_in_schema=False)
    def save(which: Which) -> dict[str, str]:
        """Ask where to, and write a picture there: the file's name, "" where the person changed their mind."""
        job = service.get(which.id)
        source = None if job is None else service.store.picture(job, which.n)
        if source is None:
            raise HTTPException(404, "no such picture")
        chosen = window().create_file_dialog(
            webview.FileDialog.SAVE, save_filename=f"edge-sd-{which.id}-{which.n}.png", file_types=("PNG (*.png)",)
        )
        if not chosen:
            return {"name": ""}
        target = Path(chosen if isinstance(chosen, str) else chosen[0])
        try:
            write_atomically(target, source.read_bytes())
        except OSError as error:
            raise OutputError(f"{target.name} could not be written ({error.strerror})") from None
        return {"name": target.name}


def show(service: Service, home: Path) -> None:
    """Open the window and serve its page; returns when it is closed."""
    place, token = read_place(home), secrets.token_urlsafe(32)
    app = create_app(service, Rules(token=token))
    window: Any = None
    add_routes(app, service, lambda: window)
    try:
        bound = bind("127.0.0.1", place.port)
    except InvalidRequest:
        bound = bind("127.0.0.1", 0)
    running = Running(Server(app, service.stop), bound)
    address = f"http://127.0.0.1:{running.port}"
    window = webview.create_window(
        TITLE, f"{address}/#token={token}&window=1", text_select=True, min_size=MIN_SIZE, menu=_menu(lambda: window),
        width=place.width, height=place.height, x=place.x, y=place.y,
    )  # fmt: skip
    place.port = running.port

    def remember() -> None:
        place.x, place.y, place.width, place.height = window.x, window.y, window.width, window.height
        write_atomically(home / PLACE, json.dumps(asdict(place)).encode())

    window.events.closing += remember
    instance.announce(home, running.port, token)
    try:
        webview.start(
            gui="qt" if sys.platform.startswith("linux") else None, private_mode=False,
            storage_path=str(home / "browser"),
        )  # fmt: skip
    finally:
        instance.leave(home)
        running.stop()


def _menu(window: Any) -> list[Menu]:
    """The menus; what they do is done by the page."""

    def click(id_: str) -> Any:
        return lambda: window().run_js(f"document.getElementById({json.dumps(id_)}).click()")

    def open_picture() -> None:
        chosen = window().create_file_dialog(webview.FileDialog.OPEN, file_types=KINDS)
        if chosen:
            from ..server.wish import as_base64

            data = as_base64(Path(chosen[0]).read_bytes())
            window().run_js(f"window.edgeSd.give({json.dumps(data)})")

    file: list[Any] = [
        MenuAction("Open a picture…", open_picture),
        MenuSeparator(),
        MenuAction("Close", lambda: window().destroy()),
    ]
    view = [MenuAction(name, click(id_)) for name, id_ in TABS]
    return [Menu("File", file), Menu("View", view)]
