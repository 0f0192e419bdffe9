"""The training loop of all stages: budget, learning-rate schedule, average of the weights, checkpoints.

A run ends after a number of steps or of minutes, whichever it was given; its schedule follows the share of that budget
that is used up, so the same recipe fits a laptop's evening and a GPU's minute. A checkpoint holds all that a run is:
stopped and started again it goes on where it was.

Under `accelerate launch` every process draws its own batches and gradients are averaged between them, so N processes
with batches of 48 are one with batches of 48 N; alone, a process is simply that.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import reduce

from ..form import Report
from .muon import Muon, hidden_matrices

Row = dict[str, float]
EAGER = 4


@dataclass
class Budget:
    """How long a run may last: `steps` or `minutes`, whichever is given.

    watch   is told at each step what is being done, and the share of the budget that is used up
    """

    steps: int | None = None
    minutes: float | None = None
    watch: Report = lambda what, share: None

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise ValueError("give either steps or minutes")

    def used(self, step: int, seconds: float) -> float:
        """The share of the budget that is used up, 0 to 1."""
        if self.steps is not None:
            return min(1.0, step / self.steps)
        assert self.minutes is not None
        return min(1.0, seconds / (60 * self.minutes))


def learning_rate(peak: float, step: int, used: float, warmup: int = 100) -> float:
    """Linear warm-up over `warmup` steps, then a cosine from `peak` down to 1 % of it at the end of the budget."""
    cosine = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * used))
    return peak * min(1.0, (step + 1) / warmup) * cosine


@dataclass
class Run:
    """One training: its modules, their optimizer, and their moving average, kept in `folder`."""

    name: str
    folder: Path
    modules: dict[str, torch.nn.Module]
    budget: Budget
    peak: float
    ema_decay: float = 0.999
    # The average is updated every few steps: less work, with no visible difference.
    ema_every: int = 4
    weight_decay: float = 0.01
    # Layers that begin at zero and have to find their size first: at EAGER times the rate, and not by Muon, whose steps
    # are equally large in all directions.
    eager: Sequence[torch.nn.Module] = ()
    step: int = 0
    seconds: float = 0.0
    log: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        device = next(p.device for m in self.modules.values() for p in m.parameters())
        self.processes = PartialState(cpu=device.type == "cpu")
        self.parameters = [p for m in self.modules.values() for p in m.parameters() if p.requires_grad]
        eager = [p for m in self.eager for p in m.parameters()]
        apart = {id(p) for p in eager}
        hidden = [p for m in self.modules.values() for p in hidden_matrices(m) if id(p) not in apart]
        apart |= {id(p) for p in hidden}
        rest = [p for p in self.parameters if id(p) not in apart]
        groups: list[dict[str, Any]] = [{"params": rest}, *([{"params": eager, "rate": EAGER}] if eager else [])]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(groups, lr=self.peak, betas=(0.9, 0.99), weight_decay=self.weight_decay, fused=True),
        ]
        if hidden:
            self.optimizers.insert(0, Muon(hidden, lr=self.peak, weight_decay=self.weight_decay))
        self.ema = {
            name: {k: v.detach().clone().float() for k, v in module.state_dict().items()}
            for name, module in self.modules.items()
        }
        if self.checkpoint.is_file():
            self._resume()
        if self.processes.num_processes > 1:
            torch.manual_seed(torch.initial_seed() + self.step + self.processes.process_index)

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes files."""
        return bool(self.processes.is_main_process)

    def rng(self, seed: int) -> np.random.Generator:
        """A generator of this process's own, different after each resumption."""
        return np.random.default_rng([seed, self.step, self.processes.process_index])

    @property
    def checkpoint(self) -> Path:
        return self.folder / f"{self.name}.checkpoint.pt"

    def _resume(self) -> None:
        state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        self.ema = state["ema"]
        self.step, self.seconds, self.log = state["step"], state["seconds"], state["log"]
        torch.set_rng_state(state["rng"])

    def save(self) -> None:
        """Write the checkpoint and the log; a stop in the middle leaves the older one."""
        if not self.is_main:
            return
        state = {
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "ema": self.ema,
            "step": self.step,
            "seconds": self.seconds,
            "log": self.log,
            "rng": torch.get_rng_state(),
        }
        beside = self.checkpoint.with_suffix(".partial")
        torch.save(state, beside)
        os.replace(beside, self.checkpoint)
        (self.folder / f"{self.name}.log.json").write_text(json.dumps(self.log))

    def train(
        self,
        loss_of: Callable[[int], tuple[torch.Tensor, dict[str, float]]],
        *,
        every: int = 100,
        report: Callable[[str], None] = print,
        sample: Callable[[], None] | None = None,
        save_minutes: float = 4.0,
    ) -> None:
        """Minimise `loss_of(step)` until the budget is used up."""
        sums: dict[str, float] = {}
        count = 0
        saved = last = time.monotonic()
        while (used := self._used()) < 1:
            lr = learning_rate(self.peak, self.step, used)
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = lr * group.get("rate", 1)
            loss, parts = loss_of(self.step)
            loss.backward()
            self._average_gradients()
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            for optimizer in self.optimizers:
                if torch.isfinite(norm):
                    optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            self.step += 1
            if self.is_main:
                self.budget.watch(f"{self.name}, step {self.step}", used)
            if self.step % self.ema_every == 0:
                self._average()
            now = time.monotonic()
            self.seconds += now - last
            last = now
            for key, value in {"loss": float(loss.detach()), **parts}.items():
                sums[key] = sums.get(key, 0.0) + value
            count += 1
            if self.step % every == 0:
                line = self._log(lr, sums, count)
                sums, count = {}, 0
                if self.is_main:
                    report(line)
            if now - saved > 60 * save_minutes:
                self._pause(sample)
                saved = time.monotonic()
        if count:
            report(self._log(lr, sums, count))
        self._pause(sample)

    def _used(self) -> float:
        """The share of the budget that is used up, the same in every process, or one would wait for ever."""
        used = self.budget.used(self.step, self.seconds)
        if self.processes.num_processes > 1:
            used = float(reduce(torch.tensor(used, device=self.processes.device), "mean"))
        return used

    def _pause(self, sample: Callable[[], None] | None) -> None:
        """Write a checkpoint and the stage's own samples."""
        self.save()
        if sample is not None and self.is_main:
            sample()
        self.processes.wait_for_everyone()

    def _average_gradients(self) -> None:
        if self.processes.num_processes == 1:
            return
        held = [p.grad for p in self.parameters if p.grad is not None]
        flat = reduce(torch.cat([g.flatten() for g in held]), "mean")
        for g, mean in zip(held, flat.split([g.numel() for g in held]), strict=True):
            g.copy_(mean.view_as(g))

    def _log(self, lr: float, sums: dict[str, float], count: int) -> str:
        """Log and print the means since the last row."""
        row: Row = {"step": self.step, "minutes": self.seconds / 60, "lr": lr}
        row |= {key: value / count for key, value in sums.items()}
        self.log.append(row)
        return "  ".join(f"{key} {value:.5g}" for key, value in row.items())

    def _average(self) -> None:
        # The average warms up with the run, so that an early picture is not made of noise.
        decay = min(self.ema_decay, (1 + self.step) / (10 + self.step)) ** self.ema_every
        with torch.no_grad():
            for name, module in self.modules.items():
                averages = self.ema[name]
                pairs: Iterable[tuple[str, Any]] = module.state_dict().items()
                floats = [(averages[k], v) for k, v in pairs if v.is_floating_point()]
                torch._foreach_lerp_([a for a, _ in floats], [v.float() for _, v in floats], 1 - decay)

    def use_average(self) -> None:
        """Put the averaged weights into the modules, which ends training."""
        for name, module in self.modules.items():
            module.load_state_dict(self.ema[name])

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights for a look at them in the middle of training, then the live ones again."""
        live = {name: {k: v.clone() for k, v in m.state_dict().items()} for name, m in self.modules.items()}
        self.use_average()
        yield
        for name, module in self.modules.items():
            module.load_state_dict(live[name])
