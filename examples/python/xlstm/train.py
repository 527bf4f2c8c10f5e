# SPDX-License-Identifier: MIT OR Apache-2.0
"""Training within a budget of steps and minutes, and the held-out measure."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from .data import even_windows, random_windows
from .model import XLSTM


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides how training runs."""

    steps: int = 2500
    minutes: float = 2.0
    batch: int = 4
    seq_len: int = 256
    lr: float = 3e-3
    warmup: float = 0.05
    """Part of the run in which the learning rate rises; then it falls along a cosine."""
    weight_decay: float = 0.1
    clip: float = 1.0
    evaluations: int = 6
    """Held-out measurements after the one at the start, evenly spread; the last at the end."""
    held_out_windows: int = 96
    seed: int = 0


@dataclass
class History:
    """What training saw. Losses are bits per byte."""

    train: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    """(steps done, bits per byte)."""
    seconds: float = 0.0
    """In training steps alone, without the evaluations."""
    tokens: int = 0


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 matmuls on a GPU, plain float32 on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def bits_per_byte(model: XLSTM, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of (B, S) targets in bits; 8 is knowing nothing."""
    with autocast(inputs.device):
        logits = model(inputs)
    return cross_entropy(logits.flatten(0, 1), targets.flatten()) / math.log(2)


@torch.no_grad()
def evaluate(model: XLSTM, data: Tensor, config: TrainConfig, device: torch.device) -> float:
    """Bits per byte on windows of `data` that are the same at every call."""
    model.eval()
    inputs, targets = even_windows(data, config.held_out_windows, config.seq_len)
    total = 0.0
    for x, y in zip(inputs.split(config.batch), targets.split(config.batch), strict=True):
        total += bits_per_byte(model, x.to(device), y.to(device)).item() * len(x)
    model.train()
    return total / len(inputs)


def learning_rate(progress: float, config: TrainConfig) -> float:
    """Linear warm-up, then a cosine to a fiftieth of the peak; `progress` in [0, 1]."""
    if progress < config.warmup:
        return config.lr * (0.02 + 0.98 * progress / config.warmup)
    rest = (progress - config.warmup) / (1 - config.warmup)
    return config.lr * (0.02 + 0.49 * (1 + math.cos(math.pi * rest)))


def progress_of(step: int, seconds: float, config: TrainConfig) -> float:
    """How much of the run is done, by steps, or by time where that ends the run first.

    Time needs a clear lead to count, so that runs within their time repeat exactly.
    """
    by_steps = step / config.steps
    by_time = seconds / (60 * config.minutes)
    return by_time if by_time >= min(1.0, by_steps + 0.02) else by_steps


def make_optimizer(model: XLSTM, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW; only matrices decay."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)


def train(
    model: XLSTM,
    train_data: Tensor,
    held_out: Tensor,
    config: TrainConfig,
    device: torch.device,
    say: Callable[[str], None] = print,
) -> History:
    """Train `model` in place until the steps or the minutes are used up."""
    generator = torch.Generator().manual_seed(config.seed)
    optimizer = make_optimizer(model, config)
    history = History()
    bar = ProgressBar()

    def measure() -> None:
        history.held_out.append((len(history.train), evaluate(model, held_out, config, device)))

    def batch() -> tuple[Tensor, Tensor]:
        x, y = random_windows(train_data, config.batch, config.seq_len, generator)
        return x.to(device), y.to(device)

    # The first call of anything is slow: keep it out of the clock.
    bits_per_byte(model, *batch()).backward()
    measure()
    say(f"  before training: held-out {history.held_out[-1][1]:.3f} bits per byte")

    start = time.perf_counter()
    done, measured = 0.0, 0
    while done < 1:
        step_start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(done, config)
        loss = bits_per_byte(model, *batch())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        history.train.append(loss.item())
        history.tokens += config.batch * config.seq_len
        now = time.perf_counter()
        history.seconds += now - step_start

        done = min(1.0, progress_of(len(history.train), now - start, config))
        recent = history.train[-20:]
        status = f"step {len(history.train):4d}  train {sum(recent) / len(recent):.3f}"
        if done * config.evaluations >= measured + 1:
            measured += 1
            measure()
            bar.clear()
            say(f"  {status}  held-out {history.held_out[-1][1]:.3f}  ({now - start:.0f} s)")
        bar.show(done, f"{status}  {history.tokens / history.seconds:,.0f} bytes/s")
    bar.clear()
    return history


class ProgressBar:
    """One line that is rewritten in a terminal and absent everywhere else."""

    def __init__(self) -> None:
        self.live = sys.stderr.isatty()

    def show(self, done: float, text: str) -> None:
        """Draw the bar; `done` in [0, 1]."""
        if self.live:
            cells = int(30 * done)
            line = f"  [{'#' * cells}{'.' * (30 - cells)}] {text}"
            print(f"\r{line}\033[K", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Make room for an ordinary line."""
        if self.live:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
