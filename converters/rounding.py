"""Weights in few bits, rounded so that a layer's outputs change least.

A layer's weight W, R rows of C numbers, is multiplied by inputs x of C numbers. With Q in its place outputs change by
(W - Q) x, and the mean of that squared is tr((W - Q) H (W - Q)^T), H = E[x x^T]. The nearest numbers minimise it only
where inputs have nothing to do with each other. Else an error in one column can be made good in others: each column in
turn takes the numbers nearest to what would undo the errors of all others, again and again (cyclic coordinate descent,
as QuantEase, Behdin et al. 2023, arXiv:2309.01885). No step makes the sum larger, on a grid of any shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

# What H's diagonal gains, of its mean: inputs that were never seen are not free, and few were seen.
DAMPING = 0.3
# Rounds over all columns; later ones change little.
SWEEPS = 3
# Columns whose products with all others are brought up to date together.
TOGETHER = 64
# Inputs of a layer that are taken of each call, and bytes of all H at a time.
SAMPLES, HELD = 1024, 2 << 30
# Ranges that are tried for a block, of the whole one, and how far that goes down.
RANGES, NARROWEST = 20, 0.4


@dataclass(frozen=True)
class Inputs:
    """What is known of a layer's inputs x [C]: H = E[x x^T] [C, C] and their mean [C]."""

    moments: Tensor
    mean: Tensor

    def damped(self, biased: bool) -> Tensor:
        """What a layer's rounding goes by: of one with a bias, which takes up the mean's share, the covariance."""
        found = self.moments - torch.outer(self.mean, self.mean) if biased else self.moments.clone()
        scale = float(found.diagonal().mean())
        # Of a layer whose inputs were always the same nothing is known.
        found.diagonal().add_(DAMPING * scale if scale > 0 else 1.0)
        return found


class Grid(Protocol):
    """The numbers that a weight can have."""

    def nearest(self, values: Tensor, column: int) -> Tensor:
        """The codes of the numbers nearest to `values` [R] of a column."""

    def decoded(self, codes: Tensor, column: int) -> Tensor:
        """The numbers of the codes [R] of a column."""


@dataclass(frozen=True)
class Integers:
    """(code - zero) * scale, codes of `bits`; `scale` and `zero` [R, blocks], a block of `width` columns each."""

    scale: Tensor
    zero: Tensor
    bits: int
    width: int

    def nearest(self, values: Tensor, column: int) -> Tensor:
        block = column // self.width
        codes = (values / self.scale[:, block]).round() + self.zero[:, block]
        return codes.clamp(*limits(self.bits))

    def decoded(self, codes: Tensor, column: int) -> Tensor:
        block = column // self.width
        return (codes - self.zero[:, block]) * self.scale[:, block]


@dataclass(frozen=True)
class Table:
    """One of the ascending `numbers`."""

    numbers: Tensor

    def nearest(self, values: Tensor, column: int) -> Tensor:
        return torch.bucketize(values.contiguous(), (self.numbers[1:] + self.numbers[:-1]) / 2)

    def decoded(self, codes: Tensor, column: int) -> Tensor:
        return self.numbers[codes]


def limits(bits: int) -> tuple[int, int]:
    """The least and the largest integer of so many bits."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def integers(weight: Tensor, bits: int, width: int, importance: Tensor | None = None) -> Integers:
    """Scales and zeros for blocks of `width` columns of `weight` [R, C] that lose least with the nearest integers.

    Of ranges from the whole one down, so that a few large numbers do not cost all others their digits. A number's
    squared error counts as much as `importance` [C] says. Scales are float16's, as they are stored.
    """
    least, most = limits(bits)
    data = weight.float().reshape(len(weight), -1, width)
    counts = torch.ones(()) if importance is None else importance.reshape(1, -1, width)
    low, high = data.amin(-1).clamp_max(0), data.amax(-1).clamp_min(0)
    best = scale = zero = None
    for share in torch.linspace(1, NARROWEST, RANGES):
        tried = ((high - low) * share / (most - least)).clamp_min(torch.finfo(torch.float16).tiny).half().float()
        exact = least - low * share / tried
        for at in (exact.floor().clamp(least, most), exact.ceil().clamp(least, most)):
            codes = ((data / tried[..., None]).round() + at[..., None]).clamp(least, most)
            error = (((codes - at[..., None]) * tried[..., None] - data).square() * counts).sum(-1)
            if best is None or scale is None or zero is None:
                best, scale, zero = error, tried, at
            better = error < best
            best, scale, zero = (
                torch.where(better, new, old) for new, old in ((error, best), (tried, scale), (at, zero))
            )
    assert scale is not None
    assert zero is not None
    return Integers(scale, zero, bits, width)


def rounded(weight: Tensor, grid: Grid, moments: Tensor | None = None) -> Tensor:
    """The codes of `weight` [R, C] on `grid`: nearest numbers, or, with H `moments` [C, C], those that change least."""
    weight = weight.float()
    columns = range(weight.shape[1])
    codes = torch.stack([grid.nearest(weight[:, n], n) for n in columns], 1)
    if moments is None:
        return codes
    error = weight - torch.stack([grid.decoded(codes[:, n], n) for n in columns], 1)
    pull = error @ moments
    power = moments.diagonal()
    for _ in range(SWEEPS):
        for start in range(0, weight.shape[1], TOGETHER):
            some = slice(start, start + TOGETHER)
            near, own = pull[:, some].clone(), moments[some, some]
            steps = torch.zeros_like(near)
            for n in range(near.shape[1]):
                column = start + n
                before = grid.decoded(codes[:, column], column)
                codes[:, column] = grid.nearest(before + near[:, n] / power[column], column)
                steps[:, n] = grid.decoded(codes[:, column], column) - before
                near -= steps[:, n, None] * own[n]
            pull -= steps @ moments[some]
    return codes


def inputs(module: nn.Module, names: Sequence[str], run: Callable[[], object]) -> Iterator[tuple[str, Inputs | None]]:
    """Layer -> what its inputs are while `run` calls the module, for each of `names`; None for an embedding.

    A convolution's columns are those of its flattened weight. `run` is called once for every HELD bytes.
    """
    layers = {name: module.get_submodule(name) for name in names}
    for some in _together(layers):
        found = _gathered({name: layers[name] for name in some}, run)
        for name in some:
            yield name, found.pop(name, None)


def _together(layers: dict[str, nn.Module]) -> Iterator[list[str]]:
    """The layers in order, as many at a time as HELD bytes allow."""
    some: list[str] = []
    held = 0
    for name, layer in layers.items():
        size = 4 * _columns(layer) ** 2
        if some and held + size > HELD:
            yield some
            some, held = [], 0
        some.append(name)
        held += size
    if some:
        yield some


def _columns(layer: Any) -> int:
    """The inputs of one output; 0 where they are no numbers, or not the same for all outputs."""
    if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1):
        return int(layer.weight[0].numel())
    return 0


def _gathered(layers: dict[str, Any], run: Callable[[], object]) -> dict[str, Inputs]:
    sums: dict[str, tuple[Tensor, Tensor, int]] = {}
    random = torch.Generator().manual_seed(0)

    def watch(name: str) -> Any:
        def hook(layer: Any, arguments: tuple[Tensor], output: Tensor) -> None:
            x = _rows(layer, arguments[0])
            if len(x) > SAMPLES:
                x = x[torch.randperm(len(x), generator=random)[:SAMPLES]]
            products, total, count = sums.get(name, (torch.zeros(()), torch.zeros(()), 0))
            sums[name] = products + x.T @ x, total + x.sum(0), count + len(x)

        return hook

    handles = [layer.register_forward_hook(watch(name)) for name, layer in layers.items() if _columns(layer)]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return {name: Inputs(products / count, total / count) for name, (products, total, count) in sums.items()}


def _rows(layer: Any, x: Tensor) -> Tensor:
    """All x [N, C] that the layer's weight, flattened to [R, C], is multiplied by."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    columns = functional.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    return columns.transpose(1, 2).reshape(-1, columns.shape[1])
