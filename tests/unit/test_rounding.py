"""Rounding to few bits: the error of outputs, and that it is the error of what is stored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from edge_sd.apps.bench import coreai as bench
from edge_sd.converters import parity
from edge_sd.converters.build import _cases
from edge_sd.converters.coreml.mixed import palette
from edge_sd.converters.recipes import RECIPES
from edge_sd.converters.rounding import Inputs, Integers, Table, inputs, integers, rounded
from edge_sd.converters.sources.source import Source
from edge_sd.converters.targets import form_named


def normal(generator: torch.Generator) -> Tensor:
    return torch.randn(48, 64, generator=generator)


def heavy_tailed(generator: torch.Generator) -> Tensor:
    """A few numbers are ten times as large as most."""
    return torch.randn(48, 64, generator=generator) * torch.randn(48, 64, generator=generator).abs().add(0.1).pow(2)


def correlated(generator: torch.Generator) -> Tensor:
    """Inputs [N, 64] that have eight directions in common."""
    shared = torch.randn(512, 8, generator=generator) @ torch.randn(8, 64, generator=generator)
    return shared + 0.3 * torch.randn(512, 64, generator=generator)


def decoded(grid: Integers | Table, codes: Tensor) -> Tensor:
    return torch.stack([grid.decoded(codes[:, n], n) for n in range(codes.shape[1])], 1)


@pytest.mark.parametrize("draw", [normal, heavy_tailed])
def test_outputs_change_less_than_with_the_nearest_numbers(draw: Callable[[torch.Generator], Tensor]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = draw(generator), correlated(generator)
    seen = x.T @ x / len(x) + 0.01 * torch.eye(64)
    plain = _whole_range(weight)

    def error(stored: Tensor) -> float:
        return float((x @ (weight - stored).T).square().mean())

    near = error(decoded(plain, rounded(weight, plain)))
    searched = integers(weight, 4, 16, seen.diagonal())
    assert error(decoded(searched, rounded(weight, searched, seen))) < 0.4 * near
    # The same grid, and a palette's.
    assert error(decoded(plain, rounded(weight, plain, seen))) < 0.5 * near
    table = Table(torch.from_numpy(palette(weight.numpy(), 4)[0]))
    assert error(decoded(table, rounded(weight, table, seen))) < 0.5 * error(decoded(table, rounded(weight, table)))


def _whole_range(weight: Tensor) -> Integers:
    data = weight.reshape(48, -1, 16)
    low, high = data.amin(-1).clamp_max(0), data.amax(-1).clamp_min(0)
    scale = (high - low) / 15
    return Integers(scale, (-8 - low / scale).round(), 4, 16)


def test_without_inputs_scales_lose_no_more_than_the_whole_range() -> None:
    weight = heavy_tailed(torch.Generator().manual_seed(1))
    whole, searched = _whole_range(weight), integers(weight, 4, 16)
    errors = [float((decoded(grid, rounded(weight, grid)) - weight).square().sum()) for grid in (whole, searched)]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("layer", [nn.Linear(8, 6), nn.Conv2d(4, 6, 3, 2, 1), nn.Conv2d(4, 6, 1)])
def test_moments_are_those_of_what_a_weight_is_multiplied_by(layer: nn.Linear | nn.Conv2d) -> None:
    """The oracle is the layer itself: outputs of any weight W have the mean square tr(W H W^T) and the mean W m."""
    torch.manual_seed(0)
    x = torch.randn(3, 8) if isinstance(layer, nn.Linear) else torch.randn(2, 4, 6, 6)
    model = nn.Sequential(layer)
    assert layer.bias is not None
    layer.bias.data.zero_()
    ((name, found),) = inputs(model, ["0"], lambda: model(x))
    assert name == "0"
    assert found is not None
    weight, y = layer.weight.detach().flatten(1), layer(x).detach().transpose(0, 1).flatten(1)
    torch.testing.assert_close(weight @ found.mean, y.mean(1), rtol=1e-4, atol=1e-4)
    total = (weight @ found.moments @ weight.T).diagonal()
    torch.testing.assert_close(total, y.square().mean(1), rtol=1e-4, atol=1e-4)
    assert float(found.damped(True).trace()) < float(found.damped(False).trace())


def test_embeddings_have_no_moments() -> None:
    model = nn.Sequential(nn.Embedding(8, 4))
    assert list(inputs(model, ["0"], lambda: model(torch.arange(3)))) == [("0", None)]


def test_what_is_stored_is_what_the_error_was_computed_with() -> None:
    pytest.importorskip("coreai_torch", reason="coreai-core and coreai-torch need Python 3.11 to 3.14")
    from edge_sd.converters.coreai import compress

    generator = torch.Generator().manual_seed(2)
    weight, x = heavy_tailed(generator), correlated(generator) + 1
    plain = nn.Sequential(nn.Linear(64, 48))
    for name, bits in (("int4", None), ("mixed4", {"0": 4})):
        model = nn.Sequential(nn.Linear(64, 48))
        model[0].weight.data = weight.clone()
        plain[0].weight.data = weight.clone()
        model[0].bias.data = plain[0].bias.data.clone()
        stored = compress.compress(model, RECIPES[name], bits, lambda model=model: model(x)).get_submodule("0.stored")
        ((_, given),) = inputs(plain, ["0"], lambda: plain(x))
        assert isinstance(given, Inputs)
        seen = given.damped(True)
        grid: Integers | Table
        if isinstance(stored, compress.Blocks):
            grid = integers(weight, 4, 32, seen.diagonal())
            codes = stored.numbers
        else:
            assert isinstance(stored, compress.Palette)
            grid, codes = Table(stored.lut.flatten().float()), stored.indices
        wanted = rounded(weight, grid, seen)
        assert torch.equal(codes.long(), wanted.long())
        torch.testing.assert_close(stored().float(), decoded(grid, wanted), rtol=2e-3, atol=1e-4)
        # Outputs are right in the mean.
        change = torch.nn.functional.linear(x, stored().float(), model[0].bias) - plain(x)
        assert change.mean(0).abs().max() < 1e-4


def test_of_a_module_that_is_called_for_a_few_layers_at_a_time_nothing_changes_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("coreai_torch", reason="coreai-core and coreai-torch need Python 3.11 to 3.14")
    from edge_sd.converters import rounding
    from edge_sd.converters.coreai import compress

    x = correlated(torch.Generator().manual_seed(3)) + 1
    found = []
    for held in (rounding.HELD, 1):
        monkeypatch.setattr(rounding, "HELD", held)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        calls: list[Tensor] = []
        compress.compress(model, RECIPES["int4"], None, lambda model=model, calls=calls: calls.append(model(x)))
        assert len(calls) == (1 if held > 1 else 2)
        assert all(torch.equal(each, calls[0]) for each in calls)
        found.append(model.half().state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_weights_are_rounded_by_other_pictures_than_figures_are_measured_on(emoji: Path) -> None:
    source = Source.open(emoji)
    shown = {
        (backend, name): [prompt for _, prompt, _ in _cases(source, form_named(backend), RECIPES[name])]
        for backend, name in (("coreai", "fp16"), ("coreai", "int4"), ("coreai", "mixed4"), ("openvino", "int4"))
    }
    only = [parity.PROMPT]
    assert shown["coreai", "fp16"] == shown["openvino", "int4"] == only
    assert shown["coreai", "int4"] == shown["coreai", "mixed4"] == only + [prompt for prompt, _ in parity.ROUNDING]
    assert not {prompt for prompt, _ in parity.ROUNDING} & {*bench.PROMPTS, parity.PROMPT}


def test_calls_for_calibration_are_not_measured() -> None:
    given = [{"x": np.full(4, value, np.float32)} for value in (1.0, 2.0)]
    recording = parity.Recording(given, [{"y": np.arange(4.0)}, {"y": np.zeros(4)}], measured=1)
    assert recording.calibration == given[1:]
    seen = []

    def run(inputs: parity.Arrays) -> parity.Arrays:
        seen.append(inputs)
        return {"y": np.arange(4.0) + 0.1}

    assert parity.measure(run, recording).max_error == pytest.approx(0.1)
    assert seen == given[:1]


def test_a_text_encoder_has_more_bits_than_a_denoiser_and_an_autoencoder_fewer_and_all_together_as_many_as_fit(
    emoji: Path,
) -> None:
    from edge_sd.converters.coreai.bits import MEAN, mean_bits

    source = Source.open(emoji)
    text, unet, vae = (mean_bits(source, part) for part in ("text_encoder", "unet", "vae_decoder"))
    assert text > unet > vae > 2
    assert mean_bits(source, "vae_encoder") == vae
    assert mean_bits(source, "controlnet") == unet
    numbers = [sum(each.numel() for each in source.load(part).parameters()) for part in ("text_encoder", "unet")]
    # Both halves of the autoencoder.
    numbers.append(
        sum(tensor.numel() for path in source.weights("vae_decoder")[0] for tensor in load_file(path).values())
    )
    assert np.average([text, unet, vae], weights=numbers) == pytest.approx(MEAN)
