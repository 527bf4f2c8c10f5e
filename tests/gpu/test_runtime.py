# SPDX-License-Identifier: MIT OR Apache-2.0
"""How the library behaves among other users of the device: graphs, streams, threads, errors."""

import ctypes
import subprocess
import sys
import threading

import mlstm_c
import pytest
import torch
from cases import Case, compare

BF16 = torch.bfloat16


def tensors(case, device="cuda"):
    inputs = case.inputs()
    x = {n: inputs[n].to(device, case.dtype_of(n)) for n in ("q", "k", "v", "i", "f", "dh")}
    out = {"h": torch.full_like(x["v"], float("nan"))}
    out["n"] = torch.full_like(x["i"], float("nan"))
    out["m"] = torch.full_like(x["i"], float("nan"))
    grads = {"d" + n: torch.full_like(x[n], float("nan")) for n in ("q", "k", "v", "i", "f")}
    return x, out, grads


def run(case, x, out, grads, workspaces):
    p = mlstm_c.problem(x)
    gates = {n: x[n] for n in ("q", "k", "v", "i", "f")}
    mlstm_c.call("chunkwise_fw", p, gates | out, workspaces[0])
    mlstm_c.call("chunkwise_bw", p, gates | out | {"dh": x["dh"]} | grads, workspaces[1])


def workspaces(x):
    p = mlstm_c.problem(x)
    sizes = [mlstm_c.query(f"chunkwise_{d}", p).workspace_size for d in ("fw", "bw")]
    return [torch.full((size + 64,), 255, dtype=torch.uint8, device="cuda") for size in sizes]


CAPTURE = """
import sys

import torch
import mlstm_c
from cases import Case
from test_runtime import run, tensors, workspaces

case = Case(dtype=torch.bfloat16, s=300, dhqk=64, dhhv=128, initial=False, last=False)
x, out, grads = tensors(case)
memory = workspaces(x)
if sys.argv[1] == "preloaded":
    mlstm_c.check(mlstm_c.lib.mlstm_preload(2, 0))
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    run(case, x, out, grads, memory)
assert out["h"].isnan().all()
graph.replay()
torch.cuda.synchronize()
captured = [t.clone() for t in (out | grads).values()]
for t in (out | grads).values():
    t.fill_(float("nan"))
run(case, x, out, grads, memory)
torch.cuda.synchronize()
for a, b in zip(captured, (out | grads).values()):
    assert not a.isnan().any() and torch.equal(a, b)
x["q"].mul_(-1)
graph.replay()
torch.cuda.synchronize()
assert torch.equal(out["h"], -captured[0])
print("captured")
"""


@pytest.mark.parametrize("before", ["preloaded", "nothing"])
def test_first_call_in_a_graph(before):
    """In a process of its own: nothing has run before the capture, or mlstm_preload alone."""
    done = subprocess.run([sys.executable, "-c", CAPTURE, before], capture_output=True, text=True)
    assert done.returncode == 0 and "captured" in done.stdout, done.stdout + done.stderr


def test_step_in_a_graph():
    from test_step import Step

    step = Step(b=4, slots=8)
    device = {n: t.to("cuda", torch.float32) for n, t in (step.x | step.pools).items()}
    slots = torch.tensor([0, 1, 2, 3], device="cuda")
    h = torch.full_like(device["v"], float("nan"))
    p = mlstm_c.problem(device, num_slots=8)
    call = device | {"h": h, "src_slots": slots}
    memory = torch.empty(1 << 20, dtype=torch.uint8, device="cuda")
    mlstm_c.check(mlstm_c.lib.mlstm_preload(2, 0))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mlstm_c.call("step", p, call, memory)
    slots.copy_(torch.tensor([7, -1, 5, 4]))
    graph.replay()
    torch.cuda.synchronize()
    wanted, _ = step.run("cuda", rows={"src_slots": slots.cpu()})
    assert torch.equal(h.nan_to_num(9), wanted.nan_to_num(9))


def test_streams_and_threads():
    """Each thread on a stream of its own, all at once, each with its own numbers."""
    results = {}

    def work(seed):
        with torch.cuda.stream(torch.cuda.Stream()):
            case = Case(dtype=BF16, s=500, dhqk=64, dhhv=64, seed=seed)
            inputs = case.inputs()
            for _ in range(3):
                results[seed] = case.run("cuda", inputs)
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, got in results.items():
        case = Case(dtype=BF16, s=500, dhqk=64, dhhv=64, seed=seed)
        alone = case.run("cuda", case.inputs())
        for name in alone:
            assert torch.equal(alone[name], got[name]), (seed, name)
    assert len(results) == 8


def test_threads_without_a_context():
    """Calls in a thread that has done nothing on the device before."""
    case = Case(dtype=BF16, s=300, dhqk=64, dhhv=128)
    x, out, grads = tensors(case)
    memory = workspaces(x)
    p = mlstm_c.problem(x)
    gates = {n: x[n] for n in ("q", "k", "v", "i", "f")}
    forward = mlstm_c.arguments("chunkwise_fw", p, gates | out, memory[0])
    all_tensors = gates | out | {"dh": x["dh"]} | grads
    backward = mlstm_c.arguments("chunkwise_bw", p, all_tensors, memory[1])
    torch.cuda.synchronize()
    failures = []

    def work():
        try:
            mlstm_c.check(mlstm_c.lib.mlstm_chunkwise_fw(ctypes.byref(forward)))
            mlstm_c.check(mlstm_c.lib.mlstm_chunkwise_bw(ctypes.byref(backward)))
        except mlstm_c.Error as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failures
    torch.cuda.synchronize()
    got = {n: t.clone() for n, t in (out | grads).items()}
    run(case, x, out, grads, memory)
    for n, t in (out | grads).items():
        assert not t.isnan().any() and torch.equal(got[n], t), n


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_other_device():
    torch.cuda.set_device(0)
    case = Case(dtype=BF16, s=300)
    inputs = case.inputs()
    got = case.run("cuda:1", inputs)
    assert torch.cuda.current_device() == 0
    torch.cuda.synchronize(1)
    assert not compare(case, got, case.run("cpu", inputs, exact=True))


def test_only_the_stream_is_used():
    """Work waits for what the stream holds before it."""
    case = Case(s=200)
    x, out, grads = tensors(case)
    memory = workspaces(x)
    run(case, x, out, grads, memory)
    wanted = out["h"].clone()
    q = x["q"].clone()
    x["q"].zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        x["q"].copy_(q)
        run(case, x, out, grads, memory)
        assert not stream.query()
    stream.synchronize()
    assert torch.equal(out["h"], wanted)


def test_errors():
    case = Case()
    x, out, _ = tensors(case)
    good = {n: x[n] for n in ("q", "k", "v", "i", "f")} | {"h": out["h"]}
    before = out["h"].clone()

    def refused(status, words, op="chunkwise_fw", **changes):
        p = mlstm_c.problem(x, **changes)
        with pytest.raises(mlstm_c.Error, match=words) as info:
            mlstm_c.call(op, p, good, torch.empty(1 << 24, dtype=torch.uint8, device="cuda"))
        assert info.value.status == mlstm_c.STATUS[status]

    refused("INVALID_ARGUMENT", "device_index", device_index=99)
    refused("INVALID_ARGUMENT", "device_index", device_index=-1)
    with pytest.raises(mlstm_c.Error, match="mlstm_query"):
        small = torch.empty(256, dtype=torch.uint8, device="cuda")
        mlstm_c.call("chunkwise_fw", mlstm_c.problem(x), good, small)
    torch.cuda.synchronize()
    assert torch.equal(out["h"].isnan(), before.isnan())


def test_query_needs_no_device():
    case = Case(dtype=BF16, s=1000, dhqk=128, dhhv=256)
    x, _, _ = tensors(case)
    here, anywhere = mlstm_c.problem(x), mlstm_c.problem(x, device_index=-1)
    for op in ("chunkwise_fw", "chunkwise_bw", "step"):
        here.s = anywhere.s = 1 if op == "step" else 1000
        a, b = mlstm_c.query(op, here), mlstm_c.query(op, anywhere)
        assert a.workspace_size == b.workspace_size
