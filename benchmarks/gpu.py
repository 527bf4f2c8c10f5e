# SPDX-License-Identifier: MIT OR Apache-2.0
"""GPU benchmark: mlstm beside mlstm_kernels, flash-linear-attention and attention, in one run.

Measures the card's ceilings first (a copy, a bfloat16 matmul) and compiles the peers' kernels on
all cores. Prints for each case our time, the share of the least possible time that it is, peak
extra memory, and the ratio to each peer that can be imported; `generic_engine` is our own kernels
for every GPU, beside those that are taken by default. Each peer runs in a process of its own,
interleaved with us; one that fails is reported with the reason. Saves JSON after every case, into a
file that later runs on the same machine add to, and draws plots.

    python benchmarks/gpu.py [--quick] [--only REGEX] [--budget SECONDS] [--json FILE] [--plots DIR]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import sys
import tempfile
import threading
import time
from importlib import metadata
from pathlib import Path

from gpu_cases import GENERIC, PEERS, QUICK_PEERS, TRITON_PEERS, Case, all_cases
from gpu_process import Worker
from tqdm import tqdm

CASE_SECONDS = 60  # longest a case may take
MOST_DEATHS = 3  # of a peer's process, before the rest of its cases is left out
WARM_SHARE = 0.5  # of the time, to compile the peers' kernels in,
WARM_SECONDS = 240  # and the longest that one shape may take for it


def available(peer: str) -> bool:
    """Whether the package of a peer can be imported."""
    packages = {"fla_simple_gla": "fla", "sdpa": "torch", GENERIC: "torch"}
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


class Results:
    """A row for each case and peer, kept in a JSON file."""

    def __init__(self, path: Path | None, machine: dict):
        self.path, self.machine, self.rows = path, machine, {}
        if path and path.exists():
            saved = json.loads(path.read_text())
            before = saved["machine"]
            for name in ("gpu", "cuda", "versions"):
                if before[name] != machine[name]:
                    raise SystemExit(f"{path}: measured with {name} {before[name]}")
            machine["commands"] = before["commands"] + machine["commands"]
            machine["without_slp"] = before["without_slp"]
            self.rows = {self.key(row): row for row in saved["rows"]}

    @staticmethod
    def key(row: dict) -> tuple:
        return row["shape_name"], row["kind"], row["peer"], row["gates"]

    def add(self, row: dict) -> None:
        """Takes the place of an older row of the same case."""
        self.rows[self.key(row)] = row
        self.save()

    def save(self) -> None:
        """Writes the file, if one is wanted."""
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"machine": self.machine, "rows": [*self.rows.values()]}, indent=1)
            self.path.write_text(text + "\n")


class Run:
    """One run of the program: what to time, and how much time is left."""

    def __init__(self, options: argparse.Namespace, cache: str):
        self.options, self.cache = options, cache
        self.start = time.monotonic()
        self.skipped: list[str] = []
        self.plan: dict[str, list[Case]] = {}
        peers = [x for x in (QUICK_PEERS if options.quick else PEERS) if available(x)]
        for peer in ("", *peers):
            cases = [x for x in all_cases(options.quick) if not peer or peer in x.peers()]
            cases = [x for x in cases if re.search(options.only, f"{x.name} {peer or 'alone'}")]
            if cases:
                self.plan[peer] = cases

    def left(self, share: float = 1.0) -> float:
        """Seconds until that share of the time has passed."""
        return self.start + share * self.options.budget - time.monotonic()

    def request(self, peer: str, case: Case, warm_only: bool = False) -> dict:
        seconds = 0.1 if self.options.quick else 0.4
        request = {"peer": peer, "case": [case.shape_name, case.kind], "seconds": seconds}
        return request | {"gates": self.options.gates, "warm_only": warm_only}

    def warm(self) -> None:
        """Compiles the peers' kernels on all cores, into the cache that the timed processes read.

        The gradient's kernels contain the forward's, and one kind of step those of all.
        """
        queue = []
        for peer in TRITON_PEERS:
            kinds = {case.shape_name: case for case in self.plan.get(peer, [])}
            queue += [self.request(peer, case, warm_only=True) for case in kinds.values()]
        if not queue:
            return
        bar = tqdm(total=len(queue), unit="shape", desc="compiling the peers", file=sys.stderr)

        def work() -> None:
            worker = Worker(self.cache)
            while self.left(WARM_SHARE) > 0:
                try:
                    request = queue.pop(0)
                except IndexError:
                    break
                worker.ask(request, min(WARM_SECONDS, self.left(WARM_SHARE)))
                bar.update()
            worker.close()

        threads = [
            threading.Thread(target=work) for _ in range(min(os.cpu_count() or 1, len(queue)))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        bar.close()

    def time_all(self, results: Results) -> None:
        machine = results.machine
        with tqdm(total=sum(map(len, self.plan.values())), unit="case", file=sys.stderr) as bar:
            for peer, cases in self.plan.items():
                worker = Worker(self.cache)
                for case in cases:
                    answer = self.time(worker, peer, case)
                    bar.update()
                    if answer is None:
                        self.skipped.append(f"{case.name} {peer or 'alone'}")
                        continue
                    floor = case.floor_ms(machine["copy_gbs"], machine["matmul_tflops"])
                    tqdm.write(line(case, peer, answer, floor), file=sys.stdout)
                    sys.stdout.flush()
                    row = vars(case) | {"peer": peer, "gates": self.options.gates}
                    row |= {"shape": case.shape, "floor_ms": floor, "date": machine["date"]}
                    results.add(row | answer)
                worker.close()

    def time(self, worker: Worker, peer: str, case: Case) -> dict | None:
        """The worker's answer; None if there is no time left, or no hope."""
        if worker.deaths >= MOST_DEATHS or self.left() <= 0:
            return None
        answer = worker.ask(self.request(peer, case), min(CASE_SECONDS, self.left()))
        return None if "failed" in answer and self.left() <= 0 else answer


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


def measure(options: argparse.Namespace, cache: str) -> Results:
    """Everything that time allows."""
    run = Run(options, cache)
    worker = Worker(cache)
    machine = worker.ask({"ceilings": True}, CASE_SECONDS)
    worker.close()
    if "failed" in machine:
        raise SystemExit(f"no ceilings: {machine['failed']}")
    machine |= {"versions": versions(), "commands": [" ".join(["python", *sys.argv])]}
    machine |= {"date": time.strftime("%Y-%m-%d"), "without_slp": []}
    results = Results(options.json, machine)
    print(json.dumps(machine, indent=1))
    run.warm()
    print(
        f"{'case':<28} {'peer':<19} {'ours ms':>9} {'peer ms':>9} {'ratio':>8} "
        f"{'of floor':>8} {'our GiB':>7} {'peer GiB':>8}"
    )
    run.time_all(results)
    log = Path(cache, "without_slp.txt")
    if log.exists():
        machine["without_slp"] = sorted({*machine["without_slp"], *log.read_text().split()})
        results.save()
    if machine["without_slp"]:
        print("compiled without LLVM's SLP vectoriser:", ", ".join(machine["without_slp"]))
    if run.skipped:
        print(f"skipped for want of time or of a peer that runs: {', '.join(run.skipped)}")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="about a minute: few cases, peers")
    parser.add_argument("--only", default="", help="cases whose 'shape kind peer' matches")
    # At bfloat16 gates Triton 3.6 cannot compile some peers but by triton_slp.py.
    parser.add_argument("--gates", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds; what is left is named")
    parser.add_argument("--cache", type=Path, help="the folder to keep the peers' kernels in")
    parser.add_argument("--json", type=Path, help="where to save, e.g. results/gpu-h200.json")
    parser.add_argument("--plots", type=Path, help="the folder to draw into")
    options = parser.parse_args()
    if options.cache:
        options.cache.mkdir(parents=True, exist_ok=True)
        results = measure(options, str(options.cache.resolve()))
    else:
        with tempfile.TemporaryDirectory() as cache:
            results = measure(options, cache)
    if options.plots:
        from gpu_plots import draw

        options.plots.mkdir(parents=True, exist_ok=True)
        prefix = options.json.stem if options.json else "gpu"
        draw([*results.rows.values()], results.machine, options.plots, prefix)


if __name__ == "__main__":
    main()
