"""Measuring: what is asked, what is measured, what is remembered, and that nothing which fails there fails here."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sd import Pipeline
from edge_sd.backends import AllBackends, Device, LoadRequest
from edge_sd.backends.fake import FakeBackend, fake_bundle
from edge_sd.bundle.bundle import ModelBundle
from edge_sd.components.base import Array, Component
from edge_sd.devices.choose import choose
from edge_sd.devices.discovery import Here
from edge_sd.devices.measurements import Measured, Row, measurements_file, remember, remembered
from edge_sd.devices.planning import plan_here
from edge_sd.devices.probe import Probe
from edge_sd.devices.tuning import PROBE, all_rows, first_use, tune, undecided
from edge_sd.errors import DeviceError, InvalidRequest, OutputError
from edge_sd.images.metrics import CEILING, finite, psnr
from edge_sd.machine import Machine
from edge_sd.sampling.schedule import NoiseSchedule

from .invented import EMOJI, MACHINES, SD15, invented, openvino, pc

TWO = ("first", "second")
PARTS = ("text_encoder", "unet", "vae_decoder")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGE_SD_CACHE", str(tmp_path))
    return tmp_path


def probe(backend: FakeBackend) -> Probe:
    schedule = NoiseSchedule(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    return Probe(fake_bundle(schedule), backend)


# What is measured.


@pytest.mark.parametrize("part", PARTS)
def test_the_first_is_the_reference_and_the_others_are_held_beside_it(part: str) -> None:
    measuring = probe(FakeBackend(devices=TWO))
    first, second = (measuring.measure(part, "fake", f"fake:{name}") for name in TWO)
    assert (first.failure, second.failure) == ("", "")
    assert first.psnr == CEILING
    assert 30 < second.psnr < 60, "one per cent more of everything"
    assert first.call > 0


@pytest.mark.parametrize(
    ("fault", "told"),
    [("nan", "the unet returned NaN"), ("flat", "returned one flat value"), ("raise", "the device was lost"),
     ("memory", "out of memory"), ("refuse", "first refused unet")],
)  # fmt: skip
def test_what_fails_is_a_reason_and_the_next_is_measured(fault: str, told: str) -> None:
    measuring = probe(FakeBackend("unet", devices=TWO, fault=fault))
    failed, sound = (measuring.measure("unet", "fake", f"fake:{name}") for name in TWO)
    assert told in failed.failure
    assert sound.failure == ""
    assert measuring.measure("unet", "fake", "fake:third").failure == "the device is gone"


def test_another_result_than_the_references_is_a_failure() -> None:
    class Inverting(FakeBackend):
        def load(self, request: LoadRequest) -> Component:
            component = super().load(request)
            return _Inverted(component) if request.device.name == "second" else component

    measuring = probe(Inverting(devices=TWO))
    measuring.measure("unet", "fake", "fake:first")
    assert "another than the reference's" in measuring.measure("unet", "fake", "fake:second").failure


class _Inverted:
    def __init__(self, component: Component) -> None:
        self.component = component
        self.bind, self.close = component.bind, component.close

    def __call__(self, **inputs: Array) -> dict[str, Array]:
        return {name: -value for name, value in self.component(**inputs).items()}


@given(st.integers(0, 2**32 - 1), st.floats(1e-3, 1e3), st.floats(-100, 100))
@settings(max_examples=30, deadline=None)
def test_psnr_counts_tenths_of_the_range(seed: int, scale: float, shift: float) -> None:
    reference = np.random.default_rng(seed).uniform(size=64)
    reference = (reference - reference.min()) / np.ptp(reference)
    for tenths, expected in ((0.1, 20.0), (0.01, 40.0)):
        found = (reference + tenths) * scale + shift
        assert psnr(found, reference * scale + shift) == pytest.approx(expected, abs=1e-6)
    assert finite(psnr(reference, reference)) == CEILING


# What is asked.


def test_a_quick_picture_or_a_single_device_is_no_question() -> None:
    for name in MACHINES:
        machine, devices = invented(name)
        if any(device.backend == "openvino" for device in devices):
            plan = choose(EMOJI, devices, machine=machine)
            assert undecided(EMOJI, devices, machine, plan, {}) == [], f"the embedded model on {name}"
    plan = choose(SD15, openvino("cpu"), machine=pc())
    assert undecided(SD15, openvino("cpu"), pc(), plan, {}) == []


def test_a_question_is_asked_once_and_of_the_fastest_only() -> None:
    machine, devices = invented("Meteor Lake")
    plan = choose(SD15, devices, machine=machine)
    rows = undecided(SD15, devices, machine, plan, {})
    assert {(part, place) for part, _, place in rows} == {
        ("unet", f"openvino:{name}") for name in ("cpu", "gpu", "npu")
    }
    assert undecided(SD15, devices, machine, plan, {rows[0]: Measured(failure="not done")}) == []
    for preference in ("quality", "memory"):
        other = choose(SD15, devices, machine=machine, preference=preference)
        assert undecided(SD15, devices, machine, other, {}) == []


def test_all_rows_leave_out_what_is_never_chosen() -> None:
    machine, devices = invented("EPYC, AVX2")
    rows = all_rows(SD15, devices, machine)
    assert {row[1] for row in rows} == {"openvino-fp16", "openvino-int8"}
    assert rows[0] == ("unet", "openvino-fp16", "openvino:cpu"), "the best is the reference"


# The process that measures. Stand-ins for it are a few lines of Python each.

GOOD = """
import json, os, sys, time
rows = json.loads(sys.stdin.read())["rows"]
print(json.dumps({"ready": True}), flush=True)
for part, variant, place in rows:
    print("a driver says hello", flush=True)
    %s
    print(json.dumps({"load": 1.0, "call": 0.5, "psnr": 40.0, "failure": ""}), flush=True)
"""
CRASH = 'if place == "openvino:gpu": os.abort()'
HANG = 'if place == "openvino:gpu": time.sleep(600)'
ROWS: list[Row] = [("unet", "openvino-fp16", f"openvino:{name}") for name in ("cpu", "gpu", "npu")]


def stand_in(line: str) -> list[str]:
    return [sys.executable, "-c", GOOD % line]


@pytest.fixture
def here(emoji: Path) -> tuple[ModelBundle, list[Device], Machine]:
    return ModelBundle.open(emoji), openvino("cpu", "gpu-arc", "npu4"), pc()


def test_a_crash_is_that_places_failure_and_the_rest_is_measured(
    here: tuple[ModelBundle, list[Device], Machine],
) -> None:
    told: list[Row] = []
    tuning = tune(*here, ROWS, 60, lambda row, measured: told.append(row), stand_in(CRASH))
    assert tuning.left == []
    assert told == ROWS
    assert [bool(tuning.found[row].failure) for row in ROWS] == [False, True, False]
    assert "its process" in tuning.found[ROWS[1]].failure
    assert "a driver says hello" in tuning.found[ROWS[1]].failure
    assert remembered(*here)[0] == tuning.found


def test_what_hangs_has_failed_and_the_rest_is_measured(here: tuple[ModelBundle, list[Device], Machine]) -> None:
    tuning = tune(*here, ROWS, 120, command=stand_in(HANG), patience=2)
    assert tuning.found[ROWS[1]].failure == "not loaded and run within 2 s"
    assert tuning.left == []


def test_the_budget_leaves_the_rest_an_estimate(here: tuple[ModelBundle, list[Device], Machine]) -> None:
    tuning = tune(*here, ROWS, 1.5, command=stand_in(HANG))
    # Starting Python may take longer than that on a busy machine.
    assert tuning.left == [row for row in ROWS if row not in tuning.found]
    assert tuning.left[-2:] == ROWS[1:]
    assert not any(measured.failure for measured in tuning.found.values())


def test_measuring_that_cannot_start_remembers_nothing(here: tuple[ModelBundle, list[Device], Machine]) -> None:
    with pytest.raises(
        DeviceError, match=r"could not start: its process ended with exit code 1 \(NameError: .*nonsense"
    ):
        tune(*here, ROWS, 60, command=[sys.executable, "-c", "nonsense"])
    assert remembered(*here) == ({}, "")


def test_first_use_says_one_line_and_survives_a_disk_that_is_full(
    here: tuple[ModelBundle, list[Device], Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    import edge_sd.devices.tuning as tuning

    def full(*_: object) -> None:
        raise OutputError("no space left")

    machine, devices = invented("Meteor Lake")
    bundle = replace(SD15, root=here[0].root)
    monkeypatch.setattr(ModelBundle, "check", lambda *_: None)
    monkeypatch.setattr(tuning, "remember", full)
    monkeypatch.setattr(tuning.tune, "__defaults__", (60.0, print, stand_in("pass"), 60.0))
    lines: list[str] = []
    found = first_use(bundle, devices, machine, choose(bundle, devices, machine=machine), {}, lines.append)
    assert lines[0].startswith("first use of invented here: measuring ")
    assert lines[0].endswith("once, 20 s at most")
    assert lines[1:] == ["no space left"]
    assert {measured.call for measured in found.values()} == {0.5}


def test_a_first_use_that_reached_nothing_is_not_repeated(
    here: tuple[ModelBundle, list[Device], Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine, devices = invented("Meteor Lake")
    monkeypatch.setattr("edge_sd.devices.tuning.tune", lambda *_: None)
    plan = choose(SD15, devices, machine=machine)
    found = first_use(SD15, devices, machine, plan, {}, lambda line: None)
    assert [measured.failure for measured in found.values()] == ["not loaded and run within 20 s"]
    known, _ = remembered(SD15, devices, machine)
    assert known == found
    assert first_use(SD15, devices, machine, plan, known, pytest.fail) == {}


def test_the_first_command_of_the_readme_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr("subprocess.Popen", never)
    told: list[str] = []
    with Pipeline.open("emoji", tell=told.append):
        assert told == []


def test_the_real_thing(emoji: Path) -> None:
    """The embedded model on OpenVINO's CPU, in a process of its own; what it found is in the next plan."""
    bundle, devices, machine = ModelBundle.open(emoji), AllBackends().devices(), pc()
    rows = all_rows(bundle, devices, machine)
    assert {row[0] for row in rows} == set(PARTS)
    tuning = tune(bundle, devices, machine, rows, 120)
    assert {measured.failure for measured in tuning.found.values()} == {""}, tuning
    known, note = remembered(bundle, devices, machine)
    assert (known, note) == (tuning.found, "")
    plan = choose(bundle, devices, machine=machine, measured=known)
    assert "measured here" in plan.summary()
    assert PROBE[0] == sys.executable


# What is remembered.

NUMBERS = st.floats(0, 1e6)
ROW = st.tuples(st.sampled_from(PARTS), st.sampled_from(sorted(SD15.variants)), st.text(max_size=20))


@given(st.dictionaries(ROW, st.builds(Measured, NUMBERS, NUMBERS, st.floats(-100, 100), st.text(max_size=50))))
@settings(max_examples=10, deadline=None)
def test_what_was_measured_comes_back(found: dict[Row, Measured]) -> None:
    machine, devices = pc(), openvino("cpu")
    measurements_file(devices, machine).unlink(missing_ok=True)
    remember(SD15, devices, machine, found)
    assert remembered(SD15, devices, machine) == (found, "")


def test_other_drivers_weights_and_machines_know_nothing_of_it() -> None:
    machine, devices = pc(), openvino("cpu", "npu4")
    row = ("unet", "openvino-fp16", "openvino:npu")
    remember(SD15, devices, machine, {row: Measured(1, 1, 40)})
    assert row in remembered(SD15, devices, machine)[0]
    assert remembered(SD15, [devices[0], replace(devices[1], driver="2")], machine)[0] == {}
    assert remembered(SD15, devices, replace(machine, cores=2))[0] == {}
    assert row in remembered(SD15, devices, replace(machine, free=1, on_battery=True))[0], "these come and go"
    assert remembered(EMOJI, devices, machine)[0] == {}


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"format": 1}', '{"format": 2, "rows": {}}', '{"format": 1, "rows": []}', "[" * 100_000,
     '{"format": 1, "rows": {"x": [{"part": "unet"}]}}', "\0", '{"format": 1, "rows": {"x": 1}}',
     '{"format": 1, "rows": {"x": [{"part": "unet", "place": "a", "failure": "", "load": NaN, "call": 1, "psnr": 1}]}}',
     '{"format": 1, "rows": {"x": [{"part": "unet", "place": "a", "failure": "", "load": -1, "call": 1, "psnr": 1}]}}'],
)  # fmt: skip
def test_a_damaged_file_counts_as_none_and_is_replaced(text: str) -> None:
    machine, devices = pc(), openvino("cpu")
    path = measurements_file(devices, machine)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    found, note = remembered(SD15, devices, machine)
    assert found == {}
    assert str(path) in note
    assert note.endswith("it is ignored")
    row = ("unet", "openvino-fp16", "openvino:cpu")
    remember(SD15, devices, machine, {row: Measured(1, 1, 40)})
    assert remembered(SD15, devices, machine) == ({row: Measured(1, 1, 40)}, "")
    assert json.loads(path.read_text())["format"] == 1


def test_a_place_that_cannot_be_written_is_one_line(home: Path) -> None:
    (home / "measured").write_text("a file where a folder is needed")
    with pytest.raises(OutputError, match="nothing is remembered"):
        remember(SD15, openvino("cpu"), pc(), {("unet", "openvino-fp16", "openvino:cpu"): Measured()})


def test_messages_do_not_start_measuring(
    here: tuple[ModelBundle, list[Device], Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine, devices = invented("Meteor Lake")
    bundle = replace(SD15, root=here[0].root)
    measured: list[Row] = []
    monkeypatch.setattr("edge_sd.devices.tuning.tune", lambda *given: measured.extend(given[3]))
    found, lines = Here(AllBackends(), devices, machine), []
    plan_here(bundle, found, "auto", None, "speed", lines.append)
    assert (measured, lines) == ([], [])
    plan_here(bundle, found, "auto", None, "speed", lines.append, measure=True)
    assert {row[0] for row in measured} == {"unet"}
    assert lines[0].startswith("first use of invented here")


def test_opening_a_pipeline_measures_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("edge_sd.devices.tuning.first_use", lambda *_: asked.append("") or {})
    lines: list[str] = []
    Pipeline.open(tell=lines.append).close()
    assert asked == []
    Pipeline.open(tell=lines.append, measure=True).close()
    assert asked == [""]
    plan = choose(EMOJI, openvino("cpu"), machine=pc())
    with pytest.raises(
        InvalidRequest, match="a plan has devices and variants in it; give no device, variant or preset"
    ):
        Pipeline.open(device="cpu", plan=plan)
