"""Mixed bits: palettes, the choice of widths by the price of a bit, and the recipe that is written of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from edge_sd.converters.coreml import convert, mixed, quantize
from edge_sd.converters.coreml.mil import Program
from edge_sd.converters.parity import Recording, measure
from edge_sd.converters.recipes import RECIPES
from edge_sd.errors import InvalidModel

from .test_coreml_mil import build

RNG = np.random.default_rng(0)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([1, 2, 4, 6, 8]), st.integers(1, 400), st.integers(0, 99))
def test_a_palette_has_at_most_its_colours_and_is_no_worse_than_even_steps(bits: int, count: int, seed: int) -> None:
    weight = np.random.default_rng(seed).normal(size=count).astype(np.float32)
    found = mixed.palettized(weight, bits)
    assert len(np.unique(found)) <= 2**bits
    steps = np.linspace(weight.min(), weight.max(), 2**bits)
    even = np.abs(weight[:, None] - steps).min(axis=1)
    assert np.mean((found - weight) ** 2) <= np.mean(even**2) * 1.05 + 1e-12


def test_its_k_means_is_about_coremltools(tmp_path: Path) -> None:
    """Which finds the best clusters there are."""
    import coremltools as ct

    weight = RNG.normal(size=(64, 64)).astype(np.float16)
    plain = build(tmp_path / "plain.mlpackage", lambda mb, x: mb.linear(x=x, weight=weight, name="out"))
    for name, bits in (("p2", 2), ("p4", 4), ("p6", 6)):
        model = quantize.compress(ct.models.MLModel(str(plain), skip_model_load=True), RECIPES[name], "iOS16")
        convert.save(model, tmp_path / f"{name}.mlpackage")
        theirs = Program.open(tmp_path / f"{name}.mlpackage").predict({"x": np.eye(64, dtype=np.float16)[:2]})["out"]
        error = np.mean((theirs - weight.T[:2]) ** 2)
        ours = np.mean((mixed.palettized(weight, bits) - weight) ** 2)
        assert 0.5 < ours / error < 1.5


@pytest.fixture(scope="module")
def analysed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, mixed.BitRecipe, Recording]:
    """Three layers, one of which counts a hundred times as much as the others."""
    weights = [(RNG.normal(size=(64, 64)) / 8).astype(np.float16) for _ in range(3)]

    def body(mb: Any, x: Any) -> Any:
        parts = [mb.linear(x=x, weight=weight, name=f"layer_{n}") for n, weight in enumerate(weights)]
        loud = mb.mul(x=parts[0], y=np.float16(100))
        return mb.add(x=mb.add(x=loud, y=parts[1]), y=parts[2], name="out")

    package = build(tmp_path_factory.mktemp("mixed") / "p.mlpackage", body)
    given = [{"x": RNG.normal(size=(2, 64)).astype(np.float16)} for _ in range(3)]
    layers = [weight.astype(np.float32).T for weight in weights]
    wanted = [{"out": x["x"].astype(np.float32) @ (100 * layers[0] + layers[1] + layers[2])} for x in given]
    recording = Recording(given, wanted)
    import coremltools as ct

    program = Program.open(package)
    names = quantize.weights(ct.models.MLModel(str(package), skip_model_load=True))
    assert len(names) == 3
    return package, mixed.choose(program, names, program.predict, recording, 40.0), recording


def test_the_weight_that_counts_gets_the_bits(analysed: Any) -> None:
    _, recipe, _ = analysed
    (loud,) = [name for name in recipe.bits if "layer_0" in name]
    assert recipe.bits[loud] >= 6
    assert all(bits <= 2 for name, bits in recipe.bits.items() if name != loud)


def test_the_mixtures_are_above_the_fixed_widths(analysed: Any) -> None:
    """At the size of each width there is a mixture as near or nearer; in the middle, much nearer."""
    _, recipe, _ = analysed
    assert [point.name for point in recipe.fixed] == ["p1", "p2", "p4", "p6", "p8"]
    sizes = [point.bytes for point in recipe.mixed]
    assert sizes == sorted(sizes)
    four = recipe.fixed[2]
    assert max(point.psnr for point in recipe.mixed if point.bytes <= four.bytes) > four.psnr + 6


def test_what_is_chosen_is_the_smallest_that_was_near_enough(analysed: Any, tmp_path: Path) -> None:
    """And the package that coremltools makes of it is the one that the analysis measured, and as small."""
    import coremltools as ct

    package, recipe, recording = analysed
    model = ct.models.MLModel(str(package), skip_model_load=True)
    convert.save(quantize.compress(model, RECIPES["mixed"], "iOS16", recipe.bits), tmp_path / "m.mlpackage")
    found = measure(Program.open(tmp_path / "m.mlpackage").predict, recording)
    assert found.psnr > 40
    tried = Program.open(package)
    for name, bits in recipe.bits.items():
        tried.substitute(name, mixed.palettized(tried.constant(name), bits))
    for inputs in recording.inputs:
        written = Program.open(tmp_path / "m.mlpackage").predict(inputs)["out"]
        assert np.array_equal(written, tried.predict(inputs)["out"]), "what is written is what was measured"
    assert found.psnr < next(point.psnr for point in recipe.fixed if point.name == "p8")
    size = (tmp_path / "m.mlpackage/Data/com.apple.CoreML/weights/weight.bin").stat().st_size
    assert size < sum(64 * 64 * bits for bits in recipe.bits.values()) / 8 + 2048


def test_the_program_is_as_it_was_after_the_analysis(analysed: Any) -> None:
    package, _, recording = analysed
    program = Program.open(package)
    before = program.predict(recording.inputs[0])["out"]
    (name,) = [each for each in analysed[1].bits if "layer_0" in each]
    trials = mixed._Trials(program, [name], lambda: 30.0)
    trials.point("p1", {name: 1})
    assert np.array_equal(program.predict(recording.inputs[0])["out"], before)


def test_what_no_palette_reaches_keeps_its_sixteen_bits(analysed: Any) -> None:
    package, recipe, recording = analysed
    program = Program.open(package)
    chosen = mixed.choose(program, list(recipe.bits), program.predict, recording, 190.0)
    assert set(chosen.bits.values()) == {16}


def test_a_recipe_is_written_read_and_drawn(analysed: Any, tmp_path: Path) -> None:
    _, recipe, _ = analysed
    recipe.save(tmp_path / "Unet.bits.json")
    assert mixed.BitRecipe.open(tmp_path / "Unet.bits.json") == recipe
    mixed.draw(recipe, tmp_path / "bits.png")
    with Image.open(tmp_path / "bits.png") as image:
        colours = {colour for _, colour in image.getcolors(1 << 16)}
    assert {(204, 51, 51), (119, 119, 119)} <= colours
    rows = mixed.table(recipe).splitlines()[2:]
    assert len(rows) == len(recipe.fixed) + len(recipe.mixed)
    (tmp_path / "Unet.bits.json").write_text('{"bits": 3}')
    with pytest.raises(InvalidModel, match="no recipe of bits"):
        mixed.BitRecipe.open(tmp_path / "Unet.bits.json")
