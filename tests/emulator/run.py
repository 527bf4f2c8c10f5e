"""Builds and runs the tests of the Hopper kernels in the emulator; README.md tells what they check.

    python tests/emulator/run.py BUILD_FOLDER

Environment: CXX, MLSTM_TEST_SEED (of the cases and schedules), EMULATOR_CASES (how many).
"""

import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mutations import MUTATIONS, Mutation
from translate import translate

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parents[1] / "kernels"
INCLUDE = HERE.parents[1] / "include"
ORACLE = HERE.parent / "c" / "oracle.c"
CORES = min(len(os.sched_getaffinity(0)), 16)  # each run takes some 120 MB

# Shared variables have addresses of 32 bits: the program must be linked where they do.
FLAGS = "-std=c++20 -g1 -fno-pie -fno-strict-aliasing -fno-omit-frame-pointer".split()
WARNINGS = ["-Wall", "-Wextra", "-Werror"]
TESTED = [
    "forward_bf16_sm90.cu",
    "forward_f16_sm90.cu",
    "gates.cu",
    "gates_sm90.cu",
    "segments_sm90.cu",
]
CXX = shlex.split(os.environ.get("CXX", "c++"))


def run(command: list) -> None:
    done = subprocess.run([str(x) for x in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{shlex.join(map(str, command))}\n{done.stdout}{done.stderr}")


def object_of(source: Path, kernels: Path, target: Path) -> Path:
    """Compiles a file of this folder, or a translated one of a folder of kernels."""
    out = target / f"{source.stem}.o"
    if source.suffix in (".c", ".cc"):
        # The kernels' headers are not held to the warnings.
        options = ["-O3", *WARNINGS, "-x", "c++", "-isystem", kernels, "-I", INCLUDE]
    else:
        options = ["-O1", "-w", "-x", "c++", "-include", HERE / "before_kernels.h", "-I", kernels]
    run([*CXX, *FLAGS, *options, "-I", HERE, "-c", source, "-o", out])
    return out


def link(objects: list[Path], out: Path) -> Path:
    run([*CXX, "-no-pie", *objects, "-o", out])
    return out


def caught(mutation: Mutation, objects: list[Path], build: Path) -> str:
    """Runs the tests on a kernel that is wrong; returns what they say."""
    folder = build / "mutants" / mutation.name.replace(" ", "-")
    translate(KERNELS, folder, (mutation.file, mutation.old, mutation.new))
    (folder / "mutant.cu").write_text(f'#include "forward_sm90.cuh"\n{mutation.definition}\n')
    mutant = object_of(folder / "mutant.cu", folder, folder)
    program = link([mutant, *objects], folder / "forward_test")
    done = subprocess.run(
        [program, "0", "1", "60", mutation.kernel],
        capture_output=True,
        text=True,
        env=os.environ | {"MLSTM_TEST_SEED": "1"},
    )
    said = done.stdout + done.stderr
    if done.returncode == 0 or mutation.expected not in said:
        raise SystemExit(f"{mutation.name}: was not found ({mutation.expected}), but:\n{said}")
    return mutation.name


def main() -> None:
    build = Path(sys.argv[1]).resolve()
    kernels = build / "kernels"
    start = time.monotonic()

    def say(text: str) -> None:
        print(f"  {time.monotonic() - start:3.0f} s: {text}", flush=True)

    translate(KERNELS, kernels)
    with ThreadPoolExecutor(CORES) as pool:
        say("compiling")
        sources = [kernels / name for name in TESTED] + [ORACLE, *sorted(HERE.glob("*.cc"))]
        objects = list(pool.map(lambda source: object_of(source, kernels, build), sources))
        program = link(objects, build / "forward_test")

        seed = os.environ.get("MLSTM_TEST_SEED") or str(time.time_ns() // 1000)
        say(f"random cases, MLSTM_TEST_SEED={seed}")
        environment = os.environ | {"MLSTM_TEST_SEED": seed}
        cases = os.environ.get("EMULATOR_CASES") or "160"
        parts = [
            subprocess.Popen([program, str(part), str(CORES), cases], env=environment)
            for part in range(CORES)
        ]
        failed = [part for part in parts if part.wait() != 0]
        if failed:
            raise SystemExit("FAILED")

        say("kernels with mistakes, each of which must be found")
        others = [x for x in objects if x.stem not in ("forward_bf16_sm90", "forward_f16_sm90")]
        for name in pool.map(lambda mutation: caught(mutation, others, build), MUTATIONS):
            say(f"found: {name}")


if __name__ == "__main__":
    main()
