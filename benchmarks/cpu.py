"""CPU benchmark: mlstm beside torch's own CPU kernels (mlstm_kernels' native chunkwise) in one run.

Prints, for each case, both medians, their ratio, and our share of the machine's
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
from functools import partial
from pathlib import Path

import torch
from step_c_abi import step_call
from tqdm import tqdm

import mlstm
from mlstm.torch import get_mlstm_kernel, get_mlstm_step_kernel

try:
    from mlstm_kernels.torch import get_mlstm_kernel as get_peer_kernel
    from mlstm_kernels.torch import get_mlstm_step_kernel as get_peer_step_kernel
except ImportError:  # the benchmark still measures us
    get_peer_kernel = get_peer_step_kernel = None

CHUNK = 64  # the peer's chunk length; ours chooses its own
BLOCK_CALLS, BLOCK_SECONDS = 5, 0.02  # at least so many calls in a row, for at least so long


@dataclass
class Row:
    """One line of the table; times in milliseconds, ceilings in GFLOP/s or GB/s."""

    case: str
    ours_ms: float
    other_ms: float | None
    other: str
    ratio: float | None
    achieved: float
    ceiling: float | None
    unit: str
    target: str

    def __str__(self) -> str:
        other = f"{self.other_ms:9.3f}" if self.other_ms else "        -"
        ratio = f"{self.ratio:6.2f}x" if self.ratio else "      -"
        share = f"{100 * self.achieved / self.ceiling:4.0f} %" if self.ceiling else "     -"
        return (
            f"{self.case:<44} {self.ours_ms:9.3f} {other} {ratio}  "
            f"{self.achieved:7.1f} {self.unit:<7} {share}  {self.target}"
        )


def paired(ours: Callable, other: Callable | None, seconds: float) -> tuple[list, list]:
    """Times blocks of calls of the two in turn, so that a drift of the machine's speed hits both.

    The first call of a block is not counted: OpenMP's threads go on spinning for milliseconds
    after torch's work is done, and would take a core from whoever comes next.
    """
    calls = [ours] if other is None else [ours, other]
    times: list[list[float]] = [[], []]
    for call in calls:
        call()
    gc.disable()
    end = time.perf_counter() + seconds
    while len(times[0]) < 2 * BLOCK_CALLS or time.perf_counter() < end:
        for call, spent in zip(calls, times, strict=False):
            time.sleep(0.01)
            call()
            calls_end, block_end = len(spent) + BLOCK_CALLS, time.perf_counter() + BLOCK_SECONDS
            while len(spent) < calls_end or time.perf_counter() < block_end:
                start = time.perf_counter()
                call()
                spent.append(1e3 * (time.perf_counter() - start))
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


def row(case, runs, other, work, ceiling, unit, target="") -> Row:
    """A line from paired times, `work` units in each call (GFLOP or GB)."""
    mine, others = runs
    milliseconds = statistics.median(mine)
    return Row(
        case=case,
        ours_ms=milliseconds,
        other_ms=statistics.median(others) if others else None,
        other=other,
        ratio=statistics.median(others) / milliseconds if others else None,
        achieved=1e3 * work / milliseconds,
        ceiling=ceiling,
        unit=unit,
        target=target,
    )


def sequence_call(kernel, inputs, dh, backward, **kwargs) -> Callable:
    """A forward, or a forward and its gradient by autograd."""

    def run():
        if backward:
            return torch.autograd.grad(kernel(*inputs, **kwargs), inputs, dh)
        with torch.no_grad():
            return kernel(*inputs, **kwargs)

    return run


def sequence_case(shape, dtype, backward, peak, seconds, target) -> Row:
    """Ours beside the peer's chunkwise kernel, on the same tensors."""
    b, nh, s, dhqk, dhhv = shape
    inputs = tokens(*shape, dtype, backward)
    dh = torch.randn(b, nh, s, dhhv, dtype=dtype)
    ours = sequence_call(get_mlstm_kernel("chunkwise--xl_chunk"), inputs, dh, backward)
    peer = None
    if get_peer_kernel and s % CHUNK == 0:
        peer_kernel = get_peer_kernel("chunkwise--native_autograd")
        options = {"chunk_size": CHUNK, "autocast_kernel_dtype": dtype}
        peer = sequence_call(peer_kernel, inputs, dh, backward, **options)
    name = str(dtype).removeprefix("torch.")
    return row(
        f"{'fw+bw' if backward else 'fw'} B{b} NH{nh} S{s} {dhqk}x{dhhv} {name}",
        paired(ours, peer, seconds),
        "mlstm_kernels native_autograd",
        sequence_flop(*shape, backward) / 1e9,
        peak,
        "GFLOP/s",
        target,
    )


def dtype_case(shape, backward, peak, seconds) -> Row:
    """bfloat16 beside float32 data, both ours."""
    b, nh, s, dhqk, dhhv = shape
    kernel = get_mlstm_kernel("chunkwise--xl_chunk")
    runs = []
    for dtype in (torch.bfloat16, torch.float32):
        dh = torch.randn(b, nh, s, dhhv, dtype=dtype)
        runs.append(sequence_call(kernel, tokens(*shape, dtype, backward), dh, backward))
    return row(
        f"{'fw+bw' if backward else 'fw'} S{s} {dhqk}x{dhhv} bfloat16 beside float32",
        paired(*runs, seconds),
        "mlstm float32",
        sequence_flop(*shape, backward) / 1e9,
        peak,
        "GFLOP/s",
        ">= 1",
    )


def step_inputs(b, nh, dhqk, dhhv):
    """q, k, v, i, f of one token per row, and c, n, m."""
    x = [torch.randn(b, nh, d) for d in (dhqk, dhqk, dhhv, 1)]
    state = [torch.zeros(b, nh, dhqk, dhhv), torch.zeros(b, nh, dhqk), torch.zeros(b, nh, 1)]
    return [*x, torch.randn(b, nh, 1) + 3], state


def step_case(through, b, nh, dhqk, dhhv, seconds) -> Row:
    """The step in place, beside a copy of a state of the same size."""
    (q, k, v, i, f), (c, n, m) = step_inputs(b, nh, dhqk, dhhv)
    q, k, v, m = q.unsqueeze(2), k.unsqueeze(2), v.unsqueeze(2), m.squeeze(2)
    source, target = torch.randn_like(c), torch.empty_like(c)
    if through == "C ABI":
        h = torch.empty_like(v)
        step = step_call(q=q, k=k, v=v, i=i, f=f, c=c, n=n, m=m, h=h)
    else:
        step = partial(torch.ops.mlstm.step_, q, k, v, i, f, c, n, m)
    runs = paired(step, lambda: target.copy_(source), seconds)
    gigabytes = 2 * c.numel() * 4 / 1e9
    rate = 1e3 * gigabytes / statistics.median(runs[1])
    name = f"step B{b} NH{nh} {dhqk}x{dhhv} in place, {through}"
    # PyTorch's dispatcher takes about 12 us of a call.
    target = ">= 0.8" if through == "C ABI" else ""
    return row(name, runs, "copy of a state", gigabytes, rate, "GB/s", target)


def step_peer_case(b, nh, dhqk, dhhv, seconds) -> Row:
    """The functional step, beside the peer's."""
    inputs, state = step_inputs(b, nh, dhqk, dhhv)
    ours, peer = get_mlstm_step_kernel("step"), get_peer_step_kernel("native")
    names = dict(zip(("q", "k", "v", "i", "f", "c", "n", "m"), inputs + state, strict=True))
    runs = paired(lambda: ours(**names), lambda: peer(**names), seconds)
    gigabytes = 2 * state[0].numel() * 4 / 1e9
    name = f"step B{b} NH{nh} {dhqk}x{dhhv}, new state"
    return row(name, runs, "mlstm_kernels native step", gigabytes, None, "GB/s")


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
                out.append(partial(sequence_case, shape, dtype, backward, peak, seconds, target))
    out += [partial(dtype_case, main, backward, peak, seconds) for backward in (False, True)]
    for through in ("C ABI", "torch op"):
        out += [partial(step_case, through, b, 8, 256, 512, seconds) for b in (1, 8)]
    if get_peer_step_kernel:
        out += [partial(step_peer_case, b, 8, 256, 512, seconds) for b in (1, 8)]
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
        rows.append(case())
        tqdm.write(str(rows[-1]), file=sys.stdout)
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
