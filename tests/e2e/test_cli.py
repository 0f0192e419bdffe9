"""The command as people start it: a process, its exit code, its one line, its files."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edge_sd.pipeline.recorded import read_recorded


def edge_sd(*arguments: str | bytes, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edge_sd", *arguments], cwd=cwd, capture_output=True, text=True,
        env={**os.environ, **environment},
    )  # fmt: skip


def test_a_first_picture(tmp_path: Path) -> None:
    done = edge_sd("generate", "a red apple, glossy style", "--seed", "7", "--output", "apple.png", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "apple.png\n"), done.stderr
    with Image.open(tmp_path / "apple.png") as image:
        assert image.size == (128, 128)
        centre = np.asarray(image.convert("RGB"), float)[48:80, 48:80].mean(axis=(0, 1))
    assert centre[0] > centre[1] + 40, "the middle of a red apple is red"
    assert centre[0] > centre[2] + 40


def test_the_same_seed_makes_the_same_file(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        edge_sd("generate", "a cat", "--seed", "3", "--steps", "3", "-q", "-o", name, cwd=tmp_path)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_without_output_the_prompt_names_the_file_and_nothing_is_overwritten(tmp_path: Path) -> None:
    names = [edge_sd("generate", "A cat, 3d!", "--steps", "1", cwd=tmp_path).stdout.strip() for _ in range(2)]
    assert names == ["a-cat-3d.png", "a-cat-3d-2.png"]


def test_json_says_all_that_makes_the_picture_again(tmp_path: Path) -> None:
    done = edge_sd("generate", "a cat", "--count", "2", "--steps", "2", "--size", "64x128", "--sampler", "euler_a",
                   "--negative", "a dog", "--guidance", "3", "--json", "-o", "x.webp", cwd=tmp_path)  # fmt: skip
    report = json.loads(done.stdout)
    assert done.stderr == ""
    assert [row["path"] for row in report["pictures"]] == ["x-1.webp", "x-2.webp"]
    first, second = report["pictures"]
    assert second["seed"] == first["seed"] + 1
    written = read_recorded(tmp_path / "x-2.webp").settings
    assert written == {key: second[key] for key in written}
    assert set(report["seconds"]) == {"load", "denoise", "decode"}
    with Image.open(tmp_path / "x-1.webp") as image:
        assert image.size == (64, 128)


def test_quiet_prints_nothing(tmp_path: Path) -> None:
    done = edge_sd("generate", "a cat", "--steps", "1", "--quiet", "-o", "x.jpg", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "x.jpg").is_file()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", ""], "the prompt is empty"),
        (["generate", b"\xff\xfe"], "not valid UTF-8"),
        (["generate", "x", "--size", "100"], "multiple of 8"),
        (["generate", "x", "--size", "8192"], "limit of 512; larger ones need --tile"),
        (["generate", "x", "--size", "20000"], "8 to 16384"),
        (["generate", "x", "--size", "1024"], "limit of 512"),
        (["generate", "x", "--size", "big"], "such as 512 or 512x768"),
        (["generate", "x", "--steps", "0"], "steps 0"),
        (["generate", "x", "--steps", "ten"], "--steps"),
        (["generate", "x", "--guidance", "nan"], "guidance nan"),
        (["generate", "x", "--sampler", "best"], "valid: ddim"),
        (["generate", "x", "--model", "best"], "installed: emoji"),
        (["generate", "x", "--variant", "best"], "it has: coreai-gpu-fp16, coreml-ane-fp16, openvino-fp16"),
        (["generate", "x", "--device", "best"], "coreml-reference, cpu"),
        (["generate", "x", "-o", "no/x.png"], "'no' does not exist"),
        (["generate", "x", "-o", "x.txt"], "valid endings"),
        (["generate", "x", "--flavour", "sweet"], "--flavour"),
        (["generate"], "prompt"),
        (["draw"], "draw"),
        (["models", "show", "best"], "installed: emoji"),
        (["convert", ".", "b"], "not a diffusers folder"),
        (
            ["convert", "emoji", "b", "--precision", "int3"],
            "valid: fp16, fp32, fp8, hybrid, int4, int4awq, int4g128, ",
        ),
        (["convert", "emoji", "b", "--to", "onnx"], "valid: coreai, coreml, openvino"),
        (["convert", "emoji", "no/b"], "does not exist"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path: Path, arguments: list[str | bytes], said: str) -> None:
    done = edge_sd(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(r"edge-sd: [^\n]+\n", done.stderr), done.stderr
    assert said.lower() in done.stderr.lower()
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    if not os.access("/dev/full", os.W_OK) or os.geteuid() != 0:
        pytest.skip("a tiny file system needs root and mount")
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "none", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a tiny file system needs the right to mount one")
    try:
        done = edge_sd("generate", "a cat, 3d", "--seed", "1", "--steps", "2", "-o", str(small / "x.png"), cwd=tmp_path)
        assert done.returncode == 2
        assert "No space left on device" in done.stderr.splitlines()[-1]
        assert os.listdir(small) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_models_are_listed_shown_and_verified(tmp_path: Path) -> None:
    listed = json.loads(edge_sd("models", "list", "--json", cwd=tmp_path).stdout)
    assert [row["name"] for row in listed] == ["emoji"]
    assert "dB against torch float32" in edge_sd("models", "show", "emoji", cwd=tmp_path).stdout
    assert "as the manifest says" in edge_sd("models", "verify", "emoji", cwd=tmp_path).stdout


def test_verify_exits_with_1_for_a_damaged_model(tmp_path: Path, emoji: Path) -> None:
    import shutil

    shutil.copytree(emoji, tmp_path / "m")
    with (tmp_path / "m/tokenizer/merges.txt").open("a") as file:
        file.write(" ")
    done = edge_sd("models", "verify", "m", cwd=tmp_path)
    assert done.returncode == 1
    assert "merges.txt" in done.stdout


def test_a_missing_extra_is_an_error_with_the_install_line(tmp_path: Path) -> None:
    """As in a light installation: torch cannot be found."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\nreal = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'torch' else real(name, *a)\n"
    )
    done = edge_sd("compare", "bits", "b", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert '[convert]"' in done.stderr
    done = edge_sd("convert", "emoji", "b", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    assert '[convert]"' in done.stderr


def test_the_help_page_begins_with_generate_and_help_is_a_word_for_it(tmp_path: Path) -> None:
    whole, asked, one, other = (
        edge_sd(*arguments, cwd=tmp_path, COLUMNS="80").stdout
        for arguments in (["--help"], ["help"], ["help", "generate"], ["generate", "--help"])
    )
    assert whole == asked
    assert one == other
    assert max(map(len, whole.splitlines())) <= 80
    named = re.findall(r"^│ ([a-z]+) ", whole, re.MULTILINE)
    assert named[:2] == ["generate", "run"]
    assert len(named) == len(set(named)) >= 19
    completed = edge_sd(cwd=tmp_path, _EDGE_SD_COMPLETE="complete_bash", COMP_WORDS="edge-sd gen", COMP_CWORD="1")
    assert completed.stdout.strip() == "generate"


def test_help_and_version(tmp_path: Path) -> None:
    for arguments in (["--help"], ["generate", "--help"], ["models", "--help"], ["train", "--help"]):
        assert edge_sd(*arguments, cwd=tmp_path).returncode == 0
    assert re.fullmatch(r"edge-sd \d+\.\d+\.\d+\n", edge_sd("--version", cwd=tmp_path).stdout)


def test_a_controlnet_that_a_model_lacks_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    Image.new("RGB", (128, 128), "white").save(tmp_path / "star.png")
    done = edge_sd("generate", "a cookie", "--control", "star.png", "--control-net", "depth", "-o", "cookie.png",
                   cwd=tmp_path)  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert re.search(r"has no controlnet\S*depth, which a control picture needs; it has: controlnet", done.stderr)
    assert not (tmp_path / "cookie.png").exists()


def test_a_part_of_a_picture_is_drawn_anew_and_the_rest_stays(tmp_path: Path) -> None:
    before = Image.effect_noise((128, 128), 60).convert("RGB")
    before.save(tmp_path / "before.png")
    mask = Image.new("L", before.size)
    mask.paste(255, (64, 0, 128, 128))
    mask.save(tmp_path / "mask.png")
    done = edge_sd("generate", "a red heart", "--image", "before.png", "--mask", "mask.png", "--mask-blur", "0",
                   "--steps", "4", "-o", "after.png", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "after.png") as image:
        after = np.asarray(image)
    assert np.array_equal(after[:, :64], np.asarray(before)[:, :64])
    assert not np.array_equal(after[:, 64:], np.asarray(before)[:, 64:])
    assert b"before" not in (tmp_path / "after.png").read_bytes()
