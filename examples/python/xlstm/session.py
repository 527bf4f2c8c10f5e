# SPDX-License-Identifier: MIT OR Apache-2.0
"""What a demo does, whatever the framework: train, write, time, check, report."""

from __future__ import annotations

import argparse
import json
import time
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import numpy as np
from matplotlib.figure import Figure

from .checks import Check
from .config import TrainConfig, XLSTMConfig
from .data import load
from .training import History


class Subject(Protocol):
    """A model in a framework."""

    where: str
    """The device and the framework."""
    parameters: int

    def train(
        self, train_data: np.ndarray, held_out: np.ndarray, config: TrainConfig
    ) -> History: ...

    def generate(self, prompt: str, length: int, temperature: float, seed: int) -> str: ...

    def throughput(self, prompt: np.ndarray) -> dict[str, float]:
        """Bytes per second of one sequence (S,), "prefill" at once and "decode" byte by byte."""

    def check(self, tokens: np.ndarray) -> list[Check]:
        """Whether the kernels agree on (B, S)."""


def parser(description: str) -> argparse.ArgumentParser:
    """Command line; model and training defaults come from their config classes."""
    result = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = result.add_argument
    add("--text", type=Path, help="train on this file instead of Python's documentation")
    add("--out", type=Path, default=Path("demo_out"), help="where the results go")
    add("--seed", type=int, default=TrainConfig.seed)

    add("--steps", type=int, default=TrainConfig.steps, help="training ends after so many steps")
    add("--minutes", type=float, default=TrainConfig.minutes, help="... or minutes, if earlier")
    add("--batch", type=int, default=TrainConfig.batch, help="sequences per step")
    add("--seq-len", type=int, default=TrainConfig.seq_len, help="bytes per sequence")
    add("--lr", type=float, default=TrainConfig.lr, help="highest learning rate")

    add("--d-model", type=int, default=XLSTMConfig.d_model, help="model width")
    add("--blocks", type=int, default=XLSTMConfig.n_blocks, help="mLSTM blocks")
    add("--heads", type=int, default=XLSTMConfig.n_heads, help="heads per block")

    add("--prompt", default="The function returns ", help="text to continue")
    add("--length", type=int, default=400, help="bytes to write")
    add("--temperature", type=float, default=0.6, help="0 always takes the likeliest byte")
    return result


def model_config(args: argparse.Namespace) -> XLSTMConfig:
    """The model that the command line asks for."""
    return XLSTMConfig(d_model=args.d_model, n_blocks=args.blocks, n_heads=args.heads)


def train_config(args: argparse.Namespace) -> TrainConfig:
    """The training that the command line asks for."""
    return TrainConfig(
        steps=args.steps,
        minutes=args.minutes,
        batch=args.batch,
        seq_len=args.seq_len,
        lr=args.lr,
        seed=args.seed,
    )


def plot(history: History, path: Path) -> None:
    """The loss curve as a picture."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(history.train) + 1), history.train, color="tab:blue", alpha=0.5, lw=0.8)
    axes.plot(*zip(*history.held_out, strict=True), "o-", color="tab:orange")
    axes.legend(["training batches", "held-out text"], frameon=False)
    axes.set(xlabel="step", ylabel="bits per byte", title="xLSTM, byte level")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def introduce(
    subject: Subject, config: XLSTMConfig, train_data: np.ndarray, held_out: np.ndarray
) -> None:
    """What is about to be trained, on what, where."""
    zipped = 8 * len(zlib.compress(held_out.tobytes(), 9)) / len(held_out)
    print(f"Text:   {len(train_data):,} bytes to train on, {len(held_out):,} held out")
    print(f"        (zlib needs {zipped:.2f} bits for a held-out byte)")
    size = f"{config.n_blocks} blocks, {config.n_heads} heads"
    print(f"Model:  {subject.parameters:,} parameters, {size}")
    print(f"Device: {subject.where}")


def run(args: argparse.Namespace, subject: Subject) -> int:
    """0 if the held-out loss fell and all kernels agree."""
    start = time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    train_data, held_out = load(args.text)
    introduce(subject, model_config(args), train_data, held_out)

    print(f"\nTraining for {args.steps} steps or {args.minutes:g} minutes; bits per byte")
    history = subject.train(train_data, held_out, train_config(args))
    plot(history, args.out / "loss.png")

    text = subject.generate(args.prompt, args.length, args.temperature, args.seed)
    print(f"\nThe model continues {args.prompt!r}:\n")
    print("  | " + (args.prompt + text).replace("\n", "\n  | "))

    speed = {"train": history.tokens / history.seconds}
    speed |= subject.throughput(held_out[:4096].astype(np.int64))
    print("\nBytes per second (one byte is one token)")
    print(f"  training {speed['train']:9,.0f}   chunkwise kernel, forward and backward")
    print(f"  prefill  {speed['prefill']:9,.0f}   chunkwise kernel, one sequence")
    print(f"  decode   {speed['decode']:9,.0f}   step kernel, one sequence, byte by byte")

    print("\nAgreement on the trained model: largest difference / largest value")
    checks = subject.check(held_out[: 2 * 256].reshape(2, -1).astype(np.int64))
    for check in checks:
        print(f"  {check}")
    first, last = history.held_out[0][1], history.held_out[-1][1]
    learned = last < first
    print(f"  {'pass' if learned else 'FAIL'}  held-out loss fell: {first:.3f} to {last:.3f}")

    results = {
        "where": subject.where,
        "model": asdict(model_config(args)),
        "training": asdict(train_config(args)),
        "history": asdict(history),
        "bytes_per_second": speed,
        "agreement": [asdict(check) | {"passed": check.passed} for check in checks],
        "sample": {"prompt": args.prompt, "text": text},
        "seconds": time.perf_counter() - start,
    }
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"\nDone in {results['seconds']:.0f} s: {args.out}/loss.png, {args.out}/results.json")
    return 0 if learned and all(check.passed for check in checks) else 1
