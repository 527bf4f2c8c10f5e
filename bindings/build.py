# SPDX-License-Identifier: MIT OR Apache-2.0
"""Puts the native parts of the Python package in place, so that it runs from the source tree.

    cargo build --release
    python bindings/build.py

copies `libmlstm.so` and `mlstm.h` into `bindings/python/mlstm/_lib` and compiles what this
interpreter has the headers for: `torch/ops.cpp` with torch, `xla_ffi/handlers.cpp` with jax. The
results load into every Python, every torch from 2.10 on, and every jax of the same age or newer.
"""

import argparse
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIB = ROOT / "bindings" / "python" / "mlstm" / "_lib"


def build(library: Path, cxx: str) -> None:
    """Fills `LIB` from `library`, a built libmlstm.so."""
    extensions = {"torch": torch_extension, "jax": xla_handlers}
    found = [name for name in extensions if importlib.util.find_spec(name)]
    if not found:
        raise SystemExit(
            "this Python has neither torch nor jax to compile against (pip's isolated builds never "
            "have them): run `python bindings/build.py` with one that has, then pip"
        )
    if not library.exists():
        raise SystemExit(f"{library} is not there: run `cargo build --release` first")
    (LIB / "include").mkdir(parents=True, exist_ok=True)
    install(library, LIB / "libmlstm.so.0")
    install(ROOT / "include" / "mlstm.h", LIB / "include" / "mlstm.h")
    for name in found:
        extensions[name](cxx)


def torch_extension(cxx: str) -> None:
    """mlstm_torch.so: the operators."""
    import torch

    torch_dir = Path(torch.__file__).parent
    flags = [
        f"-isystem{torch_dir / 'include'}",
        f"-L{torch_dir / 'lib'}",
        # libtorch.so leads to the CUDA half where there is one; nothing refers to it by itself.
        *"-Wl,--no-as-needed -ltorch -ltorch_cpu".split(),
    ]
    compile_extension(cxx, "bindings/torch/ops.cpp", "mlstm_torch.so", flags)
    print(f"built mlstm_torch.so against torch {torch.__version__}")


def xla_handlers(cxx: str) -> None:
    """mlstm_xla.so: the handlers of custom calls."""
    import jax

    flags = [f"-isystem{jax.ffi.include_dir()}"]
    compile_extension(cxx, "xla_ffi/handlers.cpp", "mlstm_xla.so", flags)
    print(f"built mlstm_xla.so against jax {jax.__version__}")


def compile_extension(cxx: str, source: str, name: str, flags: list[str]) -> None:
    """Compiles ROOT / source into LIB / name, linked with libmlstm.so beside it."""
    fresh = LIB / f"{name}.tmp"
    command = [
        *cxx.split(),
        *"-std=c++17 -O2 -fPIC -shared -fvisibility=hidden -Wall -Wextra -Werror".split(),
        f"-I{LIB / 'include'}",
        str(ROOT / source),
        "-o",
        str(fresh),
        f"-L{LIB}",
        *"-l:libmlstm.so.0 -Wl,-rpath,$ORIGIN".split(),
        *flags,
    ]
    subprocess.run(command, check=True)
    fresh.replace(LIB / name)


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
