"""Upscalers of ESRGAN's class (Wang et al. 2018, arXiv:1809.00219; Real-ESRGAN: Wang et al. 2021, arXiv:2107.10833).

A file of safetensors holds one network of residual-in-residual dense blocks. Its sizes are read from the tensors:

    conv_first, body.N.rdb1…3.conv1…5, conv_body, conv_up1, conv_up2, conv_hr, conv_last      Real-ESRGAN's names
    model.0, model.1.sub.N.RDB1…3.conv1…5.0, model.1.sub.LAST, model.3, 6, 8, 10               ESRGAN's first names

What goes in is a picture, or for networks of less than four times the size its pixels folded into channels.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from edge_sd.bundle.safetensors import check_readable
from edge_sd.errors import InvalidModel

CLASS = "RRDBNet"
WEIGHTS = "diffusion_pytorch_model.safetensors"
# Channels of the first layer -> how many times larger the result is: pixels are folded by 2 or 4 beforehand.
SCALES = {3: 4, 12: 2, 48: 1}
_OUTER = {"model.0": "conv_first", "model.3": "conv_up1", "model.6": "conv_up2", "model.8": "conv_hr",
          "model.10": "conv_last"}  # fmt: skip
# What the factor of every residual is, and the slope below 0.
RESIDUAL, SLOPE = 0.2, 0.2


@dataclass(frozen=True)
class Sizes:
    """Blocks, width of their features, growth of a dense layer, channels in."""

    num_block: int
    num_feat: int
    num_grow_ch: int
    channels: int

    @property
    def scale(self) -> int:
        return SCALES[self.channels]


def renamed(name: str) -> str:
    """A tensor's name as Real-ESRGAN has it."""
    name = re.sub(r"^(params_ema|params|module)\.", "", name)
    if inner := re.fullmatch(r"model\.1\.sub\.(\d+)\.RDB(\d)\.conv(\d)\.0\.(weight|bias)", name):
        return "body.{}.rdb{}.conv{}.{}".format(*inner.groups())
    if last := re.fullmatch(r"model\.1\.sub\.\d+\.(weight|bias)", name):
        return f"conv_body.{last[1]}"
    stem, _, end = name.rpartition(".")
    return f"{_OUTER[stem]}.{end}" if stem in _OUTER else name


def sizes_of(shapes: Mapping[str, tuple[int, ...]], name: str) -> Sizes:
    """The network's sizes, by the shapes of its tensors under Real-ESRGAN's names. Raises InvalidModel."""
    blocks = {int(found[1]) for each in shapes if (found := re.match(r"body\.(\d+)\.rdb1\.conv1\.weight", each))}
    try:
        features, channels = shapes["conv_first.weight"][:2]
        sizes = Sizes(len(blocks), features, shapes["body.0.rdb1.conv1.weight"][0], channels)
    except (KeyError, ValueError) as error:
        few = ", ".join(sorted(shapes)[:3]) or "nothing"
        raise InvalidModel(f"{name} is no upscaler of ESRGAN's class (RRDBNet): it holds {few}, …") from error
    if sizes.channels not in SCALES:
        raise InvalidModel(f"{name} takes {sizes.channels} channels; upscalers of 3, 12 and 48 are supported")
    with torch.device("meta"):
        wanted = {key: tuple(value.shape) for key, value in RRDBNet(sizes).state_dict().items()}
    if wrong := sorted(set(wanted) ^ set(shapes) | {key for key in wanted if shapes.get(key) != wanted[key]}):
        raise InvalidModel(f"{name} is another network than RRDBNet of {sizes.num_block} blocks: {wrong[0]} differs")
    return sizes


def unpack(path: Path, folder: Path) -> None:
    """Write the upscaler in the file `path` as a source's folder has it: a config, and weights in one set of names.

    Raises InvalidRequest (no such file), InvalidModel (a pickle, damaged, another network).
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    check_readable(path)
    try:
        tensors = {renamed(name): value.contiguous() for name, value in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        raise InvalidModel(f"{path} is damaged or no safetensors file: {error}") from error
    sizes = sizes_of({name: tuple(value.shape) for name, value in tensors.items()}, path.name)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"_class_name": CLASS, **asdict(sizes)}), "utf-8")
    save_file(tensors, folder / WEIGHTS)


def load(folder: Path) -> RRDBNet:
    """The network that `unpack` wrote, in float32. Raises InvalidModel."""
    from safetensors.torch import load_file

    from edge_sd.files import read_json

    config = read_json(folder / "config.json")
    tensors = load_file(folder / WEIGHTS)
    if any(not torch.isfinite(value).all() for value in tensors.values()):
        raise InvalidModel(f"{folder / WEIGHTS} is damaged: it holds NaN or infinity")
    net = RRDBNet(Sizes(**{name: int(config[name]) for name in ("num_block", "num_feat", "num_grow_ch", "channels")}))
    net.load_state_dict({name: value.float() for name, value in tensors.items()})
    return net.eval().requires_grad_(False)


def _conv(into: int, out: int) -> nn.Conv2d:
    return nn.Conv2d(into, out, 3, padding=1)


class DenseBlock(nn.Module):
    """Five convolutions, each of all that came before it."""

    def __init__(self, features: int, growth: int) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3, self.conv4, self.conv5 = (
            _conv(features + n * growth, features if n == 4 else growth) for n in range(5)
        )

    def forward(self, x: Tensor) -> Tensor:
        seen = [x]
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            seen.append(nn.functional.leaky_relu(conv(torch.cat(seen, 1)), SLOPE))
        last: Tensor = self.conv5(torch.cat(seen, 1))
        return x + RESIDUAL * last


class Block(nn.Module):
    """Three dense blocks in a residual."""

    def __init__(self, features: int, growth: int) -> None:
        super().__init__()
        self.rdb1, self.rdb2, self.rdb3 = (DenseBlock(features, growth) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        inner: Tensor = self.rdb3(self.rdb2(self.rdb1(x)))
        return x + RESIDUAL * inner


class RRDBNet(nn.Module):
    """A picture [B, 3, H, W] in [0, 1] -> the same, `scale` times as wide and high; sides divide by the folding."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        features = sizes.num_feat
        self.folding = 4 // sizes.scale
        self.conv_first = _conv(sizes.channels, features)
        self.body = nn.Sequential(*(Block(features, sizes.num_grow_ch) for _ in range(sizes.num_block)))
        self.conv_body, self.conv_up1, self.conv_up2, self.conv_hr = (_conv(features, features) for _ in range(4))
        self.conv_last = _conv(features, 3)

    def forward(self, image: Tensor) -> Tensor:
        x = self.conv_first(nn.functional.pixel_unshuffle(image, self.folding) if self.folding > 1 else image)
        x = x + self.conv_body(self.body(x))
        for up in (self.conv_up1, self.conv_up2):
            x = nn.functional.leaky_relu(up(nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")), SLOPE)
        last: Tensor = self.conv_last(nn.functional.leaky_relu(self.conv_hr(x), SLOPE))
        return last
