"""Commands whose nth change of a file fails, or is the last thing before SIGKILL: interrupt.c loaded into processes."""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import queue
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PATIENCE = 120.0
# As in interrupt.c.
COUNT, FAIL_ONCE, FAIL_FROM, KILL = range(4)
MODES = {FAIL_ONCE: "fails", FAIL_FROM: "and all later ones fail", KILL: "is killed"}
PAGE = struct.Struct("4q4000s")


def build_library(folder: Path) -> Path:
    """interrupt.c as a library. Raises OSError or CalledProcessError where there is no compiler."""
    library = folder / "interrupt.so"
    source = Path(__file__).with_name("interrupt.c")
    command = ["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"]
    subprocess.run(command, check=True, capture_output=True)
    return library


@dataclass(frozen=True)
class Fault:
    """The `nth` call below a folder: what happens to it. A call is a write, an open for it, a rename, a flush, …"""

    mode: int = COUNT
    nth: int = 0
    error: int = 0

    def __str__(self) -> str:
        return f"call {self.nth} {MODES.get(self.mode, '')} {errno.errorcode.get(self.error, '')}".strip()


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code (negative is a signal), what it printed, and the calls below the folder."""

    code: int
    said: str
    calls: int


@dataclass
class Commands:
    """Runs commands in processes that are forked from one with `modules` imported."""

    folder: Path
    library: Path
    modules: Sequence[str] = ("edge_sd.apps.cli", "numpy", "edge_sd.bundle.bundle")
    environment: dict[str, str] = field(default_factory=dict)

    def __enter__(self) -> Commands:
        path = self.folder / "page"
        path.write_bytes(bytes(PAGE.size))
        with path.open("r+b") as file:
            self._page = mmap.mmap(file.fileno(), PAGE.size)
        env = {**os.environ, **self.environment, "LD_PRELOAD": str(self.library), "EDGE_SD_FAULT_PAGE": str(path)}
        command = [sys.executable, "-m", "tests.faults.zygote", *self.modules]
        root = Path(__file__).parents[2]
        self._process = subprocess.Popen(
            command, cwd=root, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self._line()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def _line(self) -> str:
        line = self._lines.get(timeout=PATIENCE)
        if not line:
            raise RuntimeError("the process that forks commands has ended")
        return line.strip()

    def run(
        self,
        *words: str,
        at: Path,
        watched: Path,
        fault: Fault | None = None,
        call: str = "",
        arguments: Sequence[Any] = (),
        **environment: str,
    ) -> Ended:
        """Run `edge-sd` with `words`, or a function of actions.py, in the folder `at`. Fails where it hangs."""
        fault = fault or Fault()
        root = str(watched).encode()
        self._page[:] = PAGE.pack(0, fault.nth, fault.mode, fault.error, root)
        output = self.folder / "output"
        wanted = {"words": words, "call": call, "arguments": arguments, "folder": str(at), "output": str(output),
                  "environment": environment}  # fmt: skip
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(wanted) + "\n")
        self._process.stdin.flush()
        child = int(self._line())
        try:
            code = int(self._line())
        except queue.Empty:
            os.killpg(child, signal.SIGKILL)
            self._line()
            raise AssertionError(f"{fault}: {' '.join(words) or call} hangs") from None
        calls = PAGE.unpack(self._page[:])[0]
        with contextlib.suppress(ProcessLookupError, PermissionError):
            # Nothing that the command started stays.
            os.killpg(child, signal.SIGKILL)
        self._page[:] = bytes(PAGE.size)
        return Ended(code, output.read_text("utf-8", "replace"), calls)


def points(calls: int, wanted: int) -> list[int]:
    """At most `wanted` numbers of calls from 1 to `calls`, evenly spread, both ends among them."""
    if wanted >= calls:
        return list(range(1, calls + 1))
    return sorted({1 + round(n * (calls - 1) / max(1, wanted - 1)) for n in range(wanted)})
