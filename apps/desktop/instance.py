"""One window at a time: what runs says where in a file, and a second start asks it to come to the front.

Nothing rests on the file: where it is stale or damaged, the second start is simply the first.
"""

from __future__ import annotations

import http.client
import json
import os
from pathlib import Path

from edge_sd.files import write_atomically

NAME = "desktop.json"


def announce(home: Path, port: int, token: str) -> None:
    """Say where this instance is, to this person alone."""
    path = home / NAME
    before = os.umask(0o077)
    try:
        write_atomically(path, json.dumps({"port": port, "token": token}).encode())
    finally:
        os.umask(before)


def leave(home: Path) -> None:
    """Say that it is gone."""
    (home / NAME).unlink(missing_ok=True)


def wake(home: Path) -> bool:
    """Bring the running instance to the front; False where there is none."""
    try:
        record = json.loads((home / NAME).read_text("utf-8"))
        connection = http.client.HTTPConnection("127.0.0.1", int(record["port"]), timeout=5)
        connection.request("POST", "/api/show", headers={"Authorization": f"Bearer {record['token']}"})
        return connection.getresponse().status == 204
    except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException):
        return False
