"""The HTTP server itself: uvicorn, with a limit on the time in which a request's head has to come."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from edge_sd.errors import InvalidRequest

# Seconds in which the head of a request has to come, counted from the first byte or from the connection.
HEAD_SECONDS = 15.0
# Connections at a time; each costs some kilobytes.
MAX_CONNECTIONS = 1000


class Protocol(H11Protocol):
    """uvicorn waits for ever for a request's head; this closes a connection that sends none in time.

    So it does where the rest of a body that was refused does not come.
    """

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._deadline = time.monotonic() + HEAD_SECONDS
        self._watch = self.loop.call_later(HEAD_SECONDS, self._check_head)

    def connection_lost(self, exc: Exception | None) -> None:
        self._watch.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self._deadline = time.monotonic() + HEAD_SECONDS
        super().on_response_complete()

    def _check_head(self) -> None:
        if self.transport.is_closing():
            return
        # Between requests, or after an answer that did not wait for the whole body.
        waiting = self.cycle is None or self.cycle.response_complete
        left = self._deadline - time.monotonic()
        if waiting and left <= 0:
            self.transport.close()
            return
        self._watch = self.loop.call_later(max(left, 1.0) if waiting else HEAD_SECONDS, self._check_head)


class Server(uvicorn.Server):
    """uvicorn on a socket that is bound already. `on_stop` is called, once, before connections are waited for."""

    def __init__(self, app: Any, on_stop: Callable[[], None], log_level: str = "warning") -> None:
        super().__init__(
            uvicorn.Config(
                app, http=Protocol, ws="none", log_level=log_level, access_log=False, server_header=False,
                timeout_keep_alive=15, limit_concurrency=MAX_CONNECTIONS, timeout_graceful_shutdown=10,
                proxy_headers=False, h11_max_incomplete_event_size=64 << 10,
            )
        )  # fmt: skip
        self._on_stop = on_stop

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but a signal that stopped the server is not raised again: its caller has files to write."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {each: signal.signal(each, self.handle_exit) for each in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await asyncio.to_thread(self._on_stop)
        await super().shutdown(sockets)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises InvalidRequest where that cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        bound = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise InvalidRequest(f"{host!r} is no address of this machine ({error.strerror})") from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        bound.listen(256)
    except OSError as error:
        bound.close()
        raise InvalidRequest(f"{host}:{port} cannot be listened on ({error.strerror}); try another --port") from None
    return bound


class Running:
    """A server in a thread of its own, for the desktop window and tests."""

    def __init__(self, server: Server, bound: socket.socket) -> None:
        self.server, self.port = server, int(bound.getsockname()[1])
        self._thread = threading.Thread(target=server.run, args=([bound],), name="edge-sd-http", daemon=True)
        self._thread.start()
        while not server.started and self._thread.is_alive():
            time.sleep(0.01)

    def stop(self) -> None:
        """Stop and wait until it has."""
        self.server.should_exit = True
        self._thread.join()
