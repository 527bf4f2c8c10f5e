# SPDX-License-Identifier: MIT OR Apache-2.0
"""Train a small xLSTM on real text, watch it learn, let it write, check that the kernels agree.

    python examples/python/demo.py                  # Python's own documentation, about two minutes
    python examples/python/demo.py --text book.txt  # your text

Writes a loss curve and all numbers to ./demo_out and exits non-zero if anything disagrees.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

# Read when torch is loaded. Threads that spin while they wait cost a busy machine dearly.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from matplotlib.figure import Figure
from torch import Tensor
from xlstm import XLSTM, XLSTMConfig
from xlstm.agreement import check_kernels, check_logits
from xlstm.data import load
from xlstm.generate import generate, prefill, step
from xlstm.train import History, TrainConfig, bits_per_byte, train


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Command line; model and training defaults come from their config classes."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--text", type=Path, help="train on this file instead of Python's documentation")
    add("--out", type=Path, default=Path("demo_out"), help="where the results go")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add("--threads", type=int, help="CPU threads for torch")
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
    return parser.parse_args(argv)


def pick_device(wanted: str, config: XLSTMConfig) -> torch.device:
    """CUDA if it is there and runs this model forward and backward, else the CPU."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    try:
        tokens = torch.zeros(1, config.chunk_size, dtype=torch.long, device="cuda")
        bits_per_byte(XLSTM(config).cuda(), tokens, tokens).backward()
        torch.cuda.synchronize()
    except RuntimeError as error:
        if wanted == "cuda":
            raise
        print(f"CUDA is present but does not run this model, using the CPU: {error}")
        return torch.device("cpu")
    return torch.device("cuda")


def throughput(model: XLSTM, text: Tensor, device: torch.device) -> dict[str, float]:
    """Bytes per second of one sequence: reading a prompt at once, and byte by byte."""
    prompt = text[None, :4096].long().to(device)
    _, state = prefill(model, prompt)  # warm-up

    def seconds(run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def decode() -> None:
        now = state
        for token in prompt[0, :256].split(1):
            _, now = step(model, token, now)

    return {
        "prefill": prompt.numel() / seconds(lambda: prefill(model, prompt)),
        "decode": 256 / seconds(decode),
    }


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


def introduce(model: XLSTM, train_data: Tensor, held_out: Tensor, device: torch.device) -> None:
    """What is about to be trained, on what, where."""
    zipped = 8 * len(zlib.compress(held_out.numpy().tobytes(), 9)) / len(held_out)
    parameters = sum(p.numel() for p in model.parameters())
    config = model.config
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"Text:   {len(train_data):,} bytes to train on, {len(held_out):,} held out")
    print(f"        (zlib needs {zipped:.2f} bits for a held-out byte)")
    print(f"Model:  {parameters:,} parameters, {config.n_blocks} blocks, {config.n_heads} heads")
    print(f"Device: {where}, torch {torch.__version__}, {torch.get_num_threads()} CPU threads")


def main(argv: list[str] | None = None) -> int:
    """Run the demo; 0 if the held-out loss fell and all kernels agree."""
    args = parse_args(argv)
    start = time.perf_counter()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    model_config = XLSTMConfig(d_model=args.d_model, n_blocks=args.blocks, n_heads=args.heads)
    train_config = TrainConfig(
        steps=args.steps,
        minutes=args.minutes,
        batch=args.batch,
        seq_len=args.seq_len,
        lr=args.lr,
        seed=args.seed,
    )
    device = pick_device(args.device, model_config)
    torch.manual_seed(args.seed)
    model = XLSTM(model_config).to(device)
    train_data, held_out = load(args.text)
    introduce(model, train_data, held_out, device)

    print(f"\nTraining for {args.steps} steps or {args.minutes:g} minutes; bits per byte")
    history = train(model, train_data, held_out, train_config, device)
    plot(history, args.out / "loss.png")

    text = generate(model, args.prompt, args.length, args.temperature, args.seed)
    print(f"\nThe model continues {args.prompt!r}:\n")
    print("  | " + (args.prompt + text).replace("\n", "\n  | "))

    speed = {"train": history.tokens / history.seconds, **throughput(model, held_out, device)}
    print("\nBytes per second (one byte is one token)")
    print(f"  training {speed['train']:9,.0f}   chunkwise kernel, forward and backward")
    print(f"  prefill  {speed['prefill']:9,.0f}   chunkwise kernel, one sequence")
    print(f"  decode   {speed['decode']:9,.0f}   step kernel, one sequence, byte by byte")

    print("\nAgreement on the trained model: largest difference / largest value")
    some = held_out[: 2 * 256].view(2, -1).long().to(device)
    checks = [*check_kernels(model, some), check_logits(model, some[:, :250])]
    for check in checks:
        print(f"  {check}")
    first, last = history.held_out[0][1], history.held_out[-1][1]
    learned = last < first
    print(f"  {'pass' if learned else 'FAIL'}  held-out loss fell: {first:.3f} to {last:.3f}")

    results = {
        "device": str(device),
        "torch": torch.__version__,
        "model": asdict(model_config),
        "training": asdict(train_config),
        "history": asdict(history),
        "bytes_per_second": speed,
        "agreement": [asdict(check) | {"passed": check.passed} for check in checks],
        "sample": {"prompt": args.prompt, "text": text},
        "seconds": time.perf_counter() - start,
    }
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"\nDone in {results['seconds']:.0f} s: {args.out}/loss.png, {args.out}/results.json")
    return 0 if learned and all(check.passed for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
