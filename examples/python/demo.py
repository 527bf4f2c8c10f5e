# SPDX-License-Identifier: MIT OR Apache-2.0
"""Train a small xLSTM on real text, watch it learn, let it write, check that the kernels agree.

    python examples/python/demo.py                  # Python's own documentation, about two minutes
    python examples/python/demo.py --text book.txt  # your text

Writes a loss curve and all numbers to ./demo_out and exits non-zero if anything disagrees.
`demo_jax.py` does the same in JAX.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable

# Read when torch is loaded. Threads that spin while they wait cost a busy machine dearly.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
from xlstm import TrainConfig, XLSTMConfig, session
from xlstm.agreement import check_kernels, check_logits
from xlstm.checks import Check
from xlstm.generate import generate, prefill, step
from xlstm.model import XLSTM
from xlstm.train import bits_per_byte, train
from xlstm.training import History


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = session.parser(__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--threads", type=int, help="CPU threads for torch")
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


class TorchSubject:
    """The model in PyTorch."""

    def __init__(self, config: XLSTMConfig, device: torch.device) -> None:
        self.device = device
        self.model = XLSTM(config).to(device)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        self.where = f"{name}, torch {torch.__version__}, {torch.get_num_threads()} CPU threads"

    def train(self, train_data: np.ndarray, held_out: np.ndarray, config: TrainConfig) -> History:
        return train(self.model, train_data, held_out, config, self.device)

    def generate(self, prompt: str, length: int, temperature: float, seed: int) -> str:
        return generate(self.model, prompt, length, temperature, seed)

    def throughput(self, prompt: np.ndarray) -> dict[str, float]:
        tokens = torch.from_numpy(prompt)[None].to(self.device)
        _, state = prefill(self.model, tokens)  # warm-up

        def seconds(run: Callable[[], object]) -> float:
            start = time.perf_counter()
            run()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - start

        def decode() -> None:
            now = state
            for token in tokens[0, :256].split(1):
                _, now = step(self.model, token, now)

        return {
            "prefill": tokens.numel() / seconds(lambda: prefill(self.model, tokens)),
            "decode": 256 / seconds(decode),
        }

    def check(self, tokens: np.ndarray) -> list[Check]:
        some = torch.from_numpy(tokens).to(self.device)
        return [*check_kernels(self.model, some), check_logits(self.model, some[:, :250])]


def main(argv: list[str] | None = None) -> int:
    """Run the demo; 0 if the held-out loss fell and all kernels agree."""
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    config = session.model_config(args)
    device = pick_device(args.device, config)
    torch.manual_seed(args.seed)
    return session.run(args, TorchSubject(config, device))


if __name__ == "__main__":
    sys.exit(main())
