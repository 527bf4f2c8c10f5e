# SPDX-License-Identifier: MIT OR Apache-2.0
"""GPU benchmark of the JAX call beside the PyTorch operator at the same shape, and beside
mlstm_kernels.jax where that (and jax-triton) can be imported.

Prints for each case the device time, which is that of all kernels and copies, and the time from
call to call. bfloat16 with float32 gates, as in gpu.py.

    python benchmarks/gpu_jax.py [--only REGEX] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch wants its share

import jax
import jax.numpy as jnp
import torch
from gpu_cases import SHAPES, STEPS, Case
from gpu_worker import gradient_call, our_sequence, tokens
from torch.profiler import ProfilerActivity, profile

from mlstm.jax import get_mlstm_kernel
from mlstm.jax.recurrent import mlstm_recurrent_step_slots

PEER = "mlstm_kernels.jax"
PEER_SECONDS = 120  # longest that a case of the peer may take, compilation included
CASES = [Case(name, kind) for name in SHAPES for kind in ("fw", "fw+bw")]
CASES += [Case(name, "in place") for name in STEPS]


def arrays(case: Case) -> list[jax.Array]:
    """q, k, v, i, f with gates in the range a trained model has."""
    b, nh, s, dhqk, dhhv = case.shape
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v = (
        jax.random.normal(key, (b, nh, s, d), jnp.bfloat16)
        for key, d in zip(keys[:3], (dhqk, dhqk, dhhv), strict=True)
    )
    i, f = (
        jax.random.normal(key, (b, nh, s)) + shift
        for key, shift in zip(keys[3:], (-10, 3), strict=True)
    )
    return [q, k, v, i, f]


def jax_sequence(case: Case, kernel: Callable) -> Callable:
    """A forward, or a forward and its gradient, compiled."""
    inputs = arrays(case)
    if case.kind == "fw":
        function = jax.jit(lambda *x: kernel(*x))
        return lambda: function(*inputs)

    def gradient(dh, *x):
        return jax.vjp(lambda *x: kernel(*x), *x)[1](dh)

    function, dh = jax.jit(gradient), jnp.ones_like(kernel(*inputs))
    return lambda: function(dh, *inputs)


def our_jax_sequence(case: Case) -> Callable:
    return jax_sequence(case, get_mlstm_kernel("chunkwise--xl_chunk"))


def torch_sequence(case: Case) -> Callable:
    backward = case.kind == "fw+bw"
    return gradient_call(
        our_sequence(case, ""), tokens(case.shape, torch.float32, backward), backward
    )


def jax_step(case: Case) -> Callable:
    """A step in place: the pools are donated."""
    b, nh, _, dhqk, dhhv = case.shape
    inputs = arrays(case)
    state = jnp.zeros((b, nh, dhqk, dhhv)), jnp.zeros((b, nh, dhqk)), jnp.zeros((b, nh))
    function = jax.jit(mlstm_recurrent_step_slots, donate_argnums=(5, 6, 7))

    def call():
        nonlocal state
        h, state = function(*inputs, *state)
        return h

    return call


def torch_step(case: Case) -> Callable:
    b, nh, _, dhqk, dhhv = case.shape
    inputs = [x.detach() for x in tokens(case.shape, torch.float32, False)]
    c = torch.zeros(b, nh, dhqk, dhhv, device="cuda")
    n, m = torch.zeros(b, nh, dhqk, device="cuda"), torch.zeros(b, nh, device="cuda")
    return lambda: torch.ops.mlstm.step_(*inputs, c, n, m)


def peer_sequence(case: Case) -> Callable:
    import triton_slp
    from mlstm_kernels.jax import get_mlstm_kernel as get_peer_kernel

    triton_slp.install(Path(os.devnull))
    peer = get_peer_kernel("chunkwise--triton_xl_chunk")
    return jax_sequence(case, lambda *x: peer(*x, autocast_kernel_dtype=jnp.bfloat16))


OURS = {
    "torch": lambda case: torch_step(case) if case.is_step else torch_sequence(case),
    "jax": lambda case: jax_step(case) if case.is_step else our_jax_sequence(case),
}


def wait(result: object) -> None:
    jax.block_until_ready(result)  # leaves tensors alone
    torch.cuda.synchronize()


def times(call: Callable) -> tuple[float, float]:
    """Milliseconds on the device, and from call to call."""
    for _ in range(3):
        wait(call())
    start = time.perf_counter()
    wait(call())
    count = max(10, min(200, int(0.5 / (time.perf_counter() - start))))

    def many():
        for _ in range(count):
            result = call()
        wait(result)

    start = time.perf_counter()
    many()
    apart = time.perf_counter() - start
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        many()
    device = sum(event.self_device_time_total for event in seen.key_averages())
    return device / count / 1e3, 1e3 * apart / count


def peer_times(case: Case) -> tuple[float, float] | str:
    """Of the peer, in a process of its own, which it may end; else why not."""
    command = [sys.executable, __file__, "--peer", case.shape_name, case.kind]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=PEER_SECONDS)
    except subprocess.TimeoutExpired:
        return f"more than {PEER_SECONDS} s"
    if run.returncode == 0:
        return tuple(json.loads(run.stdout.splitlines()[-1]))
    return ([x for x in run.stderr.splitlines() if x.strip()] or [f"ended {run.returncode}"])[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", default="", help="cases whose 'shape kind' matches")
    parser.add_argument("--json", type=Path, help="where to save")
    parser.add_argument("--peer", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        print(json.dumps(times(peer_sequence(Case(*options.peer)))))
        return
    machine = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "jax": jax.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python", *sys.argv]),
    }
    print(json.dumps(machine))
    rows = []
    print(f"{'case':<20} {'call':<18} {'device ms':>10} {'ms':>10}")

    def report(case: Case, call: str, result: tuple[float, float] | str) -> None:
        row = vars(case) | {"shape": case.shape, "call": call}
        if isinstance(result, str):
            print(f"{case.name:<20} {call:<18} failed: {result[:200]}", flush=True)
            rows.append(row | {"failed": result[:200]})
        else:
            device, apart = result
            print(f"{case.name:<20} {call:<18} {device:>10.4f} {apart:>10.4f}", flush=True)
            rows.append(row | {"device_ms": device, "ms": apart})
        if options.json:
            text = json.dumps({"machine": machine, "rows": rows}, indent=1)
            options.json.write_text(text + "\n")

    for case in CASES:
        if re.search(options.only, case.name):
            for name, call in OURS.items():
                report(case, name, times(call(case)))
                torch.cuda.empty_cache()
            if not case.is_step:
                report(case, PEER, peer_times(case))


if __name__ == "__main__":
    main()
