"""The parts of a comparison that need no drawing: who draws what, and what follows from the figures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from edge_sd.apps.compare.energy import consumed, joules
from edge_sd.apps.compare.judge import Judge
from edge_sd.apps.compare.plan import (
    OTHER_SEEDS,
    TORCH,
    Shot,
    common_parts,
    component_bytes,
    incomplete,
    plan,
    read_prompts,
)
from edge_sd.apps.compare.plots import FONT, HEIGHT, WIDTH, Plot, Point, Series, lay_out, save_png, svg, ticks
from edge_sd.apps.compare.score import spread, summary
from edge_sd.apps.compare.sweep import Sweep
from edge_sd.apps.compare.tables import failures, label
from edge_sd.apps.compare.verdict import missed, pareto, parse_gates, recommend, sentence
from edge_sd.backends.fake import fake_bundle
from edge_sd.bundle.bundle import ModelBundle
from edge_sd.bundle.facts import Defaults
from edge_sd.bundle.variants import Artifact, Variant
from edge_sd.errors import InvalidRequest, MissingExtra, VariantNotFound
from edge_sd.files import FileRecord
from edge_sd.images.metrics import CEILING
from edge_sd.images.metrics import finite as finite_psnr

PARTS = ("text_encoder", "unet", "vae_decoder")
finite = st.floats(-1e3, 1e3)


def variant(name: str, backend: str, precision: str, size: int, **options: Any) -> Variant:
    artifacts = {part: Artifact(f"{name}/{part}.xml", (f"{name}/{part}.bin",), (), ()) for part in PARTS}
    files = {f"{name}/{part}.{end}": FileRecord(size, end * 8) for part in PARTS for end in ("xml", "bin")}
    return Variant(backend, precision, artifacts, files, **options)


@pytest.fixture
def bundle(tmp_path: Path) -> ModelBundle:
    variants = {
        "openvino-fp32": variant("openvino-fp32", "openvino", "fp32", 400),
        "openvino-fp16": variant("openvino-fp16", "openvino", "fp16", 200),
        "openvino-int8": variant("openvino-int8", "openvino", "int8", 100),
        "openvino-fp16-lcm": variant("lcm", "openvino", "fp16", 900, defaults=Defaults(steps=4)),
        "coreml-ane-p6": variant("coreml-ane-p6", "coreml", "p6", 80),
    }
    return ModelBundle(tmp_path, fake_bundle().facts, variants)


def names(comparison: Any, kind: str) -> list[str]:
    return [row.name for row in comparison.rows if row.kind == kind]


def test_without_wishes_all_variants_that_run_here_are_compared_with_the_largest(bundle: ModelBundle) -> None:
    comparison = plan(bundle, prompts=["a", "b"], seeds=3)
    assert comparison.reference.name == "openvino-fp32", "not the few-step variant, though it is larger"
    assert names(comparison, "variant") == ["openvino-fp16", "openvino-fp16-lcm", "openvino-int8"]
    assert "coreml-ane-p6 is left out" in comparison.notes[0]
    assert [(shot.prompt, shot.seed) for shot in comparison.shots[:3]] == [("a", 0), ("b", 0), ("a", 1)]


def test_the_noise_floor_is_another_seed_and_half_precision(bundle: ModelBundle) -> None:
    comparison = plan(bundle, prompts=["a"], seeds=2)
    assert names(comparison, "floor") == ["fp16 against fp32 (openvino)", "another seed"]
    seeds = {shot.seed for shot in comparison.artists()[comparison.reference]}
    assert seeds == {0, 1, OTHER_SEEDS, OTHER_SEEDS + 1}


def test_the_same_variant_on_two_devices_is_a_noise_floor(bundle: ModelBundle) -> None:
    comparison = plan(bundle, variants=["openvino-fp16@cpu", "openvino-fp16@gpu"], reference="openvino-fp32")
    assert "another device (openvino-fp16@gpu against openvino-fp16@cpu)" in names(comparison, "floor")


def test_components_are_swapped_one_at_a_time_into_the_largest_of_the_same_backend(bundle: ModelBundle) -> None:
    comparison = plan(bundle, prompts=["a", "b", "c"], seeds=1, swapped=2)
    swaps = [row for row in comparison.rows if row.kind == "swap"]
    assert [row.artist.part for row in swaps if row.artist.donor == "openvino-int8"] == list(PARTS)
    assert {row.artist.variant for row in swaps if row.artist.part} == {"openvino-fp32"}
    assert not any("lcm" in row.name for row in swaps)
    assert {row.count for row in swaps} == {2}
    assert not [row for row in plan(bundle, swapped=0).rows if row.kind == "swap"]


def test_who_draws_what_is_told_apart_on_disk(bundle: ModelBundle) -> None:
    first, again = plan(bundle, prompts=["a"]), plan(bundle, prompts=["a", "b"])
    folders = {first.folder_name(artist) for artist in first.artists()}
    assert len(folders) == len(first.artists())
    assert folders == {again.folder_name(artist) for artist in again.artists()}, "more prompts go on in the same place"


@pytest.mark.parametrize(
    ("wish", "error", "said"),
    [
        ({"variants": ["int3"]}, VariantNotFound, "it has: coreml-ane-p6"),
        ({"reference": "int3"}, VariantNotFound, "it has: coreml-ane-p6"),
        ({"reference": TORCH}, InvalidRequest, "give their folder with --weights"),
        ({"seed": -1}, InvalidRequest, "seed -1"),
        ({"prompts": ["x" * 30_000]}, InvalidRequest, "at most 20000"),
    ],
)
def test_a_wish_that_cannot_be_is_refused(bundle: ModelBundle, wish: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        plan(bundle, **wish)


def test_torch_is_asked_for_by_its_extra(bundle: ModelBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_sd.apps.compare.plan.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r'pip install "edge-sd\[convert\]"'):
        plan(bundle, reference=TORCH)
    assert plan(bundle).reference.name == "openvino-fp32"


def test_prompts_are_lines(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("# of fruit\n\na red apple \na pear\na pear\n")
    assert read_prompts(tmp_path / "p.txt") == ["a red apple", "a pear"]
    (tmp_path / "p.txt").write_text("# none\n")
    with pytest.raises(InvalidRequest, match="holds no prompt"):
        read_prompts(tmp_path / "p.txt")
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidRequest, match="not UTF-8"):
        read_prompts(tmp_path / "p.txt")


def test_shots_of_other_prompts_have_other_names() -> None:
    stems = {Shot(prompt, seed).stem for prompt in ("a cat!", "a cat", "猫", "犬") for seed in (0, 1)}
    assert len(stems) == 8
    assert all(stem.isascii() for stem in stems)


def test_bytes_of_each_component_and_of_all(bundle: ModelBundle) -> None:
    assert component_bytes(bundle, "openvino-int8") == {**dict.fromkeys(PARTS, 200), "compared": 0, "total": 600}
    # A variant without a part is not smaller for that: sizes are of the parts that all have.
    first, second = "openvino-int8", "openvino-fp16"
    lesser = {part: each for part, each in bundle.variant(first).artifacts.items() if part != PARTS[0]}
    partial = replace(bundle, variants={**bundle.variants, first: replace(bundle.variant(first), artifacts=lesser)})
    common = common_parts(partial, (first, second))
    assert common == set(PARTS[1:])
    assert component_bytes(partial, first, common)["compared"] == 400
    assert component_bytes(partial, second, common)["compared"] == sum(
        component_bytes(partial, second)[part] for part in PARTS[1:]
    )
    assert incomplete(partial, (first, second)) == [f"{first} has no {PARTS[0]}; sizes are compared without them"]


def test_a_unet_in_two_packages_is_counted_whole(bundle: ModelBundle) -> None:
    files = {name: FileRecord(100, "") for name in ("v/Unet1.mlpackage/w.bin", "v/Unet2.mlpackage/w.bin", "v/p.json")}
    unet = Artifact("v/Unet1.mlpackage", (), (), (), pieces="v/p.json", chunks=("v/Unet2.mlpackage",))
    variant = Variant("coreml", "fp16", {"unet": unet}, files)
    chunked = replace(bundle, variants={"v": variant})
    assert component_bytes(chunked, "v", frozenset(["unet"])) == {"unet": 300, "compared": 300, "total": 300}


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.sampled_from("abcdefgh"), st.tuples(finite, finite), min_size=1))
def test_the_pareto_front_is_what_nothing_beats(points: dict[str, tuple[float, float]]) -> None:
    front = pareto(points)
    assert front, "the cheapest of the best is always on it"

    def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
        return a[0] <= b[0] and a[1] >= b[1] and a != b

    for name, point in points.items():
        assert (name in front) != any(beats(other, point) for other in points.values())
    qualities = [points[name][1] for name in front]
    assert qualities == sorted(qualities), "who pays more gets more"


def row(name: str, megabytes: float, psnr: float, seconds: float, kind: str = "variant") -> dict[str, Any]:
    return {"name": name, "kind": kind, "bytes": {"compared": megabytes * 1e6, "total": 2e9},
            "quality": {"psnr": {"mean": psnr}}, "speed": {"picture": {"median": seconds}}}  # fmt: skip


ROWS = [
    row("fp16", 40, 60, 2.0),
    row("int8", 20, 40, 1.0),
    row("int4", 10, 20, 1.5),
    row("ref", 80, 100, 9, "reference"),
    {"name": "w8a8", "kind": "variant", "error": "it does not compile"},
]


def test_the_smallest_and_the_fastest_within_the_wanted_quality() -> None:
    assert recommend(ROWS, 30, None) == {"smallest": "int8", "fastest": "int8"}
    assert recommend(ROWS, 0, None) == {"smallest": "int4", "fastest": "int8"}
    assert recommend(ROWS, 50, None) == {"smallest": "fp16", "fastest": "fp16"}
    assert recommend(ROWS, 50, 30) == {"smallest": None, "fastest": None}
    assert sentence(ROWS, 50, 30) == "No variant has 50 dB or more and 30 MB or less."
    assert "the smallest is int4 (10.0 MB, 20.0 dB); the fastest is int8 (1.00 s" in sentence(ROWS, 0, None)
    assert "Nothing to recommend" in sentence(ROWS[3:4], 0, None)


def test_gates_are_missed_by_what_is_below_and_by_what_failed() -> None:
    assert parse_gates(["psnr=30, ssim=0.9", "35"]) == {"psnr": 35.0, "ssim": 0.9}
    assert missed(ROWS, parse_gates(["30"])) == ["int4: psnr is 20, below 30", "w8a8 failed: it does not compile"]
    assert missed(ROWS[:2], {"ssim": 0.5}) == ["fp16: ssim was not measured", "int8: ssim was not measured"]
    assert missed(ROWS, {}) == []
    for text in ("speed=3", "psnr=high"):
        with pytest.raises(InvalidRequest, match=r"valid: agreement|has no number"):
            parse_gates([text])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 100), min_size=1, max_size=30))
def test_a_summary_is_numpys(values: list[float]) -> None:
    found = summary(values)
    assert found["mean"] == pytest.approx(np.mean(values), abs=1e-4)
    assert found["median"] == pytest.approx(np.median(values), abs=1e-4)
    assert found["worst"] == pytest.approx(min(values), abs=1e-4)
    error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0
    assert found["error"] == pytest.approx(error, abs=1e-4)
    low, middle, high = (spread(values)[name] for name in ("low", "median", "high"))
    assert low <= middle <= high


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_decibels_can_always_be_averaged(value: float) -> None:
    assert finite_psnr(value) <= CEILING
    assert np.isfinite(finite_psnr(value))


@settings(deadline=None)
@given(finite, st.floats(0, 1e3))
def test_ticks_are_even_and_hold_the_data(low: float, width: float) -> None:
    found = ticks(low, low + width)
    assert found[0] <= low + 1e-6
    assert found[-1] >= low + width - 1e-6
    assert 2 <= len(found) <= 8
    assert np.ptp(np.diff(found)) < 1e-6


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(finite, finite), min_size=1, max_size=8))
def test_a_plot_stays_on_its_sheet(points: list[tuple[float, float]]) -> None:
    series = tuple(Series(f"v{n}", (Point(x, y),), "#123456", label=True) for n, (x, y) in enumerate(points))
    for mark in lay_out(Plot("t", "x", "y", series)):
        for point in mark.points if mark.kind != "text" else ():
            assert -1e-6 <= point.x <= WIDTH + 1e-6
            assert -1e-6 <= point.y <= HEIGHT + 1e-6


def test_a_name_covers_no_point_of_another() -> None:
    points = {"openvino-int8": (22.8, 47.5), "openvino-hybrid": (24.6, 43.8), "openvino-w8a8": (28.5, 41.7),
              "openvino-int4": (19.8, 31.9), "openvino-fp32": (82.0, 92.0)}  # fmt: skip
    series = tuple(Series(name, (Point(*at),), "#123456", label=True) for name, at in points.items())
    marks = lay_out(Plot("t", "x", "y", series))
    dots = [mark.points[0] for mark in marks if mark.kind == "dot"]
    labels = [mark for mark in marks if mark.text in points]
    assert len(dots) == len(labels) == len(points)
    for mark in labels:
        (at,) = mark.points
        width = len(mark.text) * FONT * 0.56
        left = at.x - width if mark.anchor == "end" else at.x
        assert not [dot for dot in dots if left < dot.x < left + width and abs(dot.y - (at.y - 4)) < FONT / 2]


def test_steps_are_counted_in_whole_numbers() -> None:
    assert ticks(1, 2, least=1.0) == [1, 2]
    assert ticks(1, 20, least=1.0) == [0, 5, 10, 15, 20]
    curve = Series("a", (Point(1, 3), Point(2, 4)), "#ff0000", line=True)
    told = [mark.text for mark in lay_out(Plot("t", "step", "dB", (curve,), from_zero=False, whole=True))]
    assert "2" in told
    assert "1.2" not in told


def test_why_a_variant_failed_is_told_once() -> None:
    def failed(name: str, kind: str, error: str) -> dict[str, str]:
        return {"name": name, "kind": kind, "error": error}

    rows = [failed("cut", "variant", "too short"), failed("worse", "variant", "too short"), {"name": "ok", "kind": "x"},
            failed("another seed", "floor", "cut: too short"), failed("base with the unet of cut", "swap", "too short"),
            failed("base with the unet of ok", "swap", "shapes differ")]  # fmt: skip
    told = failures({"rows": rows})
    assert [name for name, _ in told] == ["cut", "worse", "base with the unet of ok"]


def test_a_plot_is_an_svg_and_a_png(tmp_path: Path) -> None:
    line = Series("a <b>", (Point(1, 2), Point(2, 5)), "#ff0000", line=True)
    plot = Plot("t", "x", "y", (line,))
    assert svg(plot).count("<polyline") == 1
    save_png(plot, tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as image:
        colours = {colour for _, colour in image.getcolors(1 << 16)}
    assert (255, 0, 0) in colours


@pytest.mark.parametrize(
    ("wish", "made"),
    [
        (("openvino", None, None, None), ["fp32", "fp16", "int8", "int4", "int4g64", "int4g128"]),
        (("openvino", "16,8", None, None), ["fp16", "int8"]),
        (("openvino", "8,4", "32", None), ["int8", "int4"]),
        (("openvino", "8,4", "32", "w8,w8a8"), ["int8", "w8a8"]),
        (("openvino", "8,4", "32", "weights,w8a8"), ["int8", "w8a8", "int4"]),
        (("openvino", None, "128", "w4"), ["int4g128"]),
        (("openvino", "4", None, "gptq,awq,nf4"), ["int4awq", "int4gptq", "nf4"]),
        (("openvino", None, None, "fp8,w8a8"), ["fp8", "w8a8"]),
        (("openvino", None, "32,64", "weights"), ["int8", "int4", "int4g64"]),
        (("openvino", "8", None, "w8a8"), ["w8a8"]),
        (("openvino", "8,4", "32,64,128", "w8,w8a8,hybrid"), ["int8", "w8a8", "hybrid"]),
        (("coreml", "6", None, "palette"), ["p6"]),
    ],
)
def test_a_sweep_tries_all_that_fits(wish: Any, made: list[str]) -> None:
    assert [recipe.name for recipe in Sweep.parse(*wish).recipes] == made


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        (("openvino", "3", None, None), "valid: 4, 8, 16, 32"),
        (("openvino", "many", None, None), "not whole numbers"),
        (("openvino", None, "7", None), "no group size of 7 here"),
        (
            ("openvino", None, None, "w8,w4a4"),
            "valid: awq, float, fp8, gptq, hybrid, lowrank, nf4, scale, w8a8, weights, w4, w8$",
        ),
        (("openvino", None, None, "palette"), "no method 'palette' for openvino"),
        (("coreml", None, None, "w4"), "valid: float, palette, w8a8, weights, w8$"),
        (("openvino", "8", None, "w4"), "it has: fp16, fp32, fp8, hybrid, int4, int4awq, int4g128, "),
        (("onnx", None, None, None), "unknown target 'onnx'"),
    ],
)
def test_a_sweep_of_nothing_is_refused(wish: Any, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        Sweep.parse(*wish)


def test_the_judge_without_torch_says_what_torch_says(tmp_path: Path) -> None:
    from edge_sd.converters.training import evaluator

    torch.manual_seed(0)
    labels = evaluator.core_vocabulary()
    network = evaluator.Evaluator(len(labels), 4, len(evaluator.BACKGROUNDS), 192).eval()
    for parameter in network.parameters():
        parameter.data = (parameter.data + 0.1 * torch.randn_like(parameter)).half().float()
    evaluator.save(network, tmp_path / "evaluator")
    judge = Judge(tmp_path / "evaluator")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 128, 3), np.uint8))
    with torch.no_grad():
        concept, _, _, vector = network(evaluator.as_tensor([image]))
        pooled = torch.randn(192)
        prompt = network.embed_text(pooled[None])[0]
    opinion = judge.look(image)
    assert opinion.concept == labels[int(concept.argmax())]
    np.testing.assert_allclose(opinion.vector, vector[0].numpy(), atol=2e-5)
    np.testing.assert_allclose(judge.read(pooled.numpy()), prompt.numpy(), atol=2e-6)


def powercap(root: Path, zones: dict[str, tuple[str, int]], limit: int = 1_000_000_000) -> Path:
    for zone, (name, value) in zones.items():
        (root / zone).mkdir(parents=True, exist_ok=True)
        (root / zone / "name").write_text(name + "\n")
        (root / zone / "energy_uj").write_text(f"{value}\n")
        (root / zone / "max_energy_range_uj").write_text(f"{limit}\n")
    return root


def test_energy_is_that_of_all_packages_each_once(tmp_path: Path) -> None:
    zones = {"intel-rapl:0": ("package-0", 5_000_000), "intel-rapl:0:0": ("core", 7), "intel-rapl:1": ("package-1", 0),
             "intel-rapl:2": ("psys", 9), "intel-rapl-mmio:0": ("package-0", 5_000_000)}  # fmt: skip
    before = consumed(powercap(tmp_path, zones))
    later = {zone: (name, value + 2_500_000) for zone, (name, value) in zones.items()}
    assert joules(before, consumed(powercap(tmp_path, later))) == 5.0
    wrapped = {**zones, "intel-rapl:0": ("package-0", 1_000_000)}
    assert joules(before, consumed(powercap(tmp_path, wrapped))) == 996.0, "the counter began again"


def test_energy_that_nobody_tells_is_none(tmp_path: Path) -> None:
    assert joules(consumed(tmp_path / "none"), consumed(tmp_path / "none")) is None
    root = powercap(tmp_path, {"intel-rapl:0": ("package-0", 1), "intel-rapl:1": ("package-1", 1)})
    (root / "intel-rapl:1/energy_uj").unlink()
    assert consumed(root) == {}, "one of two packages is not the machine"


def test_what_the_executor_of_core_ml_draws_is_never_timed(bundle: ModelBundle) -> None:
    name = next(name for name, each in bundle.variants.items() if each.backend == "coreml")
    comparison = plan(bundle, variants=["openvino-fp16", f"{name}@coreml-reference"], reference="openvino-fp32")
    assert [artist.name for artist in comparison.timed()] == ["openvino-fp32", "openvino-fp16"]
    assert names(comparison, "variant") == ["openvino-fp16", f"{name}@coreml-reference"]
    assert any(note.startswith(f"{name}@coreml-reference: numerics, not speed") for note in comparison.notes)
    assert label({"name": name, "kind": "variant", "numerics_only": True}) == f"{name} (numerics, not speed)"
