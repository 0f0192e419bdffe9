"""A server on a free port of this machine with the embedded model, for tests that speak HTTP to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edge_sd.apps.server.app import create_app
from edge_sd.apps.server.engines import Engines
from edge_sd.apps.server.guard import Rules
from edge_sd.apps.server.listen import Running, Server, bind
from edge_sd.apps.server.service import Service
from edge_sd.apps.server.store import Store
from edge_sd.paths import embedded_models


@contextmanager
def served(
    folder: Path, rules: Rules | None = None, limit: int = 100, idle: float = 0, others: dict[str, Path] | None = None
) -> Iterator[tuple[str, Service]]:
    """Address and service; both are stopped at the end. `others` are models beside the embedded one."""
    engines = Engines({"emoji": embedded_models() / "emoji", **(others or {})}, idle)
    with Service(Store(folder), engines, limit) as service:
        running = Running(Server(create_app(service, rules), service.stop), bind("127.0.0.1", 0))
        try:
            yield f"http://127.0.0.1:{running.port}", service
        finally:
            running.stop()
