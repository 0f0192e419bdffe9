"""The macOS desktop script: the exact commands it would run there, and what it says elsewhere.

Stand-in executables record what they are given; /bin/sh, plistlib and the file system are the real ones.
"""

from __future__ import annotations

import os
import plistlib
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from edge_sd import Request
from edge_sd.apps.macos import draw as script
from edge_sd.apps.macos.install import COMMAND, TEMPLATES, WORKFLOW, install, uninstall
from edge_sd.apps.macos.wallpaper import HEIGHT, WIDTH, wallpaper_of
from edge_sd.errors import DeviceError, InvalidRequest, OutputError
from edge_sd.images.metrics import psnr
from edge_sd.pipeline.recorded import read_recorded

from ..e2e.test_cli import edge_sd

# Whatever a file system or a shell may make something of; a name holds neither NUL nor a slash.
NAMES = st.text(st.sampled_from("a\"'\\$`;&|<>(){}*?!~#%-=, \t\n«»é漢\u200e"), min_size=1, max_size=12)


def stand_in(path: Path, exit_code: int = 0) -> Path:
    """An executable that writes its arguments, and what is piped in, beside itself."""
    log = shlex.quote(str(path.parent / "log"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"#!/bin/sh\n{{ printf '%s\\0' \"$@\"; [ -t 0 ] || cat; }} > {log}\necho 'not allowed' >&2\nexit {exit_code}\n"
    )
    path.chmod(0o755)
    return path.parent / "log"


def arguments(log: Path) -> list[str]:
    return log.read_bytes().decode().split("\0")[:-1]


@pytest.fixture
def mac(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine that says it is a Mac, with stand-ins of `open` and `osascript`; the file of the arguments."""
    monkeypatch.setattr(sys, "platform", "darwin")
    log = stand_in(tmp_path / "bin/open")
    stand_in(tmp_path / "bin/osascript")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(sys, "stdin", open(os.devnull))  # noqa: SIM115 - lives as long as the test
    return log


def test_each_action_is_one_command(mac: Path, tmp_path: Path) -> None:
    picture = tmp_path / "apple.png"
    script.hand_over(picture, "preview")
    assert arguments(mac) == ["-a", "Preview", str(picture)]
    script.hand_over(picture, "wallpaper")
    assert arguments(mac) == ["-e", script.WALLPAPER, str(picture)]
    assert 'tell application "System Events" to set picture of every desktop' in script.WALLPAPER
    script.hand_over(picture, "clipboard")
    assert arguments(mac) == ["-e", script.CLIPBOARD, str(picture)]
    assert "as «class PNGf»" in script.CLIPBOARD


@settings(max_examples=40, deadline=None)
@given(name=NAMES)
def test_no_name_of_a_file_becomes_applescript(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("names")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "platform", "darwin")
        log = stand_in(folder / "bin/osascript")
        patch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
        patch.chdir(folder)
        for action, code in (("wallpaper", script.WALLPAPER), ("clipboard", script.CLIPBOARD)):
            script.hand_over(Path(name), action)
            assert arguments(log) == ["-e", code, str(folder / name)]


def test_a_small_picture_becomes_a_wallpaper_in_its_own_shape_and_a_large_one_stays(tmp_path: Path) -> None:
    small = Image.new("RGB", (128, 64), (250, 240, 10))
    small.paste((0, 0, 200), (32, 16, 96, 48))
    small.save(tmp_path / "small.png")
    path = wallpaper_of(tmp_path / "small.png")
    assert path == tmp_path / "small-wallpaper.png"
    with Image.open(path) as made:
        assert made.size == (WIDTH, HEIGHT)
        assert {made.getpixel(corner) for corner in ((0, 0), (WIDTH - 1, HEIGHT - 1))} == {(250, 240, 10)}
        inner = made.crop(((WIDTH - 640) // 2, (HEIGHT - 320) // 2, (WIDTH + 640) // 2, (HEIGHT + 320) // 2))
        assert psnr(np.asarray(inner.resize((128, 64))), np.asarray(small), 255) > 30, (
            "the picture, five times as large"
        )
    Image.new("RGB", (1300, 900)).save(tmp_path / "large.png")
    assert wallpaper_of(tmp_path / "large.png") == tmp_path / "large.png"


def test_a_person_is_told_while_core_ml_compiles(mac: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "PATIENCE", 0.0)

    def slow(model: str, device: str) -> None:
        if device == "ane":
            for _ in range(100):
                if mac.exists():
                    break
                time.sleep(0.05)
        raise DeviceError("refused")

    monkeypatch.setattr(script.Pipeline, "open", slow)
    with pytest.raises(DeviceError):
        script.draw(Request("a red apple"), say=lambda line: None)
    assert arguments(mac) == ["-e", script.NOTIFICATION, script.COMPILING]
    assert "display notification chosen" in script.NOTIFICATION


def test_the_script_is_one_screen_long() -> None:
    assert len(Path(script.__file__).read_text("utf-8").splitlines()) <= 80


def test_draw_has_the_options_of_generate(tmp_path: Path) -> None:
    done = edge_sd("macos", "draw", "a cat", "--no-preview", "--size", "64x128", "--steps", "2", "--negative", "a dog",
                   "--seed", "1", "--model", "emoji", "--folder", "p", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    made = read_recorded(tmp_path / done.stdout.strip()).settings
    assert {name: made[name] for name in ("width", "height", "steps", "negative")} == {
        "width": 64, "height": 128, "steps": 2, "negative": "a dog",
    }  # fmt: skip


def test_what_macos_refuses_is_said_with_the_pictures_place(mac: Path, tmp_path: Path) -> None:
    stand_in(tmp_path / "bin/osascript", exit_code=1)
    with pytest.raises(OutputError, match=r"a\.png was drawn, but wallpaper failed: not allowed"):
        script.hand_over(Path("a.png"), "wallpaper")
    (tmp_path / "bin/open").chmod(0o644)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(tmp_path / "bin"))
        with pytest.raises(OutputError, match="open cannot be run"):
            script.hand_over(Path("a.png"), "preview")


def test_without_core_ml_it_says_so_and_draws(emoji: Path) -> None:
    said: list[str] = []
    result = script.draw(Request("a red apple", seed=1), say=said.append)
    assert result.pictures[0].image.size == (128, 128)
    assert said[0].startswith("Core ML can't draw here, so another backend does: no device 'ane' here")
    assert "on cpu" in said[1]


def test_core_ml_comes_first_and_its_refusal_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def refuse(model: str, device: str) -> None:
        asked.append(device)
        raise DeviceError(f"{device} refused")

    monkeypatch.setattr(script.Pipeline, "open", refuse)
    with pytest.raises(DeviceError, match="auto refused"):
        script.draw(Request("a red apple"), say=asked.append)
    assert asked == ["ane", "Core ML can't draw here, so another backend does: ane refused", "auto"]


@pytest.mark.skipif(sys.platform == "darwin", reason="a Mac")
@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["draw", "a cat"], "preview"),
        (["draw", "a cat", "--no-preview", "--wallpaper"], "wallpaper"),
        (["draw", "a cat", "--no-preview", "--clipboard"], "clipboard"),
        (["install"], "installing the desktop script"),
        (["uninstall"], "taking the desktop script away"),
        (["plan"], "Core ML's plan"),
    ],
)
def test_off_macos_each_is_one_line_and_nothing_is_written(tmp_path: Path, words: list[str], what: str) -> None:
    done = edge_sd("macos", *words, cwd=tmp_path, HOME=str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"edge-sd: {what} needs macOS; on any system there is: edge-sd generate\n"
    assert list(tmp_path.iterdir()) == []


def test_the_prompt_is_what_is_piped_in(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "edge_sd", "macos", "draw", "--no-preview", "--seed", "1"]
    environment = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run(command, input="a red\n  apple\n", capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/Pictures/edge-sd/a-red-apple.png\n"), done.stderr
    done = subprocess.run(command, input=" \n", capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (2, "edge-sd: there is nothing to draw: the text is empty\n")


def test_what_is_installed_is_taken_away_again(tmp_path: Path) -> None:
    (tmp_path / "Desktop").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for python in ("/old/python", "/new/python"):
        command, workflow = install(tmp_path, python)
        assert python in command.read_text()
        assert os.access(command, os.X_OK)
        assert sorted(path.name for path in workflow.rglob("*")) == ["Contents", "Info.plist", "document.wflow"]
    assert uninstall(tmp_path) == [command, workflow]
    assert uninstall(tmp_path) == []
    left = [path for path in tmp_path.rglob("*") if path not in before]
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(left)] == ["Library", "Library/Services"]


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    for place in (COMMAND, WORKFLOW):
        theirs = tmp_path / place
        theirs.parent.mkdir(parents=True)
        theirs.write_text("mine")
        with pytest.raises(InvalidRequest, match="not edge-sd's; move it away"):
            install(tmp_path, "python")
        assert uninstall(tmp_path) == []
        assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [theirs.name]
        theirs.unlink()


def test_a_home_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "Library").write_text("a file")
    with pytest.raises(OutputError, match="cannot be written"):
        install(tmp_path, "python")
    assert not list(tmp_path.rglob(".edge-sd-*"))


def test_the_quick_action_takes_text_and_runs_a_shell_script(tmp_path: Path) -> None:
    _, workflow = install(tmp_path, "python")
    (service,) = plistlib.loads((workflow / "Contents/Info.plist").read_bytes())["NSServices"]
    assert service["NSMessage"] == "runWorkflowAsService"
    assert service["NSSendTypes"] == ["public.utf8-plain-text"]
    assert service["NSMenuItem"] == {"default": workflow.stem}
    document = plistlib.loads((workflow / "Contents/document.wflow").read_bytes())
    about = document["workflowMetaData"]
    assert about["workflowTypeIdentifier"] == "com.apple.Automator.servicesMenu"
    assert about["serviceInputTypeIdentifier"] == "com.apple.Automator.text"
    (row,) = document["actions"]
    assert row["action"]["BundleIdentifier"] == "com.apple.RunShellScript"
    assert row["action"]["ActionParameters"]["inputMethod"] == 0, "on standard input: text never meets a shell"
    assert sorted(path.name for path in TEMPLATES.iterdir()) == ["Info.plist", "document.wflow"]


@settings(max_examples=30, deadline=None)
@given(folder=NAMES.filter(lambda name: name not in (".", "..")), selection=st.text(max_size=30))
def test_both_call_the_interpreter_wherever_it_is(
    folder: str, selection: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Each as macOS runs it: the .command is executed, the workflow's script goes to its shell."""
    root = tmp_path_factory.mktemp("home")
    python = root / folder / "python"
    log = stand_in(python)
    text = selection.encode("utf-8", "replace")
    for words in both(root, python):
        subprocess.run(words, input=text, check=True, capture_output=True)
        assert log.read_bytes() == b"-m\0edge_sd\0macos\0draw\0" + text
        log.unlink()


def both(home: Path, python: Path) -> list[list[str]]:
    """Install for that interpreter; how macOS runs the .command, and how the Service's script."""
    command, workflow = install(home, str(python))
    parameters = plistlib.loads((workflow / "Contents/document.wflow").read_bytes())["actions"][0]["action"]
    shell, line = (parameters["ActionParameters"][name] for name in ("shell", "COMMAND_STRING"))
    return [[str(command)], [shell, "-c", line]]


@settings(max_examples=10, deadline=None)
@given(folder=NAMES.filter(lambda name: name not in (".", "..")), there=st.booleans())
def test_both_say_what_to_do_where_the_environment_moved_or_lost_edge_sd(
    folder: str, there: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("home")
    python = root / folder / "python"
    if there:
        stand_in(python, exit_code=1)
    log = stand_in(root / "bin/osascript")
    for words in both(root, python):
        path = {"PATH": f"{root / 'bin'}:/bin:/usr/bin"}
        done = subprocess.run(words, capture_output=True, text=True, env=path, stdin=subprocess.DEVNULL)
        assert done.returncode == 2
        assert "run: edge-sd macos install" in done.stderr
        shown = log.read_bytes().decode().split("\0")
        assert "display alert" in shown[1]
        assert str(python) in shown[2]
