# SPDX-License-Identifier: MIT OR Apache-2.0
"""Lets Triton compile kernels at which LLVM's SLP vectoriser aborts.

Triton 3.6 brings an LLVM whose SLP vectoriser fails an assertion ("trying to erase instruction
with users") and so ends the process, for mlstm_kernels' xl_chunk and limit_headdim among others.
Triton offers no way to leave the pass out, but the pass skips functions with the attribute
`noimplicitfloat`, which means nothing else on a GPU. Each kernel is compiled in a fork first;
where the fork dies, the kernel gets the attribute and all other passes run as usual.
"""

import os
import re
import tempfile
from pathlib import Path

from triton.backends.nvidia import compiler

LOG = "without_slp.txt"  # in the folder of compiled kernels: which of them needed this


def _dies(work) -> bool:
    """Whether `work`, done in a fork, ends in a signal."""
    child = os.fork()
    if child == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        try:
            work()
        finally:  # a Python exception will show up again in the parent
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def _without_slp(module):
    """A copy of an LLVM-dialect module whose functions the SLP vectoriser skips."""
    text = re.sub(
        r"(llvm\.func [^\n]*?attributes \{)",
        r'\1passthrough = ["noimplicitfloat"], ',
        str(module),
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.mlir")
        path.write_text(text)
        out = compiler.ir.parse_mlir_module(str(path), module.context)
    out.context = module.context
    return out


def install(log: Path) -> None:
    """Guards every later compilation; appends the names of the kernels it changed to `log`."""
    make_llir, to_module = compiler.CUDABackend.make_llir, compiler.llvm.to_module
    skip = False

    def guarded_to_module(module, context):
        return to_module(_without_slp(module) if skip else module, context)

    def guarded_make_llir(self, src, metadata, options, capability):
        nonlocal skip
        if skip := _dies(lambda: make_llir(self, src, dict(metadata), options, capability)):
            kernel = re.search(r"tt\.func public @(\w+)", str(src))
            with log.open("a") as file:
                print(kernel[1] if kernel else "?", file=file)
        try:
            return make_llir(self, src, metadata, options, capability)
        finally:
            skip = False

    compiler.llvm.to_module = guarded_to_module
    compiler.CUDABackend.make_llir = guarded_make_llir
