"""`edge-sd serve` in a process of its own, and clients of it."""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from edge_sd.errors import DeviceError

PROMPT = "a red apple, glossy style"


class Client:
    """A client with a connection for each request."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)

    def ask(self, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
        """Status and JSON of an answer."""
        data = None if body is None else json.dumps(body)
        headers = {"content-type": "application/json"}
        self._connection.connect()
        try:
            self._connection.request("GET" if body is None else "POST", path, data, headers)
            answer = self._connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            # The server ends a connection that is idle for long, as one is on a slow machine.
            self._connection.close()

    def draw(self, seed: int) -> float:
        """Seconds of one picture over the OpenAI API."""
        started = time.perf_counter()
        self.picture(seed)
        return time.perf_counter() - started

    def picture(self, seed: int) -> str:
        """One picture over the OpenAI API, in base64."""
        status, answer = self.ask("/v1/images/generations", {"prompt": PROMPT, "seed": seed})
        if status != 200:
            raise DeviceError(f"the server answered {status}: {answer}")
        return str(answer["data"][0]["b64_json"])


@dataclass(frozen=True)
class Served:
    """A server that runs, and the port that it listens on."""

    process: subprocess.Popen[str]
    port: int

    def resident(self) -> int:
        """Bytes of its memory; 0 where the system does not say."""
        try:
            pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        except (OSError, ValueError, IndexError):
            return 0
        return pages * 4096


@contextmanager
def serving(folder: Path | None = None) -> Iterator[Served]:
    """`edge-sd serve` with the embedded model on a free port; its history is in `folder`, or of its own."""
    with tempfile.TemporaryDirectory() as own:
        place = str(folder or own)
        command = [sys.executable, "-m", "edge_sd", "serve", "--port", "0", "--folder", place, "--model", "emoji"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace")
        try:
            assert process.stderr is not None, "it was asked for"
            said = process.stderr.readline()
            found = re.search(r":(\d+) ", said)
            if found is None:
                raise DeviceError(f"the server did not start: {said.strip()}")
            # A full pipe would stop the server.
            threading.Thread(target=process.stderr.read, daemon=True).start()
            yield Served(process, int(found[1]))
        finally:
            process.terminate()
            process.wait()


@contextmanager
def events(port: int) -> Iterator[Iterator[dict[str, Any]]]:
    """Jobs as the server tells of them, at each of their steps."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=120)) as connection:
        connection.request("GET", "/api/events")
        answer = connection.getresponse()
        lines = (answer.readline().decode() for _ in count())
        told = (json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: "))
        yield (each["job"] for each in told)
