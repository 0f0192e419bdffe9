"""A process that has imported what commands need, and forks one for each: what a command costs is its own work.

    python -m tests.faults.zygote MODULE…

A line on standard input is a JSON object: `words` of `edge-sd`, or `call`, a function of tests/faults/actions.py with
its `arguments`; `folder`, `environment`, and the file `output` for what it prints. Each is a process group of its own.
The answer is a line with its exit code, negative for a signal's.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from typing import Any


def main() -> None:
    for name in sys.argv[1:]:
        importlib.import_module(name)
    print("ready", flush=True)
    for line in sys.stdin:
        wanted = json.loads(line)
        if (child := os.fork()) == 0:
            # Not os._exit here: what a process does when it ends is part of the command.
            return _run(wanted)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    return None


def _run(wanted: dict[str, Any]) -> None:
    os.setsid()
    for number, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, wanted["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND),
        (2, wanted["output"], os.O_WRONLY | os.O_APPEND),
    ):
        os.dup2(os.open(path, flags, 0o600), number)
    os.chdir(wanted["folder"])
    os.environ.update(wanted["environment"])
    if words := wanted.get("words"):
        from edge_sd.apps.cli import main as command

        sys.argv = ["edge-sd", *words]
        command()
        return
    from . import actions

    try:
        getattr(actions, wanted["call"])(*wanted["arguments"])
    except Exception:
        traceback.print_exc()
        sys.exit(1)


if __name__ == "__main__":
    main()
