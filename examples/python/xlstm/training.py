# SPDX-License-Identifier: MIT OR Apache-2.0
"""Training within a budget of steps and minutes, and the held-out measure, in any framework."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from .config import TrainConfig
from .data import even_windows, random_windows

Loss = Callable[[np.ndarray, np.ndarray], float]
"""Bits per byte of int64 inputs and targets, both (B, S)."""


@dataclass
class History:
    """What training saw. Losses are bits per byte."""

    train: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    """(steps done, bits per byte)."""
    seconds: float = 0.0
    """In training steps alone, without the evaluations."""
    tokens: int = 0


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


def run(
    train_step: Callable[[np.ndarray, np.ndarray, float], float],
    loss: Loss,
    train_data: np.ndarray,
    held_out: np.ndarray,
    config: TrainConfig,
    say: Callable[[str], None] = print,
) -> History:
    """Calls `train_step(inputs, targets, learning rate)`, which returns bits per byte, until the
    steps or the minutes are used up; `loss` measures without training."""
    generator = np.random.default_rng(config.seed)
    history = History()
    bar = ProgressBar()

    def measure() -> None:
        inputs, targets = even_windows(held_out, config.held_out_windows, config.seq_len)
        total = 0.0
        for start in range(0, len(inputs), config.batch):
            part = slice(start, start + config.batch)
            total += loss(inputs[part], targets[part]) * len(inputs[part])
        history.held_out.append((len(history.train), total / len(inputs)))

    def batch() -> tuple[np.ndarray, np.ndarray]:
        return random_windows(train_data, config.batch, config.seq_len, generator)

    # The first call of anything is slow: keep it out of the clock. Nothing is learnt at rate 0.
    train_step(*batch(), 0.0)
    measure()
    say(f"  before training: held-out {history.held_out[-1][1]:.3f} bits per byte")

    start = time.perf_counter()
    done, measured = 0.0, 0
    while done < 1:
        step_start = time.perf_counter()
        history.train.append(train_step(*batch(), learning_rate(done, config)))
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
