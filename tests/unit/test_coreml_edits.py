"""Packages rewritten: a weight in any stored form becomes another, and coremltools reads what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_sd.backends.coreml.edits import KEPT, _module, edited
from edge_sd.bundle.mlpackage.rewrite import rewrite
from edge_sd.bundle.mlpackage.wire import WireError, changed, field
from edge_sd.components.edits import Edits
from edge_sd.components.lora import Difference, Lora
from edge_sd.converters.coreml import convert, quantize
from edge_sd.converters.coreml.mil import Program
from edge_sd.converters.recipes import RECIPES
from edge_sd.errors import InvalidRequest

from .test_coreml_mil import build

RNG = np.random.default_rng(0)
WEIGHT = (RNG.normal(size=(64, 64)) / 8).astype(np.float16)
OTHER = (RNG.normal(size=(64, 64)) / 8).astype(np.float16)
X = {"x": RNG.normal(size=(2, 64)).astype(np.float16)}
# As the converter calls the queries of a block, and another weight beside it.
QUERIES, KEYS = ("p_model_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_" + each for each in "qk")


def body(mb: Any, x: Any) -> Any:
    first, second = (mb.const(val=w, name=f"{n}_weight") for n, w in ((QUERIES, WEIGHT), (KEYS, OTHER)))
    return mb.linear(x=mb.linear(x=x, weight=first), weight=second, name="out")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("edits") / "Unet.mlpackage", body, "iOS18")


def theirs(package: Path) -> dict[str, np.ndarray]:
    """The weights as coremltools reads them."""
    import coremltools as ct
    import coremltools.optimize.coreml as cto

    model = ct.models.MLModel(str(package), skip_model_load=True)
    return {name: row.val for name, row in cto.get_weights_metadata(model, weight_threshold=0).items()}


@pytest.mark.parametrize("form", ["fp16", "int8", "p8", "p4", "p4g16", "p1"])
def test_a_weight_of_any_form_becomes_what_is_given(plain: Path, tmp_path: Path, form: str) -> None:
    package = plain
    if form != "fp16":
        package = tmp_path / "Unet.mlpackage"
        convert.save(quantize.compress(convert.opened(plain), RECIPES[form], "iOS18"), package)
    name = next(name for name in Program.open(package)._constants if name.startswith(QUERIES) and "weight" in name)
    before = Program.open(package)
    kept = before.constant(next(n for n in before._constants if n.startswith(KEYS)))
    new = (WEIGHT + 1).astype(np.float16)
    rewrite(package, tmp_path / "new.mlpackage", [name], lambda _: new)
    found = Program.open(tmp_path / "new.mlpackage").predict(X)["out"]
    wanted = X["x"].astype(np.float32) @ new.astype(np.float32).T
    wanted = wanted.astype(np.float16).astype(np.float32) @ kept.astype(np.float32).T
    assert np.abs(found - wanted).max() < np.abs(wanted).max() / 500
    read = theirs(tmp_path / "new.mlpackage")
    assert any(np.array_equal(value, new) for value in read.values())
    grown = [sum(f.stat().st_size for f in each.rglob("*.bin")) for each in (package, tmp_path / "new.mlpackage")]
    assert (grown[1] == grown[0]) == (form == "fp16"), "a plain weight is written over"


def lora(shape: tuple[int, int] = (64, 64)) -> Lora:
    up, down = (RNG.normal(size=size).astype(np.float32) / 8 for size in ((shape[0], 4), (4, shape[1])))
    module = QUERIES.removeprefix("p_model_")
    return Lora("style", "ab" * 32, {("unet", module): Difference({"up": up, "down": down}, 0.5)})


def test_copies_are_made_once_and_the_oldest_go(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_SD_CACHE", str(tmp_path))
    given = lora()
    (first,) = edited([plain], "digest", Edits(loras=((given, 0.5),), part="unet"), "Unet")
    change = given.modules["unet", QUERIES.removeprefix("p_model_")].of((64, 64), 0.5)
    found = Program.open(first)
    assert np.allclose(found.constant(f"{QUERIES}_weight"), WEIGHT + change, atol=1e-3)
    assert np.array_equal(found.constant(f"{KEYS}_weight"), OTHER)
    stamp = (first / "Manifest.json").stat().st_mtime_ns
    assert edited([plain], "digest", Edits(loras=((given, 0.5),), part="unet"), "Unet") == [first]
    assert (first / "Manifest.json").stat().st_mtime_ns == stamp
    weights = next(first.rglob("weight.bin"))
    weights.write_bytes(weights.read_bytes()[:-1])
    edited([plain], "digest", Edits(loras=((given, 0.5),), part="unet"), "Unet")
    assert np.allclose(Program.open(first).constant(f"{QUERIES}_weight"), WEIGHT + change, atol=1e-3), "made again"
    for n in range(KEPT + 1):
        edited([plain], f"digest {n}", Edits(loras=((given, 0.5),), part="unet"), "Unet")
    assert len(list((tmp_path / "edited").iterdir())) == KEPT
    assert not first.exists()


def test_what_does_not_fit_is_one_line_and_leaves_nothing(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGE_SD_CACHE", str(tmp_path))
    with pytest.raises(InvalidRequest, match=r"'style' does not fit this model: down_blocks_0.* is \[64, 32\]"):
        edited([plain], "d", Edits(loras=((lora((64, 32)), 1.0),), part="unet"), "Unet")
    strange = Lora("odd", "cd" * 32, {("unet", "nothing_like_it"): next(iter(lora().modules.values()))})
    with pytest.raises(InvalidRequest, match="'odd' changes nothing that Unet has"):
        edited([plain], "d", Edits(loras=((strange, 1.0),), part="unet"), "Unet")
    with pytest.raises(InvalidRequest, match="no table of embeddings"):
        edited([plain], "d", Edits(vectors=np.ones((1, 64), np.float32)), "Unet")
    assert not list((tmp_path / "edited").iterdir())


@pytest.mark.parametrize(
    ("constant", "module"),
    [
        ("p_model_down_blocks_1_attentions_0_blocks_0_attn2_to_out_weight_to_fp16",
         "down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_out_0"),
        ("p_model_up_blocks_0_attentions_1_blocks_2_ff_proj_in_weight_to_fp16_palettized",
         "up_blocks_0_attentions_1_transformer_blocks_2_ff_net_0_proj"),
        ("p_model_mid_block_resnets_0_time_emb_proj_conv_weight_to_fp16", "mid_block_resnets_0_time_emb_proj"),
        ("p_model_time_embedding_linear_1_conv_weight", "time_embedding_linear_1"),
        ("p_model_conv_in_weight_to_fp16", "conv_in"),
        ("p_inner_model_text_model_encoder_layers_0_self_attn_q_proj_weight_to_fp16",
         "encoder_layers_0_self_attn_q_proj"),
        # As apple/ml-stable-diffusion's converter has them.
        ("mid_block_attentions_0_transformer_blocks_0_ff_net_2_weight_to_fp16",
         "mid_block_attentions_0_transformer_blocks_0_ff_net_2"),
        ("p_inner_model_text_model_embeddings_token_embedding_weight", ""),
        ("var_12_to_fp16", ""),
    ],
)  # fmt: skip
def test_weights_are_known_by_their_names(constant: str, module: str) -> None:
    assert _module(constant) == module


def test_fields_are_changed_in_their_place() -> None:
    message = field(1, 300) + field(7, field(2, "ab") + field(3, 1) + field(2, "cd")) + field(9, b"rest")
    wanted = field(1, 300) + field(7, field(2, "abab") + field(3, 1) + field(2, "cdcd")) + field(9, b"rest")
    assert changed(message, (7, 2), lambda data: data * 2) == wanted
    with pytest.raises(WireError):
        changed(message[:-2], (7, 2), lambda data: data)


def test_an_operation_reads_another_value(plain: Path, tmp_path: Path) -> None:
    """And coremltools still reads all of it."""
    rewrite(plain, tmp_path / "new.mlpackage", [], lambda _: WEIGHT, {"out": "x"})
    found = Program.open(tmp_path / "new.mlpackage").predict(X)["out"]
    assert np.allclose(found, X["x"].astype(np.float32) @ OTHER.astype(np.float32).T, atol=1e-2)
    assert not np.allclose(found, Program.open(plain).predict(X)["out"], atol=1e-2)
    assert theirs(tmp_path / "new.mlpackage").keys() == theirs(plain).keys()
