# SPDX-License-Identifier: MIT OR Apache-2.0
"""Names, and what the package needs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import mlstm
from mlstm import jax as kernels
from mlstm.jax import chunkwise, parallel, recurrent


@pytest.mark.parametrize(
    "names, function",
    [
        (
            "chunkwise--triton_xl_chunk chunkwise--native_autograd",
            chunkwise.mlstm_chunkwise__xl_chunk,
        ),
        ("chunkwise--triton_limit_chunk", chunkwise.mlstm_chunkwise__limit_chunk),
        ("chunkwise--triton_xl_chunk_siging", chunkwise.mlstm_siging_chunkwise__xl_chunk),
        (
            "parallel--native_autograd parallel--native_custbw parallel--native_stablef_autograd "
            "parallel--native_stablef_custbw parallel--triton_limit_headdim",
            parallel.mlstm_parallel__limit_headdim,
        ),
        (
            "parallel--native_siging_autograd parallel--native_siging_custbw",
            parallel.mlstm_siging_parallel__limit_headdim,
        ),
    ],
)
def test_aliases(names, function):
    assert all(kernels.get_mlstm_kernel(name) is function for name in names.split())
    assert function in map(kernels.get_mlstm_kernel, kernels.get_available_mlstm_kernels())


def test_aliases_of_recurrent_kernels():
    sequence = kernels.get_mlstm_sequence_kernel("native_sequence__triton")
    assert sequence is recurrent.mlstm_recurrent_sequence
    for name in ("native", "triton"):
        assert kernels.get_mlstm_step_kernel(name) is recurrent.mlstm_recurrent_step


@pytest.mark.parametrize("package, other", [("jax", "torch"), ("torch", "jax")])
def test_each_package_without_the_other(package, other):
    code = f"import sys; sys.modules[{other!r}] = None; import mlstm.{package}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/", timeout=300)


def test_handlers_need_neither_python_nor_cuda():
    handlers = Path(mlstm.library_dir()) / "mlstm_xla.so"
    try:
        symbols = subprocess.run(
            ["nm", "-D", "--undefined-only", handlers], check=True, capture_output=True, text=True
        ).stdout
    except FileNotFoundError:
        pytest.skip("nm is not installed")
    names = [line.split()[-1] for line in symbols.splitlines()]
    assert not [name for name in names if re.match(r"_?Py|cu[A-Z]|cuda", name)]
    assert "mlstm_query" in names
