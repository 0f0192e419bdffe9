"""No command but `models pull` and `serve` opens a connection, or writes outside its folders: strace's account.

urllib3, which diffusers imports, makes a socket to learn whether there is IPv6, and sends nothing.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ..faults.account import Tally

pytestmark = pytest.mark.skipif(shutil.which("strace") is None, reason="strace tells what a process asks the system")
COMMANDS = [
    ("generate", "a cat", "--steps", "1", "--size", "64", "-o", "cat.png"),
    ("info", "cat.png"),
    ("batch", "rows.txt", "--steps", "1", "--size", "64"),
    ("generate", "a cat", "--image", "cat.png", "--steps", "2", "--size", "64", "-o", "again.png"),
    ("interpolate", "a cat", "a dog", "--frames", "2", "--steps", "1", "--size", "64"),
    ("models", "list"),
    ("models", "show", "emoji"),
    ("models", "verify", "emoji"),
    ("devices",),
    ("tune", "--seconds", "1"),
    ("convert", "{shallow}", "bundle", "--precision", "int8"),
]
# In full numbers only.
MORE = [
    ("generate", "a cat", "--preset", "turbo", "--size", "64", "-o", "turbo.png"),
    ("generate", "a cat", "--control", "cat.png", "--steps", "1", "--size", "64", "-o", "controlled.png"),
    ("upscale", "cat.png", "-o", "large.png", "--steps", "2"),
    ("models", "catalogue"),
    ("cache", "show"),
    ("cache", "clear"),
    ("compare", "emoji", "--variants", "openvino-fp16", "--steps", "1", "--rounds", "0", "--swap", "0"),
    ("doctor",),
    ("generate", "a cat", "--device", "torch-cpu", "--steps", "1", "--size", "64", "-o", "torch.png"),
    ("convert", "{shallow}", "bundle-coreml", "--to", "coreml"),
]


def cut_off() -> list[str]:
    """What starts a command in a network namespace of its own, in which there is no interface; nothing without one."""
    command = ["unshare", "-rn"]
    return command if shutil.which("unshare") and not subprocess.run([*command, "true"]).returncode else []


@pytest.mark.fault(17, "commands in an empty network namespace")
@pytest.mark.fault(19, "commands under strace: no INET socket connected, no file outside our folders")
@pytest.mark.parametrize("words", [*COMMANDS, *MORE], ids=lambda words: " ".join(words[:2]))
def test_no_command_phones_home(
    words: tuple[str, ...], shallow: Path, tmp_path_factory: pytest.TempPathFactory, tally: Tally
) -> None:
    if words in MORE and not tally.everything:
        pytest.skip("in full numbers only")
    tally.held()
    home = tmp_path_factory.mktemp("home")
    work = tmp_path_factory.getbasetemp() / "no-network"
    work.mkdir(exist_ok=True)
    (work / "rows.txt").write_text("a cat")
    trace = home / "trace"
    command = [sys.executable, "-m", "edge_sd", *(word.format(shallow=shallow) for word in words)]
    env = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "EDGE_SD", "CI", "HF_"))}
    env |= {"HOME": str(home)}
    watched = ["strace", "-f", "-qq", "-o", str(trace), "-e", "trace=connect,bind,sendto,sendmsg,sendmmsg", *command]
    done = subprocess.run([*cut_off(), *watched], cwd=work, capture_output=True, text=True, env=env)
    if "ptrace" in done.stderr:
        pytest.skip("this system lets no process be traced")
    assert done.returncode == 0, done.stderr
    calls = trace.read_text().splitlines()
    assert [line for line in calls if re.search(r"AF_INET6?", line) and "bind" not in line] == []
    found = {path.relative_to(home).as_posix() for path in home.rglob("*") if path.is_file()} - {"trace"}
    assert {path for path in found if not path.startswith((".local/share/edge-sd/", ".cache/edge-sd/"))} == set()
