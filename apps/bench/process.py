"""Runs a measured script in a process of its own, so that rows share neither memory nor caches."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from typing import Any

from edge_sd.backends.openvino.telemetry import refuse_telemetry

# VmHWM where there is one: Linux's ru_maxrss starts at what the parent process had.
PEAK = """
import json, re, resource, sys, time
sys.modules.setdefault("openvino_telemetry", None)  # The peers import openvino too, which would report its use.
def peak_memory():
    if sys.platform == "linux":
        return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
"""


def measured(name: str, script: str, *, home: str = "", **values: Any) -> dict[str, Any]:
    """Run `script` with `values` as its globals and `peak_memory()` at hand; the JSON of its last line.

    `home` replaces the folder of edge-sd's caches. Raises RuntimeError with the script's errors and `name`.
    """
    text = "".join(f"{key} = {value!r}\n" for key, value in values.items()) + PEAK + script
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **({"EDGE_SD_CACHE": home} if home else {})}
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def machine() -> str:
    refuse_telemetry()
    import openvino

    name = openvino.Core().get_property("CPU", "FULL_DEVICE_NAME")
    python, runtime = platform.python_version(), openvino.__version__
    return f"{name}, {os.cpu_count()} cores, {platform.system()}, Python {python}, OpenVINO {runtime}"
