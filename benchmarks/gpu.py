# SPDX-License-Identifier: MIT OR Apache-2.0
"""GPU benchmark: mlstm beside mlstm_kernels, flash-linear-attention and attention, in one run.

Measures the card's ceilings first (a copy, a bfloat16 matmul). Prints for each case our time, the
share of the least possible time that it is, peak extra memory, and the ratio to each peer that can
be imported. Each peer runs in a process of its own, interleaved with us; one that fails is
reported with the reason. Saves JSON and draws plots.

    python benchmarks/gpu.py [--quick] [--only REGEX] [--json FILE] [--plots DIR]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from gpu_cases import PEERS, QUICK_PEERS, Case, all_cases
from tqdm import tqdm

WORKER = Path(__file__).with_name("gpu_worker.py")
CASE_SECONDS = 90  # longest a case may take, the compilation of a peer's kernels included


class Worker:
    """Runs cases beside one peer in processes; a new process for what a dead one left."""

    def __init__(self, peer: str, options: argparse.Namespace, cache: str, warm_only: bool = False):
        seconds = 0.1 if options.quick else 0.4
        self.order = {"peer": peer, "seconds": seconds, "warm_only": warm_only}
        self.order["gates"] = options.gates
        self.environment = os.environ | {"TRITON_CACHE_DIR": cache}

    def run(self, cases: list, report: Callable[[object, dict], None]) -> None:
        """Calls `report(case, answer)` for each case, in order."""
        left = list(cases)
        while left:
            died = self._process(left, report)
            if left:
                report(left.pop(0), {"failed": died})

    def _process(self, left: list, report) -> str:
        names = [[x.shape_name, x.kind] if isinstance(x, Case) else x for x in left]
        with tempfile.TemporaryFile("w+", errors="replace") as errors:
            process = subprocess.Popen(
                [sys.executable, str(WORKER), json.dumps(self.order | {"cases": names})],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=self.environment,
            )
            timer = threading.Timer(CASE_SECONDS, process.kill)
            timer.start()
            for line in process.stdout:
                if line.startswith("@"):
                    report(left.pop(0), json.loads(line[1:]))
                    timer.cancel()
                    timer = threading.Timer(CASE_SECONDS, process.kill)
                    timer.start()
            code = process.wait()
            timer.cancel()
            errors.seek(0)
            lines = [line.strip() for line in errors if re.search("Assertion|Error", line)]
        cause = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        return f"{cause}: {lines[-1][-200:] if lines else f'no answer in {CASE_SECONDS} s'}"


def available(peer: str) -> bool:
    """Whether the package of a peer can be imported."""
    packages = {"fla_simple_gla": "fla", "sdpa": "torch"}
    return importlib.util.find_spec(packages.get(peer, "mlstm_kernels")) is not None


def versions() -> dict[str, str]:
    names = ("torch", "triton", "mlstm_kernels", "fla-core")
    out = {}
    for name in names:
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    return out


def line(case: Case, peer: str, answer: dict, floor: float) -> str:
    """A line of the table."""
    if "failed" in answer:
        return f"{case.name:<28} {peer or 'alone':<19} failed: {answer['failed']}"
    ours, *theirs = answer["ms"]
    memory = [f"{x / 2**30:7.2f}" for x in answer["bytes"]] + ["      -", "      -"]
    other = f"{theirs[0]:9.4f} {theirs[0] / ours:7.2f}x" if theirs else f"{'-':>9} {'-':>8}"
    return (
        f"{case.name:<28} {peer or 'alone':<19} {ours:9.4f} {other} "
        f"{100 * floor / ours:6.1f} % {memory[0]} {memory[1] if theirs else '      -'}"
    )


def warm(plan: dict[str, list[Case]], options: argparse.Namespace, cache: str) -> None:
    """Compiles all peers' kernels at once, into the cache that the timed processes read."""
    workers = [
        (Worker(peer, options, cache, warm_only=True), cases)
        for peer, cases in plan.items()
        if peer not in ("", "sdpa")
    ]
    threads = [
        threading.Thread(target=worker.run, args=(cases, lambda *_: None))
        for worker, cases in workers
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def save(path: Path | None, machine: dict, rows: list[dict]) -> None:
    """Writes the JSON file, if one is wanted."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="about a minute: few cases, peers")
    parser.add_argument("--only", default="", help="cases whose 'shape kind peer' matches")
    # At bfloat16 gates Triton 3.6 cannot compile some peers but by triton_slp.py.
    parser.add_argument("--gates", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", type=Path, help="where to save, e.g. results/gpu-h200.json")
    parser.add_argument("--plots", type=Path, help="the folder to draw into")
    options = parser.parse_args()
    peers = [x for x in (QUICK_PEERS if options.quick else PEERS) if available(x)]

    plan: dict[str, list[Case]] = {}
    for peer in ("", *peers):
        cases = [x for x in all_cases(options.quick) if not peer or peer in x.peers()]
        cases = [x for x in cases if re.search(options.only, f"{x.name} {peer or 'alone'}")]
        if cases:
            plan[peer] = cases

    machine: dict = {}
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as cache:
        Worker("", options, cache).run(["ceilings"], lambda _, answer: machine.update(answer))
        if "failed" in machine:
            raise SystemExit(f"no ceilings: {machine['failed']}")
        machine |= {"versions": versions(), "command": " ".join(["python", *sys.argv])}
        machine |= {"date": time.strftime("%Y-%m-%d")}
        print(json.dumps(machine, indent=1))
        print(
            f"{'case':<28} {'peer':<19} {'ours ms':>9} {'peer ms':>9} {'ratio':>8} "
            f"{'of floor':>8} {'our GiB':>7} {'peer GiB':>8}"
        )
        warm(plan, options, cache)
        with tqdm(total=sum(map(len, plan.values())), unit="case", file=sys.stderr) as bar:
            for peer, cases in plan.items():

                def report(case, answer, peer=peer):
                    floor = case.floor_ms(machine["copy_gbs"], machine["matmul_tflops"])
                    rows.append(vars(case) | {"shape": case.shape, "peer": peer, "floor_ms": floor})
                    rows[-1] |= answer
                    tqdm.write(line(case, peer, answer, floor), file=sys.stdout)
                    sys.stdout.flush()
                    bar.update()
                    save(options.json, machine, rows)  # so that a run cut short leaves its rows

                Worker(peer, options, cache).run(cases, report)
        log = Path(cache, "without_slp.txt")
        machine["without_slp"] = sorted(set(log.read_text().split())) if log.exists() else []
    if machine["without_slp"]:
        print("compiled without LLVM's SLP vectoriser:", ", ".join(machine["without_slp"]))
    save(options.json, machine, rows)
    if options.plots:
        from gpu_plots import draw

        options.plots.mkdir(parents=True, exist_ok=True)
        draw(rows, machine, options.plots)


if __name__ == "__main__":
    main()
