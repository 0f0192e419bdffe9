"""`edge-sd batch`: every row a picture, once, whatever ends the process on the way."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edge_sd import Pipeline, Request, machine
from edge_sd.apps import cli
from edge_sd.apps.batch import commands, drawing, manifest
from edge_sd.apps.batch.place import Place
from edge_sd.apps.batch.rows import read_rows
from edge_sd.errors import InvalidRequest
from edge_sd.pipeline.recorded import read_recorded

from ..faults.account import Tally
from .test_cli import edge_sd

SMALL = ("--steps", "1", "--size", "64")
# The process kills itself before its Nth call of those that change the disk, or that call fails.
DISTURBED = """
import errno, os, signal, sys
left, kill = int(sys.argv.pop(1)), sys.argv.pop(1) == "kill"
def disturbed(real):
    def call(*given, **named):
        global left
        left -= 1
        if left == 0 and kill:
            os.kill(os.getpid(), signal.SIGKILL)
        if left == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*given, **named)
    return call
for name in ("fsync", "link", "replace"):
    setattr(os, name, disturbed(getattr(os, name)))
from edge_sd.apps.cli import main
main()
"""


def disturbed(call: int, how: str, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", DISTURBED, str(call), how, "batch", *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def lines(folder: Path) -> list[dict[str, Any]]:
    """The manifest's lines, without the first."""
    if not (folder / manifest.NAME).exists():
        return []
    whole = (folder / manifest.NAME).read_bytes().rpartition(b"\n")[0]
    return [json.loads(line) for line in whole.splitlines()[1:]]


def kept(folder: Path) -> dict[str, tuple[int, str]]:
    """Each picture's file -> what tells that it was not written again, and its hash."""
    return {
        path.name: (path.stat().st_ino, hashlib.sha256(path.read_bytes()).hexdigest()) for path in folder.glob("*.png")
    }


def write_rows(path: Path, rows: int) -> None:
    """Rows of which no two are drawn together: that would compile another UNet in every process."""
    path.write_text("".join(json.dumps({"prompt": f"{n} cats", "guidance": 2 + n / 99}) + "\n" for n in range(rows)))


def check_complete(folder: Path, rows: int) -> None:
    """Each row has one picture, each picture one line with its hash, and nothing else lies there."""
    found = kept(folder)
    assert len(found) == rows
    assert {line["file"]: line["sha256"] for line in lines(folder)} == {name: row[1] for name, row in found.items()}
    assert [line["row"] for line in sorted(lines(folder), key=lambda line: line["row"])] == [*range(1, rows + 1)]
    assert {path.name for path in folder.iterdir()} == {*found, manifest.NAME}


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each picture alone: measuring whether several go faster together compiles two more UNets."""
    monkeypatch.setattr(drawing, "Queue", partial(drawing.Queue, most=1))


def drawn(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    """What --json says of the same in this process."""
    cli.app(["batch", *words, "--json"], standalone_mode=False)
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_each_row_is_the_picture_that_the_pipeline_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.csv").write_text(
        'prompt,seed,steps,negative\n"a red apple, glossy style",7,2,\na cat,,2,a dog\n"a dog, 3d",3,,\n', "utf-8-sig"
    )
    report = drawn(capsys, "p.csv", "--steps", "1", "--contact-sheet")
    assert [row["row"] for row in report["pictures"]] == [1, 2, 3]
    assert report["contact_sheets"] == ["p/contact-sheet.png"]
    requests = [
        Request("a red apple, glossy style", seed=7, steps=2),
        Request("a cat", seed=report["pictures"][1]["seed"], steps=2, negative="a dog"),
        Request("a dog, 3d", seed=3, steps=1),
    ]
    with Pipeline.open("emoji") as pipeline:
        for row, request in zip(report["pictures"], requests, strict=True):
            with Image.open(f"p/{row['file']}") as image:
                alone = pipeline.generate(request).pictures[0].image
                # Drawn together with others, they differ by the rounding of another batch.
                assert np.abs(np.asarray(image, float) - np.asarray(alone, float)).max() <= 2
    cli.app(["generate", "--prompts", "p.csv", "--output", "p", "--steps", "1"], standalone_mode=False)
    again = capsys.readouterr()
    assert (again.out, again.err) == ("", "3 pictures into p, 3 of them done before\n")
    for words, said in (
        (["a cat", "--prompts", "p.csv"], "no prompt beside it"),
        (["--prompts", "p.csv", "--grid"], "no --grid"),
        (["--prompts", "p.csv", "--output", "x.png"], "need a folder"),
    ):
        with pytest.raises(InvalidRequest, match=said):
            cli.app(["generate", *words], standalone_mode=False)


@pytest.mark.usefixtures("alone")
def test_a_file_that_grew_draws_what_is_new_and_a_picture_that_is_gone_is_drawn_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [
        {"prompt": "a cat", "count": 2, "seed": "4"},
        {"prompt": "a cat", "guidance": 3},
        {"prompt": "a cat", "guidance": 3},
    ]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    first = drawn(capsys, "p.jsonl", *SMALL)["pictures"]
    assert len({row["seed"] for row in first}) == 4, "the same row twice is two pictures"
    before, gone = kept(Path("p")), first[2]["file"]
    Path("p", gone).unlink()
    Path("p.jsonl").write_text("\n".join(map(json.dumps, [{"prompt": "a dog", "seed": 1}, *rows])))
    second = drawn(capsys, "p.jsonl", *SMALL)["pictures"]
    assert [row["seed"] for row in second] == [1, *(row["seed"] for row in first)]
    after = kept(Path("p"))
    assert {name: after[name] for name in before if name != gone} == {n: row for n, row in before.items() if n != gone}
    # Its number is another one by now.
    assert after[second[3]["file"]][1] == before[gone][1]
    assert len(after) == 5


@pytest.mark.fault(25, "kill -9 of `batch` at a call that changes the disk")
def test_a_kill_at_any_call_loses_nothing_and_draws_nothing_twice(tmp_path: Path, tally: Tally) -> None:
    kills, rows = tally.count(50), 0
    folder = tmp_path / "p"
    killed = 0
    while killed < kills:
        rows += 4
        write_rows(tmp_path / "p.jsonl", rows)
        before = kept(folder)
        # A picture takes four to five calls: kills come before each of them, from the first picture's to the last's.
        done = disturbed(1 + (5 * killed + killed // 5) % 11, "kill", "p.jsonl", *SMALL, cwd=tmp_path)
        with tally.trial(f"kill {killed}"):
            assert done.returncode == -signal.SIGKILL, done.stderr
            after = kept(folder)
            assert {name: after.get(name) for name in before} == before, "what was there was written again, or is gone"
            listed = {line["file"]: line["sha256"] for line in lines(folder)}
            assert listed.items() <= {name: row[1] for name, row in after.items()}.items()
            assert len(after) - len(listed) <= 1, "a picture waits for its line at most for a moment"
        killed += 1
    # A power cut tore the last line.
    path = folder / manifest.NAME
    path.write_bytes(path.read_bytes()[:-7])
    before = kept(folder)
    done = edge_sd("batch", "p.jsonl", *SMALL, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    after = kept(folder)
    assert {name: after.get(name) for name in before} == before
    check_complete(folder, rows)


@pytest.mark.fault(25, "a full disk at a call of `batch`")
def test_a_full_disk_is_one_line_and_the_next_run_goes_on(tmp_path: Path, tally: Tally) -> None:
    write_rows(tmp_path / "p.jsonl", 2)
    for n in range(tally.count(10)):
        with tally.trial(f"call {n + 1}"):
            done = disturbed(4 * n % 11 + 1, "full", "p.jsonl", *SMALL, "-o", f"p{n}", cwd=tmp_path)
            if done.returncode:
                # Only the cache of compiled graphs may do without; a picture and its line may not.
                assert (done.returncode, done.stderr.splitlines()[-1].count("No space left on device")) == (2, 1)
            done = edge_sd("batch", "p.jsonl", *SMALL, "-o", f"p{n}", cwd=tmp_path)
            assert done.returncode == 0, done.stderr
            check_complete(tmp_path / f"p{n}", 2)


def test_control_c_stops_within_a_step_and_keeps_what_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.jsonl").write_text('{"prompt":"a cat","steps":1,"size":64}\n{"prompt":"a dog","steps":1000}\n')
    words = [sys.executable, "-m", "edge_sd", "batch", "p.jsonl"]
    with subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(InvalidRequest, match="another batch is drawing into p"):
            commands.draw_batch("p.jsonl", WISHES, PLACE, None, commands.How())
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert time.monotonic() - started < 5
    assert len(kept(tmp_path / "p")) == len(lines(tmp_path / "p")) == 1


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("p.csv", "prompt,flavour\na cat,sweet\n", "p.csv line 2: unknown option 'flavour'; valid: clip_skip, colour"),
        ("p.csv", "prompt;steps\na cat;ten\n", "p.csv line 2: steps 'ten' is not a whole number"),
        ("p.csv", "prompt,steps\na cat\n", "p.csv line 2 has 1 cells, its first line 2 columns"),
        ("p.csv", "prompt,prompt\na,b\n", "two columns 'prompt'"),
        ("p.csv", 'prompt\n"a cat\n', "p.csv line 2: unexpected end of data"),
        ("p.csv", "steps\n5\n", "p.csv line 2: there is no prompt"),
        ("p.csv", "prompt,size,width\na,64,64\n", "size is given beside width or height"),
        ("p.jsonl", '{"prompt": "a cat", "steps": 20.5}', "p.jsonl line 1: steps 20.5 is not a whole number"),
        ("p.jsonl", '{"prompt": "a cat"}\n[1]', "p.jsonl line 2 holds a list"),
        ("p.jsonl", "{" * 99_999, "p.jsonl line 1 is not valid JSON"),
        ("p.jsonl", '{"prompt": {"a": 1}}', "prompt is dict, not one value"),
        ("p.jsonl", '{"prompt": "a cat", "zero_snr": "maybe"}', "zero_snr 'maybe' is neither true nor false"),
        ("p.jsonl", '{"prompt": "a cat", "Clip-Skip": 1, "clip_skip": 2}', "clip_skip is given twice"),
        ("p.txt", "a cat\n\n" + "x" * 20_001, "p.txt line 3: the prompt has 20001 characters"),
        ("p.txt", "\n \n", "holds no rows"),
        ("p.xls", "a cat", "rows are read from .csv, .jsonl, .ndjson, .txt"),
        ("p.jsonl", '{"prompt": "a cat", "image": "no.png"}', "p.jsonl line 1: "),
        ("p.jsonl", '{"prompt": "a cat", "size": "1024"}', "p.jsonl line 1: width 1024 is beyond this model's limit"),
    ],
)
def test_a_mistake_in_a_row_is_named_before_anything_is_drawn(
    name: str, text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(text)
    with pytest.raises(InvalidRequest) as caught:
        commands.draw_batch(name, WISHES, PLACE, None, commands.How())
    assert said in str(caught.value)
    assert os.listdir() == [name]


PLACE = Place("emoji", None, "auto", "speed", "exact", False)
WISHES: dict[str, Any] = dict.fromkeys(
    ["size", "lora", "embedding", "extend", "reference", "seed", "count", "control", "control_weight",
     "control_start", "control_end", "control_reading", "control_net"]
)  # fmt: skip


def test_rows_hold_every_option_of_a_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.png"):
        Image.new("RGB", (64, 64)).save(name)
    Path("p.csv").write_text(
        "prompt\tControl\tcontrol-weight\tsize\tseed\tcolour\timage\textend\treference\n"
        "a cat\ta.png|b.png\t0.5\t64x128\t5-7\tyes\ta.png\t\t\na dog\t\t\t\t\t\ta.png\t0,8,0,0\ta.png|b.png\n"
    )
    first, second = read_rows("p.csv", None, {**WISHES, "steps": 3})
    assert first.request.controls[1].weight == 0.5
    assert [str(each.image) for each in first.request.controls] == ["a.png", "b.png"]
    assert (first.request.width, first.request.height, first.request.seed, first.request.count) == (64, 128, 5, 3)
    assert first.request.colour
    assert (second.request.steps, second.request.extend, second.request.seed) == (3, (0, 8, 0, 0), None)
    assert second.request.references == (Path("a.png"), Path("b.png"))
    key = manifest._plain(second.fields)
    Image.new("RGB", (64, 64), "red").save("b.png")
    manifest._hash.cache_clear()
    assert manifest._plain(second.fields) != key, "another file is another picture"


@pytest.mark.usefixtures("alone")
def test_a_manifest_names_no_file_but_its_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("a cat")
    (row,) = drawn(capsys, "p.txt", *SMALL)["pictures"]
    whole = Path("p", manifest.NAME).read_text()
    Path("p", manifest.NAME).write_text(whole.replace(row["file"], "../elsewhere.png"))
    report = drawn(capsys, "p.txt", *SMALL, "--contact-sheet")
    assert report["pictures"] == [row]
    # A picture that was given another name, up to its key, keeps that.
    Path("p", row["file"]).rename(f"p/best-{row['key']}.png")
    (again,) = drawn(capsys, "p.txt", *SMALL)["pictures"]
    assert again == {**row, "file": f"best-{row['key']}.png"}
    for damaged in ('{"edge_sd_batch": 2, "seed": 1}\n', "[]\n", '{"edge_sd_batch": 1, "seed": 1}\n{"key": 1}\n'):
        Path("p", manifest.NAME).write_text(damaged)
        with pytest.raises(InvalidRequest, match=r"batch\.jsonl is (damaged|of format 2)"):
            cli.app(["batch", "p.txt", *SMALL], standalone_mode=False)


def test_another_file_under_the_same_name_is_another_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.jsonl").write_text('{"prompt": "a cat", "image": "a.png"}')
    keys = set()
    for colour in ("red", "blue"):
        Image.new("RGB", (64, 64), colour).save("a.png")
        manifest._hash.cache_clear()
        rows = read_rows("p.jsonl", None, WISHES)
        keys |= {job.key for job in manifest.Manifest(tmp_path / "p").jobs(rows, {})}
    assert len(keys) == 2


@pytest.mark.usefixtures("alone")
def test_a_row_that_fails_is_said_and_tried_again_and_the_others_are_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64), "red").save("a.png")
    Path("p.jsonl").write_text('{"prompt":"a cat","image":"a.png","steps":2}\n{"prompt":"a dog","size":64,"steps":1}')
    check = commands.check
    monkeypatch.setattr(commands, "check", lambda *given: (check(*given), Path("a.png").rename("b.png")))
    with pytest.raises(commands.typer.Exit) as caught:
        commands.draw_batch("p.jsonl", WISHES, PLACE, None, commands.How())
    assert caught.value.exit_code == 1
    assert [line["row"] for line in lines(tmp_path / "p")] == [2]
    monkeypatch.setattr(commands, "check", check)
    Path("b.png").rename("a.png")
    commands.draw_batch("p.jsonl", WISHES, PLACE, None, commands.How())
    check_complete(tmp_path / "p", 2)


def test_it_waits_on_a_battery_that_is_low(monkeypatch: pytest.MonkeyPatch) -> None:
    states = [machine.Machine(on_battery=True, charge=20), machine.Machine(on_battery=True, charge=29)]
    states += [machine.Machine(on_battery=False, charge=29)]
    waited: list[float] = []
    said: list[str] = []
    monkeypatch.setattr(machine, "this_machine", lambda: states.pop(0))
    monkeypatch.setattr(commands.time, "sleep", waited.append)
    commands._battery(30, said.append)()
    assert (waited, said) == ([30.0, 30.0], ["the battery is at 20 %, below 30 %: waiting for mains"])
    commands._battery(None, said.append)()
    assert states == []


def test_a_model_that_is_not_here_is_not_pulled_unless_that_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a cat")
    done = edge_sd("batch", "p.txt", "--model", "org/name", cwd=tmp_path, EDGE_SD_MODELS=str(tmp_path / "models"))
    assert done.returncode == 2
    assert "--allow-download pulls it" in done.stderr
    assert os.listdir(tmp_path) == ["p.txt"]


@pytest.mark.usefixtures("alone")
def test_the_pictures_of_jpeg_batches_carry_their_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"prompt": "a cat"}\n')))
    (row,) = drawn(capsys, "-", *SMALL, "--type", "jpg")["pictures"]
    assert read_recorded(Path("batch", row["file"])).settings["prompt"] == "a cat"
