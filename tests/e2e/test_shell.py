"""What a shell gets from the command: completion in real shells, the manual page, JSON, exit codes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edge_sd.apps.exit_codes import EXIT_CODES, SHORT

from .test_cli import edge_sd
from .test_docs import ROOT, every_command

# Commands that list or measure, and print a document for programs.
LISTS = ("models list", "models catalogue", "models show", "models verify", "devices", "cache show", "info", "tune",
         "doctor", "bench", "batch", "generate", "compare show", "macos plan")  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with `edge-sd` as shells find it."""
    command = tmp_path / "bin/edge-sd"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m edge_sd "$@"\n')
    command.chmod(0o755)
    return tmp_path


def shell(folder: Path, *words: str, **more: str) -> str:
    program = shutil.which(words[0])
    if program is None:
        pytest.skip(f"{words[0]} is not installed")
    path = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "HOME": str(folder), "XDG_CONFIG_HOME": str(folder)}
    done = subprocess.run([program, *words[1:]], capture_output=True, text=True, env={**os.environ, **path, **more})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("typed", "offered"),
    [("edge-sd mod", "models"), ("edge-sd generate x --sampler dpmpp_2m_sde_", "dpmpp_2m_sde_heun")],
)
def test_bash_completes(folder: Path, typed: str, offered: str) -> None:
    words = typed.split()
    script = f"""
        eval "$(_EDGE_SD_COMPLETE=source_bash edge-sd)"
        COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}
        $(complete -p edge-sd | sed 's/.*-F //; s/ .*//') edge-sd {words[-1]} {words[-2]}
        echo "${{COMPREPLY[@]}}" """
    assert shell(folder, "bash", "-c", script).split() == [offered]


def test_fish_completes(folder: Path) -> None:
    script = "_EDGE_SD_COMPLETE=source_fish edge-sd | source; complete -C 'edge-sd generate x --preset tur'"
    assert shell(folder, "fish", "-c", script).split()[0] == "turbo"


def test_zsh_reads_the_script_and_asks_as_it_does(folder: Path) -> None:
    (folder / "script").write_text(shell(folder, "zsh", "-c", "_EDGE_SD_COMPLETE=source_zsh edge-sd"))
    assert shell(folder, "zsh", "-n", str(folder / "script")) == ""
    asked = {"_EDGE_SD_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": "edge-sd models show em"}
    assert "emoji" in shell(folder, "sh", "-c", "edge-sd", **asked)


def test_alone_it_shows_three_commands_to_start_with(tmp_path: Path) -> None:
    done = edge_sd(cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    shown = re.findall(r"^  edge-sd (\w+)", done.stdout, re.MULTILINE)
    assert shown == ["generate", "serve", "models"]


def test_the_manual_page_is_whole_and_well_formed(tmp_path: Path) -> None:
    done = edge_sd("manual", cwd=tmp_path)
    assert done.returncode == 0
    for path, command, _ in every_command():
        if not getattr(command, "commands", None):
            assert f".SS {path}".replace("-", "\\-") in done.stdout
    assert "\\-\\-contact\\-sheet" in done.stdout
    if shutil.which("groff") is None:
        pytest.skip("groff is not installed")
    read = subprocess.run(["groff", "-man", "-Tutf8", "-ww"], input=done.stdout, capture_output=True, text=True)
    assert (read.returncode, read.stderr) == (0, "")
    assert "EXIT STATUS" in re.sub(r"\x1b\[\d*m|.\x08", "", read.stdout)


def test_what_lists_speaks_json(tmp_path: Path) -> None:
    options = {path.removeprefix("edge-sd "): command.params for path, command, _ in every_command()}
    for name in LISTS:
        assert any("--json" in each.opts for each in options[name]), name
    report = json.loads(edge_sd("models", "verify", "emoji", "--json", cwd=tmp_path).stdout)
    assert (report["model"], report["problems"]) == ("emoji", [])


def test_the_pages_say_the_exit_codes_that_the_manual_says() -> None:
    page = re.sub(r"[`\s]+", " ", (ROOT / "docs/errors.md").read_text("utf-8"))
    for code, meaning in EXIT_CODES.items():
        assert f"| {code} | {meaning} |" in page
    assert all(re.search(rf"\b{code}\b", SHORT) for code in EXIT_CODES if code != 141)


def test_a_broken_pipe_is_the_readers_of_stdout_or_it_is_said(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "edge_sd", "models", "catalogue"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert (process.wait(60), process.stderr.read()) == (141, b"")
    broken = (
        "import edge_sd.apps.models as models, edge_sd.bundle.catalogue as catalogue\n"
        "class Catalogue:\n    def __iter__(self): raise BrokenPipeError(32, 'Broken pipe')\n"
        "catalogue.CATALOGUE = Catalogue()\n"
        "import sys; sys.argv[1:] = ['models', 'catalogue']\n"
        "from edge_sd.apps.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", broken], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, "edge-sd: a connection to another program broke off\n")
