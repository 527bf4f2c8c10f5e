# SPDX-License-Identifier: MIT OR Apache-2.0
"""Puts the native parts of the Python package in place, so that it runs from the source tree.

    cargo build --release
    python bindings/torch/build.py

copies `libmlstm.so` and `mlstm.h` into `bindings/python/mlstm/_lib` and compiles `ops.cpp` against
the torch of this interpreter. The result loads into every torch from 2.10 on and every Python.
"""

import argparse
import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIB = ROOT / "bindings" / "python" / "mlstm" / "_lib"


def build(library: Path, cxx: str) -> None:
    """Fills `LIB` from `library`, a built libmlstm.so."""
    try:
        import torch
    except ImportError:
        raise SystemExit(
            "this Python has no torch to compile against (pip's isolated builds never have one): "
            "run `python bindings/torch/build.py` with one that has, then pip"
        ) from None
    if not library.exists():
        raise SystemExit(f"{library} is not there: run `cargo build --release` first")
    (LIB / "include").mkdir(parents=True, exist_ok=True)
    install(library, LIB / "libmlstm.so.0")
    install(ROOT / "include" / "mlstm.h", LIB / "include" / "mlstm.h")
    torch_dir = Path(torch.__file__).parent
    extension = LIB / "mlstm_torch.so"
    fresh = extension.with_suffix(".tmp")
    command = [
        *cxx.split(),
        *"-std=c++17 -O2 -fPIC -shared -fvisibility=hidden -Wall -Wextra -Werror".split(),
        f"-I{LIB / 'include'}",
        f"-isystem{torch_dir / 'include'}",
        str(ROOT / "bindings" / "torch" / "ops.cpp"),
        "-o",
        str(fresh),
        f"-L{LIB}",
        "-l:libmlstm.so.0",
        f"-L{torch_dir / 'lib'}",
        # libtorch.so leads to the CUDA half where there is one; nothing refers to it by itself.
        *"-Wl,--no-as-needed -ltorch -ltorch_cpu -Wl,-rpath,$ORIGIN".split(),
    ]
    subprocess.run(command, check=True)
    fresh.replace(extension)
    print(f"built {extension} against torch {torch.__version__}")


def install(source: Path, target: Path) -> None:
    """Replaces `target` in one move: a running process may have it mapped."""
    fresh = target.with_name(target.name + ".tmp")
    shutil.copyfile(source, fresh)
    fresh.replace(target)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", type=Path, default=ROOT / "target/release/libmlstm.so")
    parser.add_argument("--cxx", default=os.environ.get("CXX", "g++"), help="the C++ compiler")
    arguments = parser.parse_args()
    build(arguments.library, arguments.cxx)
