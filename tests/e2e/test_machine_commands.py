"""devices, tune, doctor, --prefer and --verbose, as people start them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edge_sd.apps import doctor, machine
from edge_sd.bundle.bundle import REFERENCE, read_manifest
from edge_sd.files import record_file
from edge_sd.pipeline.recorded import read_recorded

from .test_cli import edge_sd


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    caches = {"EDGE_SD_CACHE": str(tmp_path / "home"), "EDGE_SD_MODELS": str(tmp_path / "home/models")}
    return {**caches, "HOME": str(tmp_path)}


def test_devices_says_where_and_why(tmp_path: Path, home: dict[str, str]) -> None:
    done = edge_sd("devices", "--prefer", "memory", cwd=tmp_path, **home)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("machine  ")
    assert re.search(r"^  unet +openvino-fp16 on cpu: \w+, estimated", done.stdout, re.MULTILINE)
    report = json.loads(edge_sd("devices", "--json", cwd=tmp_path, **home).stdout)
    assert {"machine", "devices", "absent", "model", "plan", "why"} == set(report)
    assert report["plan"]["parts"]["unet"]["device"] == "cpu"


def test_devices_answers_without_any_backend(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    for backend in ("coreml.backend", "coreai.backend", "torch"):
        monkeypatch.setattr(f"edge_sd.backends.{backend}.find_spec", lambda name: None)
    machine.devices()
    told = capsys.readouterr().out
    assert told.startswith("machine  ")
    assert '[openvino]"' in told
    assert told.count("absent  ") == 4
    assert "emoji: no backend is installed" in told
    machine.devices(as_json=True)
    report = json.loads(capsys.readouterr().out)
    assert (report["plan"], report["devices"]) == (None, [])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["devices", "--prefer", "beauty"], "valid: battery, memory, quality, speed"),
        (["generate", "x", "--prefer", "beauty"], "valid: battery, memory, quality, speed"),
        (["devices", "--device", "tpu"], "no device 'tpu'"),
        (["devices", "nothing"], "no model 'nothing'"),
        (["tune", "nothing"], "no model 'nothing'"),
        (["tune", "--seconds", "0"], "seconds 0"),
        (["tune", "--seconds", "nan"], "seconds nan"),
        (["doctor", "nothing"], "no model 'nothing'"),
        (["doctor", "--seconds", "-1"], "seconds -1"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, arguments: list[str], said: str) -> None:
    done = edge_sd(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"edge-sd: [^\n]+\n", done.stderr), done.stderr
    assert said in done.stderr


def test_tune_remembers_and_the_next_plan_says_so(tmp_path: Path, home: dict[str, str]) -> None:
    done = edge_sd("tune", cwd=tmp_path, **home)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^\w+ openvino-fp16 openvino:cpu\s+loads in", done.stdout, re.MULTILINE)) == 3
    assert len(list((tmp_path / "home/measured").iterdir())) == 1
    done = edge_sd("generate", "a cat", "--steps", "1", "--verbose", "-o", "x.png", cwd=tmp_path, **home)
    assert re.search(r"unet +openvino-fp16 on cpu: \w+, measured here", done.stderr), done.stderr
    assert done.stdout == "x.png\n"


def test_generate_says_where_it_runs_and_the_seed(tmp_path: Path, home: dict[str, str]) -> None:
    done = edge_sd("generate", "a cat", "--steps", "1", "-o", "x.png", cwd=tmp_path, **home)
    assert re.fullmatch(r"openvino-fp16 on cpu \([^\n]+\nseed \d+\n", done.stderr), done.stderr


def test_the_doctor_draws_and_compares_and_exits_with_1_when_something_is_off(
    tmp_path: Path, emoji: Path, home: dict[str, str]
) -> None:
    done = edge_sd("doctor", "--json", cwd=tmp_path, **home)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert set(report) == {"sound", "versions", "machine", "devices", "absent", "caches", "model", "tests"}
    (test,) = [each for each in report["tests"] if each["device"] == "cpu"]
    assert test["result"] in ("identical", "close")
    assert test["psnr"] is None or test["psnr"] >= 40, "OpenVINO's CPU beside torch float32"
    (test,) = [each for each in report["tests"] if each["device"] == "torch-cpu"]
    assert (test["result"], test["variant"]) in [("identical", "torch"), ("close", "torch")]
    assert test["psnr"] is None or test["psnr"] >= 50, "our pipeline beside diffusers', both in torch float32"
    assert str(tmp_path) not in done.stdout.replace(test["command"], ""), "nobody's folders are in a report"
    assert report["model"]["problems"] == []

    copy = tmp_path / "copy"
    shutil.copytree(emoji, copy)
    text = (copy / "tokenizer/merges.txt").read_bytes()
    (copy / "tokenizer/merges.txt").write_bytes(text + b" ")
    done = edge_sd("doctor", "copy", cwd=tmp_path, **home)
    assert done.returncode == 1
    assert re.search(r"^damaged .*merges.txt", done.stdout, re.MULTILINE)
    assert done.stdout.endswith("something is off, see above\n")


def test_a_picture_that_is_another_is_off_and_a_crash_is_a_line(
    tmp_path: Path, emoji: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = read_manifest(emoji)
    reference = bundle.reference("openvino-fp16")
    assert reference is not None, "publishing keeps the picture that torch drew"
    recorded = read_recorded(reference)
    assert (recorded.variant, recorded.settings["steps"]) == ("torch-fp32", 4)
    from PIL import Image, ImageOps

    other = tmp_path / REFERENCE
    with Image.open(reference) as image:
        ImageOps.mirror(image).save(other)
    test = doctor.SelfTest("npu", "openvino", "openvino-fp16")
    assert doctor._compared(test, reference, reference, 30).result == "identical"
    off = doctor._compared(test, other, reference, 30)
    assert (off.result, off.sound) == ("off", False)
    assert "dB beside torch float32 (at least 30 wanted)" in off.line()
    assert doctor._compared(test, other, None, 30).result == "drawn"
    assert record_file(reference) == bundle.variant("openvino-fp16").files[f"openvino-fp16/{REFERENCE}"]

    def crash(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, -11, "", "a driver\nSegmentation fault\n")

    monkeypatch.setattr("edge_sd.apps.doctor.subprocess.run", crash)
    report = doctor.examine("emoji", 5)
    (failed,) = [each for each in report.tests if each.device == "cpu"]
    assert (failed.result, failed.why) == ("failed", "Segmentation fault (exit code -11)")
    assert f"again: {failed.command}" in report.text()
    assert not report.sound


def test_a_slow_device_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(command: list[str], **_: object) -> None:
        raise subprocess.TimeoutExpired(command, 5)

    monkeypatch.setattr("edge_sd.apps.doctor.subprocess.run", hang)
    (test,) = [each for each in doctor.examine("emoji", 5).tests if each.device == "cpu"]
    assert (test.result, test.why) == ("failed", "no picture within 5 s")
    assert os.environ.get("HOME", "/nowhere") not in test.line()


@pytest.mark.skipif(sys.platform == "win32", reason="there is no pty")
@pytest.mark.parametrize("command", ["tune", "doctor"])
def test_a_terminal_sees_the_time_left_and_a_pipe_sees_no_bar(
    command: str, tmp_path: Path, home: dict[str, str]
) -> None:
    import pty

    words = [sys.executable, "-m", "edge_sd", command, "--seconds", "2"]
    environment = {**os.environ, **home, "TERM": "xterm", "COLUMNS": "80"}
    ours, theirs = pty.openpty()
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=theirs, cwd=tmp_path, env=environment) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # Linux says so where the other end is closed.
            while some := os.read(ours, 1 << 16):
                shown += some
        assert process.stdout is not None
        printed = process.stdout.read()
    os.close(ours)
    assert re.search(rb"\d:\d\d|-:--:--", shown)
    assert "\u2501".encode() in shown
    assert b"\x1b" not in printed
    piped = subprocess.run(words, capture_output=True, cwd=tmp_path, env=environment)
    assert b"\x1b" not in piped.stdout + piped.stderr
    assert "\u2501".encode() not in piped.stdout + piped.stderr
