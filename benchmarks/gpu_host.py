# SPDX-License-Identifier: MIT OR Apache-2.0
"""What calls cost the host: the C ABI, the PyTorch operator and mlstm.torch, with the GPU idle.

Each time is the median over calls that begin when the GPU has nothing to do and end when the call
returns, not when the GPU is done. Beside them the time of torch.add and of five torch.empty, as a
scale of the machine, and that of loading all kernels in a fresh process whose CUDA context torch
has made. The C ABI is called by ctypes with a struct that was filled in once; what an empty call by
ctypes takes is part of those times. Saves JSON.

    python benchmarks/gpu_host.py [--json FILE]
"""

import argparse
import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from mlstm._library import native
from mlstm.torch import get_mlstm_kernel

os.environ["MLSTM_LIBRARY"] = native("libmlstm.so.0")
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "gpu"))
import mlstm_c  # noqa: E402

SHAPES = {"small": (1, 4, 256, 64, 64), "7b": (1, 8, 2048, 256, 512)}  # B, NH, S, DHQK, DHHV
LOADS = 3  # processes whose median counts


def host_us(call: Callable, device: str, calls: int) -> float:
    """Median time of a call alone; its results are freed outside."""
    times = []
    for index in range(-calls // 10, calls):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter_ns()
        results = call()
        end = time.perf_counter_ns()
        del results
        if index >= 0:
            times.append((end - start) / 1e3)
    return statistics.median(times)


def tensors(shape: tuple[int, ...], device: str) -> tuple[dict, dict, dict, dict]:
    """Inputs, initial states, outputs and last states, named as in mlstm_fw_args."""
    b, nh, s, dhqk, dhhv = shape

    def data(*sizes, dtype=torch.float32):
        return torch.randn(*sizes, dtype=dtype, device=device)

    x = {name: data(b, nh, s, dhqk, dtype=torch.bfloat16) for name in "qk"}
    x |= {"v": data(b, nh, s, dhhv, dtype=torch.bfloat16), "i": data(b, nh, s), "f": data(b, nh, s)}
    states = {"c": data(b, nh, dhqk, dhhv), "n": data(b, nh, dhqk), "m": data(b, nh)}
    out = {"h": torch.empty_like(x["v"]), "n": data(b, nh, s), "m": data(b, nh, s)}
    initial = {f"{name}_initial": t for name, t in states.items()}
    last = {f"{name}_last": torch.empty_like(t) for name, t in states.items()}
    return x, initial, out, last


def c_call(op: str, x: dict, arguments: dict) -> Callable:
    """A call of the C ABI on arguments that are filled in once."""
    problem = mlstm_c.problem(x)
    size = mlstm_c.query(op, problem).workspace_size
    workspace = torch.empty(size + 64, dtype=torch.uint8, device=x["q"].device)
    struct = mlstm_c.arguments(op, problem, arguments, workspace)
    function, pointer = getattr(mlstm_c.lib, f"mlstm_{op}"), ctypes.byref(struct)
    mlstm_c.check(function(pointer))
    # The default keeps what the struct points to.
    return lambda keep=(problem, workspace, arguments): function(pointer)


def cases(shape: tuple[int, ...], device: str) -> dict[str, Callable]:
    """What is timed on one shape."""
    x, initial, out, last = tensors(shape, device)
    d = {f"d{name}": torch.empty_like(t) for name, t in (x | initial).items()}
    dh = {"dh": torch.randn_like(out["h"])}
    d_last = {f"d{name}": torch.randn_like(t) for name, t in last.items()}
    d_tokens = {f"d{name}": d[f"d{name}"] for name in x}
    found = {
        "C forward": c_call("chunkwise_fw", x, x | out),
        "C forward, states": c_call("chunkwise_fw", x, x | initial | out | last),
        "C backward": c_call("chunkwise_bw", x, x | out | dh | d_tokens),
        "C backward, states": c_call("chunkwise_bw", x, x | initial | out | dh | d_last | d),
    }

    inputs, none = list(x.values()), [None] * 4
    states = [*initial.values(), None]
    leaves = [t.clone().requires_grad_() for t in inputs]
    op, kernel = torch.ops.mlstm.forward, get_mlstm_kernel("chunkwise--xl_chunk")

    def without_grad(call):
        def run():
            with torch.no_grad():
                return call()

        return run

    recorded = kernel(*leaves)
    return found | {
        "operator": lambda: op(*inputs, *none),
        "operator, states": lambda: op(*inputs, *states, return_last_states=True),
        "operator, recording": lambda: op(*leaves, *none),
        "mlstm.torch, no_grad": without_grad(lambda: kernel(*inputs)),
        "mlstm.torch, no_grad, states": without_grad(
            lambda: kernel(*inputs, *states[:3], return_last_states=True)
        ),
        "mlstm.torch, recording": lambda: kernel(*leaves),
        "its backward": lambda: torch.autograd.grad(recorded, leaves, dh["dh"], retain_graph=True),
    }


def scale(device: str) -> dict[str, Callable]:
    """What the machine takes for calls that are not ours."""
    x = torch.randn(1, 4, 256, 64, device=device)
    return {
        "an empty call by ctypes": mlstm_c.lib.mlstm_version,
        "torch.add": lambda: torch.add(x, x),
        "five torch.empty": lambda: [torch.empty(4, 256, 64, device=device) for _ in range(5)],
    }


def load_ms() -> float:
    """Loads all kernels in this process."""
    torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    start = time.perf_counter()
    mlstm_c.check(mlstm_c.lib.mlstm_preload(2, 0))
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--calls", type=int, default=400, help="of which the median counts")
    parser.add_argument("--device", default="cuda", help="cpu tries the script, no more")
    parser.add_argument("--json", type=Path, help="where to save")
    parser.add_argument("--load", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        print(load_ms())
        return
    rows = []

    def row(name: str, shape: str, value: float, unit: str) -> None:
        rows.append({"call": name, "shape": shape, unit: value})
        print(f"{name:<30} {shape:<6} {value:8.2f} {unit}", flush=True)

    for name, call in scale(args.device).items():
        row(name, "", host_us(call, args.device, args.calls), "us")
    for shape_name, shape in SHAPES.items():
        for name, call in cases(shape, args.device).items():
            row(name, shape_name, host_us(call, args.device, args.calls), "us")
    if args.device == "cuda":
        command = [sys.executable, __file__, "--load"]
        loads = [float(subprocess.check_output(command, text=True)) for _ in range(LOADS)]
        row("loading all kernels", "", statistics.median(loads), "ms")
    if args.json:
        on_gpu = args.device == "cuda"
        saved = {
            "command": " ".join(["python", *sys.argv]),
            "device": torch.cuda.get_device_name() if on_gpu else platform.processor(),
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
            "date": time.strftime("%Y-%m-%d"),
            "shapes": SHAPES,
            "rows": rows,
        }
        args.json.write_text(json.dumps(saved, indent=1) + "\n")


if __name__ == "__main__":
    main()
