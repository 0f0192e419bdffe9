"""What a command writes: pictures as they are drawn, under names of their own, and text to any kind of output."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from edge_sd.pipeline.recorded import read_recorded

from .test_cli import edge_sd

QUICK = ("--steps", "1", "--size", "64")


def started(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "edge_sd", *arguments]
    return subprocess.Popen(command, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def one_line(done: subprocess.CompletedProcess[str], said: str) -> None:
    assert "Traceback" not in done.stderr
    assert said in done.stderr.strip().splitlines()[-1]


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_what_is_drawn_before_ctrl_c_is_kept(tmp_path: Path) -> None:
    process = started("generate", "a cat", "--count", "400", *QUICK, "-o", "cat.png", cwd=tmp_path)
    deadline = time.monotonic() + 60
    while not (tmp_path / "cat-3.png").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert 3 <= len(kept) < 400
    assert sorted(out.split()) == kept, "the paths of all that were saved"
    for name in kept:
        with Image.open(tmp_path / name) as image:
            image.load()


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_a_grid_holds_what_was_drawn_before_ctrl_c(tmp_path: Path) -> None:
    code = (
        "import os, signal\n"
        "from edge_sd.apps import cli, saving\n"
        "real = saving.Saver.save\n"
        "def save(self, n, picture):\n"
        "    real(self, n, picture)\n"
        "    if n == 1: os.kill(os.getpid(), signal.SIGINT)\n"
        "saving.Saver.save = save\n"
        "cli.main()\n"
    )
    words = ["generate", "a cat", "--count", "9", *QUICK, "--grid", "-o", "grid.png"]
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "grid.png\n"), done.stderr
    with Image.open(tmp_path / "grid.png") as image:
        assert image.size == (128, 64)
    assert read_recorded(tmp_path / "grid.png").settings["count"] == 2


def test_two_processes_with_one_prompt_keep_both_pictures(tmp_path: Path) -> None:
    both = [started("generate", "a red apple", "--seed", seed, *QUICK, cwd=tmp_path) for seed in ("9", "10")]
    said = [process.communicate(timeout=120)[0].strip() for process in both]
    assert sorted(said) == sorted(path.name for path in tmp_path.iterdir())
    seeds = {read_recorded(tmp_path / name).settings["seed"] for name in said}
    assert seeds == {9, 10}


def test_a_name_that_is_taken_meanwhile_costs_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edge_sd import Pipeline, Request
    from edge_sd.apps.saving import Saver

    monkeypatch.chdir(tmp_path)
    with Pipeline.open("emoji", "cpu") as pipeline:
        (picture,) = pipeline.generate(Request("a cat", steps=1, width=64, height=64, seed=1)).pictures
    for output, expected in ((None, "a-cat-2.png"), (Path("x.png"), "x-2.png")):
        saver = Saver(output, "a cat", 1)
        saver.check()
        taken = output or Path("a-cat.png")
        taken.write_bytes(b"another program's")
        saver.save(0, picture)
        assert saver.paths == [Path(expected)]
        assert taken.read_bytes() == b"another program's"
        assert bool(saver.notes) == (output is not None)


@pytest.mark.parametrize("words", [("generate", "a cat", *QUICK), ("interpolate", "a cat", "a dog", "--frames", "2",
                                                                  *QUICK)])  # fmt: skip
def test_an_output_that_is_there_is_replaced_only_when_asked(tmp_path: Path, words: tuple[str, ...]) -> None:
    (tmp_path / "x.png").write_bytes(b"dear")
    done = edge_sd(*words, "-o", "x.png", cwd=tmp_path)
    assert done.returncode == 2
    one_line(done, "x.png is there already; give another name, or --overwrite to replace it")
    assert (tmp_path / "x.png").read_bytes() == b"dear"
    done = edge_sd(*words, "-o", "x.png", "--overwrite", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "x.png\n"), done.stderr
    with Image.open(tmp_path / "x.png") as image:
        image.load()


def test_a_random_seed_is_said(tmp_path: Path) -> None:
    done = edge_sd("generate", "a cat", *QUICK, "-o", "x.png", cwd=tmp_path)
    assert f"seed {read_recorded(tmp_path / 'x.png').settings['seed']}\n" in done.stderr


def test_a_prompt_too_long_for_a_jpeg_loses_no_picture(tmp_path: Path) -> None:
    # 30,000 bytes in UTF-16 and 90,000 escaped in JSON, in few tokens.
    prompt = "a cat" + "\u3000" * 15_000 + "x"
    done = edge_sd("generate", prompt, *QUICK, "-o", "x.jpg", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "x.png\n"), done.stderr
    assert "note: the prompt and the other settings are too long for a JPEG's EXIF" in done.stderr
    assert read_recorded(tmp_path / "x.png").settings["prompt"] == prompt


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_text_goes_to_an_output_of_any_encoding(tmp_path: Path, encoding: str) -> None:
    done = edge_sd("generate", "猫 a cat", *QUICK, "-o", "猫.png", cwd=tmp_path, PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stdout) == (0, "\\u732b.png\n"), done.stderr
    done = edge_sd("info", "猫.png", cwd=tmp_path, PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    assert "\\u732b a cat" in done.stdout
    done = edge_sd("generate", "x", "--model", "猫", cwd=tmp_path, PYTHONIOENCODING=encoding)
    one_line(done, "no model '\\u732b'")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
@pytest.mark.parametrize("words", [("models", "list"), ("generate", "--help"), ("--version",), ("devices", "--json")])
def test_a_full_output_is_one_line(tmp_path: Path, words: tuple[str, ...]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "edge_sd", *words], cwd=tmp_path, text=True, stdout=full,
                              stderr=subprocess.PIPE)  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "edge-sd: the output can't be written: No space left on device\n"


CLOSED = """
import os
real = {name: getattr(os, name) for name in ("stat", "listdir", "scandir", "mkdir", "open")}
def refusing(name):
    def call(path, *args, **kwargs):
        if isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith("/closed-home/"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return real[name](path, *args, **kwargs)
    return call
for name in real: setattr(os, name, refusing(name))
"""
NOBODY = """
import os, pwd
def getpwuid(uid): raise KeyError("getpwuid(): uid not found: 54321")
pwd.getpwuid = getpwuid
"""


@pytest.mark.skipif(sys.platform == "win32", reason="users of POSIX")
@pytest.mark.parametrize("case", ["closed", "nobody"])
def test_a_user_without_a_home_draws(tmp_path: Path, case: str) -> None:
    """HOME of another user (sudo -u, docker run -u), and a uid that has no entry and no HOME; root may read all."""
    code = {"closed": CLOSED, "nobody": NOBODY}[case] + "from edge_sd.apps.cli import main\nmain()\n"
    env = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "HOME", "EDGE_SD"))}
    env |= {"closed": {"HOME": "/closed-home"}, "nobody": {"TMPDIR": str(tmp_path / "tmp")}}[case]
    (tmp_path / "tmp").mkdir()
    for words in (("models", "list"), ("generate", "a cat", *QUICK, "-o", "x.png"), ("devices",)):
        done = subprocess.run([sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, text=True,
                              env=env)  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "x.png").is_file()
    done = subprocess.run([sys.executable, "-c", code, "models", "show", "org/x"], cwd=tmp_path, capture_output=True,
                          text=True, env=env)  # fmt: skip
    assert done.returncode == 2
    assert ("/closed-home/.local/share/edge-sd/models cannot be read (Permission denied)" in done.stderr) == (
        case == "closed"
    )
