"""Which layers pay for int8, on networks whose answer is known."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from scipy.stats import spearmanr
from torch import nn

from edge_sd.converters.sensitivity import Cost, costs, sensitive
from edge_sd.converters.sources.wrappers import UNet


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(128, 3))


def test_the_layer_whose_inputs_have_an_outlier_costs_most() -> None:
    """One value a thousand times the others takes nearly all levels of an 8-bit range."""
    model = network()
    model[2].weight.data[:, 0] = 0
    with torch.no_grad():
        model[0].weight[0] *= 1000
    inputs = [(torch.randn(1, 4, 4, 4),) for _ in range(2)]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = {cost.layer: cost for cost in costs(model, inputs)}
    assert max(found.values(), key=lambda cost: cost.error).layer == "2"
    assert found["2"].error > 20 * found["4"].error
    products = {"0": 8 * 16 * 36, "2": 8 * 16 * 8, "4": 3 * 128}
    for name, count in products.items():
        assert abs(found[name].products - count / sum(products.values())) < 1e-9
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def rounded_one_by_one(module: nn.Module, inputs: list[tuple[torch.Tensor, ...]]) -> dict[str, float]:
    """Each layer's error by its definition: round it, leave the others, and compare the network's outputs."""
    from torch.ao.quantization import FakeQuantize, MinMaxObserver, PerChannelMinMaxObserver

    found = {}
    with torch.no_grad():
        expected = [module(*each) for each in inputs]
        for name, layer in module.named_modules():
            if not isinstance(layer, nn.Conv2d | nn.Linear):
                continue
            watched = FakeQuantize(MinMaxObserver, quant_min=0, quant_max=255, dtype=torch.quint8)
            handle = layer.register_forward_pre_hook(lambda _, given, watched=watched: (watched(given[0]),))
            watched.disable_fake_quant()
            for each in inputs:
                module(*each)
            watched.enable_fake_quant()
            watched.disable_observer()
            weights = FakeQuantize(
                PerChannelMinMaxObserver, quant_min=-127, quant_max=127, dtype=torch.qint8,
                qscheme=torch.per_channel_symmetric, ch_axis=0,
            )  # fmt: skip
            kept = layer.weight.data
            layer.weight.data = weights(kept)
            found[name] = sum(float((module(*a) - b).square().mean()) for a, b in zip(inputs, expected, strict=True))
            layer.weight.data = kept
            handle.remove()
    return {name: error / sum(float(each.square().mean()) for each in expected) for name, error in found.items()}


def test_costs_are_those_of_rounding_one_layer_after_the_other() -> None:
    torch.manual_seed(0)
    model = UNet(UNet2DConditionModel(
        block_out_channels=(16, 32), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), layers_per_block=1, norm_num_groups=8,
        cross_attention_dim=24, attention_head_dim=2,
    ).eval().requires_grad_(False))  # fmt: skip
    inputs = [(torch.randn(1, 4, 8, 8), torch.tensor([each]), torch.randn(1, 5, 24)) for each in (100.0, 800.0)]
    wanted = rounded_one_by_one(model, inputs)
    shares: list[float] = []
    found = {each.layer: each.error for each in costs(model, inputs, shares.append)}
    assert found.keys() == wanted.keys()
    assert spearmanr([found[name] for name in wanted], list(wanted.values())).statistic >= 0.95
    assert abs(sum(found.values()) / sum(wanted.values()) - 1) < 0.3
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert {each.layer: each.error for each in costs(model, inputs)} == found, "another run, the same choice"


def test_layers_are_kept_until_little_error_is_left_or_too_many_products() -> None:
    found = [Cost("a", 0.5, 0.1), Cost("b", 0.3, 0.2), Cost("c", 0.15, 0.3), Cost("d", 0.05, 0.4)]
    assert sensitive(found, 0.0, 1.0) == ["a", "b", "c", "d"]
    assert sensitive(found, 0.25, 1.0) == ["a", "b"]
    assert sensitive(found, 0.0, 0.45) == ["a", "b"]
    assert sensitive(found, 1.0, 1.0) == []
