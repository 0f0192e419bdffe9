"""Mixtures of variants: which are worth it, and what is on disk of one."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sd import InvalidRequest, ModelBundle, Pipeline, Request
from edge_sd.apps.compare.plan import plan
from edge_sd.apps.compare.suggest import Mixture, chosen, family, front, make, name_of, parse_bytes
from edge_sd.bundle.mixture import add_mixture, drop_variant, mixture
from edge_sd.errors import OutputError

HOMES = ("text_encoder", "unet", "vae_decoder")
DONORS = {"text_encoder": "openvino-fp32", "unet": "openvino-fp16", "vae_decoder": "openvino-fp32"}
NAME = "openvino-fp16_text-fp32_vae-fp32"
OPTIONS = st.lists(st.tuples(st.integers(1, 50), st.floats(0, 100)), min_size=1, max_size=4)


@given(st.tuples(OPTIONS, OPTIONS, OPTIONS), st.floats(0, 10))
def test_the_front_is_what_no_mixture_of_all_beats(given: Any, base: float) -> None:
    choices = [[Mixture({home: str(n)}, size, error) for n, (size, error) in enumerate(each)]
               for home, each in zip(HOMES, given, strict=True)]  # fmt: skip
    every = [(sum(m.bytes for m in each), base + sum(m.error for m in each)) for each in product(*choices)]
    found = front(choices, base)
    assert [m.bytes for m in found] == sorted(m.bytes for m in found)
    for size, error in every:
        assert any(m.bytes <= size and m.error <= error * (1 + 1e-12) for m in found)
    for m in found:
        assert not any(s <= m.bytes and e < m.error * (1 - 1e-12) for s, e in every)
        assert set(m.donors) == set(HOMES)


def test_what_is_chosen() -> None:
    small, middle, large = (Mixture({}, size, error) for size, error in ((10, 60.0), (20, 6.0), (30, 0.6)))
    assert chosen([small, middle, large], 25, None) == [middle, small]
    assert chosen([small, middle, large], None, 35.0) == [middle, large]
    assert middle.psnr == pytest.approx(40.35, abs=0.01)
    with pytest.raises(InvalidRequest, match=r"the smallest mixture has 0.0 MB"):
        chosen([small], 5, None)
    with pytest.raises(InvalidRequest, match=r"the most exact mixture within that size is near 40.3 dB"):
        chosen([small, middle, large], 25, 45.0)


@pytest.mark.parametrize(("text", "size"), [("500MB", 5e8), ("0.5 gb", 5e8), ("500", 5e8), ("1.5MB", 1.5e6)])
def test_sizes_are_read(text: str, size: float) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "0", "-5", "5KB", "many", "1e9", "5 M B"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(InvalidRequest, match="is no size on disk, such as 500MB"):
        parse_bytes(text)


@pytest.fixture
def own(bundle: ModelBundle, tmp_path: Path) -> ModelBundle:
    shutil.copytree(bundle.root, tmp_path / "own")
    return ModelBundle.open(tmp_path / "own")


def drawn(bundle: ModelBundle, variant: str) -> np.ndarray:
    with Pipeline.open(bundle.root, "cpu", variant) as pipeline:
        return np.asarray(pipeline.generate(Request("a cat", seed=1, steps=2)).pictures[0].image)


def test_a_mixture_is_the_components_of_others_by_links(own: ModelBundle) -> None:
    assert name_of(own, Mixture(DONORS, 0, 0)) == NAME
    assert name_of(own, Mixture(dict.fromkeys(HOMES, "openvino-fp16"), 0, 0)) == "openvino-fp16"
    add_mixture(own, NAME, DONORS)
    found = ModelBundle.open(own.root)
    assert found.verify() == []
    variant = found.variant(NAME)
    assert variant.precision == "fp16"
    assert {part: variant.precision_of(part) for part in ("unet", "controlnet", "vae_encoder", "text_encoder")} == {
        "unet": "fp16", "controlnet": "fp16", "vae_encoder": "fp32", "text_encoder": "fp32"
    }  # fmt: skip
    assert set(variant.artifacts) == set(own.variant("openvino-fp16").artifacts)
    assert all(name.startswith((f"{NAME}/", "tokenizer/")) for name in variant.files)
    for home, donor in DONORS.items():
        mine, theirs = (found.path(found.variant(name).artifacts[home].weights[0]) for name in (NAME, donor))
        assert mine.samefile(theirs)
    assert (found.root / NAME / "model_index.json").is_file(), "other programs read it, too"
    assert variant.size() == mixture(own, NAME, DONORS)[0].size()
    assert family(found, ()) == ["openvino-fp32", "openvino-fp16"], "a mixture gives no parts"

    together = drawn(found, NAME)
    alone = {name: drawn(found, name) for name in own.variants}
    assert not any(np.array_equal(together, each) for each in alone.values())
    left = drop_variant(found, NAME)
    assert ModelBundle.open(own.root).variants == own.variants == left.variants
    assert own.verify() == []
    assert not (own.root / NAME).exists()


def test_the_command_adds_the_best_within_a_size_and_measures_it(own: ModelBundle, tmp_path: Path) -> None:
    def edge_sd(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "edge_sd", "compare", "suggest", "own", "--steps", "2", *words]
        return subprocess.run(
            [*command, "--reference", "openvino-fp32", "--prompts", "p.txt", "--report", "R"],
            cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip

    (tmp_path / "p.txt").write_text("a cat\n")
    sizes = {name: own.variant(name).size() for name in own.variants}
    # All but a hundredth of the largest: something has to give.
    done = edge_sd("--max-size", f"{sizes['openvino-fp32'] * 0.99 / 1e6:.6f}MB", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    front, made = report["front"], report["made"]
    assert report["reference"] == "openvino-fp32"
    assert front[-1]["name"] == "openvino-fp32"
    assert front[-1]["psnr"] == 100
    assert all(one["psnr"] < two["psnr"] for one, two in itertools.pairwise(front))
    assert made["name"] == front[-2]["name"] == next(row["name"] for row in front if row["chosen"])
    found = ModelBundle.open(own.root)
    assert found.variant(made["name"]).size() == made["bytes"]
    assert found.verify() == []
    # One component alone was measured; what it costs is what was expected.
    assert made["psnr"] == pytest.approx(made["expected"], abs=1.5)

    done = edge_sd("--max-size", "0.001MB")
    assert (done.returncode, done.stdout) == (2, "")
    assert "the smallest mixture has" in done.stderr
    assert ModelBundle.open(own.root).variants == found.variants


def test_a_disk_without_links_gets_copies_and_a_full_one_nothing(
    own: ModelBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOTSUP, "no links here")

    before = sorted(path.name for path in own.root.iterdir())
    monkeypatch.setattr(os, "link", refuse)
    add_mixture(own, NAME, DONORS)
    assert ModelBundle.open(own.root).verify() == []
    drop_variant(ModelBundle.open(own.root), NAME)
    monkeypatch.setattr(shutil, "copyfile", refuse)
    with pytest.raises(OSError, match="no links here"):
        add_mixture(own, NAME, DONORS)
    monkeypatch.undo()
    monkeypatch.setattr(ModelBundle, "write_manifest", refuse)
    with pytest.raises(OSError, match="no links here"):
        add_mixture(own, NAME, DONORS)
    assert sorted(path.name for path in own.root.iterdir() if path.suffix != ".lock") == before
    assert own.verify() == []


def test_what_another_process_added_meanwhile_stays(own: ModelBundle) -> None:
    stale = ModelBundle.open(own.root)
    add_mixture(own, NAME, DONORS)
    add_mixture(stale, "another", {**DONORS, "vae_decoder": "openvino-fp16"})
    assert {NAME, "another"} < set(ModelBundle.open(own.root).variants)
    drop_variant(stale, "another")
    assert set(ModelBundle.open(own.root).variants) == {*own.variants, NAME}


def test_a_bundle_that_cannot_be_written_to_is_said(own: ModelBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ModelBundle, "write_manifest", refuse)
    comparison = plan(own, variants=sorted(own.variants), reference="openvino-fp32", swapped=0)
    with pytest.raises(OutputError, match="No space left on device; nothing was added to it"):
        make(comparison, [Mixture(DONORS, 1, 1.0)], 5, None, own.root, lambda what, share: None)
    assert own.verify() == []
    assert not (own.root / NAME).exists()


def test_a_form_that_only_a_slow_reference_draws_here_gives_no_parts(own: ModelBundle) -> None:
    apples = {f"coreml-ane-{n}": replace(each, backend="coreml", compute="ane", precision=n)
              for n in ("fp16", "p6", "p4") for each in [own.variant("openvino-fp16")]}  # fmt: skip
    bundle = replace(own, variants={**own.variants, **apples})
    found = family(bundle, ())
    assert set(found) == (set(own.variants) if sys.platform != "darwin" else set(apples))
    assert set(family(bundle, sorted(apples))) == set(apples), "named, it is asked for"


def test_what_cannot_be_mixed_is_said(own: ModelBundle) -> None:
    with pytest.raises(InvalidRequest, match="a mixture needs two variants of one form in different precisions"):
        family(own, ["openvino-fp16"])
