# SPDX-License-Identifier: MIT OR Apache-2.0
"""The process in which benchmarks/gpu.py times us beside peers; a peer may end it.

Reads a line of JSON for each case, {"case": [shape name, kind], "peer", "seconds", "gates",
"warm_only"} or {"ceilings": true}, and answers it with a line "@{...}".
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from gpu_cases import GENERIC, PARALLEL, TRITON_PEERS, Case
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import logsigmoid, scaled_dot_product_attention

BEYOND_CACHE = 512 << 20  # bytes: several times the L2 of any card
HEAD_START = 4_000_000  # cycles, about 2 ms: longer than the host takes to launch any call
DTYPE = torch.bfloat16


def milliseconds(calls: list[Callable], seconds: float, head_start: bool = True) -> list[float]:
    """Medians of the calls, done in turn so that a drift of the clocks hits all alike.

    A write of BEYOND_CACHE / 2 before each call empties the L2. With a head start the GPU waits
    until the host has launched all of a call, whose own time then does not count.
    """
    flush = torch.empty(BEYOND_CACHE // 2, dtype=torch.int8, device="cuda")

    def rounds(count):
        events = []
        for _ in range(count):
            for call in calls:
                flush.zero_()
                if head_start:
                    torch.cuda._sleep(HEAD_START)
                events.append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
                events[-1][0].record()
                call()
                events[-1][1].record()
        torch.cuda.synchronize()
        times = [start.elapsed_time(end) for start, end in events]
        return [times[index :: len(calls)] for index in range(len(calls))]

    rounds(2)
    one = sum(min(times) for times in rounds(2))
    return [statistics.median(x) for x in rounds(max(5, min(200, int(1e3 * seconds / one))))]


def extra_memory(call: Callable) -> int:
    """The most bytes a call holds beyond what was there, its outputs included."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def ceilings() -> dict:
    """A large copy (bytes read and written) and a large bfloat16 product of random data."""
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=DTYPE)
    x, y = torch.randn(2, 1 << 29, device="cuda")
    copy, matmul = milliseconds([lambda: y.copy_(x), lambda: a @ b], 1.0)
    return {
        "copy_gbs": 2 * x.numel() * 4 / copy / 1e6,
        "matmul_tflops": 2 * 8192**3 / matmul / 1e9,
        "gpu": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
    }


# ---- sequences ----------------------------------------------------------------------------------


def tokens(shape, gates, backward):
    """q, k, v, i, f with gates in the range a trained model has."""
    b, nh, s, dhqk, dhhv = shape
    q, k = (torch.randn(b, nh, s, dhqk, device="cuda", dtype=DTYPE) for _ in range(2))
    v = torch.randn(b, nh, s, dhhv, device="cuda", dtype=DTYPE)
    i = (torch.randn(b, nh, s, device="cuda") - 10).to(gates)
    f = (torch.randn(b, nh, s, device="cuda") + 3).to(gates)
    return [x.requires_grad_(backward) for x in (q, k, v, i, f)]


def gradient_call(function, inputs, backward) -> Callable:
    """A forward, or a forward and its gradient by autograd."""
    dh = torch.randn_like(inputs[2]) if backward else None

    def call():
        if backward:
            return torch.autograd.grad(function(*inputs), inputs, dh)
        with torch.no_grad():
            return function(*inputs)

    return call


def our_sequence(case: Case, peer: str) -> Callable:
    from mlstm.torch import get_mlstm_kernel

    if peer.endswith("siging"):
        return get_mlstm_kernel("chunkwise--xl_chunk_siging")
    parallel = case.shape_name in PARALLEL
    return get_mlstm_kernel("parallel--limit_headdim" if parallel else "chunkwise--xl_chunk")


def generic_engine(case: Case) -> Callable:
    """Our kernels for every GPU, where others would be taken on this one."""
    nothing = [None] * 4
    options = {"parallel": case.shape_name in PARALLEL, "generic_engine": True}
    return lambda *inputs: torch.ops.mlstm.forward(*inputs, *nothing, **options)[0]


def peer_sequence(peer: str) -> Callable:
    from mlstm_kernels.torch import get_mlstm_kernel

    name, options = {
        "limit_chunk64": ("chunkwise--triton_limit_chunk", {"chunk_size": 64}),
        "xl_chunk128": ("chunkwise--triton_xl_chunk", {"chunk_size": 128}),
        "xl_chunk128_siging": ("chunkwise--triton_xl_chunk_siging", {"chunk_size": 128}),
        "limit_headdim": ("parallel--triton_limit_headdim", {}),
    }[peer]
    kernel = get_mlstm_kernel(name)
    return lambda *inputs: kernel(*inputs, autocast_kernel_dtype=DTYPE, **options)


def fla_call(inputs) -> Callable:
    """simple_gla computes without normaliser and input gate, in its own layout (B, S, NH, D)."""
    from fla.ops.simple_gla import chunk_simple_gla

    q, k, v, _, f = (x.detach().transpose(1, 2).contiguous() for x in inputs)
    g = logsigmoid(f.float())

    def call():
        with torch.no_grad():
            return chunk_simple_gla(q, k, v, g)

    return call


def sdpa_call(shape, backward) -> Callable:
    """cuDNN's causal attention of as many tokens and as wide, with heads of 128."""
    b, nh, s, _, dhhv = shape
    heads = nh * dhhv // 128
    inputs = [
        torch.randn(b, heads, s, 128, device="cuda", dtype=DTYPE, requires_grad=backward)
        for _ in range(3)
    ]

    def attention(q, k, v):
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(q, k, v, is_causal=True)

    return gradient_call(attention, inputs, backward)


def sequence_calls(case: Case, peer: str, gates: torch.dtype) -> list[Callable]:
    backward = case.kind == "fw+bw"
    inputs = tokens(case.shape, gates, backward)
    calls = [gradient_call(our_sequence(case, peer), inputs, backward)]
    if peer == "fla_simple_gla":
        calls.append(fla_call(inputs))
    elif peer == GENERIC:
        calls.append(gradient_call(generic_engine(case), inputs, backward))
    elif peer == "sdpa":
        calls.append(sdpa_call(case.shape, backward))
    elif peer:
        calls.append(gradient_call(peer_sequence(peer), inputs, backward))
    return calls


# ---- steps --------------------------------------------------------------------------------------


def step_calls(case: Case, peer: str) -> tuple[list[Callable], int]:
    """Calls that each take a step of every state set in turn, together beyond the cache; how many.

    Ours in place is compared with the peer's step into a new state: it has no other.
    """
    b, nh, _, dhqk, dhhv = case.shape
    q, k = (torch.randn(b, nh, dhqk, device="cuda", dtype=DTYPE) for _ in range(2))
    v = torch.randn(b, nh, dhhv, device="cuda", dtype=DTYPE)
    i, f = (torch.randn(b, nh, 1, device="cuda") + shift for shift in (0, 3))
    sets = max(2, BEYOND_CACHE // (4 * b * nh * dhqk * dhhv))
    c = torch.randn(sets, b, nh, dhqk, dhhv, device="cuda")
    n, m = torch.randn(sets, b, nh, dhqk, device="cuda"), torch.zeros(sets, b, nh, 1, device="cuda")

    def every_set(one) -> Callable:
        states = list(zip(c, n, m, strict=True))

        def call():
            # Results stay until the end, so that each is written to memory of its own.
            results = [one(*state) for state in states]
            del results

        return in_graph(call) if case.kind.startswith("graph") else call

    from mlstm.torch import get_mlstm_step_kernel

    ours = get_mlstm_step_kernel("step")
    if case.kind == "graph in place":
        q4, k4, v4 = (x.unsqueeze(2) for x in (q, k, v))
        step = torch.ops.mlstm.step_
        calls = [every_set(lambda c, n, m: step(q4, k4, v4, i, f, c, n, m.squeeze(2)))]
    else:
        calls = [every_set(lambda c, n, m: ours(q, k, v, i, f, c, n, m))]
    if peer:
        from mlstm_kernels.torch import get_mlstm_step_kernel as get_peer_step_kernel

        theirs = get_peer_step_kernel("triton")
        calls.append(every_set(lambda c, n, m: theirs(q, k, v, i, f, c, n, m)))
    return calls, sets


def in_graph(call: Callable) -> Callable:
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        call()
    return graph.replay


# ---- the process --------------------------------------------------------------------------------


def measure(case: Case, peer: str, seconds: float, gates: str, warm_only: bool) -> dict:
    """Times in ms and extra memory in bytes, ours first."""
    with torch.set_grad_enabled(not case.is_step):
        if case.is_step:
            calls, each = step_calls(case, peer)
        else:
            calls, each = sequence_calls(case, peer, getattr(torch, gates)), 1
        for call in calls:
            call()
        if warm_only:
            torch.cuda.synchronize()
            return {}
        times = [time / each for time in milliseconds(calls, seconds, not case.is_step)]
        return {"ms": times, "bytes": [] if case.is_step else [extra_memory(x) for x in calls]}


@cache
def guard_triton() -> None:
    import triton_slp

    triton_slp.install(Path(os.environ["TRITON_CACHE_DIR"], triton_slp.LOG))


def answer(request: dict) -> dict:
    """What to answer to a request."""
    if request.get("ceilings"):
        return ceilings()
    if request["peer"] in TRITON_PEERS:
        guard_triton()
    settings = (request[name] for name in ("peer", "seconds", "gates", "warm_only"))
    return measure(Case(*request["case"]), *settings)


def main() -> None:
    for line in sys.stdin:
        torch.manual_seed(0)
        try:
            result = answer(json.loads(line))
        except Exception as error:  # the peer's, of whatever kind: the next case may do
            lines = str(error).strip().splitlines() or [""]
            result = {"failed": f"{type(error).__name__}: {lines[0][:200]}"}
        torch.cuda.empty_cache()
        print("@" + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
