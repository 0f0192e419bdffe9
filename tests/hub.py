"""A local server that speaks as much of the hub's API as pulling a model takes, and can misbehave."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What the server serves, does, and was asked.

    cut      bytes after which the connection for a weight file is closed, once; later ones are refused until it is 0
    busy     "info", or the name of a file -> how often the server answers 503 before it serves that
    lie      a file whose bytes are not what its hash says
    asked    method, path and Range header of each request for a file
    """

    folder: Path
    name: str
    url: str = ""
    cut: int = 0
    lie: str = ""
    busy: dict[str, int] = field(default_factory=dict)
    asked: list[tuple[str, str, str]] = field(default_factory=list)

    def names(self) -> list[str]:
        paths = (path for path in self.folder.rglob("*") if path.is_file())
        return sorted(path.relative_to(self.folder).as_posix() for path in paths)

    def gets(self) -> set[str]:
        return {path for method, path, _ in self.asked if method == "GET"}

    def info(self) -> dict[str, Any]:
        rows = []
        for name in self.names():
            data = (self.folder / name).read_bytes()
            row = {"rfilename": name, "size": len(data), "blobId": git_hash(data)}
            if name.endswith((".safetensors", ".bin")):
                row["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            rows.append(row)
        return {"id": self.name, "modelId": self.name, "sha": COMMIT, "private": False, "tags": [], "downloads": 0,
                "likes": 0, "siblings": rows}  # fmt: skip


def git_hash(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


@contextmanager
def serving(folder: Path, name: str) -> Iterator[Hub]:
    hub = Hub(folder, name)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None: ...

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            if found := re.fullmatch(rf"/api/models/{name}(?:/revision/(.+))?", path):
                if self.is_busy("info"):
                    return None
                if found[1] in (None, "main", "v1", COMMIT):
                    return self.answer(200, json.dumps(hub.info()).encode(), {"Content-Type": "application/json"})
                return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            if found := re.fullmatch(rf"/{name}/resolve/{COMMIT}/(.+)", path):
                return self.file(found[1])
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

        def is_busy(self, what: str) -> bool:
            if not hub.busy.get(what):
                return False
            hub.busy[what] -= 1
            self.answer(503, b"{}", {"Retry-After": "0"})
            return True

        def file(self, path: str) -> None:
            if self.is_busy(path):
                return None
            span = self.headers.get("Range", "")
            hub.asked.append((self.command, path, span))
            data = (folder / path).read_bytes()
            large = path.endswith(".safetensors")
            etag = hashlib.sha256(data).hexdigest() if large else git_hash(data)
            if path == hub.lie:
                data = data[:-1] + bytes([data[-1] ^ 1])
            headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            start = int(span.removeprefix("bytes=").split("-")[0]) if span else 0
            if start:
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            if hub.cut and large and self.command == "GET":
                if start:
                    return self.answer(403, b"{}", {})
                self.answer(200, data, headers, hub.cut)
                self.close_connection = True
                return None
            return self.answer(206 if start else 200, data[start:], headers)

        def answer(self, status: int, data: bytes, headers: dict[str, str], size: int | None = None) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data[:size])

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
