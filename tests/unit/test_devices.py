"""Choosing, as a table of machines that are not here, and as rules that hold for all of them.

A row's last word is the plan: variants, then the places of text encoder, UNet and decoder. The figures behind them are
estimates, so a row that changes is a question to look at, not always a mistake; the rules below the table always hold.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sd.apps.drawing import parse_device
from edge_sd.backends import AllBackends, Device
from edge_sd.bundle.bundle import ModelBundle
from edge_sd.converters.recipes import RECIPES
from edge_sd.devices.choose import PREFERENCES, SHARE_OF_FREE, choose, plausible
from edge_sd.devices.discovery import Here
from edge_sd.devices.estimates import BITS, TYPICAL_PSNR
from edge_sd.devices.measurements import Measured, place_of
from edge_sd.devices.plan import DevicePlan
from edge_sd.devices.planning import check_plan, plan_here
from edge_sd.devices.rules import macos_needed
from edge_sd.errors import DeviceError, InvalidRequest, MissingExtra, VariantNotFound
from edge_sd.machine import Machine

from .invented import APPLE, EMOJI, GB, MACHINES, PARTS, REFERENCE, SD15, invented, mac, openvino, pc

TABLE = [
    ("M1 8 GB, macOS 13", SD15, "speed", "coreml-ane-p6: cpu ane gpu"),
    ("M1 8 GB, macOS 13, little free", SD15, "speed", "coreml-ane-p6: ane ane ane"),
    ("M1 8 GB, macOS 14", SD15, "speed", "coreml-ane-p6: cpu ane gpu"),
    ("M1, macOS 15", SD15, "speed", "coreml-ane-p6: cpu ane gpu"),
    ("M1 Pro", SD15, "speed", "coreml-ane-p6: cpu ane gpu"),
    ("M1 Max, macOS 15", SD15, "speed", "coreml-gpu-fp16: cpu gpu gpu"),
    ("M1 Ultra, macOS 13", SD15, "speed", "coreml-ane-p6: cpu ane gpu"),
    ("M2, macOS 15", SD15, "speed", "coreml-ane-p6: cpu ane gpu"),
    ("M2 Max, macOS 15", SD15, "speed", "coreml-gpu-fp16: cpu gpu gpu"),
    ("M3, macOS 14", SD15, "speed", "coreml-ane-p6: cpu ane gpu"),
    ("M4, macOS 15", SD15, "speed", "coreml-ane-p6: cpu ane gpu"),
    ("M4 Pro, macOS 15", SD15, "speed", "coreml-gpu-fp16: cpu gpu gpu"),
    ("M5, macOS 26", SD15, "speed", "coreml-gpu-fp16: cpu gpu gpu"),
    ("M1 with OpenVINO too", SD15, "speed", "coreml-ane-p6: cpu ane gpu"),
    ("M2, OpenVINO only", SD15, "speed", "openvino-fp16: cpu cpu cpu"),
    ("M4", EMOJI, "speed", "openvino-fp16: cpu cpu cpu"),
    ("Mac with Intel, macOS 13", SD15, "speed", "coreml-ane-fp16: cpu cpu gpu"),
    ("M2, memory not known", SD15, "speed", "coreml-ane-p6: cpu ane gpu"),
    ("Lunar Lake", SD15, "speed", "openvino-int8: cpu gpu gpu"),
    ("Lunar Lake on Windows", SD15, "speed", "openvino-int8: cpu gpu gpu"),
    ("Lunar Lake, no GPU driver", SD15, "speed", "openvino-int8: cpu npu npu"),
    ("Lunar Lake", EMOJI, "speed", "openvino-fp16: cpu cpu cpu"),
    ("Lunar Lake, 2 GB free", SD15, "speed", "openvino-int8: cpu gpu gpu tight"),
    ("Meteor Lake", SD15, "speed", "openvino-int8: cpu gpu gpu"),
    ("Meteor Lake, NPU only", SD15, "speed", "openvino-int8: cpu npu cpu"),
    ("Meteor Lake", EMOJI, "speed", "openvino-fp16: cpu cpu cpu"),
    ("Panther Lake", SD15, "speed", "openvino-int8: cpu gpu gpu"),
    ("Arrow Lake desktop", SD15, "speed", "openvino-int8: cpu gpu cpu"),
    ("Tiger Lake", SD15, "speed", "openvino-fp16: cpu gpu gpu"),
    ("Alder Lake", SD15, "speed", "openvino-fp16: cpu gpu gpu"),
    ("Kaby Lake, UHD 620", SD15, "speed", "openvino-fp16: cpu gpu gpu"),
    ("Kaby Lake, UHD 620", EMOJI, "speed", "openvino-fp16: cpu cpu cpu"),
    ("GPU without float16", SD15, "speed", "openvino-int8: cpu cpu cpu"),
    ("Core 2, no AVX2", SD15, "speed", "openvino-int8: cpu cpu cpu"),
    ("Celeron N4020, 4 GB", SD15, "speed", "openvino-int8: cpu gpu gpu tight"),
    ("Celeron, 1 GB free", SD15, "speed", "openvino-int8: cpu cpu cpu tight"),
    ("Arc A770", SD15, "speed", "openvino-int8: cpu gpu.1 gpu.1"),
    ("Arc A770 beside an iGPU", SD15, "speed", "openvino-int8: cpu gpu.1 gpu.1"),
    ("Arc A310, 2 GB of its own", SD15, "speed", "openvino-int8: cpu gpu.1 gpu.1"),
    ("Arc A770", EMOJI, "speed", "openvino-fp16: cpu cpu cpu"),
    ("Arc A770, 1 GB of RAM free", SD15, "speed", "openvino-int8: cpu gpu.1 gpu.1"),
    ("Ryzen, AVX2 only", SD15, "speed", "openvino-fp16: cpu cpu cpu"),
    ("Ryzen 7000, AVX-512 BF16", SD15, "speed", "openvino-fp16: cpu cpu cpu"),
    ("Ryzen, 3 GB free", SD15, "speed", "openvino-int8: cpu cpu cpu"),
    ("Ryzen, Windows", EMOJI, "speed", "openvino-fp16: cpu cpu cpu"),
    ("Xeon with AMX", SD15, "speed", "openvino-int8: cpu cpu cpu"),
    ("Xeon with AMX", EMOJI, "speed", "openvino-fp16: cpu cpu cpu"),
    ("Xeon with AMX, with torch", SD15, "speed", "openvino-int8: cpu cpu cpu"),
    ("Xeon, AVX-512", SD15, "speed", "openvino-fp16: cpu cpu cpu"),
    ("EPYC, AVX2", SD15, "speed", "openvino-fp16: cpu cpu cpu"),
    ("EPYC, AVX2", EMOJI, "speed", "openvino-fp16: cpu cpu cpu"),
    ("container, 1 core", SD15, "speed", "openvino-fp16: cpu cpu cpu"),
    ("container, 1 core EMOJI", EMOJI, "speed", "openvino-fp16: cpu cpu cpu"),
    ("container, 2 GB", SD15, "speed", "openvino-int8: cpu cpu cpu tight"),
    ("container, 512 MB", EMOJI, "speed", "openvino-fp16: cpu cpu cpu"),
    ("container, 256 MB", EMOJI, "speed", "openvino-fp16: cpu cpu cpu tight"),
    ("container on Graviton", SD15, "speed", "openvino-fp16: cpu cpu cpu"),
    ("Raspberry Pi 5, 8 GB", SD15, "speed", "openvino-fp16: cpu cpu cpu"),
    ("Raspberry Pi 4, 4 GB", SD15, "speed", "openvino-int8: cpu cpu cpu"),
    ("Raspberry Pi 4, 4 GB", EMOJI, "speed", "openvino-fp16: cpu cpu cpu"),
    ("nothing known but OpenVINO", SD15, "speed", "openvino-fp16: cpu cpu cpu"),
    ("Windows on Arm", SD15, "speed", "openvino-fp16: cpu cpu cpu"),
    ("M1, macOS 12", SD15, "speed", "VariantNotFound"),
    ("M2 Ultra, macOS 14", SD15, "speed", "coreml-ane-p6: cpu ane gpu"),
    ("M3 Pro, macOS 15", SD15, "speed", "coreml-gpu-fp16: cpu gpu gpu"),
    ("M3 Max, macOS 14", SD15, "speed", "coreml-ane-p6: cpu ane gpu"),
    ("M4 Max, macOS 26", SD15, "speed", "coreml-gpu-fp16: cpu gpu gpu"),
    ("M2 8 GB, macOS 15, 2 GB free", SD15, "speed", "coreml-ane-p6: cpu ane gpu"),
    ("M4 with 2 GB free and OpenVINO", SD15, "speed", "coreml-ane-p6: cpu ane gpu"),
    ("Ice Lake", SD15, "speed", "openvino-fp16: cpu gpu gpu"),
    ("Broadwell NUC", SD15, "speed", "openvino-fp16: cpu gpu gpu"),
    ("N100 mini PC", SD15, "speed", "openvino-fp16: cpu gpu gpu"),
    ("Atom, no AVX", SD15, "speed", "openvino-int8: cpu cpu cpu"),
    ("Steam Deck", SD15, "speed", "openvino-fp16: cpu cpu cpu"),
    ("Threadripper", SD15, "speed", "openvino-fp16: cpu cpu cpu"),
    ("EPYC Genoa, virtual, 8 cores", SD15, "speed", "openvino-fp16: cpu cpu cpu"),
    ("Sapphire Rapids, virtual, 2 cores", SD15, "speed", "openvino-fp16: cpu cpu cpu"),
    ("Haswell server", SD15, "speed", "openvino-fp16: cpu cpu cpu"),
    ("two Arc cards", SD15, "speed", "openvino-int8: cpu gpu.2 gpu.2"),
    ("Arc A770, Windows", SD15, "speed", "openvino-int8: cpu gpu.1 gpu.1"),
    ("Meteor Lake, 3 GB free", SD15, "speed", "openvino-int8: cpu gpu gpu"),
    ("Ampere Altra", SD15, "speed", "openvino-fp16: cpu cpu cpu"),
    ("Orange Pi 5, 16 GB", SD15, "speed", "openvino-fp16: cpu cpu cpu"),
    ("container, cgroup of 3 GB on a Xeon with AMX", SD15, "speed", "openvino-int8: cpu cpu cpu"),
    ("M1 8 GB, macOS 14", SD15, "battery", "coreml-ane-fp16: cpu ane ane"),
    ("M1 Max, macOS 15", SD15, "battery", "coreml-ane-fp16: cpu ane ane"),
    ("Lunar Lake", SD15, "battery", "openvino-int8: cpu npu gpu"),
    ("Meteor Lake", SD15, "battery", "openvino-fp16: cpu npu npu"),
    ("Arc A770", SD15, "battery", "openvino-int8: cpu gpu.1 gpu.1"),
    ("Ryzen, AVX2 only", SD15, "battery", "openvino-fp16: cpu cpu cpu"),
    ("Tiger Lake", SD15, "battery", "openvino-fp16: cpu gpu gpu"),
    ("M1 8 GB, macOS 14", SD15, "memory", "coreml-ane-p6: ane ane ane"),
    ("M4, macOS 15", SD15, "memory", "coreml-ane-p6: ane ane ane"),
    ("Lunar Lake", SD15, "memory", "openvino-int8: cpu gpu gpu"),
    ("Xeon with AMX", SD15, "memory", "openvino-int8: cpu cpu cpu"),
    ("Raspberry Pi 5, 8 GB", SD15, "memory", "openvino-int8: cpu cpu cpu"),
    ("Arc A770", SD15, "memory", "openvino-int8: cpu gpu.1 gpu.1"),
    ("M1, macOS 15", SD15, "quality", "coreml-ane-fp16: cpu ane gpu"),
    ("Lunar Lake", SD15, "quality", "openvino-fp16: cpu gpu gpu"),
    ("Xeon with AMX", SD15, "quality", "openvino-fp16: cpu cpu cpu"),
    ("Arc A770", SD15, "quality", "openvino-fp16: cpu gpu.1 gpu.1"),
    ("Ryzen 7000, AVX-512 BF16", SD15, "quality", "openvino-fp16: cpu cpu cpu"),
    ("M1 with OpenVINO too", SD15, "quality", "coreml-ane-fp16: cpu ane gpu"),
    ("Lunar Lake", EMOJI, "battery", "openvino-fp16: cpu cpu cpu"),
]


def short(plan: DevicePlan) -> str:
    placements = [plan.parts[part] for part in PARTS]
    variants = "+".join(dict.fromkeys(placement.variant for placement in placements))
    places = " ".join(placement.device.name for placement in placements)
    return f"{variants}: {places}{' tight' if plan.tight else ''}"


@pytest.mark.parametrize(("name", "bundle", "preference", "expected"), TABLE)
def test_the_table(name: str, bundle: ModelBundle, preference: str, expected: str) -> None:
    machine, devices = invented(name)
    if expected == "VariantNotFound":
        with pytest.raises(VariantNotFound, match="needs macOS 13"):
            choose(bundle, devices, machine=machine, preference=preference)
        return
    plan = choose(bundle, devices, machine=machine, preference=preference)
    assert short(plan) == expected
    json.dumps(plan.as_dict())


def test_every_machine_is_in_the_table() -> None:
    assert {row[0] for row in TABLE} == set(MACHINES)
    assert len(MACHINES) >= 60


@st.composite
def machines(draw: st.DrawFn) -> tuple[Machine, list[Device]]:
    machine, devices = invented(draw(st.sampled_from(sorted(MACHINES))))
    free = draw(st.one_of(st.just(machine.free), st.integers(0, 64 * GB)))
    return replace(machine, free=free), draw(
        st.permutations([*devices, *(each for each in REFERENCE if each not in devices)])
    )


@given(machines(), st.sampled_from(sorted(PREFERENCES)), st.sampled_from([SD15, EMOJI]))
@settings(max_examples=60, deadline=None)
def test_what_is_never_chosen_by_itself(
    here: tuple[Machine, list[Device]], preference: str, bundle: ModelBundle
) -> None:
    machine, devices = here
    try:
        plan = choose(bundle, devices, machine=machine, preference=preference)
    except VariantNotFound:
        assert not any(device.backend == "openvino" for device in devices)
        return
    fitting_or_told = plan.tight or plan.need[""] <= (machine.free * SHARE_OF_FREE or machine.memory or plan.need[""])
    assert fitting_or_told
    for part, placement in plan.parts.items():
        variant, device = bundle.variant(placement.variant), placement.device
        assert variant.backend == device.backend
        assert variant.defaults is None, "few-step variants draw other pictures"
        assert device.name != "coreml-reference"
        assert not (part == "text_encoder" and device.kind == "npu")
        if part == "unet":
            assert not (variant.compute == "ane" and device.kind == "gpu"), "split einsum is slow on a GPU"
            assert not (variant.compute == "gpu" and device.kind == "ane")
        if machine.system == "Darwin":
            assert macos_needed(variant.target) <= machine.os_version[0]
        if placement.cost.arithmetic == "bf16":
            assert device.features & {"BF16"} or machine.flags & {"BF16", "AMX-BF16"}
    # The order of devices says nothing, and neither does that of variants.
    turned = replace(bundle, variants=dict(reversed(list(bundle.variants.items()))))
    assert choose(turned, devices[::-1], machine=machine, preference=preference) == plan
    for row in plan.rejected:
        assert row.what
        assert row.why


def test_all_that_was_not_chosen_is_explained() -> None:
    plan = choose(SD15, openvino("cpu", "gpu-mtl", "npu3"), machine=pc())
    told = {row.what: row.why for row in plan.rejected}
    assert told["coreml-ane-p6"] == "nothing here runs coreml"
    assert "--variant openvino-fp16-lcm" in told["openvino-fp16-lcm"]
    assert "s to a first picture instead of" in told["openvino-fp16"]
    assert "s to a first picture instead of" in told["npu (openvino)"]
    for why in told.values():
        assert why in plan.explain()
    assert "\n" not in plan.summary()


def test_old_systems_and_intel_macs_are_told_why() -> None:
    told = {row.what: row.why for row in choose(SD15, APPLE, machine=mac("M1", "13.6")).rejected}
    assert told["coreml-gpu-fp16"] == "needs macOS 15, this is 13.6"
    intel = replace(mac("", "13.6"), arch="x86_64")
    told = {row.what: row.why for row in choose(SD15, APPLE, machine=intel).rejected}
    assert "no Neural Engine" in told["ane (coreml)"]


def test_what_is_asked_for_is_done_even_where_it_runs_badly() -> None:
    plan = choose(SD15, APPLE, "gpu", "coreml-ane-fp16", machine=mac("M4"))
    assert plan.device.name == "gpu"
    assert "asked for, though: its attention is cut up" in plan.explain()
    assert plan.spares == {}, "nothing moves away from a device that was asked for"
    few = choose(SD15, openvino("cpu"), variant="openvino-fp16-lcm")
    assert few.variant == "openvino-fp16-lcm"
    assert "nothing that fits" not in few.summary()
    assert "of 512x512 in " in few.summary()
    assert {row.why for row in few.rejected if row.what == "openvino-fp16"} == {"openvino-fp16-lcm was asked for"}
    assert choose(SD15, [*openvino("cpu"), *REFERENCE], "coreml-reference").device.name == "coreml-reference"


def test_what_cannot_be_says_what_there_is() -> None:
    with pytest.raises(VariantNotFound, match=r"no variant for auto; it has: openvino-fp16.*coreml-reference"):
        choose(EMOJI, REFERENCE)
    with pytest.raises(DeviceError, match="valid: auto, cpu"):
        choose(SD15, openvino("cpu"), "tpu")
    with pytest.raises(DeviceError, match="pip install"):
        choose(SD15, [])
    with pytest.raises(InvalidRequest, match="valid: battery, memory, quality, speed"):
        choose(SD15, openvino("cpu"), preference="beauty")


def test_a_device_of_a_library_that_is_not_here_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_sd.backends.torch.find_spec", lambda name: None)
    here = Here(AllBackends(), openvino("cpu"), pc())
    for wish in ("torch-cpu", {"unet": "torch-cuda.1"}):
        with pytest.raises(MissingExtra, match=r"download\.pytorch\.org|pip install"):
            plan_here(EMOJI, here, wish, None, "speed", print)
    with pytest.raises(DeviceError, match="no device 'tpu' here; valid: auto, cpu"):
        plan_here(EMOJI, here, "tpu", None, "speed", print)


def measured(**calls: float) -> dict[tuple[str, str, str], Measured]:
    return {("unet", "openvino-int8", f"openvino:{name}"): Measured(1.0, call, 35.0) for name, call in calls.items()}


def test_a_measurement_takes_the_place_of_an_estimate() -> None:
    devices = openvino("cpu", "gpu-mtl", "npu3")
    assert choose(SD15, devices, machine=pc()).device.name == "gpu"
    plan = choose(SD15, devices, machine=pc(), measured=measured(gpu=5.0, npu=0.1))
    assert (plan.device.name, plan.parts["unet"].measured) == ("npu", True)
    assert plan.parts["unet"].cost.draw == pytest.approx(20 * 0.1)
    assert "measured here" in plan.parts["unet"].explain()


def test_what_failed_when_it_was_measured_is_passed_over() -> None:
    devices = openvino("cpu", "npu4")
    failed = {("unet", name, "openvino:npu"): Measured(failure="it returned NaN or infinity")
              for name in ("openvino-fp16", "openvino-int8")}  # fmt: skip
    plan = choose(SD15, devices, machine=pc(), measured=failed)
    assert plan.device.name == "cpu"
    assert "unet on npu" not in plan.explain().splitlines()[0]
    alone = choose(SD15, openvino("npu4", "cpu"), "npu", machine=pc(), measured=failed)
    assert "failed when it was measured here: it returned NaN" in alone.explain()


def test_what_a_conversion_makes_is_not_of_unknown_size_or_quality() -> None:
    assert set(BITS) >= set(RECIPES)
    assert {name: BITS[name] for name, recipe in RECIPES.items() if not recipe.mixed} == {
        name: recipe.bits for name, recipe in RECIPES.items() if not recipe.mixed
    }
    assert set(TYPICAL_PSNR) >= set(RECIPES)


def test_a_fallback_is_the_next_best_and_after_nan_a_wider_type() -> None:
    plan = choose(SD15, openvino("cpu", "gpu-mtl", "npu3"), machine=pc(free=12))
    wide = plan.fall_back("unet", "it returned NaN or infinity", numerical=True)
    assert wide is not None
    assert wide.parts["unet"].cost.arithmetic == "f32"
    assert "unet moved from openvino-int8 on gpu to" in wide.summary()
    seen = {(place_of(plan.device), plan.parts["unet"].cost.arithmetic)}
    step: DevicePlan | None = plan
    while (step := step.fall_back("unet", "again")) is not None:
        key = (place_of(step.device), step.parts["unet"].cost.arithmetic)
        assert key not in seen, "no place is tried twice"
        seen.add(key)


def test_plausible_places_are_those_without_objection() -> None:
    found = plausible(SD15, [*openvino("cpu", "gpu-mtl", "npu3"), *REFERENCE], pc())
    assert {(p.variant, p.device.name) for p in found["unet"]} == {
        (name, device) for name in ("openvino-fp16", "openvino-int8") for device in ("cpu", "gpu", "npu")
    }
    assert all(placement.device.name != "npu" for placement in found["text_encoder"])


def test_components_are_placed_by_hand() -> None:
    machine, devices = invented("Meteor Lake")
    wish = {"unet": "npu", "vae_decoder": "cpu"}
    plan = choose(SD15, devices, wish, machine=machine)
    assert {part: plan.parts[part].device.name for part in wish} == wish
    auto = choose(SD15, devices, machine=machine)
    assert choose(SD15, devices, {}, machine=machine).parts == auto.parts
    assert "the device of unet and vae_decoder was asked for" in plan.summary()
    assert [*plan.spares] == ["text_encoder"], "nothing moves away from a device that was asked for"
    turned = choose(SD15, devices, {"vae_decoder": "npu"}, machine=machine)
    assert turned.parts["vae_decoder"].device.name == "npu"
    assert turned.parts["unet"].device.name != "npu" or auto.device.name == "npu"


def test_a_component_that_is_none_and_a_device_that_is_none_are_refused_with_the_valid_ones() -> None:
    machine, devices = invented("Meteor Lake")
    with pytest.raises(InvalidRequest, match="no component 'vae' has a device of its own; valid: text_encoder, unet"):
        choose(SD15, devices, {"vae": "cpu"}, machine=machine)
    with pytest.raises(DeviceError, match="no device 'tpu' here; valid: auto, cpu"):
        choose(SD15, devices, {"unet": "tpu"}, machine=machine)
    with pytest.raises(VariantNotFound, match=r"no variant for unet=ane; it has: .*; .* on ane: "):
        choose(SD15, APPLE, {"unet": "ane"}, "coreml-gpu-fp16", machine=mac("M1", "13.6"))


@pytest.mark.parametrize(
    ("text", "message"),
    [("unet=", "'unet=' is not COMPONENT=DEVICE"), ("unet=cpu,gpu", "'gpu' is not COMPONENT=DEVICE"),
     ("unet=cpu,unet=gpu", "two devices for unet")],
)  # fmt: skip
def test_devices_on_the_command_line(text: str, message: str) -> None:
    assert parse_device("gpu.1") == "gpu.1"
    assert parse_device("unet=gpu, vae_decoder=cpu") == {"unet": "gpu", "vae_decoder": "cpu"}
    with pytest.raises(InvalidRequest, match=message):
        parse_device(text)


def test_a_plan_that_is_given_is_followed_or_refused() -> None:
    machine, devices = invented("Meteor Lake")
    here = Here(AllBackends(), devices, machine)
    plan = choose(SD15, devices, {"unet": "npu"}, machine=machine)
    check_plan(plan, SD15, here)
    with pytest.raises(DeviceError, match="unet: no device 'openvino:npu' here; valid: openvino:cpu"):
        check_plan(plan, SD15, Here(AllBackends(), openvino("cpu"), machine))
    less = replace(plan, parts={part: each for part, each in plan.parts.items() if part != "text_encoder"})
    with pytest.raises(InvalidRequest, match="no place for text_encoder"):
        check_plan(less, SD15, here)
    moved = replace(plan.parts["unet"], variant="coreml-ane-p6")
    with pytest.raises(DeviceError, match="unet: coreml-ane-p6 runs on coreml, not on openvino:npu"):
        check_plan(replace(plan, parts={**plan.parts, "unet": moved}), SD15, here)
