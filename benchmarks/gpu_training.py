# SPDX-License-Identifier: MIT OR Apache-2.0
"""The demo's model, wide enough for the kernels of the H100 and H200, trained for the same steps on
the same batches with those kernels, with the kernels for every GPU, and in float32; in float32 once
more from other initial weights, as a measure of noise. Needs a GPU; on an H200 under two minutes.

    python benchmarks/gpu_training.py --json gpu-h200-training.json --plot gpu-h200-training.png
"""

import argparse
import json
import platform
import sys
import time
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt  # noqa: E402
from torch import nn  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "examples" / "python"))
from xlstm import TrainConfig, XLSTMConfig, data  # noqa: E402
from xlstm.model import XLSTM, MLSTMLayer  # noqa: E402
from xlstm.train import train  # noqa: E402

# Name: dtype of q, k and v, whether to take the generic engine, seed of the initial weights.
RUNS = {
    "Hopper, bfloat16": (torch.bfloat16, False, 0),
    "generic, bfloat16": (torch.bfloat16, True, 0),
    "float32": (torch.float32, False, 0),
    "float32, other weights": (torch.float32, False, 1),
}


class Kernel(nn.Module):
    """The mLSTM of a layer on one engine."""

    def __init__(self, dtype: torch.dtype, generic_engine: bool) -> None:
        super().__init__()
        self.dtype, self.generic_engine = dtype, generic_engine

    def forward(self, q, k, v, i, f, **_):
        with torch.autocast("cuda", enabled=False):
            q, k, v = (x.to(self.dtype) for x in (q, k, v))
            i, f = i.float(), f.float()
            nothing = [None] * 4
            options = {"generic_engine": self.generic_engine}
            return torch.ops.mlstm.forward(q, k, v, i, f, *nothing, **options)[0]


def run(name: str, config: XLSTMConfig, training: TrainConfig, text) -> dict:
    """Trains once; held-out and training losses in bits per byte."""
    dtype, generic_engine, seed = RUNS[name]
    torch.manual_seed(seed)
    model = XLSTM(config).cuda()
    for layer in model.modules():
        if isinstance(layer, MLSTMLayer):
            layer.backend = Kernel(dtype, generic_engine)
    start = time.perf_counter()
    print(f"{name}:")
    history = train(model, *text, training, torch.device("cuda"))
    seconds = time.perf_counter() - start
    return {"train": history.train, "held_out": history.held_out, "seconds": seconds}


def plot(results: dict, where: str, path: Path) -> None:
    """Training losses, smoothed over 20 steps, and what is left to float32's."""
    figure, (losses, gaps) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    smooth = {
        name: torch.tensor(result["train"]).unfold(0, 20, 1).mean(1)
        for name, result in results.items()
    }
    for name, loss in smooth.items():
        losses.plot(loss, label=f"{name}: {results[name]['held_out'][-1][1]:.4f} held out", lw=1)
        if name != "float32":
            gaps.plot(loss - smooth["float32"], label=name, lw=1)
    losses.set(xlabel="step", ylabel="bits per byte", title=where)
    gaps.set(xlabel="step", ylabel="bits per byte", title="difference to float32")
    for axes in (losses, gaps):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def main() -> int:
    """Trains all; non-zero if an engine ends further from float32 than other weights do."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    import mlstm.torch  # noqa: F401 (registers torch.ops.mlstm)

    config = XLSTMConfig(d_model=512, n_blocks=3, n_heads=4)
    training = TrainConfig(steps=args.steps, minutes=10.0, batch=16, seq_len=512, lr=1e-3)
    text = data.load()
    results = {name: run(name, config, training, text) for name in RUNS}
    last = {name: result["held_out"][-1][1] for name, result in results.items()}
    gap = {name: abs(bits - last["float32"]) for name, bits in last.items()}
    for name, bits in last.items():
        print(f"{name:24} {bits:.4f} bits per held-out byte, {gap[name]:.4f} from float32")
    where = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    if args.json:
        versions = {"machine": where, "python": platform.python_version()}
        saved = {"command": " ".join(sys.argv), **versions, "results": results}
        args.json.write_text(json.dumps(saved, indent=1) + "\n")
    if args.plot:
        plot(results, where, args.plot)
    noise = max(gap["float32, other weights"], 0.01)
    return int(any(gap[name] > noise for name in ("Hopper, bfloat16", "generic, bfloat16")))


if __name__ == "__main__":
    sys.exit(main())
