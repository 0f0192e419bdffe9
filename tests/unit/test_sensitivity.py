"""Which layers pay for int8, on networks whose answer is known."""

from __future__ import annotations

import torch
from torch import nn

from edge_sd.converters.sensitivity import Cost, costs, sensitive


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


def test_layers_are_kept_until_little_error_is_left_or_too_many_products() -> None:
    found = [Cost("a", 0.5, 0.1), Cost("b", 0.3, 0.2), Cost("c", 0.15, 0.3), Cost("d", 0.05, 0.4)]
    assert sensitive(found, 0.0, 1.0) == ["a", "b", "c", "d"]
    assert sensitive(found, 0.25, 1.0) == ["a", "b"]
    assert sensitive(found, 0.0, 0.45) == ["a", "b"]
    assert sensitive(found, 1.0, 1.0) == []
