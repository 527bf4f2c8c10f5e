# SPDX-License-Identifier: MIT OR Apache-2.0
"""The distribution: names, version, wheel, and the same source compiled by PyTorch."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import mlstm
from mlstm import torch as kernels
from mlstm.torch import chunkwise, parallel, recurrent

ROOT = Path(__file__).resolve().parents[2]


def test_version_is_the_crates():
    crate = re.search(r'^version = "(.+)"', (ROOT / "Cargo.toml").read_text(), re.M)[1]
    header = (Path(mlstm.include_dir()) / "mlstm.h").read_text()
    parts = [
        re.search(rf"define MLSTM_VERSION_{part} (\d+)", header)[1]
        for part in ("MAJOR", "MINOR", "PATCH")
    ]
    assert mlstm.__version__ == crate == ".".join(parts)


def test_registry():
    assert kernels.get_available_mlstm_kernels() == [
        "chunkwise--xl_chunk",
        "chunkwise--limit_chunk",
        "chunkwise--xl_chunk_siging",
        "parallel--limit_headdim",
    ]
    assert kernels.get_available_mlstm_sequence_kernels() == ["recurrent_sequence"]
    assert kernels.get_available_mlstm_step_kernels() == ["step"]


@pytest.mark.parametrize(
    "alias, function",
    [
        ("chunkwise--triton_xl_chunk", chunkwise.mlstm_chunkwise__xl_chunk),
        ("chunkwise--triton_limit_chunk", chunkwise.mlstm_chunkwise__limit_chunk),
        ("chunkwise--triton_xl_chunk_siging", chunkwise.mlstm_siging_chunkwise__xl_chunk),
        ("parallel--triton_limit_headdim", parallel.mlstm_parallel__limit_headdim),
    ],
)
def test_aliases(alias, function):
    assert kernels.get_mlstm_kernel(alias) is function


def test_aliases_of_recurrent_kernels():
    sequence = kernels.get_mlstm_sequence_kernel("native_sequence__triton")
    assert sequence is recurrent.mlstm_recurrent_sequence
    assert kernels.get_mlstm_step_kernel("triton") is recurrent.mlstm_recurrent_step


@pytest.mark.parametrize("kind", ["mlstm", "mlstm_sequence", "mlstm_step"])
def test_unknown_kernel(kind):
    with pytest.raises(ValueError, match="'no--such' is unknown; there are "):
        getattr(kernels, f"get_{kind}_kernel")("no--such")


SMOKE = """
import torch
from mlstm.torch.chunkwise import mlstm_chunkwise__xl_chunk
x = [torch.ones(1, 1, 3, 4) for _ in range(3)] + [torch.zeros(1, 1, 3) for _ in range(2)]
x[0].requires_grad_()
h = mlstm_chunkwise__xl_chunk(*x)
h.sum().backward()
assert torch.allclose(h, torch.ones(1, 1, 3, 4)), h
print("works")
"""

JAX_SMOKE = """
import jax.numpy as jnp
from mlstm.jax.chunkwise import mlstm_chunkwise__xl_chunk
h = mlstm_chunkwise__xl_chunk(*[jnp.ones((1, 1, 3, 4))] * 3, *[jnp.zeros((1, 1, 3))] * 2)
assert jnp.allclose(h, 1), h
print("works")
"""


def run_python(code, **environment):
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
        cwd="/",
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.slow
def test_wheel(tmp_path):
    """It has everything, serves every Python 3, and needs no compiler where it is used."""
    pytest.importorskip("setuptools", minversion="77")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "."]
        + ["-w", str(tmp_path)],
        cwd=ROOT,
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert re.fullmatch(rf"mlstm-{mlstm.__version__}-py3-none-linux_\w+\.whl", wheel.name)
    target = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    for name in ("libmlstm.so.0", "mlstm_torch.so", "mlstm_xla.so", "include/mlstm.h"):
        assert (target / "mlstm/_lib" / name).exists()
    check = f"import mlstm; assert mlstm.__file__.startswith({str(target)!r}), mlstm.__file__\n"
    for smoke in (SMOKE, JAX_SMOKE):
        assert run_python(check + smoke, PYTHONPATH=str(target), PATH="/none") == "works"


# How a program compiles the operators by itself, against an installed libmlstm.
COMPILE = """
import mlstm
from torch.utils.cpp_extension import load
lib = mlstm.library_dir()
load(
    name="mlstm_torch",
    sources=["SOURCE"],
    extra_include_paths=[mlstm.include_dir()],
    extra_ldflags=[f"-L{lib}", "-l:libmlstm.so.0", f"-Wl,-rpath,{lib}"],
    build_directory="BUILD",
    is_python_module=False,
)
import mlstm.torch  # uses the operators that are there
maps = open("/proc/self/maps").read()
assert "BUILD/mlstm_torch.so" in maps and "_lib/mlstm_torch.so" not in maps
"""


@pytest.mark.slow
def test_cpp_extension_load(tmp_path):
    pytest.importorskip("ninja")
    source = str(ROOT / "bindings/torch/ops.cpp")
    code = COMPILE.replace("SOURCE", source).replace("BUILD", str(tmp_path))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    assert run_python(code + SMOKE, PATH=path).endswith("works")


def test_missing_library(tmp_path):
    """A source tree that was not built says what to do."""
    package = tmp_path / "mlstm"
    package.mkdir()
    for name in ("__init__.py", "_library.py"):
        (package / name).write_text((Path(mlstm.__file__).parent / name).read_text())
    result = subprocess.run(
        [sys.executable, "-c", "import mlstm"], cwd=tmp_path, capture_output=True, text=True
    )
    assert "run `cargo build --release`" in result.stderr


def test_extension_uses_nothing_but_the_stable_abi():
    """No symbol of libtorch's C++ interface, which changes from release to release."""
    extension = Path(mlstm.library_dir()) / "mlstm_torch.so"
    try:
        symbols = subprocess.run(
            ["nm", "-D", "--undefined-only", extension], check=True, capture_output=True, text=True
        ).stdout
    except FileNotFoundError:
        pytest.skip("nm is not installed")
    names = [line.split()[-1] for line in symbols.splitlines()]
    assert not [name for name in names if re.search(r"c10|_ZN2at|_ZN5torch", name)]
    assert any(name.startswith("aoti_torch_") for name in names), torch.__version__
