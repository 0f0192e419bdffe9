"""The page's files. They are listed once at the start: no path of a client is ever joined to a folder."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fastapi import APIRouter, HTTPException, Request
from starlette.responses import Response

KINDS = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}


def page_files() -> dict[str, bytes]:
    """Name -> bytes of each file of the page."""
    folder = Path(__file__).parent / "page"
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix in KINDS}


def router() -> APIRouter:
    """The page at / and its files under /page/."""
    routes = APIRouter(include_in_schema=False)
    files = page_files()
    tags = {name: f'"{hashlib.sha256(data).hexdigest()[:16]}"' for name, data in files.items()}

    def answer(name: str, request: Request) -> Response:
        if name not in files:
            raise HTTPException(404, "no such file")
        headers = {"etag": tags[name], "cache-control": "no-cache"}
        if request.headers.get("if-none-match") == tags[name]:
            return Response(status_code=304, headers=headers)
        return Response(files[name], media_type=KINDS[Path(name).suffix], headers=headers)

    @routes.get("/")
    async def index(request: Request) -> Response:
        return answer("index.html", request)

    @routes.get("/page/{name}")
    async def file(name: str, request: Request) -> Response:
        return answer(name, request)

    return routes
