"""CPU benchmark: mlstm beside torch's own CPU kernels (mlstm_kernels' native chunkwise) in one run.

Prints, for each case, both medians, the ratio of the paired runs, and our share of the machine's
ceilings, which are measured first: a float32 matmul for compute, a copy for memory. Saves JSON.

    .venv/bin/python benchmarks/cpu.py [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import mlstm
from mlstm.torch import get_mlstm_kernel, get_mlstm_step_kernel

try:
    from mlstm_kernels.torch import get_mlstm_kernel as get_peer_kernel
    from mlstm_kernels.torch import get_mlstm_step_kernel as get_peer_step_kernel
except ImportError:  # the benchmark still measures us
    get_peer_kernel = get_peer_step_kernel = None

CHUNK = 64  # the peer's chunk length; ours chooses its own


@dataclass
class Row:
    """One line of the table; times in milliseconds, ceilings in GFLOP/s or GB/s."""

    case: str
    ours_ms: float
    other_ms: float | None
    other: str
    ratio: float | None
    achieved: float
    ceiling: float
    unit: str
    target: str

    def __str__(self) -> str:
        other = f"{self.other_ms:9.3f}" if self.other_ms else "        -"
        ratio = f"{self.ratio:6.2f}x" if self.ratio else "      -"
        share = 100 * self.achieved / self.ceiling
        return (
            f"{self.case:<44} {self.ours_ms:9.3f} {other} {ratio}  "
            f"{self.achieved:7.1f} {self.unit:<7} {share:4.0f} %  {self.target}"
        )


def paired(ours: Callable, other: Callable | None, seconds: float) -> tuple[list, list]:
    """Times the two in turn, so that a drift of the machine's speed hits both alike."""
    calls = [ours] if other is None else [ours, other]
    for call in calls:
        call()
        call()
    times: list[list[float]] = [[], []]
    gc.disable()
    end = time.perf_counter() + seconds
    while len(times[0]) < 5 or (time.perf_counter() < end and len(times[0]) < 2000):
        for index, call in enumerate(calls):
            start = time.perf_counter()
            call()
            times[index].append(1e3 * (time.perf_counter() - start))
    gc.enable()
    return times[0], times[1]


def matmul_ceiling() -> float:
    """GFLOP/s of a large float32 matmul: what the cores can do."""
    a, b = torch.randn(2, 2048, 2048)
    times, _ = paired(lambda: a @ b, None, 2.0)
    return 2 * 2048**3 / statistics.median(times) / 1e6


def tokens(b, nh, s, dhqk, dhhv, dtype, requires_grad):
    """Random q, k, v, i, f with gates in the range a trained model has."""
    q, k = (torch.randn(b, nh, s, dhqk, dtype=dtype) for _ in range(2))
    v = torch.randn(b, nh, s, dhhv, dtype=dtype)
    i = torch.randn(b, nh, s, dtype=dtype) - 1
    f = torch.randn(b, nh, s, dtype=dtype) + 3
    return [x.requires_grad_(requires_grad) for x in (q, k, v, i, f)]


def sequence_flop(b, nh, s, dhqk, dhhv, backward: bool) -> float:
    """Multiply-adds, counted twice, of the chunkwise algorithm at CHUNK with causal skipping."""
    inter, pairs = dhqk * dhhv, CHUNK / 2
    forward = 2 * inter + pairs * (dhqk + dhhv)
    # State again, state gradient, dq, dk, dv; scores, their gradient, and their three uses.
    back = 5 * inter + pairs * (3 * dhqk + 2 * dhhv)
    return 2.0 * b * nh * s * (forward + back if backward else forward)


def sequence_case(shape, dtype, backward, peak, seconds) -> Row:
    b, nh, s, dhqk, dhhv = shape
    inputs = tokens(*shape, dtype, backward)
    dh = torch.randn(b, nh, s, dhhv, dtype=dtype)

    def call(kernel, **kwargs):
        def run():
            if not backward:
                with torch.no_grad():
                    return kernel(*inputs, **kwargs)
            return torch.autograd.grad(kernel(*inputs, **kwargs), inputs, dh)

        return run

    ours = call(get_mlstm_kernel("chunkwise--xl_chunk"))
    peer = None
    if get_peer_kernel and s % CHUNK == 0:
        peer_kernel = get_peer_kernel("chunkwise--native_autograd")
        peer = call(peer_kernel, chunk_size=CHUNK, autocast_kernel_dtype=dtype)
    mine, others = paired(ours, peer, seconds)
    name = str(dtype).removeprefix("torch.")
    milliseconds = statistics.median(mine)
    return Row(
        case=f"{'fw+bw' if backward else 'fw'} B{b} NH{nh} S{s} {dhqk}x{dhhv} {name}",
        ours_ms=milliseconds,
        other_ms=statistics.median(others) if others else None,
        other="mlstm_kernels native_autograd",
        ratio=statistics.median(o / m for m, o in zip(mine, others)) if others else None,
        achieved=sequence_flop(*shape, backward) / milliseconds / 1e6,
        ceiling=peak,
        unit="GFLOP/s",
        target="",
    )


def dtype_case(shape, backward, peak, seconds) -> Row:
    """bfloat16 beside float32 data, both ours."""
    b, nh, s, dhqk, dhhv = shape
    runs = []
    for dtype in (torch.bfloat16, torch.float32):
        inputs = tokens(*shape, dtype, backward)
        dh = torch.randn(b, nh, s, dhhv, dtype=dtype)
        kernel = get_mlstm_kernel("chunkwise--xl_chunk")
        if backward:
            runs.append(lambda x=inputs, g=dh: torch.autograd.grad(kernel(*x), x, g))
        else:
            runs.append(lambda x=inputs: kernel(*x))
    mine, others = paired(*runs, seconds)
    milliseconds = statistics.median(mine)
    return Row(
        case=f"{'fw+bw' if backward else 'fw'} S{s} {dhqk}x{dhhv} bfloat16 against float32",
        ours_ms=milliseconds,
        other_ms=statistics.median(others),
        other="mlstm float32",
        ratio=statistics.median(o / m for m, o in zip(mine, others)),
        achieved=sequence_flop(*shape, backward) / milliseconds / 1e6,
        ceiling=peak,
        unit="GFLOP/s",
        target=">= 1",
    )


def step_inputs(b, nh, dhqk, dhhv):
    state = [torch.zeros(b, nh, dhqk, dhhv), torch.zeros(b, nh, dhqk), torch.zeros(b, nh)]
    x = [torch.randn(b, nh, dhqk), torch.randn(b, nh, dhqk), torch.randn(b, nh, dhhv)]
    return x + [torch.randn(b, nh, 1), torch.randn(b, nh, 1) + 3], state


def step_case(b, nh, dhqk, dhhv, seconds) -> Row:
    """The step in place, beside a copy of a state of the same size."""
    inputs, state = step_inputs(b, nh, dhqk, dhhv)
    q, k, v, i, f = (x.unsqueeze(2) if x.shape[-1] > 1 else x for x in inputs)
    source, target = torch.randn_like(state[0]), torch.empty_like(state[0])
    mine, others = paired(
        lambda: torch.ops.mlstm.step_(q, k, v, i, f, *state),
        lambda: target.copy_(source),
        seconds,
    )
    gigabytes = 2 * state[0].numel() * 4 / 1e9
    copy = statistics.median(others)
    milliseconds = statistics.median(mine)
    return Row(
        case=f"step B{b} NH{nh} {dhqk}x{dhhv}, in place",
        ours_ms=milliseconds,
        other_ms=copy,
        other="copy of a state",
        ratio=statistics.median(o / m for m, o in zip(mine, others)),
        achieved=gigabytes / milliseconds * 1e3,
        ceiling=gigabytes / copy * 1e3,
        unit="GB/s",
        target=">= 0.8",
    )


def step_peer_case(b, nh, dhqk, dhhv, seconds) -> Row:
    """The functional step, beside the peer's."""
    inputs, (c, n, m) = step_inputs(b, nh, dhqk, dhhv)
    args = {"c": c, "n": n, "m": m.unsqueeze(-1)}
    ours, peer = get_mlstm_step_kernel("step"), get_peer_step_kernel("native")
    mine, others = paired(lambda: ours(*inputs, **args), lambda: peer(*inputs, **args), seconds)
    gigabytes = 2 * c.numel() * 4 / 1e9
    milliseconds = statistics.median(mine)
    return Row(
        case=f"step B{b} NH{nh} {dhqk}x{dhhv}, new state",
        ours_ms=milliseconds,
        other_ms=statistics.median(others),
        other="mlstm_kernels native step",
        ratio=statistics.median(o / m for m, o in zip(mine, others)),
        achieved=gigabytes / milliseconds * 1e3,
        ceiling=float("nan"),
        unit="GB/s",
        target="",
    )


def with_target(row: Row, target: str) -> Row:
    row.target = target
    return row


def cases(peak: float, seconds: float) -> list[Callable[[], Row]]:
    """The program's cases; targets are for the first shape."""
    main, long, small = (1, 4, 2048, 128, 256), (1, 4, 8192, 128, 256), (1, 4, 1024, 64, 64)
    seven_b = (1, 8, 2048, 256, 512)
    out: list[Callable[[], Row]] = []
    for dtype in (torch.float32, torch.bfloat16):
        for shape in (main, small, seven_b, long):
            for backward in (False, True):
                target = ">= 5" if backward else ">= 2"
                target = target if shape == main and dtype == torch.float32 else ""
                out.append(
                    lambda s=shape, d=dtype, w=backward, t=target: with_target(
                        sequence_case(s, d, w, peak, seconds), t
                    )
                )
    out += [lambda w=w: dtype_case(main, w, peak, seconds) for w in (False, True)]
    out += [lambda b=b: step_case(b, 8, 256, 512, seconds) for b in (1, 8)]
    if get_peer_step_kernel:
        out += [lambda b=b: step_peer_case(b, 8, 256, 512, seconds) for b in (1, 8)]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="0.3 s a case instead of 3 s")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/cpu.json"))
    options = parser.parse_args()
    seconds = 0.3 if options.quick else 3.0
    if get_peer_kernel is None:
        print("mlstm_kernels is not installed: no ratios (pip install mlstm_kernels)")

    peak = matmul_ceiling()
    machine = {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "mlstm": mlstm.__version__,
        "matmul_gflops": peak,
        "command": "python " + " ".join(sys.argv),
        "date": time.strftime("%Y-%m-%d"),
    }
    print(json.dumps(machine, indent=1))
    print(
        f"{'case':<44} {'ours ms':>9} {'other ms':>9} {'ratio':>7}  {'achieved':>15} share  target"
    )
    rows = []
    for case in tqdm(cases(peak, seconds), unit="case", file=sys.stderr):
        row = case()
        rows.append(row)
        tqdm.write(str(row), file=sys.stdout)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(
        json.dumps({"machine": machine, "rows": [asdict(r) for r in rows]}, indent=1)
    )
    print(f"saved {options.json}")


def cpu_name() -> str:
    """The model name and the cores in use."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        name = names[0].split(":")[1].strip() if names else name
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


if __name__ == "__main__":
    main()
