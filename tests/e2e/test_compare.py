"""`edge-sd compare` as people start it: processes that draw, files that stay, and a report that opens anywhere."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from edge_sd.apps.cli import main
from edge_sd.apps.compare.score import METRICS
from edge_sd.bundle.bundle import ModelBundle
from edge_sd.files import FileRecord

from .test_cli import edge_sd

SHORT = ("--steps", "2", "--prompts", "prompts.txt")


def compare(arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """The report of `edge-sd compare ARGUMENTS --json`, in this process, which has the libraries; workers are new."""
    monkeypatch.setattr(sys, "argv", ["edge-sd", "compare", *arguments, "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    assert ended.value.code == 0, printed.err
    return json.loads(printed.out)


def rename(paths: Any, old: str, new: str) -> tuple[str, ...]:
    return tuple(path.replace(old, new) for path in paths)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory, bundle: ModelBundle) -> Path:
    """The miniature in fp32 and fp16, and a variant whose UNet was cut short."""
    root = tmp_path_factory.mktemp("damaged") / "bundle"
    shutil.copytree(bundle.root, root)
    shutil.copytree(root / "openvino-fp16", root / "openvino-cut")
    sound = bundle.variant("openvino-fp16")
    artifacts = {
        part: replace(
            each,
            graph=each.graph.replace("-fp16", "-cut"),
            weights=rename(each.weights, "-fp16", "-cut"),
        )
        for part, each in sound.artifacts.items()
    }
    files = {path.replace("-fp16", "-cut"): FileRecord(r.bytes, r.sha256) for path, r in sound.files.items()}
    # With defaults of its own it is not swapped into others: that would be more processes and prove no more.
    cut = replace(sound, artifacts=artifacts, files=files, defaults=bundle.defaults)
    ModelBundle(root, bundle.facts, {**bundle.variants, "openvino-cut": cut}, bundle.files).write_manifest()
    weights = root / "openvino-cut/unet/openvino_model.bin"
    weights.write_bytes(weights.read_bytes()[:-100])
    return root


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, damaged: Path, miniature: Path) -> tuple[Path, Any]:
    """A comparison of them with torch, for a gate that the damaged one misses."""
    folder = tmp_path_factory.mktemp("compare")
    (folder / "prompts.txt").write_text("a red apple\na </script> cat\n")
    done = edge_sd("compare", str(damaged), *SHORT, "--weights", str(miniature), "--swap", "1", "--rounds", "1",
                   "--sampler", "euler", "--fail-under", "psnr=20,ssim=0.5", "--report", "R", cwd=folder)  # fmt: skip
    return folder, done


def test_a_variant_that_fails_is_a_row_that_says_why_and_misses_the_gate(report: tuple[Path, Any]) -> None:
    folder, done = report
    assert done.returncode == 1, done.stderr
    assert re.search(r"gate missed: openvino-cut failed: .*openvino_model.bin has \d+ bytes", done.stderr)
    rows = {row["name"]: row for row in json.loads((folder / "R/report.json").read_text())["rows"]}
    assert "openvino_model.bin has" in rows["openvino-cut"]["error"]
    assert "error" not in rows["openvino-fp16"]
    assert done.stdout.splitlines()[-1] == "R/report.html"


def test_float32_is_nearest_to_torch_and_another_seed_far_away(report: tuple[Path, Any]) -> None:
    found = json.loads((report[0] / "R/report.json").read_text())
    quality = {row["name"]: row["quality"] for row in found["rows"] if "quality" in row}
    assert found["reference"] == "torch-fp32"
    assert quality["openvino-fp32"]["psnr"]["mean"] > 45
    assert quality["openvino-fp32"]["psnr"]["mean"] >= quality["openvino-fp16"]["psnr"]["mean"]
    assert quality["openvino-fp16"]["latent_psnr"]["mean"] > quality["another seed"]["latent_psnr"]["mean"] + 10
    swapped = [row for row in found["rows"] if row["kind"] == "swap" and row["donor"] == "openvino-fp16"]
    assert [row["part"] for row in swapped] == ["text_encoder", "unet", "vae_decoder", "all"]
    assert all(row["quality"]["psnr"]["mean"] > 30 for row in swapped)
    # What is swapped shows: each component's own precision, which together are the variant's.
    moved = [row["quality"]["latent_psnr"]["mean"] for row in swapped]
    assert [each < 100 for each in moved] == [True, True, False, True]
    for row in found["rows"]:
        if row["kind"] == "variant" and "quality" in row:
            assert len(row["divergence"]) == 2
            assert {"load", "first", "step", "decode", "memory"} <= set(row["speed"])
            assert row["speed"]["same"], "a fresh process draws the same picture"
            assert row["speed"]["first"]["median"] > row["speed"]["load"]["median"] > 0
            assert row["bytes"]["total"] >= row["bytes"]["unet"] > 0
            assert set(row["quality"]) <= set(METRICS)


def test_the_page_is_one_file_that_asks_nobody(report: tuple[Path, Any]) -> None:
    page = (report[0] / "R/report.html").read_text("utf-8")
    assert not re.findall(r"""(?:src|href)=["']?(?!data:)|@import|url\(|https?://""", page)
    (data,) = re.findall(r"<script type=application/json id=pictures>(.*?)</script>", page)
    assert len(json.loads(data)) == 3 * 2, "two pictures of torch, fp32 and fp16"
    assert all(each.startswith("data:image/webp;base64,") for each in json.loads(data).values())
    assert "a &lt;/script&gt; cat" in page


def test_the_same_as_markdown_and_png(report: tuple[Path, Any]) -> None:
    text = (report[0] / "R/report.md").read_text("utf-8")
    assert "| openvino-fp16 |" in text
    for name in re.findall(r"!\[.*?\]\((.*?)\)", text):
        with Image.open(report[0] / "R" / name) as image:
            assert min(image.size) > 200
    assert {"size.png", "steps.png", "grid.png"} <= {path.name for path in (report[0] / "R").iterdir()}


def test_show_prints_the_table_again(report: tuple[Path, Any]) -> None:
    folder, done = report
    shown = edge_sd("compare", "show", "R", cwd=folder)
    assert shown.returncode == 0
    assert shown.stdout.splitlines() == done.stdout.splitlines()[:-1]


def test_stopped_and_started_again_it_goes_on_and_finds_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("a red apple\na cat\n")
    arguments = ("emoji", *SHORT, "--rounds", "0", "--reference", "openvino-fp16")
    command = [sys.executable, "-m", "edge_sd", "compare", *arguments, "--report", "stopped"]
    first = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # A shell's background jobs ignore SIGINT, and so would their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    while not (drawn := list((tmp_path / "stopped").rglob("*.png"))):
        assert first.poll() is None, first.communicate()
        time.sleep(0.02)
    first.send_signal(signal.SIGINT)
    _, said = first.communicate()
    assert (first.returncode, said.count("\n")) == (130, 1), said
    assert not (tmp_path / "stopped/report.json").exists()
    written = drawn[0].stat().st_mtime_ns

    monkeypatch.chdir(tmp_path)
    reports = [compare((*arguments, "--report", name), monkeypatch, capsys) for name in ("stopped", "other")]
    assert drawn[0].stat().st_mtime_ns == written, "it was drawn again"
    assert reports[0] == reports[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["no-such-model"], "no model 'no-such-model'"),
        (["emoji", "--variants", "int3"], "it has: coreai-gpu-fp16, coreml-ane-fp16, openvino-fp16"),
        (["emoji", "--fail-under", "beauty=1"], "no gate 'beauty'"),
        (["emoji", "--prompts", "missing.txt"], "missing.txt cannot be read"),
        (["emoji", "--report", "taken.txt"], "taken.txt is a file"),
        (["emoji", "--report", "full"], "neither empty nor a report"),
        (["emoji", "--report", "no/such"], "does not exist"),
        (["emoji", "--steps", "0"], "steps 0"),
        (["emoji", "--seeds", "0"], "--seeds"),
        (["show", "full"], "full holds no report"),
        (["sweep", "emoji", "--bits", "3"], "no bits of 3"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "taken.txt").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["edge-sd", "compare", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    printed = capsys.readouterr()
    assert (stopped.value.code, printed.out) == (2, "")
    assert printed.err.count("\n") == 1, printed.err
    assert said in printed.err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_a_sweep_makes_the_variants_and_compares_them(
    tmp_path: Path, miniature: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("a red apple\n")
    monkeypatch.chdir(tmp_path)
    few = ("--steps", "2", "--rounds", "0", "--swap", "0", "--prompts", "prompts.txt")
    found = compare(("sweep", str(miniature), "--bits", "16,8", *few), monkeypatch, capsys)
    assert [row["name"] for row in found["rows"] if row["kind"] == "variant"] == ["openvino-fp16", "openvino-int8"]
    assert found["rows"][0]["name"] == "torch-fp32"
    assert all("quality" in row for row in found["rows"])
    assert (tmp_path / "sweep/bundle/edge_sd.json").is_file()


def test_a_folder_that_cannot_be_written_to_ends_the_comparison_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from edge_sd.apps.compare import measure

    monkeypatch.chdir(tmp_path)
    # The worker finds no folder to write into, as it finds a full disk.
    monkeypatch.setattr(measure, "_make_folder", lambda folder: None)
    (tmp_path / "prompts.txt").write_text("a cat")
    words = ("--variants", "openvino-fp16", "--reference", "openvino-fp16", "--rounds", "0", "--swap", "0", *SHORT)
    monkeypatch.setattr(sys, "argv", ["edge-sd", "compare", "emoji", *words, "--report", "R"])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code == 2
    assert "artist.json cannot be written: No such file or directory; what was drawn is kept" in said
    assert not (tmp_path / "R/report.json").exists()
