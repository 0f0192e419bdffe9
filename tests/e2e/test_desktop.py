"""The desktop window on a display without a screen: what it shows, that it is one, and that it remembers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import ImageGrab

from edge_sd.apps.desktop import instance

pytestmark = pytest.mark.skipif(
    shutil.which("Xvfb") is None or not sys.platform.startswith("linux"), reason="no Xvfb here: apt-get install xvfb"
)
# The page's own colour, of its button and its sign.
KEY = (0x5B, 0x3F, 0xD6)


@pytest.fixture(scope="module")
def display() -> Iterator[str]:
    read, write = os.pipe()
    server = subprocess.Popen(
        ["Xvfb", "-displayfd", str(write), "-screen", "0", "1400x1000x24", "-nolisten", "tcp"],
        pass_fds=[write], stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(write)
    with os.fdopen(read) as told:
        yield f":{told.readline().strip()}"
    server.terminate()
    server.wait()


def start(display: str, folder: Path) -> subprocess.Popen[bytes]:
    flags = "--no-sandbox --disable-gpu"
    env = {**os.environ, "DISPLAY": display, "EDGE_SD_MODELS": str(folder / "models"), "QT_QPA_PLATFORM": "xcb",
           "QTWEBENGINE_CHROMIUM_FLAGS": flags, "QTWEBENGINE_DISABLE_SANDBOX": "1"}  # fmt: skip
    command = [sys.executable, "-m", "edge_sd", "desktop", "--folder", str(folder / "state")]
    return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def seen(display: str) -> int:
    """Pixels of the page's colour on the screen."""
    return int((np.asarray(ImageGrab.grab(xdisplay=display).convert("RGB")) == KEY).all(-1).sum())


def test_the_window_shows_the_page_and_is_one(display: str, tmp_path: Path) -> None:
    first = start(display, tmp_path)
    try:
        until = time.monotonic() + 90
        while seen(display) < 2000 and time.monotonic() < until:
            assert first.poll() is None
            time.sleep(0.5)
        assert seen(display) >= 2000
        record = json.loads((tmp_path / "state" / "desktop.json").read_text())
        assert (tmp_path / "state" / "desktop.json").stat().st_mode & 0o077 == 0
        address = f"http://127.0.0.1:{record['port']}"
        assert httpx.get(f"{address}/api/jobs").status_code == 401
        assert httpx.post(f"{address}/api/show").status_code == 401
        second = start(display, tmp_path)
        assert second.wait(timeout=60) == 0
        assert first.poll() is None
    finally:
        first.terminate()
        first.wait(timeout=30)
    # It is gone without having said so; the next start is the first.
    assert not instance.wake(tmp_path / "state")


def test_a_place_that_makes_no_sense_is_the_first_place(tmp_path: Path) -> None:
    from edge_sd.apps.desktop.window import Place, read_place

    for text in ("", "[]", "{", '{"x": "1"}', '{"width": 1}', '{"x": 1e9}', '{"other": 1}', '{"port": -1}'):
        (tmp_path / "window.json").write_text(text)
        assert read_place(tmp_path) == Place()
    (tmp_path / "window.json").write_text('{"x": 5, "y": 6, "width": 700, "height": 800, "port": 1234}')
    assert read_place(tmp_path) == Place(5, 6, 700, 800, 1234)
