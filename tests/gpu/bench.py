# SPDX-License-Identifier: MIT OR Apache-2.0
"""Times of the CUDA kernels: medians over CUDA graph replays (step) and events (the rest)."""

import argparse
import statistics
import sys
from pathlib import Path

import mlstm_c
import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
from gpu_cases import SHAPES, STEPS  # noqa: E402


def median_ms(work, repeats=10):
    for _ in range(2):
        work()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def sequence(name, dtype, f_bias, **options):
    b, nh, s, dhqk, dhhv = SHAPES[name]
    x = {
        "q": torch.randn(b, nh, s, dhqk, device="cuda", dtype=dtype),
        "k": torch.randn(b, nh, s, dhqk, device="cuda", dtype=dtype),
        "v": torch.randn(b, nh, s, dhhv, device="cuda", dtype=dtype),
        "i": torch.randn(b, nh, s, device="cuda") - 10,
        "f": torch.randn(b, nh, s, device="cuda") + f_bias,
    }
    out = {"h": torch.empty_like(x["v"]), "n": torch.empty_like(x["i"])}
    if not options.get("gate"):
        out["m"] = torch.empty_like(x["i"])
    dh = {"dh": torch.randn_like(x["v"])}
    grads = {"d" + name: torch.empty_like(t) for name, t in x.items()}
    p = mlstm_c.problem(x, **options)
    memory = [
        torch.empty(mlstm_c.query(op, p).workspace_size + 64, dtype=torch.uint8, device="cuda")
        for op in ("chunkwise_fw", "chunkwise_bw")
    ]
    fw = median_ms(lambda: mlstm_c.call("chunkwise_fw", p, x | out, memory[0]))
    bw = median_ms(lambda: mlstm_c.call("chunkwise_bw", p, x | out | dh | grads, memory[1]))
    gib = max(m.numel() for m in memory) / 2**30
    if options_profile:
        profile(lambda: mlstm_c.call("chunkwise_fw", p, x | out, memory[0]))
        profile(lambda: mlstm_c.call("chunkwise_bw", p, x | out | dh | grads, memory[1]))
    print(f"{name:9} {dtype} {options}: fw {fw:.3f} ms, fw+bw {fw + bw:.3f} ms, {gib:.2f} GiB")


def profile(work):
    """Time of each kernel of a call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(3):
            work()
        torch.cuda.synchronize()
    for event in profiler.key_averages():
        print(f"  {event.key[:40]:40} {event.device_time:9.1f} us")


def step(b, dtype=torch.bfloat16, state=torch.float32, s=1):
    nh, dhqk, dhhv = 8, 256, 512
    sets = max(1, 256 // b // 4)  # rotate among pools beyond the cache
    x = {
        "q": torch.randn(b, nh, s, dhqk, device="cuda", dtype=dtype),
        "k": torch.randn(b, nh, s, dhqk, device="cuda", dtype=dtype),
        "v": torch.randn(b, nh, s, dhhv, device="cuda", dtype=dtype),
        "i": torch.randn(b, nh, s, device="cuda"),
        "f": torch.randn(b, nh, s, device="cuda") + 3,
    }
    pools = [
        {
            "c": torch.randn(b, nh, dhqk, dhhv, device="cuda").to(state),
            "n": torch.randn(b, nh, dhqk, device="cuda"),
            "m": torch.randn(b, nh, device="cuda"),
        }
        for _ in range(sets)
    ]
    h = {"h": torch.empty_like(x["v"])}
    p = mlstm_c.problem(x, state_dtype=mlstm_c.DTYPES[state])
    memory = torch.empty(1 << 20, dtype=torch.uint8, device="cuda")
    loops = max(20, sets)
    graph = torch.cuda.CUDAGraph()
    mlstm_c.call("step", p, x | pools[0] | h, memory)
    with torch.cuda.graph(graph):
        for j in range(loops):
            mlstm_c.call("step", p, x | pools[j % sets] | h, memory)
    us = median_ms(graph.replay) / loops * 1e3
    gigabytes = 2 * b * nh * dhqk * dhhv * pools[0]["c"].element_size() / 1e9
    print(f"step B{b} T{s} state {state}: {us:.1f} us, {gigabytes / us * 1e6:.0f} GB/s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="*", default=["step", *SHAPES])
    parser.add_argument("--profile", action="store_true", help="time of each kernel")
    parser.add_argument("--dtype", default="bfloat16", help="of the sequences' data")
    parser.add_argument("--f-bias", type=float, default=3, help="mean of the forget gates")
    parser.add_argument("--flags", type=int, default=0, help="MLSTM_FLAG_* of the sequences")
    arguments = parser.parse_args()
    options_profile = arguments.profile
    for what in arguments.what:
        if what == "step":
            for rows, *_ in STEPS.values():
                step(rows)
            step(16, s=4)
            step(128, state=torch.bfloat16)
        else:
            dtype = getattr(torch, arguments.dtype)
            sequence(what, dtype, arguments.f_bias, flags=arguments.flags)
