"""Low-rank differences added to weights in memory, held to torch's arithmetic."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge_sd.errors import InvalidModel
from edge_sd.lora import add_lora, tensors

torch = pytest.importorskip("torch")
from safetensors.torch import save_file  # noqa: E402


def files(folder: Path, **changes: object) -> tuple[Path, Path]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> object:
        return torch.randn(shape, generator=generator).half()

    weights = {"a.to_q.weight": random(6, 5), "a.conv.weight": random(7, 4, 3, 3), "a.norm.weight": random(5)}
    lora = {
        "unet.a.to_q.lora_A.weight": random(2, 5),
        "unet.a.to_q.lora_B.weight": random(6, 2),
        "unet.a.conv.lora_A.weight": random(2, 4, 3, 3),
        "unet.a.conv.lora_B.weight": random(7, 2, 1, 1),
        "unet.a.conv.alpha": torch.tensor(1.0),
    }
    save_file(weights, folder / "model.safetensors")
    save_file({**lora, **changes}, folder / "lora.safetensors")
    return folder / "model.safetensors", folder / "lora.safetensors"


def test_differences_are_what_torch_computes(tmp_path: Path) -> None:
    model, lora = files(tmp_path)
    data = np.fromfile(model, np.uint8)
    before = {name: tensor.astype(np.float32) for name, tensor in tensors(data.copy(), "model").items()}
    add_lora([("model", data)], lora)
    after, low = tensors(data, "model"), tensors(np.fromfile(lora, np.uint8), "lora")
    down, up = (torch.from_numpy(low[f"unet.a.to_q.lora_{half}.weight"].astype(np.float32)) for half in "AB")
    np.testing.assert_allclose(after["a.to_q.weight"], before["a.to_q.weight"] + (up @ down).numpy(), atol=4e-3)
    # A convolution and then a 1x1 convolution are one with the product of their weights; alpha / rank is 1/2.
    down, up = (torch.from_numpy(low[f"unet.a.conv.lora_{half}.weight"].astype(np.float32)) for half in "AB")
    x = torch.randn(1, 4, 9, 9, generator=torch.Generator().manual_seed(1))
    weight = torch.from_numpy(after["a.conv.weight"].astype(np.float32) - before["a.conv.weight"])
    through = torch.nn.functional.conv2d(torch.nn.functional.conv2d(x, down), up) / 2
    torch.testing.assert_close(torch.nn.functional.conv2d(x, weight), through, atol=0.05, rtol=0.01)
    np.testing.assert_array_equal(after["a.norm.weight"], before["a.norm.weight"].astype(np.float16))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unet.b.lora_A.weight": torch.zeros(2, 3), "unet.b.lora_B.weight": torch.zeros(3, 2)}, "no place"),
        ({"unet.a.norm.lora_A.weight": torch.zeros(2, 5), "unet.a.norm.lora_B.weight": torch.zeros(5, 2)}, "shape"),
        ({"unet.a.norm.lora_A.weight": torch.zeros(2, 5)}, "one half"),
    ],
)
def test_a_difference_that_does_not_fit_is_named(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    model, lora = files(tmp_path, **changes)
    with pytest.raises(InvalidModel, match=message):
        add_lora([("model", np.fromfile(model, np.uint8))], lora)


@pytest.mark.parametrize("size", [0, 4, 8, 60])
def test_a_cut_file_is_called_damaged(tmp_path: Path, size: int) -> None:
    model, lora = files(tmp_path)
    lora.write_bytes(lora.read_bytes()[:size])
    with pytest.raises(InvalidModel, match="damaged"):
        add_lora([("model", np.fromfile(model, np.uint8))], lora)
